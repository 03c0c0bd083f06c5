//! Reaching the destination: a session that has a connection, and a migration's control stream in
//! it. Nothing has begun before both are there.

use tokio_util::sync::CancellationToken;

use super::cancelled;
use super::failure::Failure;
use super::request::SourceRequest;
use crate::migrate::host::{AskError, Host};
use crate::migrate::protocol::client::{Link, LinkError};
use crate::mux::Code;
use crate::net::session::{OpenStreamError, Session};
use crate::net::stream::StreamEnded;

/// Sessions that may be lost before the control stream is open.
const ATTEMPTS: usize = 3;

/// Reaches the destination. A session that is found to be without its peer is not waited for: the
/// peer may be another process by now, to which another session leads.
pub(crate) async fn reach(
    host: &Host,
    request: &SourceRequest,
    cancel: &CancellationToken,
) -> Result<Link, Failure> {
    let mut attempt = 1;
    loop {
        let session = connect(host, &request.peer, cancel).await?;
        let last = attempt >= ATTEMPTS;
        tokio::select! {
            biased;
            link = Link::open(&session, request.id) => match link {
                Err(e) if is_session_lost(&e) && !last => {}
                link => return Ok(link?),
            },
            () = session.missed(), if !last => {}
            () = cancel.cancelled() => return Err(cancelled(host)),
        }
        tracing::info!(attempt, "the session was lost before the migration began; another is tried");
        attempt += 1;
    }
}

fn is_session_lost(error: &LinkError) -> bool {
    let refused = |e: &OpenStreamError| {
        matches!(e, OpenStreamError::Refused { source: StreamEnded(Code::SessionLost), .. })
    };
    error.is_session_lost() || matches!(error, LinkError::Open(e) if refused(e))
}

async fn connect(host: &Host, peer: &str, cancel: &CancellationToken) -> Result<Session, Failure> {
    tokio::select! {
        session = host.peers.session(peer) => session.map_err(|failure| match failure {
            AskError::Connect { source, .. } => {
                Failure::Problems(vec![host.peers.connect_problem(peer, &source)])
            }
            other => other.into(),
        }),
        () = cancel.cancelled() => Err(cancelled(host)),
    }
}
