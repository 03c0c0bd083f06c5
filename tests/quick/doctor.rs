//! `vmferry doctor`, on a host made of folders.

use std::fs::{Permissions, set_permissions};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::forward::agents::Ground;

const VMFERRY: &str = env!("CARGO_BIN_EXE_vmferry");

/// Exit code and findings of the host in `folder`.
pub(crate) fn look(folder: &Path) -> (i32, Vec<Value>) {
    let mut doctor = Command::new(VMFERRY);
    doctor.arg("--socket").arg(folder.join("run/vmferry.sock"));
    let done =
        doctor.args(["doctor", "--json", "--config"]).arg(folder.join("vmferry.toml")).output().unwrap();
    let report: Value = serde_json::from_slice(&done.stdout).unwrap_or_else(|e| panic!("{e}: {done:?}"));
    (done.status.code().unwrap(), report["findings"].as_array().unwrap().clone())
}

/// The state of what was looked at, by the beginning of its name.
pub(crate) fn state<'f>(findings: &'f [Value], what: &str) -> &'f str {
    let is_it = |f: &&Value| f["what"].as_str().unwrap().starts_with(what);
    let found = findings.iter().find(is_it).unwrap_or_else(|| panic!("no {what} in {findings:?}"));
    found["state"].as_str().unwrap()
}

#[test]
fn a_host_is_looked_at_and_what_cannot_be_seen_is_not_called_good() {
    let ground = Ground::new();
    let more = format!("[vm.web1]\nqmp = '{}'\n", ground.path("nobody.qmp").display());
    let bravo = ground.bravo(&more);
    let folder = ground.path("bravo");
    let (code, findings) = look(&folder);
    assert_eq!(code, 0, "{findings:?}");
    for (what, expected) in [
        ("agent", "ok"),
        ("configuration", "ok"),
        ("identity", "ok"),
        ("this host's certificate", "ok"),
        ("revocation", "warning"),
        ("key", "ok"),
        ("state folder", "ok"),
        ("socket", "ok"),
        ("port", "ok"),
        ("monitor of web1", "unknown"),
        ("QEMU of web1", "unknown"),
        ("kernel: pidfd", "ok"),
        ("the way to peers", "unknown"),
    ] {
        assert_eq!(state(&findings, what), expected, "{what}: {findings:?}");
    }
    let without_remedy = findings.iter().filter(|f| f["state"] != "ok" && f["remedy"].is_null());
    assert_eq!(without_remedy.count(), 0, "{findings:?}");

    // Without an agent: the port is somebody else's, the key everybody's.
    drop(bravo);
    let _other = TcpListener::bind(ground.bravo).unwrap();
    set_permissions(ground.path("pki/hosts/bravo/key.pem"), Permissions::from_mode(0o644)).unwrap();
    let (code, findings) = look(&folder);
    assert_eq!(code, 1);
    for (what, expected) in
        [("agent", "warning"), ("key", "failed"), ("port", "failed"), ("descriptors of the agent", "unknown")]
    {
        assert_eq!(state(&findings, what), expected, "{what}: {findings:?}");
    }

    std::fs::write(folder.join("vmferry.toml"), "listen = 7\n").unwrap();
    let (code, findings) = look(&folder);
    assert_eq!((code, state(&findings, "configuration")), (1, "failed"));
    assert!(!findings.iter().any(|f| f["what"] == "identity"), "what could not be read is not judged");
}
