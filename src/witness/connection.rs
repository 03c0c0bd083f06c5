//! One connection to one endpoint: HTTP/1.1, over TLS 1.3 unless it is on this host. The certificate files are read
//! for each connection, so that renewed ones need no restart.

use std::path::PathBuf;
use std::sync::Arc;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::crypto::aws_lc_rs;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

use crate::config::Endpoint;
use crate::net::tls::{TlsError, read_certificates, read_key};
use crate::printable::bounded;

/// Longest answer that is read.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// Why one endpoint does not answer.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    #[error("cannot connect")]
    Connect(#[source] std::io::Error),
    #[error("no TLS session")]
    Handshake(#[source] std::io::Error),
    #[error(transparent)]
    Files(#[from] TlsError),
    #[error("the certificate files cannot be used")]
    Settings(#[source] rustls::Error),
    #[error("\"{0}\" is no name of a server")]
    Name(String),
    #[error("no answer")]
    Http(#[source] hyper::Error),
    #[error("the request cannot be made")]
    Request(#[source] hyper::http::Error),
    #[error("the answer cannot be read")]
    Answer(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("it answered {status}: {text}")]
    Status { status: StatusCode, text: String },
}

/// Certificate files.
#[derive(Debug, Clone)]
pub(super) struct Files {
    pub(super) ca: Option<PathBuf>,
    /// Certificate and key.
    pub(super) own: Option<(PathBuf, PathBuf)>,
}

impl Files {
    pub(super) fn settings(&self) -> Result<ClientConfig, ConnectionError> {
        let mut roots = RootCertStore::empty();
        if let Some(ca) = &self.ca {
            for certificate in read_certificates("CA certificate of the witness", ca)? {
                roots.add(certificate).map_err(ConnectionError::Settings)?;
            }
        }
        let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(ConnectionError::Settings)?
            .with_root_certificates(roots);
        let mut settings = match &self.own {
            None => builder.with_no_client_auth(),
            Some((cert, key)) => {
                let chain = read_certificates("certificate for the witness", cert)?;
                builder.with_client_auth_cert(chain, read_key(key)?).map_err(ConnectionError::Settings)?
            }
        };
        settings.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(settings)
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection; dropped, it is closed.
#[derive(Debug)]
pub(super) struct Connection {
    number: usize,
    sender: SendRequest<Full<Bytes>>,
    _driver: JoinSet<()>,
}

impl Connection {
    /// To the endpoint of that number.
    pub(super) async fn open(
        number: usize,
        endpoint: &Endpoint,
        files: &Files,
    ) -> Result<Self, ConnectionError> {
        let address = (endpoint.host.as_str(), endpoint.port);
        let tcp = TcpStream::connect(address).await.map_err(ConnectionError::Connect)?;
        tcp.set_nodelay(true).map_err(ConnectionError::Connect)?;
        let stream: Box<dyn Stream> = match endpoint.tls {
            false => Box::new(tcp),
            true => {
                let name = ServerName::try_from(endpoint.host.clone())
                    .map_err(|_| ConnectionError::Name(endpoint.host.clone()))?;
                let connector = TlsConnector::from(Arc::new(files.settings()?));
                Box::new(connector.connect(name, tcp).await.map_err(ConnectionError::Handshake)?)
            }
        };
        let (sender, driver) = http1::handshake(TokioIo::new(stream)).await.map_err(ConnectionError::Http)?;
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let _ = driver.await;
        });
        Ok(Self { number, sender, _driver: tasks })
    }

    pub(super) fn is_to(&self, number: usize) -> bool {
        self.number == number
    }

    /// Asks, and reads the whole answer.
    pub(super) async fn ask(
        &mut self,
        endpoint: &Endpoint,
        path: &str,
        body: &str,
    ) -> Result<Vec<u8>, ConnectionError> {
        self.sender.ready().await.map_err(ConnectionError::Http)?;
        let host = match endpoint.host.contains(':') {
            true => format!("[{}]:{}", endpoint.host, endpoint.port),
            false => format!("{}:{}", endpoint.host, endpoint.port),
        };
        let request = Request::post(path)
            .header("host", host)
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body.to_owned())))
            .map_err(ConnectionError::Request)?;
        let answer = self.sender.send_request(request).await.map_err(ConnectionError::Http)?;
        let status = answer.status();
        let whole = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
        let whole = whole.map_err(ConnectionError::Answer)?.to_bytes().to_vec();
        if status != StatusCode::OK {
            let text = bounded(&String::from_utf8_lossy(&whole));
            return Err(ConnectionError::Status { status, text });
        }
        Ok(whole)
    }
}
