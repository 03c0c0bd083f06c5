//! A guest of another architecture: Arm's `virt` machine, whose flash has names and places of its own. No system is on
//! it; its processor waits in the firmware's first instruction.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Result, ensure};
use serde_json::json;

use super::Stage;
use super::machine::{Arch, Machine, Place, blockdev, device, raw};
use crate::support::{Version, with_lab};

/// As large as `virt` wants each of both to be.
const FLASH_BYTES: u64 = 64 << 20;
/// Where the guest sees its variables.
const VARIABLES_AT: u64 = FLASH_BYTES;
const SOME: usize = 4096;
/// `wfi`, and back to it.
const WAIT: [u8; 8] = [0x7f, 0x20, 0x03, 0xd5, 0xff, 0xff, 0xff, 0x17];

fn flash(file: &Path, begin: &[u8]) -> Result<()> {
    let file = File::create(file)?;
    file.set_len(FLASH_BYTES)?;
    Ok(file.write_all_at(begin, 0)?)
}

fn words(place: &Place, variables: &[u8]) -> Result<Vec<String>> {
    let (code, ours) = (place.file("code.fd"), place.file("vars.fd"));
    flash(&code, &WAIT)?;
    flash(&ours, variables)?;
    let drive = |unit: usize, file: &Path, more: &str| {
        ["-drive".to_owned(), format!("if=pflash,unit={unit},format=raw,file={}{more}", file.display())]
    };
    let disk = blockdev(&raw("n0", &place.image("raw", "", "0.raw")?));
    let disk = [disk, device("virtio-blk-pci,id=disk0,addr=5,drive=n0")].concat();
    Ok([drive(0, &code, ",readonly=on"), drive(1, &ours, "")].concat().into_iter().chain(disk).collect())
}

fn seen(machine: &Machine) -> Result<String> {
    let look = json!({"command-line": format!("xp /64xb {VARIABLES_AT:#x}")});
    let told = machine.qmp()?.execute("human-monitor-command", look)?;
    Ok(told.as_str().unwrap_or_default().to_owned())
}

#[test]
#[ignore = "make disks"]
fn an_arm_guest_arrives_with_its_disk_and_its_flash() -> Result<()> {
    arrives("an_arm_guest_arrives_with_its_disk_and_its_flash", Version::V10)
}

#[test]
#[ignore = "make disks"]
fn an_arm_guest_arrives_with_its_disk_and_its_flash_on_qemu_7_2() -> Result<()> {
    arrives("an_arm_guest_arrives_with_its_disk_and_its_flash_on_qemu_7_2", Version::V72)
}

pub(crate) fn arrives(name: &str, version: Version) -> Result<()> {
    with_lab(name, |lab| {
        let stage = Stage::set_up(lab, &["arm"])?;
        let places = stage.places(lab, "arm", version)?;
        let [source, target] = places.map(|place| Place { arch: Arch::Arm, ..place });
        let variables: Vec<u8> = (0..SOME).map(|at| (at % 251) as u8 | 1).collect();
        let words_there = words(&target, &[0; SOME])?;
        let words_here = words(&source, &variables)?;
        let image = format!("driver=raw,file.driver=file,file.filename={}", source.file("0.raw").display());
        source.io(&image, "write -P 77 1M 1M")?;
        let (from, to) = (source.start(&words_here, false)?, target.start(&words_there, true)?);
        let (code, found) = stage.check("arm", &[])?;
        ensure!(code == 0, "{found:?}");
        let before = seen(&from)?;
        ensure!(before.contains("0x01") && seen(&to)? != before, "{before}");
        let (code, last) = stage.migrate("arm", &["--keep-source", "--verify"])?;
        ensure!(code == 0 && last["outcome"] == json!({"result": "moved", "leftovers": []}), "{last}");
        ensure!(seen(&to)? == before, "{} is not {before}", seen(&to)?);
        to.qmp()?.query("cont")?;
        ensure!(to.qmp()?.status()? == "running");
        from.quit()?;
        to.quit()?;
        for (file, what) in [("vars.fd", "the variables"), ("0.raw", "the disk")] {
            let [ours, theirs] = [&source, &target].map(|place| fs::read(place.file(file)));
            let ours = ours?;
            ensure!(ours == theirs? && ours.iter().any(|byte| *byte != 0), "{what} did not arrive");
        }
        Ok(())
    })
}
