//! The hand-off: how this process begins with what another has left, and gives way to the next.
//!
//! `freeze` makes the `state` and takes it up again; `transport` is what all ways to the next process
//! share. There are two: the service manager's store (`systemd`), where everything waits in one
//! `fd_queue`, and from process to process (`socket`).

mod fd_queue;
mod freeze;
mod passed_sockets;
mod socket;
mod state;
mod systemd;
mod transport;

use std::sync::Arc;

use super::draining;
use super::journals::settle_abandoned;
use super::running::Agent;
use crate::config::Config;
use crate::net::stream_owner::Descriptors;
use socket::Successor;
use state::HandoffState;
use transport::{Offer, Package};

pub(super) use passed_sockets::PassedSockets;
pub(super) use socket::{Predecessor, listen};
pub(super) use state::LeftCounts;

/// What the service manager has kept, if anything.
pub(super) type Kept = anyhow::Result<Option<Package>>;

/// What the service manager passes to a process that it starts.
pub(super) struct Passed {
    pub(super) kept: Kept,
    pub(super) sockets: PassedSockets,
}

/// What it has passed to this one. To be called once.
pub(super) fn passed() -> Passed {
    match systemd::passed() {
        Ok((kept, sockets)) => Passed { kept, sockets: PassedSockets::new(sockets) },
        Err(e) => Passed { kept: Err(e), sockets: PassedSockets::default() },
    }
}

/// How an agent begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartMode {
    /// With what the service manager kept of a process before, if that is anything.
    Alone,
    /// With everything that the running agent holds, which ends.
    TakeOver,
}

/// What this version can take over, as a line of JSON.
pub fn handoff_formats() -> anyhow::Result<String> {
    Ok(serde_json::to_string(&Offer::ours())?)
}

/// What this version makes of what a process of `identity` has left: the same again, without the descriptors.
#[doc(hidden)]
pub fn reread(left: &[u8], identity: &str) -> anyhow::Result<Vec<u8>> {
    HandoffState::decode(left, identity)?.encode()
}

/// What another process has left, and whether that one waits for our word.
pub(super) struct Inherited {
    pub(super) state: Option<(HandoffState, Descriptors)>,
    pub(super) predecessor: Option<Predecessor>,
}

impl Inherited {
    /// Whatever there is and can be read. What cannot is lost, and told: the journals know what
    /// was under way.
    pub(super) fn find(config: &Config, identity: &str, kept: Kept, mode: StartMode) -> anyhow::Result<Self> {
        if mode == StartMode::TakeOver {
            let asked = || socket::take_over(&config.runtime_dir);
            let (package, predecessor) = tokio::task::block_in_place(asked)?;
            return match HandoffState::decode(&package.state, identity) {
                Ok(state) => {
                    let state = Some((state, Descriptors::new(package.fds)));
                    Ok(Self { state, predecessor: Some(predecessor) })
                }
                Err(e) => {
                    predecessor.decline(&format!("{e:#}"));
                    Err(e.context("the running agent goes on"))
                }
            };
        }
        let decoded = kept.and_then(|kept| match kept {
            None => Ok(None),
            Some(package) => {
                let state = HandoffState::decode(&package.state, identity)?;
                Ok(Some((state, Descriptors::new(package.fds))))
            }
        });
        let state = decoded.unwrap_or_else(|e| {
            tracing::error!(
                cause = format!("{e:#}"),
                "what the process before left cannot be taken up; its migrations are settled by their journals"
            );
            None
        });
        Ok(Self { state, predecessor: None })
    }
}

/// Leaves everything to the process that the service manager is about to start; false if there
/// will be none, or it could not take over: then this one has everything as before.
pub(super) async fn leave_to_systemd(agent: &Arc<Agent>) -> bool {
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
        return false;
    }
    match systemd::is_restarted().await {
        Ok(true) => {}
        Ok(false) => return false,
        Err(e) => {
            let cause = format!("{e:#}");
            tracing::warn!(cause, "whether this is a restart cannot be told; migrations are rolled back");
            return false;
        }
    }
    if let Err(e) = systemd::can_succeed(agent.host.has_a_witness()).await {
        let cause = format!("{e:#}");
        tracing::error!(
            cause,
            "the program that is started next cannot go on with migrations; they are rolled back"
        );
        return false;
    }
    hand_off(agent, async |package| systemd::to_store(package).await).await
}

/// Lets another process take over; false if it did not, and everything goes on here.
pub(super) async fn give_way(agent: &Arc<Agent>, stream: tokio::net::UnixStream) -> bool {
    let mut successor =
        match tokio::task::block_in_place(|| Successor::hear(stream, agent.host.has_a_witness())) {
            Ok(successor) => successor,
            Err(e) => {
                tracing::warn!(cause = format!("{e:#}"), "a process that asked to take over was refused");
                return false;
            }
        };
    let give = async |package: &Package| tokio::task::block_in_place(|| successor.give(package));
    let handed_off = hand_off(agent, give).await;
    if handed_off {
        tracing::info!("another process has taken over");
        // It waits for the end of this process, with which this is closed, and the port and the lock.
        std::mem::forget(successor);
    }
    handed_off
}

/// Stops everything and sends it; takes everything back when that fails.
async fn hand_off(agent: &Arc<Agent>, send: impl AsyncFnOnce(&Package) -> anyhow::Result<()>) -> bool {
    let (state, fds) = agent.freeze().await;
    let mut package = Package { state: Vec::new(), fds: fds.into_fds() };
    let sent = match tokio::task::block_in_place(|| state.encode()) {
        Ok(bytes) => {
            package.state = bytes;
            match package.fits() {
                Ok(()) => send(&package).await,
                Err(e) => Err(e),
            }
        }
        Err(e) => Err(e),
    };
    let Err(e) = sent else { return true };
    tracing::error!(cause = format!("{e:#}"), "nothing could be passed on; going on here");
    let mut fds = Descriptors::new(package.fds);
    let taken = agent.thaw(state, &mut fds);
    let taken_up = taken.iter().map(|taken| taken.journal).collect();
    taken.into_iter().for_each(|taken| agent.resume(taken));
    settle_abandoned(agent, &taken_up);
    draining::go_on(agent);
    false
}
