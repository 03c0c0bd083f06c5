//! Dialing: from a peer's name to a TLS connection on which it has proved its identity, and to a new
//! session. Going on with a session is in `resume`. Knows no stream.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use super::addresses;
use super::connect_error::ConnectError;
use super::connection::{Connection, Established};
use super::endpoint::Endpoint;
use super::handshake::{self, HANDSHAKE_DEADLINE};
use super::hello_exchange::{MISMATCH, OTHER_ANSWER, denied, in_time, receive_hello, send};
use super::identity::Identity;
use super::session_key::{SessionKey, random};
use crate::mux::hello::{self, Mode};
use crate::mux::{Code, Role};

/// How long TCP may take to connect (WIRE §8).
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// Dials a peer and agrees on a new session, proving that it is `peer`.
pub(super) async fn dial(
    endpoint: &Endpoint,
    address: &str,
    peer: &Identity,
) -> Result<Established, ConnectError> {
    let (mut tls, remote) = connect(endpoint, address, peer, CONNECT_DEADLINE).await?;
    let (session_id, secret_share) = (random()?, random()?);
    let ours = endpoint.hello(Mode::New { session_id, secret_share });
    let (negotiated, share) = in_time(async {
        send(&mut tls, &ours.encode()).await?;
        let theirs = receive_hello(&mut tls).await?;
        let Mode::Accepted { secret_share } = theirs.mode else {
            return Err(denied(peer, (Code::Protocol, OTHER_ANSWER)));
        };
        let negotiated = hello::negotiate(&ours, &theirs).map_err(|code| denied(peer, (code, MISMATCH)))?;
        Ok((negotiated, secret_share))
    })
    .await?;
    let (tcp, tls) = tls.into_inner();
    let instance = negotiated.peer_instance;
    Ok(Established {
        connection: Connection::new(tcp, tls, remote)?,
        peer: peer.clone(),
        role: Role::Dialer,
        key: SessionKey::derive(session_id, &secret_share, &share, instance, negotiated.version),
        negotiated,
        address: Some(address.to_owned()),
    })
}

/// TLS with `peer` at one of the addresses that its name has now; TCP may take `deadline`.
pub(super) async fn connect(
    endpoint: &Endpoint,
    name: &str,
    peer: &Identity,
    deadline: Duration,
) -> Result<(TlsStream<TcpStream>, SocketAddr), ConnectError> {
    let found = addresses::resolve(name).await?;
    let own = endpoint.tls();
    let attempt = |address| {
        let own = &own;
        async move {
            let tcp = addresses::tcp(address, deadline).await?;
            endpoint.prepare(&tcp);
            let tls = handshake::connect(own, tcp, peer, HANDSHAKE_DEADLINE).await?;
            Ok((tls, address))
        }
    };
    addresses::first_of(name, found, attempt).await
}
