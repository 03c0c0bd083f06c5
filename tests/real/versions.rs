//! Every pair of the three QEMUs, the newest of Debian's suites among them, with a machine type that all of them
//! know: `make versions`. What is proved of a move between two of them is what tests/real/moves.rs proves.

mod newest;

use anyhow::{Context, Result, ensure};

use crate::disks::thin;
use crate::faults::Plan;
use crate::moves::{VM, migrate};
use crate::retry::{CALM, only_what_changed_is_copied_again};
use crate::support::pair::Pair;
use crate::support::proof;
use crate::support::{DiskFormat, Version, VmSpec, Way, with_lab};

const MIB: u64 = 1 << 20;
/// What a move of this guest sends at most: twice its RAM, and its disks' contents.
const SENT_MOST: u64 = 300 * MIB;

fn moves(name: &str, from: Version, to: Version) -> Result<()> {
    with_lab(name, |lab| {
        let spec = |version| VmSpec { rate: 200, blocks: 512, ..VmSpec::new(VM, version) };
        // Both disks change their format on the way.
        let on_bravo = VmSpec { disks: vec![DiskFormat::Qcow2, DiskFormat::Raw], ..spec(to) };
        let (pair, guest) = Pair::with_guest(lab, &spec(from), &on_bravo)?;
        guest.alpha.wait_more(100)?;
        let before = pair.net.alpha.sent_bytes()?;
        let last = migrate(&pair, VM, Way::ToBravo, &["--verify"])?;
        let sent = pair.net.alpha.sent_bytes()? - before;
        ensure!(sent <= SENT_MOST, "{sent} bytes were sent, at most {SENT_MOST}");
        pair.proves_move(&guest, Way::ToBravo)?;
        let compared = |name: &str| last["comparison"][name].as_u64().with_context(|| format!("{last}"));
        ensure!(compared("different_bytes")? == 0, "{last}");
        ensure!(compared("equal_bytes")? >= compared("of_bytes")? / 2, "{last}");
        let state = guest.bravo.qmp()?.status()?;
        ensure!(state == "running", "the guest is {state} on bravo");
        // QEMU 7.2 loses RAM of its own while it sends (tests/real/moves.rs).
        if from != Version::V72 {
            proof::guest_continued(&guest.alpha, &guest.bravo)?;
            guest.bravo.quit()?;
            proof::disks_whole(&guest.bravo)?;
        }
        Ok(())
    })
}

macro_rules! pairs {
    ($($name:ident: $from:ident to $to:ident;)*) => {$(
        #[test]
        #[ignore = "make versions"]
        fn $name() -> Result<()> {
            moves(stringify!($name), Version::$from, Version::$to)
        }
    )*};
}

pairs! {
    qemu_7_2_to_11: V72 to V11;
    qemu_10_to_11: V10 to V11;
    qemu_10_to_7_2: V10 to V72;
    qemu_11_to_7_2: V11 to V72;
    qemu_11_to_10: V11 to V10;
    qemu_11_to_11: V11 to V11;
}

/// QEMU 11 is told that the images read as zeroes.
#[test]
#[ignore = "make versions"]
fn what_is_thin_stays_thin_from_qemu_11_to_7_2() -> Result<()> {
    thin::between("what_is_thin_stays_thin_from_qemu_11_to_7_2", Version::V11, Version::V72)
}

#[test]
#[ignore = "make versions"]
fn what_is_thin_stays_thin_from_qemu_11_to_11() -> Result<()> {
    thin::between("what_is_thin_stays_thin_from_qemu_11_to_11", Version::V11, Version::V11)
}

#[test]
#[ignore = "make versions"]
fn what_is_thin_stays_thin_from_qemu_10_to_11() -> Result<()> {
    thin::between("what_is_thin_stays_thin_from_qemu_10_to_11", Version::V10, Version::V11)
}

#[test]
#[ignore = "make versions"]
fn only_what_changed_is_copied_again_from_qemu_11_to_10() -> Result<()> {
    let plan = Plan { version: Version::V11, to: Some(Version::V10), ..CALM };
    only_what_changed_is_copied_again(plan, "only_what_changed_is_copied_again_from_qemu_11_to_10")
}

#[test]
#[ignore = "make versions"]
fn only_what_changed_is_copied_again_from_qemu_10_to_11() -> Result<()> {
    let plan = Plan { to: Some(Version::V11), ..CALM };
    only_what_changed_is_copied_again(plan, "only_what_changed_is_copied_again_from_qemu_10_to_11")
}
