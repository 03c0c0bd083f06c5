//! Disks that a host encrypts below QEMU, or may encrypt: a file system that does (fscrypt, with the kernel's own key for
//! tests), an overlay, which does not tell, and a device that does not. The agents see what QEMU has open, or, as another
//! user, have no more than the paths that QEMU names.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::machine::{DISK_BYTES, Machine, Place, blockdev, device, raw};
use super::refused::words;
use super::{Stage, moves, tells};
use crate::support::volume::Volume;
use crate::support::{Lab, Net, Version, with_lab};

/// Where images lie, in each host's folder.
const PLAIN: &str = "plain";
const ENCRYPTING: &str = "encrypting";
const OVERLAY: &str = "overlay";
const IN_USE: &str = "in-use";
const NAMES: [&str; 5] = ["clear", "unknown", "bared", "kept", "busy"];
const VOLUME_MIB: u64 = 16;
/// A user that every host has a name for, and none of the QEMUs'.
const NOBODY: u32 = 65_534;

/// Folders of both hosts with file systems of their own.
struct Volumes {
    _mounted: Vec<Volume>,
    encrypts: bool,
}

impl Volumes {
    fn mount(net: &Net) -> Result<Self> {
        let mut mounted = Vec::new();
        for host in [&net.alpha, &net.bravo] {
            mounted.push(Volume::memory(&host.dir.join(PLAIN), VOLUME_MIB)?);
            mounted.extend(Volume::overlay(&host.dir.join(OVERLAY), VOLUME_MIB)?);
            mounted.push(Volume::mount(&host.dir.join(IN_USE), DISK_BYTES >> 20)?);
            mounted.extend(Volume::encrypting(&host.dir.join(ENCRYPTING), VOLUME_MIB)?);
        }
        let encrypts = mounted.len() == 10;
        if !encrypts {
            eprintln!("  fscrypt: not here");
        }
        Ok(Self { _mounted: mounted, encrypts })
    }
}

/// Starts a QEMU of one disk on this file.
fn start(place: &Place, file: &Path, incoming: bool) -> Result<Machine> {
    let device = device("virtio-blk-pci,id=disk0,addr=5,drive=vda");
    let machine = place.start(&words([blockdev(&raw("vda", file)), device]), incoming)?;
    // Whoever the agent is.
    fs::set_permissions(place.file("agent.qmp"), Permissions::from_mode(0o777))?;
    Ok(machine)
}

/// Starts the two QEMUs of this name, each on a new image in one of its host's folders.
fn both(stage: &Stage, lab: &Lab, name: &str, folders: [&str; 2]) -> Result<[Machine; 2]> {
    let on = |place: &Place, folder: &str, incoming| {
        let folder = place.host.dir.join(folder);
        fs::create_dir_all(&folder)?;
        let file = folder.join(format!("{name}.raw"));
        File::create(&file)?.set_len(DISK_BYTES)?;
        start(place, &file, incoming)
    };
    let [source, target] = stage.places(lab, name, Version::V10)?;
    Ok([on(&source, folders[0], false)?, on(&target, folders[1], true)?])
}

fn is_silent(found: &[Value]) -> Result<()> {
    ensure!(found.iter().all(|p| p["kind"] != "disk-format"), "{found:?}");
    Ok(())
}

/// What is found on each pair of folders, whoever the agents are.
fn judges(stage: &Stage, lab: &Lab, encrypts: bool, by_paths: bool) -> Result<()> {
    let _clear = both(stage, lab, "clear", [PLAIN, PLAIN])?;
    let (code, found) = stage.check("clear", &["--strict"])?;
    ensure!(code == 0, "{found:?}");
    is_silent(&found)?;
    if by_paths {
        tells(&found, "not-seen", "note", &["disk0: whether both hosts use the same storage is not known"])?;
    }

    let [at_source, at_target] = both(stage, lab, "unknown", [OVERLAY, PLAIN])?;
    let (code, found) = stage.check("unknown", &[])?;
    let said = ["disk0", "whether the source's host encrypts it is not known"];
    tells(&found, "disk-format", "warning", &said)?;
    ensure!(code == 0, "{found:?}");
    let (code, found) = stage.check("unknown", &["--strict"])?;
    tells(&found, "disk-format", "problem", &said)?;
    ensure!(code == 1, "{found:?}");
    let last = moves(stage, "unknown", at_source, at_target, &[])?;
    ensure!(last["notes"].to_string().contains(said[1]), "{last}");

    if !encrypts {
        return Ok(());
    }
    let _kept = both(stage, lab, "kept", [ENCRYPTING, ENCRYPTING])?;
    let (code, found) = stage.check("kept", &[])?;
    ensure!(code == 0, "{found:?}");
    is_silent(&found)?;

    let [at_source, at_target] = both(stage, lab, "bared", [ENCRYPTING, PLAIN])?;
    let said = ["disk0", "the source's host encrypts", "would lie in clear", "bared.raw"];
    let (code, found) = stage.check("bared", &[])?;
    tells(&found, "disk-format", "problem", &said)?;
    ensure!(code == 1, "{found:?}");
    let (code, last) = stage.migrate("bared", &[])?;
    ensure!(code == 1 && last["outcome"]["result"] == "failed", "{last}");
    let told = last["outcome"]["problems"].as_array().context("no problems")?;
    tells(told, "disk-format", "problem", &said)?;
    moves(stage, "bared", at_source, at_target, &["--accept", "disk-format"]).map(drop)
}

#[test]
fn what_a_host_encrypts_or_may_encrypt_does_not_land_in_clear_unsaid() -> Result<()> {
    with_lab("what_a_host_encrypts_or_may_encrypt_does_not_land_in_clear_unsaid", |lab| {
        let net = lab.two_hosts()?;
        let volumes = Volumes::mount(&net)?;
        let stage = Stage::begin(lab, net, &NAMES, None, None)?;
        judges(&stage, lab, volumes.encrypts, false)
    })
}

/// As in the hardened unit of `deploy/`.
#[test]
fn agents_of_another_user_tell_by_the_paths_that_qemu_names() -> Result<()> {
    with_lab("agents_of_another_user_tell_by_the_paths_that_qemu_names", |lab| {
        let net = lab.two_hosts()?;
        let volumes = Volumes::mount(&net)?;
        let stage = Stage::begin(lab, net, &NAMES, None, Some(NOBODY))?;
        judges(&stage, lab, volumes.encrypts, true)?;

        let [source, target] = stage.places(lab, "busy", Version::V10)?;
        let own = source.image("raw", "", "disk0.raw")?;
        let in_use = target.host.dir.join(IN_USE).with_extension("volume");
        let _both = [start(&source, &own, false)?, start(&target, &in_use, true)?];
        let (code, found) = stage.check("busy", &[])?;
        tells(&found, "disk-in-use", "problem", &["disk0", "mounted there at"])?;
        ensure!(code == 1, "{found:?}");
        Ok(())
    })
}
