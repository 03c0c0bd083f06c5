//! A destination that does not answer the NBD handshake of a disk: the guest runs on meanwhile. QEMU would lead
//! that handshake in its main loop, and the guest would stand still for as long.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use crate::faults::{End, Migration, Plan, Stage};
use crate::support::net::Way;
use crate::support::process::{LONG, signal_pid, wait_for};
use crate::support::with_lab;

/// The guest's blocks while the handshake waits.
const BLOCKS: u64 = 200;
/// The connection is missed for as long as the destination's QEMU takes to start.
const PLAN: Plan = Plan { deadlines: "resume_s = 60\nresume_paused_s = 4\n", ..Plan::ORDINARY };

const RESTARTED: End =
    End::failed(&["mirror"], &["restarted while the NBD handshake of disk", "begin the migration again"]);

/// The destination's QEMU is stopped when it has exported its disks, and before the source knows of it.
#[test]
fn the_guest_runs_while_the_destination_is_waited_for() -> Result<()> {
    with_lab("the_guest_runs_while_the_destination_is_waited_for", |lab| {
        let stage = Stage::set_up(lab, PLAN)?;
        let (migration, pid) = in_a_handshake(&stage)?;
        stage.source.wait_more(BLOCKS)?;
        ensure!(stage.source.qmp()?.status()? == "running");
        let now = migration.now(&stage.alpha)?;
        ensure!(now["phase"] == "mirror" && now["outcome"].is_null(), "it was to wait: {now}");
        let nodes = stage.source.qmp()?.query("query-named-block-nodes")?;
        ensure!(!nodes.to_string().contains("\"nbd\""), "a handshake is over: {nodes}");
        signal_pid(pid, Signal::SIGCONT)?;
        let report = migration.ended(&stage.alpha)?;
        ensure!(report["outcome"]["result"] == "moved", "{report}");
        stage.is_moved()
    })
}

/// The agent is restarted while that is so and the hosts are not connected: that is what is said, and nothing else.
#[test]
fn a_restart_in_a_handshake_is_named() -> Result<()> {
    with_lab("a_restart_in_a_handshake_is_named", |lab| {
        let mut stage = Stage::set_up(lab, PLAN)?;
        let (migration, pid) = in_a_handshake(&stage)?;
        stage.net.cut()?;
        wait_for("the connection to be missed for longer than in a pause", LONG, || {
            let now = migration.now(&stage.alpha)?;
            Ok((now["reconnecting"]["for_s"].as_u64() > Some(4)).then_some(()))
        })?;
        stage.alpha.take_over()?;
        let report = migration.ended(&stage.alpha)?;
        stage.net.restore()?;
        signal_pid(pid, Signal::SIGCONT)?;
        RESTARTED.fits(&report)?;
        stage.is_as_before()?;
        stage.moves()
    })
}

/// A migration whose first disk's handshake waits for the destination's QEMU, which is stopped; its process.
fn in_a_handshake(stage: &Stage) -> Result<(Migration, u32)> {
    stage.start().close()?;
    let migration = Migration::begin(&stage.alpha, "web1", "bravo", &["--keep-source"])?;
    stage.start().wait_reached()?;
    stage.net.drop_way(Way::ToAlpha)?;
    stage.start().open();
    // That is all it asks its QEMU; the answer is on its way.
    wait_for("both disks to be exported", LONG, || {
        let all = stage.bravo.api("/v1/migrations")?;
        Ok((all[0]["disks"].as_array().map(Vec::len) == Some(2)).then_some(()))
    })?;
    let pid = stage.destination.pid().context("no QEMU at the destination")?;
    signal_pid(pid, Signal::SIGSTOP)?;
    stage.net.restore()?;
    wait_for("the first disk's stream at the destination", LONG, || {
        let all = stage.bravo.api("/v1/migrations")?;
        Ok((all[0]["phase"] == "mirror").then_some(()))
    })?;
    Ok((migration, pid))
}
