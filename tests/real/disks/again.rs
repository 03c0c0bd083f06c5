//! What is remembered of an image in several files, from one try of a migration to the next.

use std::io::Write;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::Stage;
use super::machine::{Machine, Place, blockdev, device, file_node};
use crate::faults::Migration;
use crate::support::process::{LONG, wait_for};
use crate::support::{Agent, Version, with_lab};

/// Of RAM that takes a while to cross.
const MEMORY_MIB: usize = 64;
const ALL: &str = "write -P 90 0 4M";
const READ_ALL: &str = "read -P 90 0 4M";

fn words(place: &Place) -> Result<(Vec<String>, String)> {
    let options = format!("data_file={}", place.file("data").display());
    let image = place.image("qcow2", &options, "disk0.qcow2")?;
    let mut ram = std::fs::File::create(place.file("ram"))?;
    // Nothing of it is a page of zeroes.
    (0..MEMORY_MIB << 8)
        .try_for_each(|page| ram.write_all(&[u8::try_from(page % 251)? + 1; 4096]).context("ram"))?;
    let node = json!({"driver": "qcow2", "node-name": "vda", "file": file_node(&image)});
    let memory = format!(
        "memory-backend-file,id=mem,size={MEMORY_MIB}M,share=off,mem-path={}",
        place.file("ram").display()
    );
    let parts = [
        ["-object".to_owned(), memory],
        ["-machine".to_owned(), "memory-backend=mem".to_owned()],
        blockdev(&node),
        device("virtio-blk-pci,id=disk0,drive=vda"),
    ];
    Ok((parts.into_iter().flatten().collect(), format!("driver=qcow2,file.filename={}", image.display())))
}

fn at_try(agent: &Agent, migration: &Migration, number: u64, phase: &str) -> Result<Value> {
    wait_for(&format!("try {number} in {phase}"), LONG, || {
        let now = migration.now(agent)?;
        ensure!(now["outcome"].is_null(), "it ended: {now}");
        Ok((now["tries"]["number"] == number && now["phase"] == phase).then_some(now))
    })
}

/// The destination's QEMU dies with the disk whole there; then somebody writes to its data file, and
/// not to the image that names it.
#[test]
fn a_data_file_that_was_changed_between_tries_is_copied_as_a_whole() -> Result<()> {
    with_lab("a_data_file_that_was_changed_between_tries_is_copied_as_a_whole", |lab| {
        let stage = Stage::set_up(lab, &["again"])?;
        let [source, target] = stage.places(lab, "again", Version::V10)?;
        let (source_words, image) = words(&source)?;
        source.io(&image, ALL)?;
        let (target_words, copy) = words(&target)?;
        let at_source = source.start(&source_words, false)?;
        let at_target = target.start(&target_words, true)?;
        let (code, found) = stage.check("again", &[])?;
        ensure!(code == 0, "{found:?}");
        let options = ["--retry", "9", "--limit", "8MiB/s"];
        let migration = Migration::begin(&stage.alpha, "again", "bravo", &options)?;
        at_try(&stage.alpha, &migration, 1, "precopy")?;
        at_target.kill()?;

        wait_for("the end of the first try", LONG, || {
            Ok((migration.now(&stage.alpha)?["tries"]["number"] != 1).then_some(()))
        })?;
        let data = std::fs::File::options().write(true).open(target.file("data"))?;
        data.write_all_at(&[0x11; 65536], 1 << 20)?;
        drop(data);
        let at_target = target.start(&target_words, true)?;
        let report = migration.ended(&stage.alpha)?;
        ensure!(report["outcome"]["result"] == "moved", "{report}");
        let notes = report["notes"].to_string();
        ensure!(notes.contains("disk0: the whole disk is copied again"), "{notes}");
        ensure!(notes.contains("was changed since it was copied"), "{notes}");
        end([at_source, at_target])?;
        target.io(&copy, READ_ALL)
    })
}

fn end(machines: [Machine; 2]) -> Result<()> {
    machines.into_iter().try_for_each(Machine::quit)
}
