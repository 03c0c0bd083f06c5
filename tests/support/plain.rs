//! A migration as QEMU does it by itself, over the network, in clear, with a port for each part.
//! The control experiment: what is proved of vmferry's migrations must be provable of this one
//! too, and what they avoid must be seen here.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::process::wait_for;
use super::qmp::Qmp;
use super::vm::{Vm, node_name};

/// Where the destination's QEMU takes the guest's disks.
pub const NBD_PORT: u16 = 10809;
/// Where it takes its RAM.
pub const RAM_PORT: u16 = 4444;
/// For each phase; guests here are small.
const PHASE_WITHIN: Duration = Duration::from_secs(90);

/// Moves a running guest. The destination's QEMU is started here; `at_handover` is called when the
/// source has given the guest up and the destination has not begun.
///
/// # Errors
/// QEMU's, or a phase took too long. Nothing is undone then.
pub fn migrate(
    source: &Vm,
    destination: &Vm,
    address: &str,
    at_handover: impl FnOnce() -> Result<()>,
) -> Result<()> {
    destination.start_incoming()?;
    let (mut from, mut to) = (source.qmp()?, destination.qmp()?);
    let disks = source.spec.disks.len();
    export_disks(&mut to, address, disks)?;
    mirror_disks(&mut from, address, disks)?;
    move_ram(&mut from, &mut to, address)?;
    end_mirrors(&mut from, disks)?;
    to.query("nbd-server-stop")?;
    from.execute("migrate-continue", json!({"state": "pre-switchover"}))?;
    wait_migration(&mut from, "completed")?;
    wait_migration(&mut to, "completed")?;
    at_handover()?;
    to.query("cont")?;
    ensure!(to.status()? == "running", "the destination does not run");
    Ok(())
}

fn export_disks(to: &mut Qmp, address: &str, disks: usize) -> Result<()> {
    let listen = json!({"type": "inet", "data": {"host": address, "port": NBD_PORT.to_string()}});
    to.execute("nbd-server-start", json!({"addr": listen}))?;
    for node in (0..disks).map(node_name) {
        let export = json!({"type": "nbd", "id": node, "node-name": node, "name": node, "writable": true});
        to.execute("block-export-add", export)?;
    }
    Ok(())
}

fn mirror_disks(from: &mut Qmp, address: &str, disks: usize) -> Result<()> {
    for node in (0..disks).map(node_name) {
        let server = json!({"type": "inet", "host": address, "port": NBD_PORT.to_string()});
        from.execute(
            "blockdev-add",
            json!({"driver": "nbd", "node-name": format!("plain-{node}"), "server": server, "export": node}),
        )?;
        let mirror = json!({"job-id": node, "device": node, "target": format!("plain-{node}"), "sync": "full", "auto-dismiss": false});
        from.execute("blockdev-mirror", mirror)?;
    }
    for _ in 0..disks {
        from.wait_event("BLOCK_JOB_READY", PHASE_WITHIN)?;
    }
    Ok(())
}

fn move_ram(from: &mut Qmp, to: &mut Qmp, address: &str) -> Result<()> {
    let on = |names: &[&str]| json!({"capabilities": names.iter().map(|n| json!({"capability": n, "state": true})).collect::<Vec<Value>>()});
    from.execute("migrate-set-capabilities", on(&["return-path", "pause-before-switchover"]))?;
    to.execute("migrate-set-capabilities", on(&["return-path"]))?;
    let uri = json!({"uri": format!("tcp:{address}:{RAM_PORT}")});
    to.execute("migrate-incoming", uri.clone())?;
    from.execute("migrate", uri)?;
    wait_migration(from, "pre-switchover")
}

fn end_mirrors(from: &mut Qmp, disks: usize) -> Result<()> {
    for node in (0..disks).map(node_name) {
        from.execute("block-job-cancel", json!({"device": node}))?;
    }
    for _ in 0..disks {
        let done = from.wait_event("BLOCK_JOB_COMPLETED", PHASE_WITHIN)?;
        ensure!(done["data"]["error"].is_null(), "a mirror failed: {done}");
    }
    Ok(())
}

fn wait_migration(qmp: &mut Qmp, wanted: &str) -> Result<()> {
    wait_for(&format!("the migration to be {wanted}"), PHASE_WITHIN, || {
        let state = qmp.query("query-migrate")?;
        let status = state["status"].as_str().unwrap_or_default();
        ensure!(status != "failed" && status != "cancelled", "it is {state}");
        Ok((status == wanted).then_some(()))
    })
}
