//! What comes before a stream of messages is accepted from a peer, whatever the messages are about: the peer is
//! still trusted, it may ask, the stream is one for messages, and the peer has a place for it. What unfinished
//! messages may hold is bounded by the number of these places and by the credit of an urgent stream. Knows no
//! message.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::access::{Action, Denied, Who, authorize};
use crate::mux::{Class, Code};
use crate::net::endpoint::Endpoint;
use crate::net::identity::Identity;
use crate::net::session::IncomingStream;
use crate::net::stream::Stream;
use crate::net::trust;
use crate::peer_refusals::{PeerRefusals, Reason};

/// Of a peer that may have virtual machines or domains of libvirt moved here: one for each that is on its way,
/// and questions.
const STREAMS_MAX: usize = 256;
/// Of one that may not: it has only questions.
const QUESTIONS_MAX: usize = 16;

/// Of all peers that are in the configuration, over all their sessions.
#[derive(Debug)]
pub struct ControlStreams {
    endpoint: Arc<Endpoint>,
    refusals: Arc<PeerRefusals>,
    places: Mutex<BTreeMap<Identity, Arc<Semaphore>>>,
}

/// A peer's place for one stream, held until it is dropped.
#[derive(Debug)]
pub(crate) struct Place(#[expect(dead_code, reason = "held")] OwnedSemaphorePermit);

impl ControlStreams {
    pub fn new(endpoint: Arc<Endpoint>, refusals: Arc<PeerRefusals>) -> Self {
        Self { endpoint, refusals, places: Mutex::default() }
    }

    /// Accepts a stream of messages, whose opener is `who`; `what` it is about. None: it was refused, which is
    /// counted, or it has ended meanwhile.
    pub(crate) async fn accept(
        &self,
        stream: IncomingStream,
        who: Who<'_>,
        what: impl Fn() -> String,
    ) -> Option<(Stream, Place)> {
        let peer = stream.session().info().peer.clone();
        let place = match self.admit(&peer, &stream, who) {
            Ok(place) => place,
            Err((reason, code)) => {
                self.refusals.refused(&peer, reason, what);
                stream.refuse(code);
                return None;
            }
        };
        match stream.accept().await {
            Ok(stream) => Some((stream, place)),
            Err(e) => {
                tracing::debug!(%peer, error = %e, "{} ended before it began", what());
                None
            }
        }
    }

    fn admit(&self, peer: &Identity, stream: &IncomingStream, who: Who<'_>) -> Result<Place, (Reason, Code)> {
        trust::judge(&self.endpoint, stream.session()).map_err(|_| (Reason::NotTrusted, Code::Auth))?;
        authorize(Action::AskAfterOwn, who).map_err(|Denied| (Reason::NotPermitted, Code::Denied))?;
        // The class is its opener's to say, and a bulk stream has more credit than any message needs.
        if stream.open.class != Class::Urgent {
            return Err((Reason::WrongClass, Code::Unsupported));
        }
        let may_move =
            [Action::SendVms, Action::MoveDomains].into_iter().any(|action| authorize(action, who).is_ok());
        self.place(peer, may_move).ok_or((Reason::ControlStreams, Code::Limit))
    }

    /// A place for one more. `may_move`: the peer may have virtual machines or domains moved here.
    fn place(&self, peer: &Identity, may_move: bool) -> Option<Place> {
        let mut all = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let most = if may_move { STREAMS_MAX } else { QUESTIONS_MAX };
        let places = all.entry(peer.clone()).or_insert_with(|| Arc::new(Semaphore::new(most)));
        Arc::clone(places).try_acquire_owned().ok().map(Place)
    }
}
