//! A new process makes itself known to the peers of what it found open.
//!
//! A peer that had accepted the session with the process before waits for its dialer, and with it the migration, for
//! its whole `resume_s`: the dialer is gone, and only a new session tells. So whoever starts without what the process
//! before had asks for one, once. It settles nothing: what the journals say is done meanwhile, whatever comes of it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, sleep, timeout_at};

use super::open::Open;
use crate::migrate::host::{AskError, Host};
use crate::migrate::model::problem::chain;

/// Between two tries, doubled up to the longest.
const PAUSE_FIRST: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// The peers of what is open, by their identities.
pub fn peers_of(open: &[Open]) -> BTreeSet<String> {
    open.iter().map(|one| one.journal.past().header.peer.clone()).collect()
}

/// Asks each peer for a session until it has one, within this host's `resume_s`: by then a peer of the same
/// configuration has given the old one up.
pub async fn announce(host: Arc<Host>, peers: BTreeSet<String>) {
    let known: Vec<_> = peers.iter().filter_map(|identity| host.peers.name_of(identity)).collect();
    tokio::select! {
        _ = join_all(known.into_iter().map(|peer| tell(&host, peer))) => {}
        () = host.stopping.cancelled() => {}
        () = host.freeze.begun() => {}
    }
}

async fn tell(host: &Host, peer: &str) {
    // Only a peer that was dialed from here can be waiting for a dialer.
    let Some(config) = host.find_peer(peer).ok().filter(|config| config.address.is_some()) else { return };
    let until = Instant::now() + host.config.deadlines.resume();
    let mut pause = PAUSE_FIRST;
    let mut cause = String::from("no answer");
    while let Ok(asked) = timeout_at(until, host.peers.session(peer)).await {
        let Err(error) = asked else {
            return tracing::info!(peer, "the peer knows that this is a new process");
        };
        cause = chain(&error);
        let is_final = !may_pass(&error);
        let next = Instant::now() + pause;
        if is_final || next >= until {
            break;
        }
        tracing::debug!(peer, cause, "the peer does not know yet that this is a new process");
        sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
    // It has come by itself while it could not be reached from here.
    if host.pool.reachable(&config.identity) == Some(true) {
        return;
    }
    tracing::warn!(
        peer,
        cause,
        "the peer could not be told that this is a new process; a session that it had with the one before may be \
         waited for there, for its resume_s"
    );
}

fn may_pass(error: &AskError) -> bool {
    matches!(error, AskError::Connect { source, .. } if source.may_pass())
}
