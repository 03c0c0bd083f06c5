//! Something that answers as an etcd's gateway does, or as none should.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::config::WitnessConfig;

/// What it does with a question.
pub(crate) enum Reply {
    Says(u16, String),
    /// These bytes, whatever they are.
    Raw(&'static [u8]),
    Silent,
}

/// What an etcd of that cluster says, whatever it is asked.
pub(crate) fn nothing(cluster: &str) -> Reply {
    Reply::Says(200, format!(r#"{{"header":{{"cluster_id":"{cluster}","revision":"4"}}}}"#))
}

/// A server on this host, for as long as the test's runtime lives.
pub(crate) struct Fake {
    pub(crate) port: u16,
    connections: Arc<AtomicUsize>,
}

impl Fake {
    /// `reply`: to a question, by the number of its connection and its own on that.
    pub(crate) async fn start(reply: impl Fn(usize, usize) -> Reply + Send + Sync + 'static) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let connections = Arc::new(AtomicUsize::new(0));
        let (count, reply) = (Arc::clone(&connections), Arc::new(reply));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let number = count.fetch_add(1, Relaxed);
                let reply = Arc::clone(&reply);
                tokio::spawn(async move { serve(stream, |question| reply(number, question)).await });
            }
        });
        Ok(Self { port, connections })
    }

    /// How many connections it has taken.
    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Relaxed)
    }
}

/// `[witness]` with these servers as its endpoints.
pub(crate) fn table(fakes: &[&Fake], answer_s: u64) -> Result<WitnessConfig> {
    let endpoints: Vec<_> = fakes.iter().map(|fake| format!("\"http://127.0.0.1:{}\"", fake.port)).collect();
    Ok(toml::from_str(&format!("endpoints = [{}]\nanswer_s = {answer_s}\n", endpoints.join(", ")))?)
}

async fn serve(mut stream: TcpStream, reply: impl Fn(usize) -> Reply) -> Option<()> {
    for question in 0.. {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.ok()?);
            // What no HTTP begins with.
            if head[0] == 0x16 {
                break;
            }
        }
        let head = String::from_utf8_lossy(&head).to_lowercase();
        let length = head.split_once("content-length: ").and_then(|(_, rest)| rest.lines().next());
        stream.read_exact(&mut vec![0; length.unwrap_or("0").parse().ok()?]).await.ok()?;
        match reply(question) {
            Reply::Silent => std::future::pending().await,
            Reply::Raw(bytes) => stream.write_all(bytes).await.ok()?,
            Reply::Says(status, body) => {
                let text = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                stream.write_all(text.as_bytes()).await.ok()?;
            }
        }
    }
    None
}
