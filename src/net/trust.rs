//! Whether the peer of a live session would still be let in, by the credentials in use and the clock of now.

use super::endpoint::Endpoint;
use super::handshake_failure::HandshakeFailure;
use super::session::Session;
use super::tls::PeerRole;
use crate::mux::{Code, Role};

/// Judges a session's peer again. One whose certificate has expired, or whose authority is trusted no more, has to
/// come again, with the certificate that it has by now: the session goes on if that is good. Any other that would be refused loses the session at once.
/// Errors: the reason for which a handshake would fail now.
pub fn judge(endpoint: &Endpoint, session: &Session) -> Result<(), HandshakeFailure> {
    let info = session.info();
    let role = match info.role {
        Role::Dialer => PeerRole::Server,
        Role::Acceptor => PeerRole::Client,
    };
    let judged = endpoint.tls().reverify(&session.link().connection.chain, role, &info.peer);
    match &judged {
        Ok(()) => {}
        Err(failure) if may_be_renewed(*failure) && session.away_since().is_some() => {}
        Err(failure) if may_be_renewed(*failure) => {
            tracing::warn!(peer = %info.peer, cause = %failure, "a session's peer has to prove itself again");
            session.renew_connection();
        }
        Err(failure) => {
            tracing::warn!(peer = %info.peer, cause = %failure, "a session's peer is not trusted any more");
            session.close(Code::Auth, "your certificate is not accepted any more");
        }
    }
    judged
}

/// Whether the peer may have another certificate by now that is good. An authority of the same name is one that
/// has replaced the other.
fn may_be_renewed(failure: HandshakeFailure) -> bool {
    use HandshakeFailure::{BadSignature, Expired, UnknownCa};
    matches!(failure, Expired | UnknownCa | BadSignature)
}
