//! A planned restart is a non-event: another process takes over from an agent in the middle of a
//! migration, in every phase, at the source, at the destination and at both. QEMU notices a pause,
//! and the migration goes on as if nothing had been.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use crate::faults::{Migration, Plan, Reach, Stage};
use crate::support::process::{LONG, SHORT, run_any, wait_for};
use crate::support::proof::field;
use crate::support::{Agent, Credentials, Lab, with_lab};
use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// Where a restart hits, and whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whom {
    Source,
    Destination,
    Both,
}

/// Nothing while a process that has just begun has not looked at its sessions yet.
fn away(agent: &Agent) -> Result<f64> {
    Ok(agent.metrics()?.find("vmferry_session_away_seconds_total", &[]).unwrap_or_default())
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
        stage.start().close()?;
        let migration = stage.begin()?;
        stage.bring_to(Reach::Prepare, &migration)?;
        replace(&mut stage, &migration, Whom::Source, "prepare")?;
        stage.start().open();
        replace_in_every_phase(&mut stage, &migration)?;
        stage.calm()?;
        let report = migration.ended(&stage.alpha)?;
        ensure!(field(&report, "/outcome/result")? == "moved", "{report}");
        stage.is_moved()
    })
}

fn replace_in_every_phase(stage: &mut Stage, migration: &Migration) -> Result<()> {
    for (reach, phase, all) in [
        (Reach::Mirror, "mirror", &[Whom::Source, Whom::Destination, Whom::Both][..]),
        (Reach::Precopy, "precopy", &[Whom::Source, Whom::Destination, Whom::Both]),
        (Reach::Switchover, "switchover", &[Whom::Both]),
        (Reach::Device, "device", &[Whom::Both]),
    ] {
        stage.bring_to(reach, migration)?;
        for whom in all {
            replace(stage, migration, *whom, phase)?;
        }
    }
    Ok(())
}

/// The source's agent itself copies what changed, and its connections to the destination's NBD server are in the middle
/// of requests.
#[test]
fn agents_are_replaced_in_every_phase_of_a_further_try() -> Result<()> {
    with_lab("agents_are_replaced_in_every_phase_of_a_further_try", |lab| {
        let mut stage = Stage::set_up(lab, Plan::ORDINARY)?;
        let migration = stage.reach_with(Reach::Precopy, &["--retry", "2", "--keep-source"])?;
        stage.limit_to_mirror()?;
        stage.destination.kill()?;
        wait_for("the second try", LONG, || {
            let now = migration.now(&stage.alpha)?;
            ensure!(now["outcome"].is_null(), "it ended: {now}");
            Ok((now["tries"]["number"] == 2).then_some(()))
        })?;
        replace_in_every_phase(&mut stage, &migration)?;
        stage.calm()?;
        let report = migration.ended(&stage.alpha)?;
        ensure!(report["outcome"]["result"] == "moved" && report["tries"]["number"] == 2, "{report}");
        let notes = report["notes"].to_string();
        ensure!(!notes.contains("the whole disk") && notes.contains("copied again"), "{report}");
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
        let hook = stage.hook().clone();
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
        ensure!(stage.copies().calls() == 1, "the hook was called {} times", stage.copies().calls());
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

/// A process of the same program that must not get far: with another certificate, or another state
/// folder, but the same runtime folder. What it says.
fn stranger(stage: &Stage, change: impl Fn(&str) -> String, words: &[&str]) -> Result<String> {
    let host = stage.alpha.host();
    let text = std::fs::read_to_string(host.dir.join("vmferry.toml"))?;
    let config = host.dir.join("stranger.toml");
    std::fs::write(&config, change(&text))?;
    let mut command = host.command(&stage.paths.vmferry);
    command.arg("agent").arg("--config").arg(&config).args(words);
    let outcome = run_any(&mut command, LONG)?;
    ensure!(outcome.code == 1, "it gave {outcome:?}");
    Ok(outcome.stdout + &outcome.stderr)
}

/// Another host's process asks to take over; the running agent gives everything, and gets it back.
fn take_over_in_vain(lab: &Lab, stage: &Stage) -> Result<()> {
    let hosts = lab.dir().join("certs/hosts");
    let (ours, theirs) = (hosts.join("alpha"), hosts.join("charlie"));
    let change = |text: &str| text.replace(&ours.display().to_string(), &theirs.display().to_string());
    let said = stranger(stage, change, &["--take-over"])?;
    ensure!(said.contains("this is charlie"), "{said}");
    Ok(())
}

/// A process that does not take over after all changes nothing, also for what had been left to its
/// journal alone: a source at the hand-over, and one that is being settled.
#[test]
fn a_take_over_that_fails_changes_nothing() -> Result<()> {
    with_lab("a_take_over_that_fails_changes_nothing", |lab| {
        let mut stage = Stage::set_up(lab, Plan::ORDINARY)?;
        Credentials::of(&stage.paths, lab.dir()).issue("charlie")?;
        let other = |text: &str| text.replace("/state\"", "/other-state\"");
        let said = stranger(&stage, other, &[])?;
        ensure!(said.contains("another agent uses") && said.contains("/run"), "{said}");
        // It has not taken the running agent's sockets away.
        stage.alpha.take_over()?;

        let migration = stage.reach(Reach::HandOver)?;
        take_over_in_vain(lab, &stage)?;
        let now = migration.now(&stage.alpha)?;
        ensure!(now["outcome"].is_null() && now["phase"] == "hand-over", "{now}");
        let again = stage.alpha.vmferry(&["migrate", "web1", "--to", "bravo"])?;
        ensure!(again.code != 0 && again.stdout.contains("already part of migration"), "{again:?}");
        // Before the guest has run there: it never did, and the source is told so.
        stage.destination.kill()?;
        stage.calm()?;
        let report = migration.ended(&stage.alpha)?;
        ensure!(field(&report, "/outcome/result")? == "failed", "{report}");
        stage.is_as_before()?;

        let migration = stage.reach(Reach::HandOver)?;
        stage.alpha.kill()?;
        stage.alpha.restart()?;
        wait_for("the settlement", SHORT, || Ok(migration.now(&stage.alpha).ok().map(drop)))?;
        take_over_in_vain(lab, &stage)?;
        let now = migration.now(&stage.alpha)?;
        ensure!(now["outcome"].is_null() && now["phase"] == "hand-over", "{now}");
        stage.calm()?;
        stage.has_moved(&migration)
    })
}
