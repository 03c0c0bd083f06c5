//! Real guests moved between two hosts by real agents, and proved to have arrived whole, without
//! asking vmferry.
//!
//! QEMU 7.2 under TCG sometimes loses a write of the guest to its RAM while it migrates, whoever
//! carries the stream. Where it is the source the guest may be ill afterwards, so there the disks
//! at the hand-over are judged and that QEMU runs, and not what the guest does from then on.

use std::time::Duration;

use crate::support::agent::PORT;
use crate::support::pair::journals;
use crate::support::process::{LONG, wait_for};
use crate::support::proof::{self, field};
use crate::support::{Agent, Capture, DiskFormat, Guest, Pair, Version, VmSpec, Way, with_lab};
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

pub(super) const VM: &str = "web1";
/// The guest's writes are live and yet leave the other side air.
const RATE: u64 = 400;
/// The same, where more than the writes costs time.
const CALM_RATE: u64 = 100;
const MOVE_WITHIN: Duration = Duration::from_secs(300);

fn spec(name: &str, version: Version) -> VmSpec {
    VmSpec { rate: CALM_RATE, blocks: 512, ..VmSpec::new(name, version) }
}

/// A migration by the command line: its exit code must be 0, its last words say "moved".
pub(super) fn migrate(pair: &Pair, vm: &str, way: Way, options: &[&str]) -> Result<Value> {
    let (agent, peer) = pair.from(way);
    let words = [&["migrate", vm, "--to", peer, "--json"], options].concat();
    let outcome = agent.vmferry_start(&words)?.wait(MOVE_WITHIN)?;
    ensure!(outcome.code == 0, "vmferry {}: {outcome:?}", words.join(" "));
    let last = json_lines(&outcome.stdout)?.pop().context("no line of JSON")?;
    ensure!(field(&last, "/outcome/result")? == "moved", "{last}");
    Ok(last)
}

fn json_lines(text: &str) -> Result<Vec<Value>> {
    let lines =
        text.lines().map(|line| serde_json::from_str(line).with_context(|| format!("no JSON: {line}")));
    lines.collect()
}

fn moves(name: &str, from: Version, to: Version) -> Result<()> {
    with_lab(name, |lab| {
        // Both disks of the guest change their format on the way.
        let on_alpha = VmSpec { rate: RATE, ..spec(VM, from) };
        let on_bravo = VmSpec { disks: vec![DiskFormat::Qcow2, DiskFormat::Raw], rate: RATE, ..spec(VM, to) };
        let (pair, guest) = Pair::with_guest(lab, &on_alpha, &on_bravo)?;
        guest.alpha.wait_more(200)?;
        // Whose disks are compared on the way, where both sides have the same QEMU.
        let options: &[&str] = if from == to { &["--verify"] } else { &[] };
        let last = migrate(&pair, VM, Way::ToBravo, options)?;
        pair.proves_move(&guest, Way::ToBravo)?;
        if from == to {
            compared_but_for_what_the_guest_writes(&last)?;
        }
        let state = guest.bravo.qmp()?.status()?;
        ensure!(state == "running", "the guest is {state} on bravo");
        ensure!(guest.bravo_copies.calls() == 1, "the hook was called {} times", guest.bravo_copies.calls());
        if from == Version::V10 {
            proof::guest_continued(&guest.alpha, &guest.bravo)?;
            guest.bravo.quit()?;
            proof::disks_whole(&guest.bravo)?;
        }
        Ok(())
    })
}

/// A guest that writes all the time does not keep the rest of its disks from being compared.
fn compared_but_for_what_the_guest_writes(last: &Value) -> Result<()> {
    let number = |name: &str| last["comparison"][name].as_u64().with_context(|| format!("no {name}: {last}"));
    let (of, equal) = (number("of_bytes")?, number("equal_bytes")?);
    ensure!(equal >= of / 2 && number("different_bytes")? == 0, "{last}");
    ensure!(number("written_bytes")? > 0 && last["notes"].to_string().contains("compared: "), "{last}");
    Ok(())
}

#[test]
fn a_guest_moves_from_qemu_7_2_to_7_2() -> Result<()> {
    moves("a_guest_moves_from_qemu_7_2_to_7_2", Version::V72, Version::V72)
}

#[test]
fn a_guest_moves_from_qemu_10_to_10() -> Result<()> {
    moves("a_guest_moves_from_qemu_10_to_10", Version::V10, Version::V10)
}

#[test]
fn a_guest_moves_from_qemu_7_2_to_10() -> Result<()> {
    moves("a_guest_moves_from_qemu_7_2_to_10", Version::V72, Version::V10)
}

/// The QEMU that ran the guest has ended, so the way back takes a fresh one and the same disks.
#[test]
fn a_guest_moves_there_and_back() -> Result<()> {
    with_lab("a_guest_moves_there_and_back", |lab| {
        let spec = VmSpec { dirty_mib: 4, ..spec(VM, Version::V10) };
        let (pair, guest) = Pair::with_guest(lab, &spec, &spec)?;
        migrate(&pair, VM, Way::ToBravo, &[])?;
        pair.proves_move(&guest, Way::ToBravo)?;
        proof::guest_continued(&guest.alpha, &guest.bravo)?;
        let first_stay = guest.alpha.console()?.counts.len();

        migrate(&pair, VM, Way::ToAlpha, &[])?;
        pair.proves_move(&guest, Way::ToAlpha)?;
        let left_bravo = guest.bravo.console()?.last().context("it never counted on bravo")?;
        guest.alpha.wait_count(left_bravo + 100)?;
        let console = guest.alpha.console()?;
        let (back, _) = console.counts[first_stay];
        ensure!(back > left_bravo, "bravo counted to {left_bravo}, alpha goes on from {back}");
        ensure!(console.generations.len() == 1, "the guest booted again: {:?}", console.generations);
        ensure!(guest.alpha.starts() == 2 && guest.bravo.starts() == 1, "each stay has its own QEMU");
        guest.alpha.quit()?;
        proof::disks_whole(&guest.alpha)
    })
}

#[test]
fn a_paused_guest_is_moved_and_stays_paused() -> Result<()> {
    with_lab("a_paused_guest_is_moved_and_stays_paused", |lab| {
        let (pair, guest) = Pair::with_guest(lab, &spec(VM, Version::V10), &spec(VM, Version::V10))?;
        guest.alpha.qmp()?.query("stop")?;
        migrate(&pair, VM, Way::ToBravo, &[])?;
        pair.proves_move(&guest, Way::ToBravo)?;
        let state = guest.bravo.qmp()?.status()?;
        ensure!(state == "paused", "the guest is {state} on bravo");
        ensure!(guest.bravo.console()?.counts.is_empty(), "it counted on bravo");
        guest.bravo.qmp()?.query("cont")?;
        proof::guest_continued(&guest.alpha, &guest.bravo)?;
        guest.bravo.quit()?;
        proof::disks_whole(&guest.bravo)
    })
}

/// Writes of four such guests, mirrored, leave the processors to the copies of their disks.
fn one_of_many(name: &str) -> VmSpec {
    VmSpec { rate: CALM_RATE / 2, ..spec(name, Version::V10) }
}

/// How slow the link is until all four are seen under way, in megabits per second: each guest alone
/// writes more than that (4 KiB to both disks each time), so the first is still copied when the last
/// begins, however long its destination took to prepare.
const CROWDED_MBIT: u32 = 2;
/// Of each migration while its disks are copied: control and two disks.
const STREAMS_EACH: u64 = 3;

#[test]
fn four_guests_move_both_ways_over_one_connection() -> Result<()> {
    with_lab("four_guests_move_both_ways_over_one_connection", |lab| {
        let net = lab.two_hosts()?;
        let names =
            [("web1", Way::ToBravo), ("db1", Way::ToAlpha), ("web2", Way::ToBravo), ("db2", Way::ToAlpha)];
        let guests = names
            .iter()
            .map(|(name, _)| Guest::define(lab, &net, &one_of_many(name), &one_of_many(name)))
            .collect::<Result<Vec<_>>>()?;
        let travels: Vec<(&Guest, Way)> = guests.iter().zip(names.map(|(_, way)| way)).collect();
        boot_all(&travels)?;
        let pair = Pair::start(lab, net, &guests.iter().collect::<Vec<_>>())?;
        pair.net.limit_mbit_shallow(CROWDED_MBIT)?;
        let capture = Capture::start_without_contents(&pair.net, "link")?;
        let mut under_way = Vec::new();
        for (guest, way) in &travels {
            let (agent, peer) = pair.from(*way);
            let run = agent.vmferry_start(&["migrate", &guest.name, "--to", peer, "--json"])?;
            // Begun one after the other: two agents that dial each other at the very same moment
            // have two connections for a while.
            wait_for("the first session", LONG, || Ok(sessions(agent)?.first().map(drop)))?;
            under_way.push((guest.name.clone(), run));
        }
        wait_for("all four to copy their disks at once", LONG, || all_mirror(&pair))?;
        for agent in [&pair.alpha, &pair.bravo] {
            one_session(agent, STREAMS_EACH * travels.len() as u64)?;
        }
        pair.net.no_limit()?;
        for (name, run) in under_way {
            let outcome = run.wait(MOVE_WITHIN)?;
            ensure!(outcome.code == 0, "{name}: {outcome:?}");
        }
        let traffic = capture.finish(&[])?;
        ensure!(traffic.connections.len() == 1, "{} connections: {traffic:?}", traffic.connections.len());
        ensure!(
            traffic.destination_ports().iter().eq([&PORT]) && traffic.other_packets.is_empty(),
            "{traffic:?}"
        );
        for (guest, way) in travels {
            let (source, destination, _) = guest.way(way);
            pair.proves_move(guest, way).with_context(|| guest.name.clone())?;
            proof::guest_continued(source, destination).with_context(|| guest.name.clone())?;
        }
        Ok(())
    })
}

fn boot_all(travels: &[(&Guest, Way)]) -> Result<()> {
    std::thread::scope(|scope| {
        let boots: Vec<_> =
            travels.iter().map(|(guest, way)| scope.spawn(|| guest.way(*way).0.boot())).collect();
        boots.into_iter().try_for_each(|boot| boot.join().map_err(|_| anyhow::anyhow!("a boot panicked"))?)
    })?;
    // Each disk is then full of the guest's blocks.
    travels
        .iter()
        .try_for_each(|(guest, way)| guest.way(*way).0.wait_count(guest.alpha.spec.blocks).map(drop))
}

fn sessions(agent: &Agent) -> Result<Vec<Value>> {
    Ok(agent.api("/v1/status")?["sessions"].as_array().cloned().unwrap_or_default())
}

/// Whether every migration of both agents is in its mirror phase at this moment.
fn all_mirror(pair: &Pair) -> Result<Option<()>> {
    let mut all = Vec::new();
    for agent in [&pair.alpha, &pair.bravo] {
        let list = agent.api("/v1/migrations")?.as_array().cloned().unwrap_or_default();
        all.extend(list.into_iter().filter(|p| p["role"] == "source"));
    }
    let ended = all.iter().find(|p| !p["outcome"].is_null());
    ensure!(ended.is_none(), "one ended before all were under way: {ended:?}");
    let in_mirror =
        |p: &&Value| p["phase"] == "mirror" && p["disks"].as_array().is_some_and(|d| d.len() == 2);
    let copying = all.iter().filter(in_mirror).count() == 4;
    Ok(copying.then_some(()))
}

/// That an agent has one session, which carries all streams, and one TCP connection.
fn one_session(agent: &Agent, streams: u64) -> Result<()> {
    let carries = || -> Result<Option<()>> {
        let sessions = sessions(agent)?;
        ensure!(sessions.len() == 1, "one session, not {sessions:?}");
        Ok((sessions[0]["streams"] == streams).then_some(()))
    };
    wait_for(&format!("{streams} streams"), LONG, carries)
        .with_context(|| format!("{:?}", sessions(agent)))?;
    let connections: Vec<_> =
        agent.host().tcp_connections()?.into_iter().filter(|c| c.state == "ESTAB").collect();
    ensure!(connections.len() == 1, "{connections:?}");
    ensure!([connections[0].local_port, connections[0].peer_port].contains(&PORT), "{connections:?}");
    Ok(())
}

/// A link that makes the copy of a disk last until it is let go.
const SLOW_MBIT: u32 = 8;

/// Waits until the migration that follows `earlier` others copies its disks, and gives its id.
fn wait_mirror(agent: &Agent, earlier: usize) -> Result<String> {
    wait_for("the mirror phase", LONG, || {
        let list = agent.api("/v1/migrations")?;
        let Some(progress) = list.get(earlier) else { return Ok(None) };
        ensure!(progress["outcome"].is_null(), "it ended too soon: {progress}");
        let copying = progress["phase"] == "mirror";
        Ok(copying.then(|| progress["id"].as_str().unwrap_or_default().to_owned()))
    })
}

#[test]
fn a_migration_does_not_need_its_command_line() -> Result<()> {
    with_lab("a_migration_does_not_need_its_command_line", |lab| {
        let (pair, guest) = Pair::with_guest(lab, &spec(VM, Version::V10), &spec(VM, Version::V10))?;
        guest.alpha.wait_count(guest.alpha.spec.blocks)?;

        pair.net.limit_mbit(SLOW_MBIT)?;
        let run = pair.alpha.vmferry_start(&["migrate", VM, "--to", "bravo"])?;
        let id = wait_mirror(&pair.alpha, 0)?;
        run.signal(Signal::SIGKILL)?;
        ensure!(run.wait(LONG)?.code == 128 + Signal::SIGKILL as i32);
        let watch = pair.alpha.vmferry_start(&["watch", &id, "--json"])?;
        let destination_watch = pair.bravo.vmferry_start(&["watch", &id, "--json"])?;
        pair.net.no_limit()?;
        for watch in [watch, destination_watch] {
            let watched = watch.wait(MOVE_WITHIN)?;
            ensure!(watched.code == 0, "watch: {watched:?}");
            let lines = json_lines(&watched.stdout)?;
            let last = lines.last().context("watch said nothing")?;
            ensure!(lines[0]["phase"] != "done" && lines[0]["id"] == id.as_str(), "{}", lines[0]);
            ensure!(last["phase"] == "done" && last["outcome"]["result"] == "moved", "{last}");
        }
        pair.proves_move(&guest, Way::ToBravo)?;
        proof::guest_continued(&guest.alpha, &guest.bravo)?;

        let detached = pair.bravo.vmferry(&["migrate", VM, "--to", "alpha", "--detach"])?;
        ensure!(detached.code == 0, "{detached:?}");
        let back = detached.stdout.trim().to_owned();
        ensure!(back.len() == 36 && back != id, "--detach printed {detached:?}");
        let watched = pair.bravo.vmferry_start(&["watch", &back])?.wait(MOVE_WITHIN)?;
        ensure!(watched.code == 0 && watched.stdout.contains("web1 runs on alpha"), "{watched:?}");
        pair.proves_move(&guest, Way::ToAlpha)?;
        answers_about(&pair.bravo, &[&id, &back])
    })
}

/// What is known of ended migrations, and of one that there never was.
fn answers_about(agent: &Agent, ids: &[&str]) -> Result<()> {
    let json = |words: &[&str]| -> Result<Value> {
        let outcome = agent.vmferry(words)?;
        ensure!(outcome.code == 0, "{words:?}: {outcome:?}");
        Ok(serde_json::from_str(&outcome.stdout)?)
    };
    let list = json(&["list", "--json"])?["migrations"].clone();
    let listed: Vec<_> = list.as_array().into_iter().flatten().filter_map(|p| p["id"].as_str()).collect();
    ensure!(listed == ids, "{listed:?} are listed, not {ids:?}");
    for id in ids {
        ensure!(json(&["status", id, "--json"])?["outcome"]["result"] == "moved");
        let again = agent.vmferry(&["watch", id])?;
        ensure!(again.code == 0, "{again:?}");
        let late = agent.vmferry(&["cancel", id])?;
        ensure!(
            late.code == 2 && !late.stderr.is_empty(),
            "a migration that has ended was cancelled: {late:?}"
        );
    }
    let status = json(&["status", "--json"])?;
    ensure!(status["identity"] == agent.host().name.as_str() && status["migrations_active"] == 0, "{status}");
    let never = "00000000-0000-4000-8000-000000000000";
    for words in [["watch", never], ["status", never], ["cancel", never]] {
        let outcome = agent.vmferry(&words)?;
        ensure!(outcome.code == 2 && outcome.stderr.contains(never), "{words:?}: {outcome:?}");
    }
    Ok(())
}

/// Two tries fail, one before anything is changed and one in the middle; each retry has a fresh
/// QEMU at the destination, and the source's is as it was.
#[test]
fn a_failed_try_is_followed_by_a_good_one() -> Result<()> {
    with_lab("a_failed_try_is_followed_by_a_good_one", |lab| {
        let (pair, guest) = Pair::with_guest(lab, &spec(VM, Version::V10), &spec(VM, Version::V10))?;
        guest.alpha.wait_count(guest.alpha.spec.blocks)?;
        let descriptors = qemu_descriptors(&guest)?;

        guest.bravo.create_disk(1, guest.bravo.spec.disk_mib - 1)?;
        let refused = pair.alpha.vmferry(&["migrate", VM, "--to", "bravo"])?;
        ensure!(refused.code == 1, "{refused:?}");
        ensure!(
            refused.stdout.contains("disk1") && refused.stdout.contains("qemu-img resize"),
            "{refused:?}"
        );
        source_goes_on(&pair, &guest, descriptors)?;

        guest.bravo.create_disk(1, guest.bravo.spec.disk_mib)?;
        pair.net.limit_mbit(SLOW_MBIT)?;
        let run = pair.alpha.vmferry_start(&["migrate", VM, "--to", "bravo", "--json"])?;
        let id = wait_mirror(&pair.alpha, 1)?;
        let asked = pair.alpha.vmferry(&["cancel", &id])?;
        ensure!(asked.code == 0, "{asked:?}");
        let cancelled = run.wait(LONG)?;
        let last = json_lines(&cancelled.stdout)?.pop().context("no line of JSON")?;
        ensure!(cancelled.code == 1 && last["outcome"]["cancelled"] == true, "{cancelled:?}");
        ensure!(last["outcome"]["leftovers"].as_array().is_some_and(Vec::is_empty), "{last}");
        pair.net.no_limit()?;
        source_goes_on(&pair, &guest, descriptors)?;

        let moved = migrate(&pair, VM, Way::ToBravo, &["--keep-source"])?;
        ensure!(moved["outcome"]["leftovers"].as_array().is_some_and(Vec::is_empty), "{moved}");
        let state = guest.alpha.qmp()?.status()?;
        ensure!(state == "postmigrate", "the source's QEMU, which was to be kept, is {state}");
        proof::qemu_is_clean(&mut guest.alpha.qmp()?)?;
        guest.alpha.kill()?;
        pair.proves_move(&guest, Way::ToBravo)?;
        proof::guest_continued(&guest.alpha, &guest.bravo)?;
        ensure!(guest.bravo.starts() == 3, "each try has its own QEMU: {} starts", guest.bravo.starts());
        // The destination keeps none of a try that it refused with nothing begun.
        for (agent, tries) in [(&pair.alpha, 3), (&pair.bravo, 2)] {
            let journals = journals(agent)?;
            ensure!(journals.len() == tries, "{tries} tries: {journals:?}");
        }
        Ok(())
    })
}

fn qemu_descriptors(guest: &Guest) -> Result<usize> {
    let pid = guest.alpha.pid().context("no QEMU on alpha")?;
    Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

/// After a try that failed.
fn source_goes_on(pair: &Pair, guest: &Guest, descriptors: usize) -> Result<()> {
    guest.alpha.wait_more(100)?;
    proof::qemu_is_clean(&mut guest.alpha.qmp()?)?;
    wait_for("the source's QEMU to close what it was given", LONG, || {
        Ok((qemu_descriptors(guest)? <= descriptors).then_some(()))
    })?;
    guest.bravo.wait_ended().context("the destination's QEMU was to end")?;
    pair.is_clean()
}
