//! Words to the destination over a control stream of their own, and how long it may take.

use std::time::Duration;

use tokio::time::timeout;
use uuid::Uuid;

use crate::config::HOOK_S_MAX;
use crate::migrate::host::{AskError, Host};
use crate::migrate::journal::Past;
use crate::migrate::model::problem::chain;
use crate::migrate::protocol::client::{Link, LinkError};
use crate::migrate::protocol::message::{Fate, Prepared, Request, Response, Told};

/// How long a destination may take to answer.
pub(crate) const ANSWER_DEADLINE: Duration = Duration::from_secs(20);
/// How long it is waited for when nothing depends on it.
const COURTESY_DEADLINE: Duration = Duration::from_secs(5);

/// How long the destination's `before_start` may take.
pub(crate) fn hook(host: &Host, grant: Option<&Prepared>) -> Duration {
    hook_of(grant, host.config.deadlines.hook())
}

/// By the destination's own word, if it gave one, and at most [`HOOK_S_MAX`].
fn hook_of(grant: Option<&Prepared>, ours: Duration) -> Duration {
    let granted = grant.and_then(|grant| grant.hook_s);
    granted.map_or(ours, |s| Duration::from_secs(s.min(HOOK_S_MAX)))
}

/// Tells a destination, over a control stream of its own, that the guest stays where it is.
/// Errors: it cannot be told; it finds out by itself when it has waited for long enough.
pub(crate) async fn abort_remote(
    host: &Host,
    peer: &str,
    migration: Uuid,
    reason: &str,
) -> Result<Option<Fate>, AskError> {
    let session = host.peers.session(peer).await?;
    let mut link = Link::open(&session, migration).await?;
    let answer = link.ask(Request::Abort { reason: reason.into() }, ANSWER_DEADLINE).await?;
    link.finish();
    Ok(match answer {
        Response::Fate(fate) => Some(fate),
        _ => None,
    })
}

/// What the other host's journals say of a migration; why it cannot be asked.
pub(crate) async fn ask_peer(host: &Host, past: &Past) -> Result<Option<Told>, String> {
    let Some(peer) = host.peers.name_of(&past.header.peer) else {
        return Err("it is not in this host's configuration".into());
    };
    let deadline = host.config.deadlines.recover();
    match timeout(deadline, tell(host, peer, past.header.migration, deadline)).await {
        Ok(told) => told.map_err(|e| chain(&e)),
        Err(_) => Err(format!("no answer within {} s", deadline.as_secs())),
    }
}

/// What the journals of a peer of that name in the configuration say of a migration; none: there is no journal.
/// Errors: it cannot be asked.
pub(super) async fn tell(
    host: &Host,
    peer: &str,
    migration: Uuid,
    deadline: Duration,
) -> Result<Option<Told>, AskError> {
    let mut link = Link::open(&host.peers.session(peer).await?, migration).await?;
    let answer = link.ask(Request::Tell, deadline).await?;
    link.finish();
    match answer {
        Response::Told(told) => Ok(told),
        _ => Err(LinkError::Unexpected { request: "tell" }.into()),
    }
}

/// Tells a destination that its word is known here for good, so that it need not be kept there.
pub(crate) async fn confirm_remote(host: &Host, peer: &str, migration: Uuid) {
    let said = async {
        let session = host.peers.session(peer).await?;
        let mut link = Link::open(&session, migration).await?;
        link.demand(Request::Confirmed, COURTESY_DEADLINE).await?;
        link.finish();
        Ok::<_, AskError>(())
    };
    if !matches!(timeout(COURTESY_DEADLINE, said).await, Ok(Ok(()))) {
        tracing::debug!("the destination keeps its journal for longer: it was not told that it need not");
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_destination_says_how_long_its_command_may_take() {
        // As an agent says it that does not know of it.
        let grant: Prepared =
            serde_json::from_str(r#"{"exports":[],"qemu":"QEMU 10.0.2","restartable":true}"#).unwrap();
        let ours = Duration::from_secs(30);
        let says = |hook_s| hook_of(Some(&Prepared { hook_s, ..grant.clone() }), ours).as_secs();
        assert_eq!((hook_of(None, ours), says(None)), (ours, 30));
        assert_eq!((says(Some(0)), says(Some(400)), says(Some(u64::MAX))), (0, 400, HOOK_S_MAX));
    }
}
