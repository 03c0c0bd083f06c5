//! A connection that is lost is no failure: a guest with disks moves although the connection is
//! reset every second from beginning to end, and although the link is down for 20 seconds. What that
//! cost is read from the metrics and printed.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::support::agent::PORT;
use crate::support::process::{SHORT, wait_for};
use crate::support::proof;
use crate::support::{Agent, Guest, Pair, Version, VmSpec, Way, with_lab};
use anyhow::{Context, Result, ensure};
use serde_json::Value;

const VM: &str = "web1";
const RESET_EVERY: Duration = Duration::from_secs(1);
/// So often on the slow link; then the rest may be soon over.
const RESETS: u64 = 10;
const DOWN_FOR: Duration = Duration::from_secs(20);
/// `dead_peer_s` and a little.
const DEAD_AFTER: Duration = Duration::from_secs(8);
/// So that the copying takes a good while.
const MBIT: u32 = 48;
/// Each block makes QEMU copy 64 KiB of each disk, for which the link must have room.
const RATE: u64 = 15;
/// A resumption is a handshake; a second each is generous even on a busy machine.
const MOVE_WITHIN: Duration = Duration::from_secs(300);

fn spec() -> VmSpec {
    VmSpec { rate: RATE, blocks: 4096, ..VmSpec::new(VM, Version::V10) }
}

/// Moves a guest while `disturb` is at work; gives how long that took.
fn moves_while(name: &str, disturb: impl Fn(&Pair, &Guest, &AtomicBool) -> Result<()> + Sync) -> Result<()> {
    with_lab(name, |lab| {
        let (pair, guest) = Pair::with_guest(lab, &spec(), &spec())?;
        guest.alpha.wait_count(20)?;
        pair.net.limit_mbit(MBIT)?;
        let since = Instant::now();
        let run = pair.alpha.vmferry_start(&["migrate", VM, "--to", "bravo", "--json"])?;
        wait_for("both disks to be under way", SHORT, || {
            let list = pair.alpha.api("/v1/migrations")?;
            let flows = |d: &Value| d["done_bytes"].as_u64().is_some_and(|n| n > 1 << 20);
            let disks = list[0]["disks"].as_array().map_or(&[][..], Vec::as_slice);
            Ok((disks.len() == 2 && disks.iter().all(flows)).then_some(()))
        })?;
        let over = AtomicBool::new(false);
        let outcome = std::thread::scope(|scope| {
            let disturber = scope.spawn(|| disturb(&pair, &guest, &over));
            let outcome = run.wait(MOVE_WITHIN);
            over.store(true, Ordering::Relaxed);
            let disturbed = disturber.join().map_err(|_| anyhow::anyhow!("the disturber panicked"))?;
            disturbed.context("the disturber")?;
            outcome
        })?;
        ensure!(outcome.code == 0, "{outcome:?}");
        eprintln!("  moved after {:.1} s", since.elapsed().as_secs_f64());
        cost(&pair)?;
        pair.proves_move(&guest, Way::ToBravo)?;
        proof::guest_continued(&guest.alpha, &guest.bravo)?;
        guest.bravo.quit()?;
        proof::disks_whole(&guest.bravo)
    })
}

/// What the two agents say that it cost: at least one connection was lost, and made up for.
fn cost(pair: &Pair) -> Result<()> {
    for agent in [&pair.alpha, &pair.bravo] {
        let metrics = agent.metrics()?;
        let sum = |name: &str| metrics.sum(name, &[]);
        let replayed = sum("vmferry_session_replayed_bytes_total")?;
        let reconnects = sum("vmferry_session_reconnects_total")?;
        let away = sum("vmferry_session_away_seconds_total")?;
        eprintln!(
            "  {}: {reconnects} reconnects, {replayed} bytes replayed, {away:.1} s without a connection",
            agent.host().name
        );
        ensure!(reconnects >= 1.0, "{} counts no reconnect", agent.host().name);
        ensure!(away > 0.0, "{} counts no time without a connection", agent.host().name);
    }
    Ok(())
}

#[test]
fn the_connection_is_reset_every_second() -> Result<()> {
    let resets = AtomicU64::new(0);
    moves_while("the_connection_is_reset_every_second", |pair, _, over| {
        while !over.load(Ordering::Relaxed) {
            std::thread::sleep(RESET_EVERY);
            let done = pair.alpha.host().reset_tcp(PORT)?;
            let before = resets.fetch_add(u64::from(done), Ordering::Relaxed);
            if done && before + 1 == RESETS {
                pair.net.no_limit()?;
            }
        }
        Ok(())
    })?;
    let resets = resets.into_inner();
    eprintln!("  {resets} resets");
    ensure!(resets >= 5, "the connection was reset {resets} times only: it was over too soon");
    Ok(())
}

#[test]
fn the_link_is_down_for_20_s() -> Result<()> {
    moves_while("the_link_is_down_for_20_s", |pair, guest, over| {
        let before = guest.alpha.wait_more(1)?;
        pair.net.cut()?;
        let since = Instant::now();
        while since.elapsed() < DOWN_FOR {
            ensure!(!over.load(Ordering::Relaxed), "the migration has ended while the link was down");
            says_that_it_waits(&pair.alpha, since)?;
            std::thread::sleep(Duration::from_millis(500));
        }
        let wrote = guest.alpha.console()?.last().unwrap_or(0) - before;
        pair.net.restore()?;
        pair.net.no_limit()?;
        eprintln!("  the guest wrote {wrote} blocks meanwhile");
        ensure!(
            wrote > DOWN_FOR.as_secs() * RATE / 2,
            "it did not go on while the link was down: {wrote} blocks"
        );
        Ok(())
    })
}

/// Once the connection is known to be dead, the agent says that it waits for another.
fn says_that_it_waits(agent: &Agent, since: Instant) -> Result<()> {
    let status = agent.api("/v1/status")?;
    if since.elapsed() > DEAD_AFTER {
        let said = status["sessions"][0]["reconnecting"]["of_s"].as_u64();
        ensure!(said == Some(60), "the agent does not say that it reconnects, for 60 s at most: {status}");
    }
    Ok(())
}
