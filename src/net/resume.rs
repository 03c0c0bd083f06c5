//! The dialer's way back: how a session goes on over another connection.
//!
//! ```text
//! dialer                                              acceptor
//! TLS, both sides with certificates ────────────────►
//! HELLO resume: session, attempt, received, proof ──► is the proof right, the attempt the newest?
//!                                                     lets go of the old connection (`accept`)
//!                     ◄──────────────────── HELLO resumed: received, proof
//! sends again what the other has not received  ◄────►
//! ```
//! Knows no stream.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};

use super::connect_error::ConnectError;
use super::connection::{Connection, Resumed};
use super::dial;
use super::endpoint::Endpoint;
use super::hello_exchange::{OTHER_ANSWER, WRONG_PROOF, agree, denied, in_time, receive_hello, send};
use super::identity::Identity;
use super::session_key::{self, SessionKey};
use crate::mux::hello::Mode;
use crate::mux::{Code, Role};

/// How long TCP may take when a session is to be resumed: a packet that was lost while the link was
/// down is sent again by the kernel ever more rarely, a new attempt sends one at once.
const RECONNECT_DEADLINE: Duration = Duration::from_secs(2);
/// Longest pause between two attempts of the dialer: a link that is back is to be noticed soon.
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// The pauses (WIRE §4): each is half of its length and a random part of the other half, so that
/// agents of one switch do not come back in step. The first is of 50 ms, each further one twice as long.
const PAUSES: ExponentialBuilder = ExponentialBuilder::new()
    .with_min_delay(Duration::from_millis(25))
    .with_max_delay(Duration::from_millis(500))
    .without_max_times()
    .with_jitter();

/// Where a session's dialer dials again.
#[derive(Debug, Clone)]
pub(super) struct Redial {
    pub(super) endpoint: Arc<Endpoint>,
    /// As configured: it is looked up anew each time, so the peer may have moved.
    pub(super) address: String,
    pub(super) peer: Identity,
}

impl Redial {
    /// Tries until the peer takes the session up again. Each attempt has a number of its own,
    /// which `newest` holds before it begins; the newest wins.
    /// Errors: the peer's final word: it has no such session any more, or does not take it up.
    pub(super) async fn until_resumed(
        &self,
        key: &SessionKey,
        newest: &AtomicU64,
        rx_seq: u64,
    ) -> Result<Resumed, ConnectError> {
        let mut pauses = PAUSES.build();
        loop {
            let generation = newest.fetch_add(1, Relaxed) + 1;
            match self.attempt(key, generation, rx_seq).await {
                Ok(resumed) => return Ok(resumed),
                Err(e) if is_final(&e) => return Err(e),
                Err(e) => tracing::debug!(
                    peer = %self.peer, attempt = generation, error = %e, "the session cannot be resumed yet"
                ),
            }
            tokio::time::sleep(pauses.next().unwrap_or(PAUSE_MAX)).await;
        }
    }

    async fn attempt(&self, key: &SessionKey, generation: u64, rx_seq: u64) -> Result<Resumed, ConnectError> {
        let Self { endpoint, address, peer } = self;
        let (mut tls, remote) = dial::connect(endpoint, address, peer, RECONNECT_DEADLINE).await?;
        let exported = session_key::export(tls.get_ref().1)?;
        let ours = endpoint.hello(session_key::resume_mode(key, &exported, generation, rx_seq));
        let peer_rx_seq = in_time(async {
            send(&mut tls, &ours.encode()).await?;
            let theirs = receive_hello(&mut tls).await?;
            let Mode::Resumed { rx_seq, proof } = theirs.mode else {
                return Err(denied(peer, (Code::Protocol, OTHER_ANSWER)));
            };
            agree(key, &ours, &theirs).map_err(|denial| denied(peer, denial))?;
            if !key.is_proof(&proof, &exported, generation, Role::Acceptor) {
                return Err(denied(peer, (Code::Auth, WRONG_PROOF)));
            }
            Ok(rx_seq)
        })
        .await?;
        let (tcp, tls) = tls.into_inner();
        Ok(Resumed { connection: Connection::new(tcp, tls, remote)?, peer_rx_seq })
    }
}

/// Whether asking again cannot help. A certificate that is refused may be renewed meanwhile.
fn is_final(error: &ConnectError) -> bool {
    match error {
        ConnectError::Refused { code, .. } => !matches!(code, Code::Limit | Code::Shutdown),
        ConnectError::Incompatible { .. } => true,
        _ => false,
    }
}
