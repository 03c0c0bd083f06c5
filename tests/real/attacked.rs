//! A guest moves away and back while its host is attacked through the port and through the metrics. The
//! attackers are on a third host; so is a known peer that may send nothing and asks all the time.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::moves::{VM, migrate};
use crate::support::agent::{METRICS_PORT, PORT};
use crate::support::net::Host;
use crate::support::process::{LONG, wait_for};
use crate::support::{
    Agent, AgentSpec, Credentials, DiskFormat, Guest, Lab, Pair, PeerEntry, Version, Vm, VmEntry, VmSpec,
    Way, proof, with_lab,
};
use anyhow::{Context, Result, ensure};

/// Each keeps its connections so long that the places of its address are always taken.
const HELD: usize = 600;
/// alpha's address on its link to charlie.
const ALPHA_OF_CHARLIE: &str = "10.78.0.1";
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// More than an agent needs with a migration under way, far less than what attackers would take.
const RESIDENT_MAX: u64 = 128 << 20;
/// A record of 512 bytes that begins a ClientHello and does not go on.
const HALF_A_HELLO: &[u8] = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03half of a random";

/// What an attacker does.
type Act = Box<dyn FnMut() + Send>;

/// Attackers at work, each with what it is called and how often it has acted.
struct Attacks {
    stop: Arc<AtomicBool>,
    attackers: Vec<(&'static str, Arc<AtomicU64>, JoinHandle<()>)>,
}

impl Attacks {
    fn begin(charlie: &Agent, alpha: &Host) -> Result<Self> {
        let mut attacks = Self { stop: Arc::default(), attackers: Vec::new() };
        let port = SocketAddr::new(ALPHA_OF_CHARLIE.parse()?, PORT);
        attacks.add("silent connections", charlie.host(), 1000.0, connects(port, b""))?;
        attacks.add("halves of a ClientHello", charlie.host(), 200.0, connects(port, HALF_A_HELLO))?;
        attacks.add("another protocol", charlie.host(), 200.0, connects(port, b"GET / HTTP/1.1\r\n\r\n"))?;
        let metrics = SocketAddr::from(([127, 0, 0, 1], METRICS_PORT));
        attacks.add("scrapes", alpha, 50.0, Box::new(move || scrape(metrics)))?;
        attacks.add("checks of a peer without permission", charlie.host(), 5.0, asks(charlie))?;
        Ok(attacks)
    }

    fn add(&mut self, name: &'static str, from: &Host, per_second: f64, mut act: Act) -> Result<()> {
        let (stop, done) = (Arc::clone(&self.stop), Arc::new(AtomicU64::new(0)));
        let acted = Arc::clone(&done);
        let host = from.clone();
        let work = move || {
            let begin = Instant::now();
            while !stop.load(Relaxed) {
                if (acted.load(Relaxed) as f64) < begin.elapsed().as_secs_f64() * per_second {
                    act();
                    acted.fetch_add(1, Relaxed);
                } else {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            Ok(())
        };
        // A host that is gone at the end of the lab is no matter any more.
        let thread = std::thread::spawn(move || drop(host.inside(work)));
        self.attackers.push((name, done, thread));
        Ok(())
    }

    /// How often each has acted so far.
    fn done(&self) -> Vec<u64> {
        self.attackers.iter().map(|(_, done, _)| done.load(Relaxed)).collect()
    }

    /// Fails unless each has acted since.
    fn all_acted_since(&self, before: &[u64]) -> Result<()> {
        for ((name, done, _), before) in self.attackers.iter().zip(before) {
            ensure!(done.load(Relaxed) > *before, "no {name} while the guest moved");
        }
        Ok(())
    }
}

impl Drop for Attacks {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        for (_, _, thread) in self.attackers.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Connections that say so much and are held.
fn connects(to: SocketAddr, said: &'static [u8]) -> Act {
    let mut held = VecDeque::new();
    Box::new(move || {
        if let Ok(mut stream) = TcpStream::connect_timeout(&to, CONNECT_WITHIN) {
            let _ = stream.write_all(said);
            held.push_back(stream);
        }
        if held.len() > HELD {
            held.pop_front();
        }
    })
}

fn scrape(from: SocketAddr) {
    if let Ok(mut stream) = TcpStream::connect_timeout(&from, CONNECT_WITHIN) {
        let _ = stream.set_read_timeout(Some(CONNECT_WITHIN));
        let _ = stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n");
        let _ = stream.read_to_end(&mut Vec::new());
    }
}

/// An operator on charlie whose host may send nothing.
fn asks(charlie: &Agent) -> Act {
    let mut check = charlie.command(&["check", VM, "--to", "alpha"]);
    Box::new(move || drop(check.output()))
}

fn resident_bytes(agent: &Agent) -> Result<u64> {
    let pid = agent.pid().context("no agent")?;
    let status = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}

/// How often alpha has refused connections of strangers, and charlie.
fn refused(alpha: &Agent) -> Result<[f64; 2]> {
    let metrics = alpha.metrics()?;
    let of_strangers = metrics.sum("vmferry_connect_failures_total", &[("direction", "in")]);
    let of_charlie = metrics.sum("vmferry_peer_refusals_total", &[("peer", "charlie")]);
    // None has happened yet where there is no sample.
    Ok([of_strangers, of_charlie].map(|sum| sum.unwrap_or(0.0)))
}

/// How often the honest peer's session has lost its connection and gone on over another.
fn reconnects(alpha: &Agent) -> Result<f64> {
    let status = alpha.api("/v1/status")?;
    let sessions = status["sessions"].as_array().context("sessions")?;
    ensure!(sessions.iter().any(|session| session["peer"] == "bravo"), "no session with bravo: {status}");
    let of_bravo = [("peer", "bravo")];
    Ok(alpha.metrics()?.find("vmferry_session_reconnects_total", &of_bravo).unwrap_or(0.0))
}

/// The agent of a third host, which alpha knows and permits nothing, with a guest that could be checked.
fn asker(lab: &Lab, third: &Host, spec: &VmSpec) -> Result<Agent> {
    let to_alpha = Some(format!("{ALPHA_OF_CHARLIE}:{PORT}"));
    let of_charlie = Vm::define(&lab.paths, third, spec)?;
    of_charlie.boot()?;
    of_charlie.qmp()?.query("stop")?;
    let mut on_charlie = AgentSpec::default().vm(VmEntry::of(&of_charlie));
    on_charlie.peers.push(PeerEntry { name: "alpha".to_owned(), address: to_alpha, receive: Vec::new() });
    let credentials = Credentials::of(&lab.paths, lab.dir()).issue("charlie")?;
    Agent::start(&lab.paths, third, &on_charlie, &credentials)
}

#[test]
fn a_guest_moves_away_and_back_while_its_host_is_attacked() -> Result<()> {
    with_lab("a_guest_moves_away_and_back_while_its_host_is_attacked", |lab| {
        let spec = VmSpec { rate: 100, blocks: 512, ..VmSpec::new(VM, Version::V10) };
        let net = lab.two_hosts()?;
        let third = net.third(lab.dir())?;
        let guest = Guest::define(lab, &net, &spec, &spec)?;
        guest.alpha.boot()?;
        let nothing = PeerEntry { name: "charlie".to_owned(), address: None, receive: Vec::new() };
        let pair = Pair::start_with(lab, net, &[&guest], |on_alpha, on_bravo| {
            on_alpha.peers.push(nothing);
            // A machine that stalls loses them no connection.
            for spec in [on_alpha, on_bravo] {
                spec.end_lines = "[deadlines]\ndead_peer_s = 60\n".to_owned();
            }
        })?;
        let mut charlie = asker(lab, &third, &spec)?;
        moves(&pair, &guest, Way::ToBravo, &mut charlie)?;
        proof::guest_continued(&guest.alpha, &guest.bravo)?;
        moves(&pair, &guest, Way::ToAlpha, &mut charlie)?;
        guest.alpha.wait_more(20)?;
        guest.alpha.quit()?;
        proof::disks_whole(&guest.alpha)
    })
}

/// Moves it while alpha is attacked.
fn moves(pair: &Pair, guest: &Guest, way: Way, charlie: &mut Agent) -> Result<()> {
    guest.way(way).0.wait_more(100)?;
    let attacks = Attacks::begin(charlie, pair.alpha.host())?;
    let before = refused(&pair.alpha)?;
    wait_for("the attacks to be felt", LONG, || {
        let now = refused(&pair.alpha)?;
        Ok(now.iter().zip(before).all(|(now, before)| *now > before).then_some(()))
    })?;
    let done = attacks.done();
    migrate(pair, VM, way, &[])?;
    attacks.all_acted_since(&done)?;
    ensure!(reconnects(&pair.alpha)? == 0.0, "the honest connection was lost");
    let resident = resident_bytes(&pair.alpha)?;
    eprintln!("  {} MiB resident", resident >> 20);
    ensure!(resident < RESIDENT_MAX, "the agent has {} MiB", resident >> 20);
    drop(attacks);
    // With its session alpha has more descriptors than at first.
    charlie.terminate()?;
    pair.proves_move(guest, way)?;
    charlie.restart()
}

/// How often the guest moves to and fro, with and without attacks.
const ROUNDS: usize = 3;
/// What a migration keeps of its speed, in the median of the rounds, where all attackers, both agents and both QEMUs
/// share two processors: seen were 0.77 over 1 Gbit/s and 0.68 without a limit.
const KEPT_MIN: f64 = 0.6;
/// Of the guest's disk, of which nearly all is written.
const DISK_MIB: u32 = 512;

/// Moves it there and back, attacked or not: how long both took together.
fn there_and_back(pair: &Pair, charlie: &Agent, is_attacked: bool) -> Result<f64> {
    let attacks = is_attacked.then(|| Attacks::begin(charlie, pair.alpha.host())).transpose()?;
    let mut took_ms = 0.0;
    for way in [Way::ToBravo, Way::ToAlpha] {
        let done = attacks.as_ref().map(Attacks::done);
        let last = migrate(pair, VM, way, &[])?;
        took_ms += last["elapsed_ms"].as_f64().context("elapsed_ms")?;
        if let (Some(attacks), Some(done)) = (&attacks, done) {
            attacks.all_acted_since(&done)?;
        }
    }
    Ok(took_ms)
}

/// All attacks at once, over a link of 1 Gbit/s and over one without a limit, where attackers, QEMUs and agents fight
/// for the processors.
#[test]
#[ignore = "it measures: make attacks"]
fn migrations_keep_their_speed_while_their_host_is_attacked() -> Result<()> {
    with_lab("migrations_keep_their_speed_while_their_host_is_attacked", |lab| {
        let disks = vec![DiskFormat::Raw];
        let spec =
            VmSpec { rate: 10, blocks: 512, disks, disk_mib: DISK_MIB, ..VmSpec::new(VM, Version::V10) };
        let net = lab.two_hosts()?;
        let third = net.third(lab.dir())?;
        let guest = Guest::define(lab, &net, &spec, &spec)?;
        guest.alpha.boot()?;
        ensure!(guest.alpha.write_beyond(0, u64::from(DISK_MIB) - 16)?, "no place to write to");
        let nothing = PeerEntry { name: "charlie".to_owned(), address: None, receive: Vec::new() };
        let pair = Pair::start_with(lab, net, &[&guest], |on_alpha, _| on_alpha.peers.push(nothing))?;
        let charlie = asker(lab, &third, &spec)?;
        let mut slowed = Vec::new();
        for (link, mbit) in [("1 Gbit/s", Some(1000)), ("no limit", None)] {
            match mbit {
                Some(mbit) => pair.net.limit_mbit(mbit)?,
                None => pair.net.no_limit()?,
            }
            let mut kept = Vec::new();
            for _ in 0..ROUNDS {
                let before = there_and_back(&pair, &charlie, false)?;
                let attacked = there_and_back(&pair, &charlie, true)?;
                let after = there_and_back(&pair, &charlie, false)?;
                eprintln!("  {link}: {before:.0} ms, attacked {attacked:.0} ms, {after:.0} ms");
                kept.push((before + after) / 2.0 / attacked);
            }
            kept.sort_by(f64::total_cmp);
            let (median, least, most) = (kept[ROUNDS / 2], kept[0], kept[ROUNDS - 1]);
            println!("migrations, {link}: {median:.2} [{least:.2}–{most:.2}] of their speed");
            if median < KEPT_MIN {
                slowed.push(format!("{link}: {median:.2}"));
            }
        }
        ensure!(slowed.is_empty(), "less than {KEPT_MIN} of their speed: {}", slowed.join(", "));
        Ok(())
    })
}
