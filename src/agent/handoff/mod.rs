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

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::bail;

use super::draining;
use super::journals::settle_abandoned;
use super::running::Agent;
use crate::config::Config;
use crate::net::stream_owner::Descriptors;
use socket::Successor;
use state::HandoffState;
use transport::{Offer, Package, Start};

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

/// What this version can take over, and what it would start as with a configuration, as a line of JSON.
pub(super) fn handoff_formats(start: anyhow::Result<(String, PathBuf)>) -> anyhow::Result<String> {
    let start = match start {
        Ok((host, state_dir)) => Start::As { host, state_dir },
        Err(e) => Start::Refused(format!("{e:#}")),
    };
    Ok(serde_json::to_string(&Offer::ours().with_start(start))?)
}

/// What this version makes of what a process of `identity` has left: the same again, without the descriptors.
#[doc(hidden)]
pub fn reread(left: &[u8], identity: &str) -> anyhow::Result<Vec<u8>> {
    let state = HandoffState::decode(left)?;
    state.check_owner(identity, state.state_dir.as_deref().unwrap_or(Path::new("")))?;
    state.encode()
}

/// What another process has left, and whether that one waits for our word.
pub(super) struct Inherited {
    pub(super) left: Option<Left>,
    pub(super) predecessor: Option<Predecessor>,
}

impl Inherited {
    /// Whatever there is and can be read. What cannot is lost, and told: the journals know what
    /// was under way.
    /// Errors: it is another agent's. Then that one still has it, or the service manager.
    pub(super) async fn find(
        config: &Config,
        identity: &str,
        kept: Kept,
        mode: StartMode,
    ) -> anyhow::Result<Self> {
        let is_ours = |left: &Left| left.state.check_owner(identity, &config.state_dir);
        if mode == StartMode::TakeOver {
            let asked = || socket::take_over(&config.runtime_dir);
            let (package, predecessor) = tokio::task::block_in_place(asked)?;
            let left = Left::read(package).and_then(|left| is_ours(&left).map(|()| left));
            return match left {
                Ok(left) => Ok(Self { left: Some(left), predecessor: Some(predecessor) }),
                Err(e) => {
                    predecessor.decline(&format!("{e:#}"));
                    Err(e.context("the running agent goes on"))
                }
            };
        }
        let left = Left::of(kept);
        if let Some(Err(e)) = left.as_ref().map(is_ours) {
            match left {
                Some(left) if left.state.is_waited_for() => {
                    left.keep().await;
                    return Err(e);
                }
                _ => tracing::warn!(cause = format!("{e:#}"), "the process before was another agent"),
            }
            return Ok(Self { left: None, predecessor: None });
        }
        Ok(Self { left, predecessor: None })
    }
}

/// What another process has left, read and not taken up.
pub(super) struct Left {
    pub(super) state: HandoffState,
    pub(super) fds: Descriptors,
}

impl Left {
    fn read(package: Package) -> anyhow::Result<Self> {
        let state = HandoffState::decode(&package.state)?;
        Ok(Self { state, fds: Descriptors::new(package.fds) })
    }

    fn of(kept: Kept) -> Option<Self> {
        let read = kept.and_then(|kept| kept.map(Self::read).transpose());
        read.unwrap_or_else(|e| {
            tracing::error!(
                cause = format!("{e:#}"),
                "what the process before left cannot be taken up; its migrations are settled by their journals"
            );
            None
        })
    }

    /// Gives it back to the service manager, for the next start; this process has touched nothing of it. Whether
    /// anything is waiting there then.
    pub(super) async fn keep(self) -> bool {
        if !self.state.is_waited_for() {
            return false;
        }
        let left = self.state.summary();
        let kept = async {
            if let Some(stopped) = self.state.stopped.filter(|stopped| stopped.is_too_long_ago()) {
                bail!("it was left {} s ago, and nobody waits for it any more", stopped.ago().as_secs());
            }
            systemd::to_store(&Package { state: self.state.encode()?, fds: self.fds.into_fds() }).await
        };
        match kept.await {
            Ok(()) => {
                tracing::error!(left, "this process cannot start; what was left waits for the one after it");
                true
            }
            Err(e) => {
                let cause = format!("{e:#}");
                tracing::error!(
                    left,
                    cause,
                    "what was left is lost with this process; its migrations are settled by their journals"
                );
                false
            }
        }
    }
}

/// Keeps what the process before left, for a process that cannot even read its configuration. Whether anything is
/// waiting for the next start.
pub(super) async fn keep(kept: Kept) -> bool {
    match Left::of(kept) {
        Some(left) => left.keep().await,
        None => false,
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
    if let Err(e) = systemd::can_succeed(&agent.host, &agent.config_path).await {
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
