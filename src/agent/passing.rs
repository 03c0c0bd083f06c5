//! How this process begins with what another has left, and gives way to the next. Joins what is
//! left (`succession`) to how it travels (`inherit`).

use std::sync::Arc;

use tokio::sync::mpsc;

use super::Agent;
use super::inherit::{self, Left, Predecessor, Successor};
use super::start::{How, settle_abandoned};
use super::store;
use super::succession::Estate;
use crate::config::Config;
use crate::migrate::frozen::Descriptors;
use crate::net::session::IncomingStream;

/// What an agent begins with.
pub(super) type Inherited = anyhow::Result<Option<Left>>;

/// What another process has left, and whether that one waits for our word.
pub(super) struct Estates {
    pub(super) estate: Option<(Estate, Descriptors)>,
    pub(super) before: Option<Predecessor>,
}

impl Estates {
    /// Whatever there is and can be read. What cannot is lost, and told: the journals know what
    /// was under way.
    pub(super) fn find(config: &Config, identity: &str, kept: Inherited, how: How) -> anyhow::Result<Self> {
        if how == How::TakingOver {
            let socket = inherit::socket_path(&config.runtime_dir);
            let (left, before) = tokio::task::block_in_place(|| inherit::take_over(&socket))?;
            return match Estate::decode(&left.state, identity) {
                Ok(estate) => {
                    let estate = Some((estate, Descriptors::new(left.fds)));
                    Ok(Self { estate, before: Some(before) })
                }
                Err(e) => {
                    before.decline(&format!("{e:#}"));
                    Err(e.context("the running agent goes on"))
                }
            };
        }
        let decoded = kept.and_then(|kept| match kept {
            None => Ok(None),
            Some(left) => {
                let estate = Estate::decode(&left.state, identity)?;
                Ok(Some((estate, Descriptors::new(left.fds))))
            }
        });
        let estate = decoded.unwrap_or_else(|e| {
            tracing::error!(
                cause = format!("{e:#}"),
                "what the process before left cannot be taken up; its migrations are settled by their journals"
            );
            None
        });
        Ok(Self { estate, before: None })
    }
}

/// Leaves everything to the process that the service manager is about to start; false if there
/// will be none, or it could not take over: then this one has everything as before.
pub(super) async fn leave_to_the_store(agent: &Arc<Agent>, incoming: &mpsc::Sender<IncomingStream>) -> bool {
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
        return false;
    }
    match store::is_restarted().await {
        Ok(true) => {}
        Ok(false) => return false,
        Err(e) => {
            let cause = format!("{e:#}");
            tracing::warn!(cause, "whether this is a restart cannot be told; migrations are rolled back");
            return false;
        }
    }
    if let Err(e) = store::can_succeed().await {
        let cause = format!("{e:#}");
        tracing::error!(
            cause,
            "the program that is started next cannot go on with migrations; they are rolled back"
        );
        return false;
    }
    pass(agent, incoming, async |left| store::to_store(left).await).await
}

/// Lets another process take over; false if it did not, and everything goes on here.
pub(super) async fn give_way(
    agent: &Arc<Agent>,
    stream: tokio::net::UnixStream,
    incoming: &mpsc::Sender<IncomingStream>,
) -> bool {
    let mut successor = match tokio::task::block_in_place(|| Successor::hear(stream)) {
        Ok(successor) => successor,
        Err(e) => {
            tracing::warn!(cause = format!("{e:#}"), "a process that asked to take over was refused");
            return false;
        }
    };
    let give = async |left: &Left| tokio::task::block_in_place(|| successor.give(left));
    let passed = pass(agent, incoming, give).await;
    if passed {
        tracing::info!("another process has taken over");
        // It waits for the end of this process, with which this is closed, and the port and the lock.
        std::mem::forget(successor);
    }
    passed
}

/// Stops everything and passes it on; takes everything back when that fails.
async fn pass(
    agent: &Arc<Agent>,
    incoming: &mpsc::Sender<IncomingStream>,
    send: impl AsyncFnOnce(&Left) -> anyhow::Result<()>,
) -> bool {
    let (estate, fds) = agent.leave().await;
    let mut left = Left { state: Vec::new(), fds: fds.into_fds() };
    let sent = match tokio::task::block_in_place(|| estate.encode()) {
        Ok(state) => {
            left.state = state;
            send(&left).await
        }
        Err(e) => Err(e),
    };
    let Err(e) = sent else { return true };
    tracing::error!(cause = format!("{e:#}"), "nothing could be passed on; going on here");
    let mut fds = Descriptors::new(left.fds);
    let taken = agent.take_up(estate, &mut fds, incoming);
    let taken_up = taken.iter().map(|taken| taken.journal).collect();
    taken.into_iter().for_each(|taken| agent.go_on(taken));
    settle_abandoned(agent, &taken_up);
    false
}
