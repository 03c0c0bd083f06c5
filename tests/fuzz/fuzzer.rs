//! libFuzzer's side of the targets: which one is run says `VMFERRY_FUZZ`.

#![no_main]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failure here is a finding")]

mod targets;

use std::sync::LazyLock;

static TARGET: LazyLock<fn(&[u8])> = LazyLock::new(|| {
    let name = std::env::var("VMFERRY_FUZZ").unwrap_or_default();
    let found = targets::TARGETS.iter().find(|(known, _)| *known == name);
    found.unwrap_or_else(|| panic!("VMFERRY_FUZZ={name}: no such target")).1
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| TARGET(data));
