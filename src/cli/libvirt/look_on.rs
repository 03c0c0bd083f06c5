//! `vmferry watch` of a migration that libvirt makes itself: looks on, and changes nothing. Whoever follows its
//! events keeps its sockets, so it is asked for instead.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::time::{Instant, MissedTickBehavior, interval};
use uuid::Uuid;

use super::show::{self, Progress};
use crate::api::{LIBVIRT, LibvirtEnd, LibvirtMigration, LibvirtStage};
use crate::cli::client::Client;
use crate::cli::exit_code::{EXIT_FAILED, EXIT_LEFT, EXIT_UNDECIDED};

const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long an agent that has gone is waited for.
const REATTACH_WITHIN: Duration = Duration::from_secs(30);

/// Shows it until its end. Ctrl-C ends the looking only.
pub(in crate::cli) async fn look_on(client: &Client, id: Uuid, json: bool) -> anyhow::Result<ExitCode> {
    let progress = Progress::new(json);
    let mut looks = interval(LOOK_EVERY);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut heard = Instant::now();
    loop {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => return Ok(ExitCode::SUCCESS),
            _ = looks.tick() => {}
        }
        let all: Vec<LibvirtMigration> = match client.get(LIBVIRT).await {
            Ok(all) => all,
            // It is restarted, which takes moments.
            Err(_) if heard.elapsed() < REATTACH_WITHIN => continue,
            Err(e) => return Err(e.context("the agent is gone; libvirt goes on by itself")),
        };
        heard = Instant::now();
        let state = all.into_iter().find(|m| m.id == id);
        let state = state.with_context(|| {
            format!("the agent does not know {id} any more: it was ended by its stop or its crash, and libvirt knows how")
        })?;
        if state.stage != LibvirtStage::Ended {
            progress.show(&state, None);
            continue;
        }
        drop(progress);
        return end(&state, json);
    }
}

fn end(state: &LibvirtMigration, json: bool) -> anyhow::Result<ExitCode> {
    if json {
        crate::cli::show::json_line(state, true)?;
    } else {
        println!("{}: {}, {}", state.domain, show::state(state), show::text(state, None, 0));
        show::bypassed(state);
        show::left(state);
    }
    let Some(ended) = state.ended else { bail!("the agent says that it has ended, and not how") };
    Ok(code(ended, !state.left.is_empty()))
}

fn code(ended: LibvirtEnd, is_left: bool) -> ExitCode {
    match ended {
        LibvirtEnd::Moved if !is_left => ExitCode::SUCCESS,
        LibvirtEnd::Moved | LibvirtEnd::Bypassed => EXIT_LEFT.into(),
        LibvirtEnd::Failed => EXIT_FAILED.into(),
        LibvirtEnd::Unknown => EXIT_UNDECIDED.into(),
    }
}
