//! Connecting to the destination: a session that has a connection, and a migration's control stream in
//! it. Nothing has begun before both are there.

use super::context::Context;
use super::failure::Failure;
use crate::migrate::host::AskError;
use crate::migrate::protocol::client::{Link, LinkError};
use crate::mux::Code;
use crate::net::session::{OpenStreamError, Session};
use crate::net::stream::StreamEnded;

/// Sessions that may be lost before the control stream is open.
const ATTEMPTS: usize = 3;

/// Connects to the destination. A session that is found to be without its peer is not waited for: the
/// peer may be another process by now, to which another session leads.
pub(crate) async fn connect(context: &Context) -> Result<Link, Failure> {
    let mut attempt = 1;
    loop {
        let session = session(context).await?;
        let last = attempt >= ATTEMPTS;
        tokio::select! {
            biased;
            link = Link::open(&session, context.request.id) => match link {
                Err(e) if is_session_lost(&e) && !last => {}
                link => return Ok(link?),
            },
            () = session.missed(), if !last => {}
            () = context.cancel.cancelled() => return Err(context.cancelled()),
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

async fn session(context: &Context) -> Result<Session, Failure> {
    let (host, peer) = (&context.host, &context.request.peer);
    tokio::select! {
        session = host.peers.session(peer) => session.map_err(|error| match error {
            AskError::Connect { source, .. } => {
                Failure::Problems(vec![host.peers.connect_problem(peer, &source)])
            }
            other => other.into(),
        }),
        () = context.cancel.cancelled() => Err(context.cancelled()),
    }
}
