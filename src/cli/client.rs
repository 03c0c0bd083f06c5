//! HTTP over the agent's unix socket: one connection per call.

use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::api::{ErrorBody, migration_path};
use crate::printable;

/// Where the local agent's socket is, unless the environment says so.
pub(super) const SOCKET: &str = "/run/vmferry/vmferry.sock";
/// … and what says so.
pub(super) const SOCKET_VARIABLE: &str = "VMFERRY_SOCKET";
/// Longest answer read into memory.
const ANSWER_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Calls that the agent has surely not carried out.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotDone {
    /// Nothing was sent.
    #[error(
        "cannot reach the agent at {}; is it running (`systemctl status vmferry`), and may you use its socket",
        socket.display()
    )]
    Unreachable { socket: PathBuf, source: std::io::Error },
    /// The agent said no.
    #[error("{error}; {remedy}")]
    Refused { error: String, remedy: String },
}

/// Calls the agent behind one socket.
pub(super) struct Client {
    socket: PathBuf,
}

impl Client {
    pub(super) fn new(socket: &Path) -> Self {
        Self { socket: socket.into() }
    }

    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.call(Method::GET, path, &()).await
    }

    pub(super) async fn call<B: Serialize, T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &B,
    ) -> anyhow::Result<T> {
        let (answer, _connection) = self.send(method, path, body).await?;
        let bytes = collect(answer).await?;
        // An answer without a body stands for `()`.
        let bytes = if bytes.is_empty() { Bytes::from_static(b"null") } else { bytes };
        printable::to_show(&bytes).context("the agent's answer could not be understood")
    }

    /// Rolls a migration back.
    pub(super) async fn cancel(&self, migration: Uuid) -> anyhow::Result<()> {
        self.call(Method::POST, &format!("{}/cancel", migration_path(migration)), &()).await
    }

    /// The lines of an answer that does not end soon.
    pub(super) async fn lines(&self, path: &str) -> anyhow::Result<Lines> {
        let (answer, connection) = self.send(Method::GET, path, &()).await?;
        Ok(Lines { body: answer.into_body(), buffer: Vec::new(), _connection: connection })
    }

    async fn send<B: Serialize>(
        &self,
        method: Method,
        path: &str,
        body: &B,
    ) -> anyhow::Result<(Response<Incoming>, JoinSet<()>)> {
        let unreachable = |source| NotDone::Unreachable { socket: self.socket.clone(), source };
        let stream = UnixStream::connect(&self.socket).await.map_err(unreachable)?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let _ = connection.await;
        });
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "vmferry")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(serde_json::to_vec(body)?)))?;
        let answer = sender.send_request(request).await.context("the agent ended the connection")?;
        if answer.status().is_success() {
            return Ok((answer, tasks));
        }
        let status = answer.status();
        match printable::to_show::<ErrorBody>(&collect(answer).await?) {
            Ok(ErrorBody { error, remedy, .. }) if status.is_client_error() => {
                Err(NotDone::Refused { error, remedy }.into())
            }
            Ok(body) => Err(anyhow!("{}; {}", body.error, body.remedy)),
            Err(_) => bail!("the agent answered {status}"),
        }
    }
}

async fn collect(answer: Response<Incoming>) -> anyhow::Result<Bytes> {
    let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
    Ok(body.map_err(|e| anyhow!(e)).context("the agent's answer was cut short")?.to_bytes())
}

/// Lines as they come.
pub(super) struct Lines {
    body: Incoming,
    buffer: Vec<u8>,
    _connection: JoinSet<()>,
}

impl Lines {
    /// The next line; `None` at the end.
    pub(super) async fn next<T: DeserializeOwned>(&mut self) -> anyhow::Result<Option<T>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|&b| b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return Ok(Some(printable::to_show(&line)?));
            }
            if self.buffer.len() > ANSWER_BYTES_MAX {
                bail!("the agent's answer has no end");
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(frame) => {
                    let frame = frame.context("the agent ended the connection")?;
                    self.buffer.extend_from_slice(frame.data_ref().map_or(&[][..], |d| d));
                }
            }
        }
    }
}
