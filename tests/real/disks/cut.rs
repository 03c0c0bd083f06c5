//! The destination's monitor is cut at each command of the guest's pause. Its agent repeats those whose second execution
//! changes nothing, asks what became of the others, and the guest arrives.

use anyhow::{Result, ensure};
use serde_json::json;

use super::Stage;
use super::machine::{Place, blockdev, device, raw};
use crate::faults::proxy::Proxy;
use crate::support::{Version, with_lab};

/// Those that are given with the guest paused, in their order. The first `stop` is an earlier one.
const COMMANDS: [&str; 5] = ["stop", "stop", "nbd-server-stop", "query-block-exports", "cont"];

fn disk(place: &Place) -> Result<Vec<String>> {
    let node = raw("n0", &place.image("raw", "", "0.raw")?);
    Ok([blockdev(&node), device("virtio-blk-pci,id=disk0,addr=5,drive=n0")].concat())
}

fn image(place: &Place) -> String {
    format!("driver=raw,file.filename={}", place.file("0.raw").display())
}

fn a_cut_is_no_failure(name: &str, version: Version) -> Result<()> {
    with_lab(name, |lab| {
        let cases = [("heard", true), ("lost", false)];
        let stage = Stage::set_up(lab, &cases.map(|(name, _)| name))?;
        for (name, heard) in cases {
            let [source, target] = stage.places(lab, name, version)?;
            let (ours, theirs) = (disk(&source)?, disk(&target)?);
            source.io(&image(&source), "write -P 7 1M 1M")?;
            let (at_source, at_target) = (source.start(&ours, false)?, target.start(&theirs, true)?);
            at_source.qmp()?.query("cont")?;
            let proxy = Proxy::before(&target.file("agent.qmp"))?;
            proxy.cut_at(&COMMANDS, heard);
            let (code, last) = stage.migrate(name, &["--keep-source"])?;
            ensure!(
                code == 0 && last["outcome"] == json!({"result": "moved", "leftovers": []}),
                "{name}: {last}"
            );
            ensure!(proxy.to_cut_at().is_empty(), "{name}: {:?} did not come", proxy.to_cut_at());
            ensure!(at_target.qmp()?.status()? == "running" && at_source.qmp()?.status()? == "postmigrate");
            proxy.leave()?;
            at_source.quit()?;
            at_target.quit()?;
            target.io(&image(&target), "read -P 7 1M 1M")?;
        }
        Ok(())
    })
}

#[test]
#[ignore = "make disks"]
fn a_monitor_that_is_cut_at_any_command_of_the_pause_costs_nothing_on_qemu_10() -> Result<()> {
    let name = "a_monitor_that_is_cut_at_any_command_of_the_pause_costs_nothing_on_qemu_10";
    a_cut_is_no_failure(name, Version::V10)
}

#[test]
#[ignore = "make disks"]
fn a_monitor_that_is_cut_at_any_command_of_the_pause_costs_nothing_on_qemu_7_2() -> Result<()> {
    let name = "a_monitor_that_is_cut_at_any_command_of_the_pause_costs_nothing_on_qemu_7_2";
    a_cut_is_no_failure(name, Version::V72)
}
