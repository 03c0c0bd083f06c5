//! Lanes: a migration whose streams are spread over several connections to the same port. Each is
//! lost and resumed for itself, all of them together keep one limit, and all outlive a restart.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::faults::{Migration, Plan, Stage};
use crate::support::agent::PORT;
use crate::support::process::{SHORT, wait_for};
use crate::support::proof::field;
use crate::support::{Agent, Host, with_lab};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

const LANES: usize = 3;
const MIB: u64 = 1 << 20;
const LIMIT: u64 = 4 * MIB;
/// How exactly a limit is kept.
const KEPT: f64 = 1.02;
/// What waited while nobody looked at the clock, on a busy machine or during a restart, may be made up
/// for.
const MADE_UP: Duration = Duration::from_millis(200);

/// How often it is looked whether the limit is used.
const SPANS: usize = 3;

/// The local ports of the host's connections to the peer's one port.
fn connections(host: &Host) -> Result<BTreeSet<u16>> {
    let all = host.tcp_connections()?.into_iter();
    Ok(all.filter(|c| c.state == "ESTAB" && c.peer_port == PORT).map(|c| c.local_port).collect())
}

fn reconnects(agent: &Agent) -> Result<f64> {
    agent.metrics()?.sum("vmferry_session_reconnects_total", &[])
}

/// Bytes that each session of the agent has sent.
fn sent(agent: &Agent) -> Result<Vec<u64>> {
    let status = agent.api("/v1/status")?;
    let sessions = status["sessions"].as_array().context("sessions")?;
    Ok(sessions.iter().filter_map(|session| session["sent_bytes"].as_u64()).collect())
}

fn flows(progress: &Value) -> bool {
    let mut disks = progress["disks"].as_array().into_iter().flatten();
    disks.all(|disk| disk["done_bytes"].as_u64() > Some(MIB))
}

/// That no more than the limit leaves through all lanes, and that it is used. Where this machine stalls it is used in a
/// later span.
fn keeps_the_limit(agent: &Agent) -> Result<()> {
    for _ in 0..SPANS {
        if uses_the_limit(agent)? {
            return Ok(());
        }
    }
    bail!("the limit is not used")
}

fn uses_the_limit(agent: &Agent) -> Result<bool> {
    let (begin, before) = (Instant::now(), sent(agent)?.iter().sum::<u64>());
    std::thread::sleep(Duration::from_secs(5));
    let after = sent(agent)?.iter().sum::<u64>();
    let time = begin.elapsed() + MADE_UP;
    let most = (LIMIT as f64 * time.as_secs_f64() * KEPT) as u64;
    eprintln!("  {} bytes through all lanes, at most {most}", after - before);
    ensure!(after - before <= most, "{} bytes at {LIMIT} bytes per second: at most {most}", after - before);
    Ok(after - before > most / 2)
}

#[test]
fn streams_are_spread_resumed_and_limited_over_all_lanes() -> Result<()> {
    with_lab("streams_are_spread_resumed_and_limited_over_all_lanes", |lab| {
        let mut stage = Stage::set_up(lab, Plan { rate: 60, lanes: Some(LANES), ..Plan::ORDINARY })?;
        let words = ["--limit", "4MiB/s", "--keep-source"];
        let migration = Migration::begin(&stage.alpha, "web1", "bravo", &words)?;
        migration.reach(&stage.alpha.socket(), "mirror", flows)?;
        // One with the control stream, and one for each disk.
        let before = connections(&stage.net.alpha)?;
        ensure!(before.len() == LANES, "connections from {before:?}");
        let through = sent(&stage.alpha)?;
        let used = through.iter().filter(|bytes| **bytes > MIB).count();
        ensure!(through.len() == LANES && used == 2, "two disks on two lanes: {through:?}");
        keeps_the_limit(&stage.alpha)?;

        for port in &before {
            let earlier = reconnects(&stage.alpha)?;
            ensure!(stage.net.alpha.reset_tcp(*port)?, "nothing to reset");
            wait_for("that lane's next connection", SHORT, || {
                let now = reconnects(&stage.alpha)?;
                let all = connections(&stage.net.alpha)?.len() == LANES;
                Ok((all && now >= earlier + 1.0).then_some(()))
            })?;
        }
        let resumed = connections(&stage.net.alpha)?;
        ensure!(resumed.is_disjoint(&before), "{resumed:?} after {before:?}: each was reset once");

        stage.alpha.take_over()?;
        stage.bravo.take_over()?;
        wait_for("all lanes after the restart", SHORT, || {
            Ok((connections(&stage.net.alpha)?.len() == LANES).then_some(()))
        })?;
        keeps_the_limit(&stage.alpha)?;
        let free = stage.alpha.vmferry(&["limit", &migration.id, "--rate", "none"])?;
        ensure!(free.code == 0, "{free:?}");
        let report = migration.ended(&stage.alpha)?;
        ensure!(field(&report, "/outcome/result")? == "moved", "{report}");
        ensure!(connections(&stage.net.alpha)?.len() == LANES, "no further connection for the RAM");
        stage.is_moved()
    })
}
