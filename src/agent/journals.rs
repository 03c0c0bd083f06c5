//! Journals that wait for this agent: what an earlier process left open is settled, what a full disk
//! kept from its end is ended, old ones are thrown away.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::registry::Timelines;
use super::running::Agent;
use crate::error_chain::chain;
use crate::migrate::journal::Role;
use crate::migrate::progress::{Progress, ProgressSink};
use crate::migrate::{Host, settle};

/// Between two tries to end the journals of ended migrations whose disk was full.
const END_LATE_EVERY: Duration = Duration::from_secs(5);

/// Takes up what an earlier life of this agent left open.
pub(super) fn settle_all(
    agent: &Arc<Agent>,
    (open, history): (Vec<settle::Open>, Vec<Progress>),
    mut timelines: Timelines,
) {
    for progress in agent.history.load(history) {
        let progress = ProgressSink::new(progress);
        timelines.restore(&progress);
        agent.registry.add(progress);
    }
    for one in open {
        timelines.restore(&one.progress);
        agent.registry.add(one.progress.clone());
        settle_one(agent, one);
    }
}

/// Takes up what was left to its journal when a process that was to take over did not: whoever
/// follows it goes on to see it.
pub(super) fn settle_abandoned(agent: &Arc<Agent>, taken: &BTreeSet<(Uuid, Role)>) {
    let found = tokio::task::block_in_place(|| settle::abandoned(&agent.host, taken));
    match found {
        Ok(open) => {
            for mut one in open {
                let now = one.progress.now();
                match agent.registry.followed(now.id, now.role) {
                    Some(progress) => {
                        progress.update(|p| (p.phase, p.outcome) = (now.phase, None));
                        one.progress = progress;
                    }
                    None => agent.registry.add(one.progress.clone()),
                }
                settle_one(agent, one);
            }
        }
        Err(e) => tracing::error!(error = chain(&e), "open journals cannot be read; a restart settles them"),
    }
}

fn settle_one(agent: &Arc<Agent>, one: settle::Open) {
    let settling = Arc::clone(agent);
    agent.sources.spawn(async move {
        let progress = one.progress.clone();
        let frozen = settling.host.freeze.begun();
        tokio::select! {
            () = settle::settle(Arc::clone(&settling.host), one) => settling.ended(&progress),
            // Its journal is open, for whoever comes next.
            () = frozen => {}
        }
    });
}

/// Ends journals once their disk has room again, and throws old ones away when many have ended.
pub(super) async fn end_late(agent: Arc<Agent>) {
    loop {
        tokio::time::sleep(END_LATE_EVERY).await;
        if let Err(e) = agent.host.journals.end_late() {
            tracing::debug!(error = chain(&e), "a journal still cannot be ended");
        }
        if agent.host.journals.are_many() {
            let host = Arc::clone(&agent.host);
            // One at a time; it cannot fail but by a panic, which its thread has told.
            let _ended = tokio::task::spawn_blocking(move || prune(&host)).await;
        }
    }
}

/// Throws old journals away, once the agent listens: nobody waits for it.
pub(super) fn prune(host: &Host) {
    if let Err(e) = host.journals.prune() {
        tracing::warn!(error = chain(&e), "old journals are kept");
    }
}
