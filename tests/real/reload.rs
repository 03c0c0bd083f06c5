//! New certificates without a restart: what SIGHUP keeps, and what it ends. Two agents in two
//! network namespaces; no guest is needed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::process::{SHORT, run, wait_for};
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

        revocation.revoke(&["bravo"])?;
        reload(&alpha, "not trusted any more")?;
        wait_for("the end of the session", SHORT, || Ok(sessions(&alpha)?.is_empty().then_some(())))?;
        let refused = alpha.vmferry(&["check", "nobody", "--to", "bravo"])?;
        ensure!(refused.code == 1 && refused.stdout.contains("is revoked"), "{refused:?}");
        ensure!(alpha.pid() == pid, "the agent was started anew");
        Ok(())
    })
}
