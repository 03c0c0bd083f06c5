//! One TLS handshake from start to verdict: deadline, protocol, identity. Knows no frames, sessions or
//! migrations; why a handshake fails is in `handshake_failure`.
//!
//! TLS 1.3 has one surprise. The dialer is done *before* the acceptor has looked at the
//! dialer's certificate, so a refusal reaches it only with its first read. Whoever waits for
//! the peer's first byte passes that read's error to [`classify_handshake_error`] as well.

use std::io;
use std::time::Duration;

use rustls::server::{Acceptor, ServerConnection};
use rustls::{CommonState, Error as RustlsError, ProtocolVersion};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use tokio_rustls::{LazyConfigAcceptor, TlsConnector, client, server};

use super::certificate_dates;
pub use super::handshake_failure::{HandshakeFailure, Refusal, classify_handshake_error, classify_tls_error};
use super::identity::{Identity, IdentityError};
use super::tls::{ALPN, Tls};

/// The deadline for [`connect`] and [`accept`] unless there is a reason for another.
pub const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);

/// After a refusal the acceptor reads on for at most this long, so that the kernel does not
/// answer unread bytes with a reset that overtakes the alert.
const LINGER_DEADLINE: Duration = Duration::from_secs(1);
/// … and at most this many bytes.
const LINGER_BYTES_MAX: u64 = 64 * 1024;

/// A failed handshake: the classified cause, with the library's own words as its source.
#[derive(Debug, thiserror::Error)]
#[error("TLS handshake failed: {failure}")]
pub struct HandshakeError {
    pub failure: HandshakeFailure,
    /// What the TLS library or the socket said.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// Runs the dialer's side over a connected stream, and proves within `deadline` that the
/// other end is `peer`.
/// Errors: [`HandshakeError`]; see the module's note on refusals that arrive only later.
pub async fn connect<IO>(
    tls: &Tls,
    io: IO,
    peer: &Identity,
    deadline: Duration,
) -> Result<client::TlsStream<IO>, HandshakeError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let name = peer.server_name().map_err(identity_error)?;
    let connecting = TlsConnector::from(tls.client.clone()).connect(name, io);
    let stream = match timeout(deadline, connecting).await {
        Ok(done) => done.map_err(io_error)?,
        Err(elapsed) => return Err(timed_out(elapsed)),
    };
    let proved = verdict(tls, stream.get_ref().1)?;
    if proved == *peer {
        Ok(stream)
    } else {
        // The verifier has refused this already; a second look costs nothing.
        Err(HandshakeError {
            failure: HandshakeFailure::WrongIdentity,
            source: format!("`{proved}` answered instead of `{peer}`").into(),
        })
    }
}

/// Runs the acceptor's side, and returns who has proved within `deadline` to be at the other
/// end. Whether that identity may do anything here is for the caller to decide.
/// Errors: [`HandshakeError`]. The peer has then been told why, as far as TLS has words for it.
pub async fn accept<IO>(
    tls: &Tls,
    io: IO,
    deadline: Duration,
) -> Result<(server::TlsStream<IO>, Identity), HandshakeError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    accept_telling(tls, io, deadline, || {}).await
}

/// As [`accept`]; calls `spoke` once the dialer has said a whole ClientHello, before keys are exchanged.
pub(super) async fn accept_telling<IO>(
    tls: &Tls,
    io: IO,
    deadline: Duration,
    spoke: impl FnOnce(),
) -> Result<(server::TlsStream<IO>, Identity), HandshakeError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let accepting = async {
        let mut hearing = LazyConfigAcceptor::new(Acceptor::default(), io);
        let hello = match (&mut hearing).await {
            Ok(hello) => hello,
            Err(error) => return Err((error, hearing.take_io())),
        };
        spoke();
        // What has come behind the ClientHello would be looked at only with the next bytes. What is wrong with it is said
        // once more by the handshake.
        let look = |connection: &mut ServerConnection| drop(connection.process_new_packets());
        let shaking = hello.into_stream_with(tls.server.clone(), look).into_fallible();
        shaking.await.map_err(|(error, io)| (error, Some(io)))
    };
    let stream = match timeout(deadline, accepting).await {
        Ok(Ok(stream)) => stream,
        Ok(Err((error, io))) => {
            if let Some(io) = io {
                linger(io).await;
            }
            return Err(io_error(error));
        }
        Err(elapsed) => return Err(timed_out(elapsed)),
    };
    let identity = verdict(tls, stream.get_ref().1)?;
    Ok((stream, identity))
}

/// The checks that remain when the library is content: TLS 1.3, our protocol, one identity.
/// Errors: `BadVersion`, `BadProtocol`, `NoIdentity` or `NoClientCertificate`.
fn verdict(tls: &Tls, state: &CommonState) -> Result<Identity, HandshakeError> {
    if state.protocol_version() != Some(ProtocolVersion::TLSv1_3) {
        return Err(refuse(HandshakeFailure::BadVersion, "TLS 1.3 is required"));
    }
    if state.alpn_protocol() != Some(ALPN) {
        let words = "the peer did not agree to ALPN `vmferry/1`";
        return Err(refuse(HandshakeFailure::BadProtocol, words));
    }
    let certs = state.peer_certificates().unwrap_or_default();
    tls.naming.identity(certs).map_err(identity_error)
}

/// Ends a refused connection so that the alert arrives: half-close, read what is in flight.
async fn linger<IO: AsyncRead + AsyncWrite + Unpin>(mut io: IO) {
    // The connection is lost either way; its last error tells nobody anything.
    let _ = timeout(LINGER_DEADLINE, async {
        io.shutdown().await?;
        drain(io).await
    })
    .await;
}

/// Ends the connection of a peer that gets no session, so that the last words arrive, an alert or a frame: says that
/// nothing follows, reads what is in flight.
pub(super) async fn part<IO: AsyncRead + AsyncWrite + Unpin>(mut tls: server::TlsStream<IO>) {
    let _ = timeout(LINGER_DEADLINE, async {
        tls.shutdown().await?;
        drain(tls.into_inner().0).await
    })
    .await;
}

async fn drain<IO: AsyncRead + Unpin>(io: IO) -> io::Result<u64> {
    tokio::io::copy(&mut io.take(LINGER_BYTES_MAX), &mut tokio::io::sink()).await
}

fn io_error(source: io::Error) -> HandshakeError {
    let failure = classify_handshake_error(&source);
    let tls = source.get_ref().and_then(|e| e.downcast_ref::<RustlsError>());
    match tls.and_then(certificate_dates::both_dates) {
        Some(words) => refuse(failure, &words),
        None => HandshakeError { failure, source: source.into() },
    }
}

fn timed_out(elapsed: tokio::time::error::Elapsed) -> HandshakeError {
    HandshakeError { failure: HandshakeFailure::Timeout, source: elapsed.into() }
}

fn identity_error(source: IdentityError) -> HandshakeError {
    let failure = match source {
        IdentityError::NoCertificate => HandshakeFailure::NoClientCertificate,
        _ => HandshakeFailure::NoIdentity,
    };
    HandshakeError { failure, source: source.into() }
}

fn refuse(failure: HandshakeFailure, words: &str) -> HandshakeError {
    HandshakeError { failure, source: words.into() }
}
