//! Follows each session from its start to its end: its figures for the metrics, and the log.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use uuid::Uuid;

use super::running::Agent;
use crate::audit::Event;
use crate::error_chain::chain;
use crate::net::session::{EndCause, Session};

/// Between two looks at a session's figures.
const SAMPLE: Duration = Duration::from_secs(1);

impl Agent {
    /// Follows each session from its start to its end.
    pub(super) async fn serve_sessions(self: Arc<Self>, mut started: mpsc::UnboundedReceiver<Session>) {
        while let Some(session) = started.recv().await {
            let agent = Arc::clone(&self);
            self.tasks.spawn(async move { agent.follow(session).await });
        }
    }

    async fn follow(&self, session: Session) {
        let info = session.info();
        let peer = info.peer.as_str();
        let connection = session.link().connection;
        tracing::info!(peer, address = %connection.address, cipher = connection.cipher, "session begins");
        let (audit, id) = (&self.host.audit, Uuid::from_bytes(session.id()).to_string());
        audit.record(Event::SessionBegins {
            peer: peer.to_owned(),
            certificate: connection.fingerprint(),
            address: connection.address.to_string(),
            cipher: connection.cipher.clone(),
            session: id.clone(),
        });
        let mut since = connection.since;
        let end = loop {
            tokio::select! {
                end = session.ended() => break end,
                () = tokio::time::sleep(SAMPLE) => {}
            }
            self.metrics.sessions.count(peer, session.id(), &session.stats().await);
            self.sample(peer).await;
            let connection = session.link().connection;
            if connection.since != since {
                since = connection.since;
                audit.record(Event::SessionResumed {
                    peer: peer.to_owned(),
                    certificate: connection.fingerprint(),
                    address: connection.address.to_string(),
                    session: id.clone(),
                });
            }
        };
        self.metrics.sessions.count(peer, session.id(), &end.stats);
        self.sample(peer).await;
        self.metrics.sessions.count_end(peer, end.cause.label());
        // One that is left to another process goes on there, with these figures.
        if !matches!(end.cause, EndCause::Frozen) {
            self.metrics.sessions.forget(session.id());
        }
        let cause = chain(&end.cause);
        audit.record(Event::SessionEnds { peer: peer.to_owned(), session: id, cause: cause.clone() });
        tracing::info!(peer, cause, "session ends");
    }

    async fn sample(&self, peer: &str) {
        let live = self.host.pool.all();
        let mut stats = Vec::new();
        let mut away = 0;
        for session in live.iter().filter(|s| s.info().peer.as_str() == peer) {
            stats.push(session.stats().await);
            away += usize::from(session.away_since().is_some());
        }
        self.metrics.sessions.set_of_peer(peer, away, &stats);
    }
}
