//! New certificates without a restart: what SIGHUP keeps, and what it ends. Two agents in two
//! network namespaces, without a guest where none is needed, and in the middle of a migration.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::faults::{Migration, Plan, Stage};
use crate::support::process::{SHORT, run, wait_for};
use crate::support::proof::field;
use crate::support::{Agent, AgentSpec, Credentials, Lab, with_lab};
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

/// The authority, and the list that alpha goes by.
struct Revocation<'a> {
    lab: &'a Lab,
}

impl Revocation<'_> {
    fn list(&self) -> PathBuf {
        self.lab.dir().join("certs/crl.pem")
    }

    /// Revokes `hosts`; without any, only renews the list.
    fn revoke(&self, hosts: &[&str]) -> Result<()> {
        let mut command = Command::new(&self.lab.paths.vmferry);
        command.args(["certs", "revoke"]).args(hosts).arg("--dir").arg(self.lab.dir().join("certs"));
        run(&mut command, SHORT).map(drop)
    }
}

fn use_list(agent: &mut Agent, list: &Path) -> Result<()> {
    agent.terminate()?;
    let config = agent.host().dir.join("vmferry.toml");
    let text = fs::read_to_string(&config)?;
    let with_list = text.replacen("[metrics]", &format!("crl = \"{}\"\n[metrics]", list.display()), 1);
    ensure!(with_list != text, "no place for the list in {text}");
    fs::write(&config, with_list)?;
    agent.restart()
}

/// The addresses of an agent's sessions: the peer's port is the connection's mark.
fn sessions(agent: &Agent) -> Result<Vec<String>> {
    let status = agent.api("/v1/status")?;
    let sessions = status["sessions"].as_array().context("no sessions in the status")?;
    Ok(sessions.iter().map(|s| s["address"].to_string()).collect())
}

/// Sends SIGHUP and waits until the log has said `said` once more.
fn reload(agent: &Agent, said: &str) -> Result<()> {
    let count = || Ok::<_, anyhow::Error>(fs::read_to_string(agent.log())?.matches(said).count());
    let before = count()?;
    agent.signal(Signal::SIGHUP)?;
    wait_for(&format!("the agent to say \"{said}\""), SHORT, || Ok((count()? > before).then_some(())))
}

#[test]
fn a_reload_ends_what_is_revoked_and_nothing_else() -> Result<()> {
    with_lab("a_reload_ends_what_is_revoked_and_nothing_else", |lab| {
        let net = lab.two_hosts()?;
        let credentials = Credentials::create(&lab.paths, lab.dir())?;
        let (of_alpha, of_bravo) = (credentials.issue("alpha")?, credentials.issue("bravo")?);
        let mut alpha =
            Agent::start(&lab.paths, &net.alpha, &AgentSpec::default().peer(&net.bravo), &of_alpha)?;
        let bravo = Agent::start(&lab.paths, &net.bravo, &AgentSpec::default().peer(&net.alpha), &of_bravo)?;
        let revocation = Revocation { lab };
        revocation.revoke(&[])?;
        use_list(&mut alpha, &revocation.list())?;
        let pid = alpha.pid();

        // Nobody knows the VM, but the question needs a session.
        alpha.vmferry(&["check", "nobody", "--to", "bravo"])?;
        let before = sessions(&bravo)?;
        ensure!(before.len() == 1, "{before:?}");

        reload(&alpha, "certificates reloaded")?;
        ensure!(sessions(&bravo)? == before, "a reload of good files ended the session");

        let (cert, away) = (of_alpha.join("cert.pem"), of_alpha.join("away.pem"));
        fs::rename(&cert, &away)?;
        reload(&alpha, "certificates not reloaded")?;
        ensure!(sessions(&bravo)? == before, "files that are wrong ended the session");
        fs::rename(&away, &cert)?;

        // Nobody says so to the agent: it sees that the list has changed.
        revocation.revoke(&["bravo"])?;
        let said =
            || Ok::<_, anyhow::Error>(fs::read_to_string(alpha.log())?.contains("not trusted any more"));
        wait_for("the list to be taken", SHORT, || Ok(said()?.then_some(())))?;
        wait_for("the end of the session", SHORT, || Ok(sessions(&alpha)?.is_empty().then_some(())))?;
        let refused = alpha.vmferry(&["check", "nobody", "--to", "bravo"])?;
        ensure!(refused.code == 1 && refused.stdout.contains("is revoked"), "{refused:?}");
        ensure!(alpha.pid() == pid, "the agent was started anew");
        Ok(())
    })
}

/// The folder of the stage's authority, out of which the agents read their files.
struct Authority {
    vmferry: PathBuf,
    folder: PathBuf,
}

impl Authority {
    fn of(lab: &Lab) -> Self {
        Self { vmferry: lab.paths.vmferry.clone(), folder: lab.dir().join("certs") }
    }

    fn certs(&self, words: &[&str]) -> Result<()> {
        let mut command = Command::new(&self.vmferry);
        run(command.arg("certs").args(words).arg("--dir").arg(&self.folder), SHORT).map(drop)
    }

    fn count(&self, of: &str, mark: &str) -> Result<usize> {
        Ok(fs::read_to_string(self.folder.join(of))?.matches(mark).count())
    }
}

/// Both hosts read their files again, one after the other.
fn reload_both(stage: &Stage) -> Result<()> {
    reload(&stage.alpha, "certificates reloaded")?;
    reload(&stage.bravo, "certificates reloaded")
}

/// A peer that was never lost has no sample.
fn reconnects(agent: &Agent) -> Result<f64> {
    Ok(agent.metrics()?.find("vmferry_session_reconnects_total", &[]).unwrap_or(0.0))
}

/// Begins a migration that takes its time, and waits until it copies.
fn slow(stage: &Stage) -> Result<Migration> {
    let migration = Migration::begin(&stage.alpha, "web1", "bravo", &["--limit", "4MiB/s", "--keep-source"])?;
    let copies = |p: &serde_json::Value| p["disks"][0]["stream_bytes"].as_u64() > Some(0);
    migration.reach(&stage.alpha.socket(), "mirror", copies)?;
    Ok(migration)
}

#[test]
fn both_hosts_go_to_another_authority_while_a_guest_moves() -> Result<()> {
    with_lab("both_hosts_go_to_another_authority_while_a_guest_moves", |lab| {
        // A machine that stalls loses them no connection.
        let deadlines = "dead_peer_s = 60\nresume_s = 8\nresume_paused_s = 4\n";
        let mut stage = Stage::set_up(lab, Plan { rate: 60, deadlines, ..Plan::ORDINARY })?;
        let migration = slow(&stage)?;
        let authority = Authority::of(lab);
        let (old, before) = (fs::read(authority.folder.join("ca-cert.pem"))?, reconnects(&stage.alpha)?);
        for step in ["begin", "switch"] {
            authority.certs(&["rotate-ca", step])?;
            ensure!(authority.count("hosts/alpha/ca-cert.pem", "BEGIN")? == 2, "not both after {step}");
            reload_both(&stage)?;
            ensure!(reconnects(&stage.alpha)? == before, "{step} cost a connection");
        }
        authority.certs(&["rotate-ca", "end"])?;
        ensure!(authority.count("hosts/bravo/ca-cert.pem", "BEGIN")? == 1);
        ensure!(fs::read(authority.folder.join("hosts/bravo/ca-cert.pem"))? != old, "the old one is left");
        reload_both(&stage)?;
        // What each of them had shown to the other was of the old one.
        wait_for("the session to go on with the new certificates", SHORT, || {
            Ok((reconnects(&stage.alpha)? > before).then_some(()))
        })?;
        let now = migration.now(&stage.alpha)?;
        ensure!(field(&now, "/phase")? == "mirror", "the rotation was not within the copying: {now}");
        let free = stage.alpha.vmferry(&["limit", &migration.id, "--rate", "none"])?;
        ensure!(free.code == 0, "{free:?}");
        stage.calm()?;
        let report = migration.ended(&stage.alpha)?;
        ensure!(field(&report, "/outcome/result")? == "moved", "{report}");
        stage.is_moved()
    })
}

#[test]
fn a_peer_that_is_revoked_in_the_middle_of_a_migration_gets_no_guest() -> Result<()> {
    with_lab("a_peer_that_is_revoked_in_the_middle_of_a_migration_gets_no_guest", |lab| {
        let stage = Stage::set_up(lab, Plan { rate: 60, ..Plan::ORDINARY })?;
        let authority = Authority::of(lab);
        let migration = slow(&stage)?;
        authority.certs(&["revoke", "bravo"])?;
        // A list that its configuration has not named before.
        let (config, list) = (stage.alpha.host().dir.join("vmferry.toml"), authority.folder.join("crl.pem"));
        let text = fs::read_to_string(&config)?;
        let with_list = text.replacen("[metrics]", &format!("crl = \"{}\"\n[metrics]", list.display()), 1);
        ensure!(with_list != text, "no place for the list in {text}");
        fs::write(&config, with_list)?;
        reload(&stage.alpha, "not trusted any more")?;
        let report = migration.ended(&stage.alpha)?;
        ensure!(field(&report, "/outcome/result")? == "failed", "{report}");
        ensure!(field(&report, "/outcome/phase")? == "mirror", "{report}");
        ensure!(stage.source.qmp()?.status()? == "running");
        stage.source.wait_more(100)?;
        let refused = stage.alpha.vmferry(&["check", "web1", "--to", "bravo"])?;
        ensure!(refused.code == 1 && refused.stdout.contains("is revoked"), "{refused:?}");
        // The other host has nothing of it any more, and says so to its own operator.
        wait_for("the end at the destination", SHORT, || {
            let list = stage.bravo.api("/v1/migrations")?;
            Ok((field(&list, "/0/outcome/result").ok() == Some(&"failed".into())).then_some(()))
        })
    })
}
