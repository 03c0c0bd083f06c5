//! Accepting: from a socket of a listener through TLS and HELLO to a new session, or to the one that the
//! dialer resumes. Everything before that has a deadline and a byte limit. Knows no stream and no
//! migration.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::connect_error::ConnectError;
use super::connection::{Connection, Established, Resumed};
use super::endpoint::Endpoint;
use super::handshake::{self, HANDSHAKE_DEADLINE};
use super::hello_exchange::{Denial, MISMATCH, WRONG_PROOF, agree, denied, in_time, receive_hello, send};
use super::identity::Identity;
use super::link::EndCause;
use super::session::Session;
use super::session_key::{self, Exported, SessionKey, random};
use crate::mux::hello::{self, Hello, Mode, Negotiated};
use crate::mux::{Code, Role};

/// How long our own session may take to let go of its old connection.
const FENCE_DEADLINE: Duration = Duration::from_secs(5);
/// Connections that the kernel keeps for us before they are accepted.
const LISTEN_BACKLOG: i32 = 1024;

/// What a peer is told that comes while another process takes over: it is to come again.
pub(super) const LEAVING: Denial = (Code::Shutdown, "this agent's process changes; come again");

/// What an accepted connection is for.
pub(super) enum Accepted {
    New(Box<Established>),
    /// It has been given to this session, which goes on.
    Resumed(Session),
}

/// What a HELLO is answered with.
enum Answer {
    New(Box<Negotiated>, SessionKey),
    Resume { session: Session, generation: u64, peer_rx_seq: u64 },
}

/// Listens on one address; an unspecified IPv6 address takes IPv4 as well.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(LISTEN_BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Takes a socket that a listener accepted through TLS and HELLO. `admit` decides whether the
/// proved identity may have the session that it asks for: a new one (`None`), or which it means.
pub(super) async fn accept<F: Future<Output = Result<Option<Session>, Denial>>>(
    endpoint: &Endpoint,
    tcp: TcpStream,
    address: SocketAddr,
    spoke: impl FnOnce(),
    admit: impl FnOnce(Identity, Hello) -> F,
) -> Result<Accepted, ConnectError> {
    endpoint.prepare(&tcp);
    let (mut tls, peer) = handshake::accept_telling(&endpoint.tls(), tcp, HANDSHAKE_DEADLINE, spoke).await?;
    let exported = session_key::export(tls.get_ref().1)?;
    let theirs = match in_time(receive_hello(&mut tls)).await {
        Ok(theirs) => theirs,
        Err(error) => {
            // Who has said nothing in time gets no more of it.
            if !matches!(error, ConnectError::Deadline(_)) {
                handshake::part(tls).await;
            }
            return Err(error);
        }
    };
    let answer = match admit(peer.clone(), theirs.clone()).await {
        Err(denial) => Err(denial),
        Ok(None) => accept_new(endpoint, &theirs),
        Ok(Some(session)) => accept_resume(endpoint, &theirs, &exported, session).await,
    };
    let (ours, what) = match answer {
        Ok(answer) => answer,
        Err((code, text)) => {
            let _ = in_time(send(&mut tls, &hello::encode_goaway(code, 0, text))).await;
            handshake::part(tls).await;
            return Err(denied(&peer, (code, text)));
        }
    };
    in_time(send(&mut tls, &ours.encode())).await?;
    let (tcp, tls) = tls.into_inner();
    let connection = Connection::new(tcp, tls, address)?;
    match what {
        Answer::New(negotiated, key) => Ok(Accepted::New(Box::new(Established {
            connection,
            peer,
            role: Role::Acceptor,
            negotiated: *negotiated,
            key,
            address: None,
        }))),
        Answer::Resume { session, generation, peer_rx_seq } => {
            session.rejoin(generation, Resumed { connection, peer_rx_seq });
            Ok(Accepted::Resumed(session))
        }
    }
}

fn accept_new(endpoint: &Endpoint, theirs: &Hello) -> Result<(Hello, Answer), Denial> {
    let Mode::New { session_id, secret_share } = theirs.mode else {
        return Err((Code::Protocol, "a HELLO that only an acceptor says"));
    };
    let share = random().map_err(|_| (Code::Internal, "no randomness"))?;
    let ours = endpoint.hello(Mode::Accepted { secret_share: share });
    let negotiated = hello::negotiate(&ours, theirs).map_err(|code| (code, MISMATCH))?;
    let (instance, version) = (negotiated.peer_instance, negotiated.version);
    let key = SessionKey::derive(session_id, &secret_share, &share, instance, version);
    Ok((ours, Answer::New(Box::new(negotiated), key)))
}

/// The session lets go of its old connection *before* it says what it has received: bytes that
/// still come over that one would be counted twice.
async fn accept_resume(
    endpoint: &Endpoint,
    theirs: &Hello,
    exported: &Exported,
    session: Session,
) -> Result<(Hello, Answer), Denial> {
    let Mode::Resume { generation, rx_seq, proof, .. } = theirs.mode else {
        return Err((Code::Protocol, "a HELLO that only an acceptor says"));
    };
    let key = session.key();
    if !key.is_proof(&proof, exported, generation, Role::Dialer) {
        return Err((Code::Auth, WRONG_PROOF));
    }
    let mut ours = endpoint.hello(Mode::Resumed { rx_seq: 0, proof: [0; 32] });
    agree(key, &ours, theirs)?;
    let fenced = timeout(FENCE_DEADLINE, session.fence(generation)).await.ok().flatten();
    let Some(our_rx_seq) = fenced else {
        let end = timeout(FENCE_DEADLINE, session.ended()).await;
        return Err(match end.as_deref().map(|end| &end.cause) {
            Ok(EndCause::Frozen) => LEAVING,
            _ => (Code::NoSession, "that session has ended, or has been resumed since"),
        });
    };
    let proof = session.key().proof(exported, generation, Role::Acceptor);
    ours.mode = Mode::Resumed { rx_seq: our_rx_seq, proof };
    Ok((ours, Answer::Resume { session, generation, peer_rx_seq: rx_seq }))
}
