//! One connection to one endpoint: HTTP/1.1, over TLS 1.3 unless it is on this host.

use std::io;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::AlertDescription;
use rustls_pki_types::ServerName;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;

use super::error::ConnectionError;
use super::files::Files;
use crate::config::Endpoint;
use crate::net::addresses;
use crate::printable::printable;

/// Longest answer that is read.
const ANSWER_BYTES_MAX: usize = 64 * 1024;
/// Most of an endpoint's text that is repeated, in characters.
const TEXT_CHARS_MAX: usize = 300;
/// A connection that nothing was heard on for so long is looked after.
const KEEPALIVE: Duration = Duration::from_secs(3);

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection; dropped, it is closed.
#[derive(Debug)]
pub(super) struct Connection {
    number: usize,
    sender: SendRequest<Full<Bytes>>,
    /// When it answered last.
    used: Instant,
    _driver: JoinSet<()>,
}

impl Connection {
    /// To the endpoint of that number, of which nothing may stay unacknowledged for longer than `answer`.
    pub(super) async fn open(
        number: usize,
        endpoint: &Endpoint,
        files: &Files,
        answer: Duration,
    ) -> Result<Self, ConnectionError> {
        let tcp = reach(endpoint, answer).await?;
        let stream: Box<dyn Stream> = match endpoint.tls {
            false => Box::new(tcp),
            true => {
                let name = ServerName::try_from(endpoint.host.clone())
                    .map_err(|_| ConnectionError::Name(endpoint.host.clone()))?;
                let connector = TlsConnector::from(files.settings()?);
                Box::new(connector.connect(name, tcp).await.map_err(no_session)?)
            }
        };
        let (sender, driver) = http1::handshake(TokioIo::new(stream)).await.map_err(ConnectionError::Http)?;
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let _ = driver.await;
        });
        Ok(Self { number, sender, used: Instant::now(), _driver: tasks })
    }

    pub(super) fn is_to(&self, number: usize) -> bool {
        self.number == number
    }

    /// For how long nothing was asked on it.
    pub(super) fn idle(&self) -> Duration {
        self.used.elapsed()
    }

    /// Asks, and reads the whole answer.
    pub(super) async fn ask(
        &mut self,
        endpoint: &Endpoint,
        path: &str,
        body: &str,
    ) -> Result<Vec<u8>, ConnectionError> {
        self.sender.ready().await.map_err(ConnectionError::Http)?;
        let request = Request::post(path)
            .header("host", endpoint.authority())
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body.to_owned())))
            .map_err(ConnectionError::Request)?;
        let answer = self.sender.send_request(request).await.map_err(ConnectionError::Http)?;
        let status = answer.status();
        let whole = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
        let whole = whole.map_err(ConnectionError::Answer)?.to_bytes().to_vec();
        if status != StatusCode::OK {
            return Err(refused(status, &whole));
        }
        self.used = Instant::now();
        Ok(whole)
    }
}

/// The first of its addresses that takes a connection.
async fn reach(endpoint: &Endpoint, answer: Duration) -> Result<TcpStream, ConnectionError> {
    let name = endpoint.authority();
    let found = addresses::resolve(&name).await?;
    let tcp = addresses::first_of(&name, found, |address| addresses::tcp(address, answer)).await?;
    let socket = SockRef::from(&tcp);
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(Duration::from_secs(1));
    let options = [
        socket.set_tcp_nodelay(true),
        socket.set_tcp_user_timeout(Some(answer)),
        socket.set_tcp_keepalive(&keepalive),
    ];
    for error in options.into_iter().filter_map(Result::err) {
        tracing::debug!(%error, "a socket option was refused");
    }
    Ok(tcp)
}

fn no_session(source: io::Error) -> ConnectionError {
    use AlertDescription::{HandshakeFailure, ProtocolVersion};
    match source.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) {
        Some(
            rustls::Error::AlertReceived(ProtocolVersion | HandshakeFailure)
            | rustls::Error::PeerIncompatible(_),
        ) => ConnectionError::OldTls(source),
        _ => ConnectionError::Handshake(source),
    }
}

fn refused(status: StatusCode, body: &[u8]) -> ConnectionError {
    let text = short(&String::from_utf8_lossy(body));
    let is_of_users = ["user name is empty", "permission denied", "invalid auth token"];
    let has_users = [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN].contains(&status)
        || is_of_users.iter().any(|words| text.contains(words));
    if has_users { ConnectionError::Users { status, text } } else { ConnectionError::Status { status, text } }
}

/// An endpoint's text as it is repeated.
pub(super) fn short(text: &str) -> String {
    let mut shown: String = printable(text).chars().take(TEXT_CHARS_MAX).collect();
    if text.chars().nth(TEXT_CHARS_MAX).is_some() {
        shown.push('…');
    }
    shown
}
