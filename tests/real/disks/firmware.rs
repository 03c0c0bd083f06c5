//! What is beside the disks: the firmware's variables and a TPM's state arrive with the guest, by QEMU's own
//! doing. No system is on these machines; the processor halts at its first instruction.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use serde_json::json;

use super::machine::{Machine, Place, blockdev, device, raw};
use super::tpm::Tpm;
use super::{Stage, tells};
use crate::support::{Lab, Version, with_lab};

const CODE_BYTES: usize = 256 << 10;
const VARIABLES_BYTES: usize = 128 << 10;
/// `hlt`.
const HALT: u8 = 0xf4;
const INDEX: &[u8; 16] = b"vmferry-nv-index";

/// What a firmware would keep: no two blocks of it are alike, and none is of zeroes.
fn variables() -> Vec<u8> {
    (0..VARIABLES_BYTES).map(|at| (at % 251) as u8 ^ (at >> 12) as u8 | 1).collect()
}

/// Words for flash of these bytes and a disk.
fn with_flash(place: &Place, variables: &[u8]) -> Result<Vec<String>> {
    let flash = |unit: usize, name: &str, bytes: &[u8], more: &str| -> Result<[String; 2]> {
        let file = place.file(name);
        fs::write(&file, bytes)?;
        Ok(["-drive".into(), format!("if=pflash,unit={unit},format=raw,file={}{more}", file.display())])
    };
    let code = flash(0, "code.fd", &[HALT; CODE_BYTES], ",readonly=on")?;
    let variables = flash(1, "vars.fd", variables, "")?;
    let disk = blockdev(&raw("n0", &place.image("raw", "", "0.raw")?));
    Ok([code, variables, disk, device("virtio-blk-pci,id=disk0,addr=5,drive=n0")].concat())
}

/// What the guest sees at the beginning of its variables.
fn seen(machine: &Machine) -> Result<String> {
    let at = (1_u64 << 32) - (CODE_BYTES + VARIABLES_BYTES) as u64;
    let told = machine
        .qmp()?
        .execute("human-monitor-command", json!({"command-line": format!("xp /64xb {at:#x}")}))?;
    Ok(told.as_str().unwrap_or_default().to_owned())
}

fn variables_arrive(stage: &Stage, lab: &Lab, version: Version) -> Result<()> {
    let [source, target] = stage.places(lab, "flash", version)?;
    let at_source = source.start(&with_flash(&source, &variables())?, false)?;
    let smaller = target.start(&with_flash(&target, &[0; VARIABLES_BYTES / 2])?, true)?;
    let (code, found) = stage.check("flash", &[])?;
    ensure!(code == 1, "a store of another size was let through: {found:?}");
    tells(&found, "memory", "problem", &["flash"])?;
    smaller.quit()?;

    let at_target = target.start(&with_flash(&target, &[0; VARIABLES_BYTES])?, true)?;
    let (code, found) = stage.check("flash", &[])?;
    ensure!(code == 0, "{found:?}");
    let before = seen(&at_source)?;
    ensure!(before.contains("0x01") && seen(&at_target)? != before, "{before}");
    let (code, last) = stage.migrate("flash", &["--keep-source", "--verify"])?;
    ensure!(code == 0 && last["outcome"] == json!({"result": "moved", "leftovers": []}), "{last}");
    ensure!(seen(&at_target)? == before, "{} is not {before}", seen(&at_target)?);
    // QEMU writes them when the guest goes on.
    let written = || -> Result<Vec<u8>> { Ok(fs::read(target.file("vars.fd"))?) };
    ensure!(at_target.qmp()?.status()? == "paused" && written()? == [0; VARIABLES_BYTES]);
    at_target.qmp()?.query("cont")?;
    ensure!(at_target.qmp()?.status()? == "running");
    at_source.quit()?;
    at_target.quit()?;
    let ours = fs::read(source.file("vars.fd"))?;
    ensure!(ours == variables() && written()? == ours, "the variables are not in the destination's file");
    Ok(())
}

/// Words for a TPM and a disk.
fn with_tpm(place: &Place, tpm: &Tpm) -> Result<Vec<String>> {
    let chardev = format!("socket,id=tpm,path={}", tpm.control().display());
    let words =
        ["-chardev", &chardev, "-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm0"];
    let disk = blockdev(&raw("n0", &place.image("raw", "", "0.raw")?));
    let disk = [disk, device("virtio-blk-pci,id=disk0,addr=5,drive=n0")].concat();
    Ok(words.iter().map(|word| (*word).to_owned()).chain(disk).collect())
}

fn is_empty(folder: &Path) -> Result<bool> {
    Ok(fs::read_dir(folder)?.flatten().all(|entry| !entry.file_name().to_string_lossy().ends_with("permall")))
}

fn a_tpm_arrives(stage: &Stage, lab: &Lab, version: Version) -> Result<()> {
    let [source, target] = stage.places(lab, "tpm", version)?;
    let [ours, theirs] = [source.file("tpm"), target.file("tpm")];
    fs::create_dir(&ours)?;
    fs::create_dir(&theirs)?;
    Tpm::write(&source.host, &ours, INDEX)?;
    let (at_source, at_target) = (Tpm::serve(&source.host, &ours)?, Tpm::serve(&target.host, &theirs)?);
    let from = source.start(&with_tpm(&source, &at_source)?, false)?;
    let to = target.start(&with_tpm(&target, &at_target)?, true)?;
    let (code, found) = stage.check("tpm", &[])?;
    ensure!(code == 0, "{found:?}");
    let (code, last) = stage.migrate("tpm", &[])?;
    ensure!(code == 0 && last["outcome"] == json!({"result": "moved", "leftovers": []}), "{last}");
    ensure!(to.qmp()?.status()? == "paused");
    from.quit()?;
    to.quit()?;
    drop((at_source, at_target));
    ensure!(!is_empty(&theirs)?, "the destination's emulator has kept nothing");
    ensure!(Tpm::read(&target.host, &theirs)? == INDEX, "another TPM has arrived");
    Ok(())
}

pub(crate) fn arrive(version: Version, name: &str) -> Result<()> {
    with_lab(name, |lab| {
        let stage = Stage::set_up(lab, &["flash", "tpm"])?;
        variables_arrive(&stage, lab, version)?;
        a_tpm_arrives(&stage, lab, version)
    })
}

#[test]
#[ignore = "make disks"]
fn firmware_variables_and_a_tpm_arrive_on_qemu_10() -> Result<()> {
    arrive(Version::V10, "firmware_variables_and_a_tpm_arrive_on_qemu_10")
}

#[test]
#[ignore = "make disks"]
fn firmware_variables_and_a_tpm_arrive_on_qemu_7_2() -> Result<()> {
    arrive(Version::V72, "firmware_variables_and_a_tpm_arrive_on_qemu_7_2")
}
