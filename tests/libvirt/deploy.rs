//! What `deploy/` has for libvirt's hosts, judged by the programs that will read it. This kernel has no
//! AppArmor, so its rule is parsed and not loaded.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::support::process::{SHORT, run_any};
use crate::support::with_lab;

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy")
}

/// Whether Debian's parser takes a profile with that rule in it.
fn parses(root: &Path, rule: &str) -> Result<bool> {
    let mut command = Command::new("chroot");
    command.arg(root).args([
        "/sbin/apparmor_parser",
        "--skip-kernel-load",
        "--skip-cache",
        "--skip-read-cache",
    ]);
    command.env("LC_ALL", "C").stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().context("cannot start apparmor_parser")?;
    let profile = format!("profile libvirt-test {{\n{rule}\n}}\n");
    child.stdin.take().context("it reads nothing")?.write_all(profile.as_bytes())?;
    Ok(child.wait()?.success())
}

#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn apparmors_parser_takes_the_rule() -> Result<()> {
    with_lab("apparmors_parser_takes_the_rule", |lab| {
        let root = lab.paths.libvirt("libvirt11")?.join("libvirt11");
        let rule = fs::read_to_string(deploy().join("apparmor.d/libvirt-qemu"))?;
        ensure!(parses(&root, &rule)?, "it is refused");
        ensure!(!parses(&root, &rule.replace("rwk", "rwz"))?, "the parser takes anything");
        Ok(())
    })
}

/// What systemd says of the unit with one of its drop-ins, in a root of its own.
fn verified(root: &Path, drop_in: &str) -> Result<String> {
    let units = root.join("usr/lib/systemd/system");
    let folder = units.join("vmferry.service.d");
    fs::create_dir_all(&folder)?;
    for unit in ["vmferry.service", "vmferry-drain.service"] {
        fs::copy(deploy().join(unit), units.join(unit))?;
    }
    fs::write(folder.join("test.conf"), drop_in)?;
    for program in ["usr/bin/vmferry", "bin/kill", "bin/true", "bin/sh"] {
        let file = root.join(program);
        fs::create_dir_all(file.parent().context("a program without a folder")?)?;
        fs::write(&file, "")?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
    }
    // The targets that every unit has.
    for entry in fs::read_dir("/usr/lib/systemd/system")?.flatten() {
        let name = entry.file_name();
        let is_wanted = [".target", ".slice"].iter().any(|end| name.to_string_lossy().ends_with(end));
        if is_wanted && entry.file_type()?.is_file() {
            fs::copy(entry.path(), units.join(name))?;
        }
    }
    let mut command = Command::new("systemd-analyze");
    command.args(["verify", "--man=no"]).arg(format!("--root={}", root.display()));
    command.args(["vmferry.service", "vmferry-drain.service"]);
    let outcome = run_any(&mut command, SHORT)?;
    Ok(outcome.stderr + &outcome.stdout)
}

/// An unknown key is only said, and no error to it.
#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn systemd_has_nothing_to_say_of_the_drop_ins() -> Result<()> {
    with_lab("systemd_has_nothing_to_say_of_the_drop_ins", |lab| {
        let mut count = 0;
        for entry in fs::read_dir(deploy().join("vmferry.service.d"))?.flatten() {
            let root = lab.dir().join(format!("root-{count}"));
            let said = verified(&root, &fs::read_to_string(entry.path())?)?;
            ensure!(said.trim().is_empty(), "{}: {said}", entry.path().display());
            count += 1;
        }
        ensure!(count >= 3, "only {count} drop-ins");
        let said = verified(&lab.dir().join("root-wrong"), "[Service]\nSuplementaryGroups=libvirt\n")?;
        ensure!(said.contains("SuplementaryGroups"), "it takes anything: {said}");
        Ok(())
    })
}
