//! `--verify`: what is not the same at the destination is found before the guest is there.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::Stage;
use super::machine::{blockdev, device, raw};
use crate::support::process::{LONG, wait_for};
use crate::support::{Version, with_lab};

const AT: u64 = (2 << 20) + 70_000;
const UNIT: u64 = 64 << 10;

/// Flips one bit of an image, behind its QEMU's back.
fn flip(image: &Path) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(image)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, AT)?;
    file.write_all_at(&[byte[0] ^ 1], AT)?;
    Ok(())
}

#[test]
fn one_flipped_bit_stops_a_migration() -> Result<()> {
    with_lab("one_flipped_bit_stops_a_migration", |lab| {
        let stage = Stage::set_up(lab, &["checked"])?;
        let [source, target] = stage.places(lab, "checked", Version::V10)?;
        let mut words = [Vec::new(), Vec::new()];
        for (number, kib) in [(0, 64), (1, 3072)] {
            for (place, words) in [&source, &target].into_iter().zip(&mut words) {
                let file = place.image("raw", "", &format!("{number}.raw"))?;
                words.extend(blockdev(&raw(&format!("n{number}"), &file)));
                let more = format!("virtio-blk-pci,id=disk{number},addr={},drive=n{number}", number + 5);
                words.extend(device(&more));
            }
            let data = format!("write -P {} 512k {kib}k", number + 1);
            source.io(
                &format!("driver=raw,file.filename={}", source.file(&format!("{number}.raw")).display()),
                &data,
            )?;
        }
        let at_source = source.start(&words[0], false)?;
        let at_target = target.start(&words[1], true)?;
        let (code, found) = stage.check("checked", &["--verify"])?;
        ensure!(code == 0, "{found:?}");

        // The first disk is in step while the second is still copied.
        let order = ["--disk", "disk0", "--disk", "disk1", "--disks-at-once", "1"];
        let slow =
            [&["migrate", "checked", "--to", "bravo", "--json", "--verify", "--limit", "256K"], &order[..]]
                .concat();
        let running = stage.alpha.vmferry_start(&slow)?;
        wait_for("the first disk to be in step", LONG, || {
            let status = stage.alpha.vmferry(&["status", "checked", "--json"])?;
            let status: Value = serde_json::from_str(&status.stdout).unwrap_or_default();
            let disks = &status["migration"]["disks"];
            Ok((disks[0]["ready"] == true && disks[1]["ready"] == false).then_some(()))
        })?;
        flip(&target.file("0.raw"))?;
        let lifted = stage.alpha.vmferry(&["limit", "checked", "--rate", "none"])?;
        ensure!(lifted.code == 0, "{lifted:?}");
        let outcome = running.wait(LONG)?;
        let last: Value = serde_json::from_str(outcome.stdout.lines().last().context("no line")?)?;
        let cause = last["outcome"]["cause"].as_str().unwrap_or_default();
        let first = AT / UNIT * UNIT;
        let range = format!("bytes {first} to {} differ", first + UNIT - 1);
        ensure!(outcome.code == 1 && cause.contains("disk disk0") && cause.contains(&range), "{last}");
        ensure!(last["comparison"]["different_bytes"] == UNIT, "{last}");
        ensure!(last["outcome"]["leftovers"] == json!([]), "{last}");
        ensure!(at_source.qmp()?.status()? == "paused" && at_target.qmp()?.status()? == "inmigrate");

        // The copy makes it equal again.
        let (code, last) = stage.migrate("checked", &["--verify"])?;
        ensure!(code == 0, "{last}");
        let all = 8 << 20;
        ensure!(
            last["comparison"]["equal_bytes"] == all && last["comparison"]["written_bytes"] == 0,
            "{last}"
        );
        at_source.quit()?;
        at_target.quit()
    })
}
