//! Why one endpoint does not answer.

use std::io;
use std::path::PathBuf;

use hyper::StatusCode;

use crate::net::connect_error::ConnectError;
use crate::net::tls::TlsError;

/// Why one endpoint does not answer.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    #[error("its name cannot be resolved")]
    Resolve(#[source] io::Error),
    #[error("cannot connect")]
    Connect(#[source] io::Error),
    #[error("no TLS session")]
    Handshake(#[source] io::Error),
    #[error(
        "no TLS session: it seems not to speak TLS 1.3, which is required here; etcd does from 3.5.8 on, 3.5.0 to 3.5.7 \
         and some builds of 3.4 do not"
    )]
    OldTls(#[source] io::Error),
    #[error(transparent)]
    Files(#[from] TlsError),
    #[error("the private key `{}` cannot be used", path.display())]
    Key { path: PathBuf, source: rustls::Error },
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
    #[error(
        "it answered {status}: {text}; an etcd that has users (`etcdctl auth enable`) cannot be used, for its gateway \
         does not know them by certificates: take one of its own, with auth off"
    )]
    Users { status: StatusCode, text: String },
    #[error("its answer is not understood, as of something that is no etcd: {0}")]
    NotUnderstood(String),
    #[error("it is another etcd: its cluster is {cluster}")]
    Another { cluster: String },
}

impl From<ConnectError> for ConnectionError {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Resolve { source, .. } => Self::Resolve(source),
            ConnectError::Connect { source, .. } => Self::Connect(source),
            other => Self::Connect(io::Error::other(other)),
        }
    }
}
