//! Whether the peer of a live session would still be let in, by the credentials in use and the clock of now.

use super::endpoint::Endpoint;
use super::handshake_failure::HandshakeFailure;
use super::session::Session;
use super::tls::PeerRole;
use crate::mux::{Code, Role};

/// Whether a session's peer, and its connection, would be accepted now. Nothing comes of it: whoever has to hear a
/// refusal first is judged after that.
/// Errors: the reason for which a handshake would fail now.
pub fn look(endpoint: &Endpoint, session: &Session) -> Result<(), HandshakeFailure> {
    let info = session.info();
    let role = match info.role {
        Role::Dialer => PeerRole::Server,
        Role::Acceptor => PeerRole::Client,
    };
    let (tls, connection) = (endpoint.tls(), session.link().connection);
    tls.reverify_accepted(&connection.chain, role, &info.peer)?;
    tls.permits(connection.group)
}

/// Judges a session's peer again. One whose certificate has expired, or whose authority is trusted no more, or whose
/// keys are of a kind that the policy does not have any more, has to come again, with what it has by now: the session
/// goes on if that is good. Any other that would be refused loses the session at once.
/// Errors: those of [`look`].
pub fn judge(endpoint: &Endpoint, session: &Session) -> Result<(), HandshakeFailure> {
    let info = session.info();
    let judged = look(endpoint, session);
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

/// Whether the peer may have another certificate by now that is good, or other keys. An authority of the same name is
/// one that has replaced the other.
fn may_be_renewed(failure: HandshakeFailure) -> bool {
    use HandshakeFailure::{BadSignature, Expired, NothingInCommon, UnknownCa};
    matches!(failure, Expired | UnknownCa | BadSignature | NothingInCommon)
}
