//! `vmferry doctor`: what was found, as lines or JSON, and the exit code. What only the agent knows is asked of it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;
use tokio::net::UnixStream;

use super::client::{Client, NotDone};
use super::exit_code::EXIT_FAILED;
use super::show;
use crate::api::{Here, Status};
use crate::config::DEFAULT_PATH;
use crate::doctor::{Finding, RunningAgent, State, examine};
use crate::printable::printable;

#[derive(Debug, Args)]
pub(super) struct DoctorArgs {
    /// The agent's configuration.
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
    config: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    findings: Vec<Finding>,
}

pub(super) async fn run(client: &Client, socket: &Path, args: DoctorArgs) -> anyhow::Result<ExitCode> {
    let status = client.get::<Status>("/v1/status").await;
    let agent = match &status {
        Ok(_) => {
            let stream = UnixStream::connect(socket).await.ok();
            Some(RunningAgent { pid: stream.and_then(|stream| stream.peer_cred().ok()?.pid()) })
        }
        Err(_) => None,
    };
    let mut findings = vec![of_agent(&status)];
    findings.extend(examine(&args.config, agent.as_ref()).await);
    if let Ok(status) = &status {
        findings.extend(status.vm_states.iter().map(of_vm));
    }
    findings.push(Finding::unknown(
        "the way to peers",
        "is not looked at here",
        "`vmferry ping PEER` looks at one, `vmferry check VM --to PEER` at a guest and both hosts",
    ));
    let failed = findings.iter().any(|finding| finding.state == State::Failed);
    if args.json {
        show::json(&Report { findings })?;
    } else {
        findings.iter().for_each(line);
    }
    Ok(if failed { EXIT_FAILED.into() } else { ExitCode::SUCCESS })
}

fn line(finding: &Finding) {
    let mark = match finding.state {
        State::Ok => "ok      ",
        State::Warning => "warning ",
        State::Failed => "FAILED  ",
        State::Unknown => "unknown ",
    };
    println!("{mark} {}: {}", printable(&finding.what), printable(&finding.text));
    if let Some(remedy) = &finding.remedy {
        println!("          → {}", printable(remedy));
    }
}

fn of_agent(status: &anyhow::Result<Status>) -> Finding {
    match status {
        Ok(status) => {
            let failing = status.audit.as_ref().and_then(|audit| audit.failing.clone());
            match failing {
                Some(why) => {
                    Finding::failed("audit record", why, "make room, or mend its folder's permissions")
                }
                None => {
                    Finding::ok("agent", format!("{} answers, version {}", status.identity, status.version))
                }
            }
        }
        Err(e) if e.downcast_ref::<NotDone>().is_some_and(|e| matches!(e, NotDone::Unreachable { .. })) => {
            Finding::warning("agent", format!("{e:#}"), "systemctl start vmferry")
        }
        Err(e) => Finding::unknown("agent", format!("{e:#}"), "use a user that may view"),
    }
}

fn of_vm(state: &crate::api::VmState) -> Finding {
    let what = format!("QEMU of {}", state.vm);
    let said = state.qemu_state.as_deref().unwrap_or("no state");
    match state.here {
        Here::Unknown => {
            let cause = state.cause.as_deref().unwrap_or("it could not be asked");
            Finding::unknown(what, cause, "see whether it lives, and whether another program has its monitor")
        }
        Here::Spent => Finding::warning(what, "has lost the migration that it waited for", "start it anew"),
        Here::NoQemu => {
            Finding::unknown(what, "nobody listens at its monitor", "nothing unless it is to run here")
        }
        Here::InMigration => {
            Finding::unknown(what, "is in a migration, and was not asked", "`vmferry watch`")
        }
        _ => Finding::ok(what, format!("answers: {said}; `vmferry check` asks what it can do")),
    }
}
