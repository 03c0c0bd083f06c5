//! A planned restart is a non-event: another process takes over from an agent in the middle of a
//! migration, in every phase, at the source, at the destination and at both. QEMU notices a pause,
//! and the migration goes on as if nothing had been.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use crate::faults::{Migration, Plan, Reach, Stage};
use crate::support::process::{LONG, SHORT, wait_for};
use crate::support::proof::field;
use crate::support::{Agent, with_lab};
use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// Where a restart hits, and whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whom {
    Source,
    Destination,
    Both,
}

/// A metric of all peers.
fn metric(agent: &Agent, name: &str) -> Result<f64> {
    let text = agent.metrics()?;
    let of = |line: &str| line.strip_prefix(name)?.strip_prefix('{')?.rsplit_once(' ')?.1.parse::<f64>().ok();
    Ok(text.lines().filter_map(of).sum())
}

fn away(agent: &Agent) -> Result<f64> {
    metric(agent, "vmferry_session_away_seconds_total")
}

/// Waits until the session of both agents has a connection again.
fn joined(stage: &Stage) -> Result<()> {
    for agent in [&stage.alpha, &stage.bravo] {
        wait_for("the session to be resumed", SHORT, || {
            let status = agent.api("/v1/status")?;
            let sessions = field(&status, "/sessions")?.as_array().map_or(&[][..], Vec::as_slice);
            let joined = !sessions.is_empty() && sessions.iter().all(|s| s["reconnecting"].is_null());
            Ok(joined.then_some(()))
        })?;
    }
    Ok(())
}

/// Replaces agents while `migration` is under way, which must not even change its phase.
fn replace(stage: &mut Stage, migration: &Migration, whom: Whom, phase: &str) -> Result<()> {
    let (since, before) = (Instant::now(), away(&stage.bravo)?);
    match whom {
        Whom::Source => stage.alpha.take_over()?,
        Whom::Destination => stage.bravo.take_over()?,
        Whom::Both => {
            let (alpha, bravo) = (&mut stage.alpha, &mut stage.bravo);
            std::thread::scope(|scope| {
                let there = scope.spawn(|| bravo.take_over());
                alpha.take_over()?;
                there.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })?;
        }
    }
    joined(stage)?;
    let now = migration.now(&stage.alpha)?;
    ensure!(now["outcome"].is_null() || now["outcome"]["result"] == "moved", "it ended: {now}");
    // Where both are new processes, nobody has counted the whole of it.
    let stood = match whom {
        Whom::Source => format!("{:.2} s without a connection", {
            wait_for("the count", SHORT, || Ok(Some(away(&stage.bravo)?).filter(|now| *now > before)))?
                - before
        }),
        _ => String::new(),
    };
    eprintln!("  {phase:<12} {:<12} {:>5.1} s  {stood}", format!("{whom:?}"), since.elapsed().as_secs_f64());
    Ok(())
}

#[test]
fn agents_are_replaced_in_every_phase_of_one_migration() -> Result<()> {
    with_lab("agents_are_replaced_in_every_phase_of_one_migration", |lab| {
        let mut stage = Stage::set_up(lab, Plan::ORDINARY)?;
        stage.start.close()?;
        let migration = stage.begin()?;
        stage.bring_to(Reach::Prepare, &migration)?;
        replace(&mut stage, &migration, Whom::Source, "prepare")?;
        stage.start.open();
        for (reach, phase, all) in [
            (Reach::Mirror, "mirror", &[Whom::Source, Whom::Destination, Whom::Both][..]),
            (Reach::Precopy, "precopy", &[Whom::Source, Whom::Destination, Whom::Both]),
            (Reach::Switchover, "switchover", &[Whom::Both]),
            (Reach::Device, "device", &[Whom::Both]),
        ] {
            stage.bring_to(reach, &migration)?;
            for whom in all {
                replace(&mut stage, &migration, *whom, phase)?;
            }
        }
        stage.calm()?;
        let report = migration.ended(&stage.alpha)?;
        ensure!(field(&report, "/outcome/result")? == "moved", "{report}");
        stage.is_moved()
    })
}

/// From the hand-over on the journal has all that the next process needs.
#[test]
fn agents_are_replaced_at_the_hand_over() -> Result<()> {
    with_lab("agents_are_replaced_at_the_hand_over", |lab| {
        let mut stage = Stage::set_up(lab, Plan::ORDINARY)?;
        let migration = stage.reach(Reach::HandOver)?;
        stage.alpha.take_over()?;
        // The destination's process waits until the guest runs: nothing else is safe.
        let hook = stage.hook.clone();
        let opening = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_secs(1));
            hook.open();
        });
        stage.bravo.take_over()?;
        let _ = opening.join();
        let report = migration.ended(&stage.alpha)?;
        ensure!(field(&report, "/outcome/result")? == "moved", "{report}");
        stage.source.wait_ended()?;
        stage.destination.wait_more(50)?;
        ensure!(stage.copies.calls() == 1, "the hook was called {} times", stage.copies.calls());
        Ok(())
    })
}

/// A successor that cannot read what is left is refused before anything is given up.
#[test]
fn who_cannot_take_over_is_told_so_first() -> Result<()> {
    with_lab("who_cannot_take_over_is_told_so_first", |lab| {
        let mut stage = Stage::set_up(lab, Plan::ORDINARY)?;
        let migration = stage.reach(Reach::Mirror)?;
        let socket = stage.alpha.host().dir.join("run/takeover.sock");
        let ask = |offer: &str| -> Result<Value> {
            let mut stream = UnixStream::connect(&socket)?;
            stream.set_read_timeout(Some(SHORT))?;
            writeln!(stream, "{offer}")?;
            let mut answer = String::new();
            BufReader::new(stream).read_line(&mut answer)?;
            serde_json::from_str(&answer).with_context(|| format!("{answer:?}"))
        };
        let answer = ask(r#"{"version":"99.0.0","formats":[98,99]}"#)?;
        let why = answer["no"].as_str().unwrap_or_default();
        ensure!(why.contains("99.0.0") && why.contains("98"), "{answer}");
        // The version before this one does not know of compressed streams.
        let answer = ask(r#"{"version":"0.0.1","formats":[1]}"#)?;
        ensure!(answer["no"].as_str().is_some_and(|why| why.contains("0.0.1")), "{answer}");
        // One that could, but goes away with everything in its hands: it is given up again.
        let answer = ask(r#"{"version":"99.0.0","formats":[99,2]}"#)?;
        ensure!(answer == "yes", "{answer}");
        wait_for("the migration to go on", LONG, || {
            let now = migration.now(&stage.alpha)?;
            ensure!(now["outcome"].is_null(), "{now}");
            Ok((now["phase"] == "mirror" && now["rate_bytes_per_s"].as_u64() > Some(0)).then_some(()))
        })?;
        stage.calm()?;
        let report = migration.ended(&stage.alpha)?;
        ensure!(field(&report, "/outcome/result")? == "moved", "{report}");
        Ok(())
    })
}
