//! HELLO over a fresh TLS connection: one from each side, within a deadline and a limit of bytes. What is
//! in them is decided in `dial`, `resume` and `accept`.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use super::connect_error::ConnectError;
use super::identity::Identity;
use super::session_key::SessionKey;
use crate::mux::Code;
use crate::mux::hello::{self, FirstFrame, Hello};

/// How long the peer's HELLO may take after TLS (WIRE §8).
const HELLO_DEADLINE: Duration = Duration::from_secs(5);

/// Why a peer gets no session: the code that it is told, and words.
pub(super) type Denial = (Code, &'static str);

/// What a peer of another version or other features is told.
pub(super) const MISMATCH: &str = "versions or features do not match";

/// What a peer is told whose proof for the session that it resumes does not fit.
pub(super) const WRONG_PROOF: &str = "the proof for that session is wrong";

/// What is said of a peer whose HELLO answers something else.
pub(super) const OTHER_ANSWER: &str = "its HELLO does not answer ours";

/// Our refusal of what `peer` has said.
pub(super) fn denied(peer: &Identity, (code, why): Denial) -> ConnectError {
    ConnectError::Incompatible { peer: peer.clone(), code, why }
}

/// Checks that two HELLOs of a resumption fit the session: the same processes, the same version.
pub(super) fn agree(key: &SessionKey, ours: &Hello, theirs: &Hello) -> Result<(), Denial> {
    let negotiated = hello::negotiate(ours, theirs).map_err(|code| (code, MISMATCH))?;
    if negotiated.peer_instance != key.peer_instance {
        return Err((Code::NoSession, "another process of that host has the session"));
    }
    if negotiated.version != key.version {
        return Err((Code::Version, "the session speaks another version"));
    }
    Ok(())
}

/// Runs `work` within the time that a HELLO may take.
pub(super) async fn in_time<T>(
    work: impl Future<Output = Result<T, ConnectError>>,
) -> Result<T, ConnectError> {
    timeout(HELLO_DEADLINE, work).await.unwrap_or(Err(ConnectError::Deadline(HELLO_DEADLINE)))
}

pub(super) async fn send(tls: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> Result<(), ConnectError> {
    tls.write_all(bytes).await.map_err(ConnectError::BeforeHello)?;
    tls.flush().await.map_err(ConnectError::BeforeHello)
}

/// Reads exactly the peer's first frame, so that what follows stays with the TLS connection.
pub(super) async fn receive_hello(tls: &mut (impl AsyncRead + Unpin)) -> Result<Hello, ConnectError> {
    let mut bytes = vec![0; hello::HEADER_LEN];
    tls.read_exact(&mut bytes).await.map_err(ConnectError::BeforeHello)?;
    loop {
        match hello::peek(&bytes).map_err(ConnectError::Hello)? {
            Some(FirstFrame::Hello { hello, .. }) => return Ok(*hello),
            Some(FirstFrame::GoAway { code, text, .. }) => return Err(ConnectError::Refused { code, text }),
            None => {}
        }
        let length = hello::first_frame_len(&bytes).map_err(ConnectError::Hello)?;
        let have = bytes.len();
        bytes.resize(length.max(have + 1), 0);
        tls.read_exact(&mut bytes[have..]).await.map_err(ConnectError::BeforeHello)?;
    }
}
