//! A probe of the way to a peer, on a stream of its own: who answers, how soon, and how fast bytes go. What it may
//! cost who answers is bounded; whether somebody may is not decided here.
//!
//! ```text
//! prober:    bytes …                                  FIN
//! answerer:  {"version": …}\n     … swallows them …        {"bytes": n}\n FIN
//! ```

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::session::{OpenStreamError, Session};
use super::stream::{RecvHalf, Stream, StreamEnded};
use crate::mux::hello::{VERSION_MAX, VERSION_MIN};
use crate::mux::{Class, Name, Open, purpose};
use crate::printable;

/// Most that one probe may carry.
pub const BYTES_MAX: u64 = 64 * 1024 * 1024;
/// How long one may take.
pub const DEADLINE: Duration = Duration::from_secs(15);
/// Longest line of an answer, with its end.
pub const LINE_BYTES_MAX: usize = 1024;
const CHUNK_BYTES: usize = 64 * 1024;
/// Among bulk streams it is the least.
const WEIGHT: u16 = 1;

/// Who answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Answerer {
    /// Of its program.
    pub version: String,
    /// Versions of the session protocol that it speaks, oldest and newest.
    pub protocols: (u16, u16),
}

/// How many bytes have come.
#[derive(Debug, Serialize, Deserialize)]
pub struct Swallowed {
    pub bytes: u64,
}

/// What a probe has found out.
#[derive(Debug, Clone)]
pub struct Probed {
    pub answerer: Answerer,
    /// From the question to the answer, which was a round trip.
    pub round_trip: Duration,
    /// What was sent, and how long it took until the other side had all of it.
    pub sent_bytes: u64,
    pub sent_in: Duration,
}

#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    #[error(transparent)]
    Open(#[from] OpenStreamError),
    #[error("the probe was ended")]
    Ended(#[from] StreamEnded),
    #[error("the answer could not be understood")]
    NotUnderstood,
    #[error("no answer within {} s", DEADLINE.as_secs())]
    Deadline,
}

/// Probes the way to a session's peer with so many bytes.
pub async fn probe(session: &Session, bytes: u64) -> Result<Probed, ProbeError> {
    timeout(DEADLINE, run(session, bytes.min(BYTES_MAX))).await.map_err(|_| ProbeError::Deadline)?
}

async fn run(session: &Session, bytes: u64) -> Result<Probed, ProbeError> {
    let asked = Instant::now();
    let open = Open {
        purpose: purpose::PROBE,
        class: Class::Bulk,
        weight: WEIGHT,
        migration: [0; 16],
        channel: 0,
        name: Name::NONE,
    };
    let mut stream = session.open(open).await?;
    let round_trip = asked.elapsed();
    let mut lines = Lines { recv: stream.recv, buffer: BytesMut::new() };
    let answerer = lines.next().await?;
    let began = Instant::now();
    let chunk = Bytes::from(vec![0x5a; CHUNK_BYTES]);
    let mut left = bytes;
    while left > 0 {
        let part = chunk.slice(..left.min(CHUNK_BYTES as u64) as usize);
        left -= part.len() as u64;
        stream.send.send(part).await?;
    }
    stream.send.finish()?;
    let Swallowed { bytes: sent_bytes } = lines.next().await?;
    if sent_bytes != bytes {
        return Err(ProbeError::NotUnderstood);
    }
    Ok(Probed { answerer, round_trip, sent_bytes, sent_in: began.elapsed() })
}

/// Answers a probe that was let in.
pub async fn answer(stream: Stream) {
    if timeout(DEADLINE, swallow(stream)).await.is_err() {
        tracing::debug!("a probe took too long and was ended");
    }
}

async fn swallow(mut stream: Stream) -> Option<()> {
    let answerer =
        Answerer { version: env!("CARGO_PKG_VERSION").into(), protocols: (VERSION_MIN, VERSION_MAX) };
    stream.send.send(line(&answerer)?).await.ok()?;
    let mut swallowed = 0;
    while let Some(chunk) = stream.recv.recv().await.ok()? {
        swallowed += chunk.len() as u64;
        if swallowed > BYTES_MAX {
            return None;
        }
        stream.recv.consumed(chunk.len());
    }
    stream.send.send(line(&Swallowed { bytes: swallowed })?).await.ok()?;
    stream.send.finish().ok()
}

fn line(what: &impl Serialize) -> Option<Bytes> {
    let mut json = serde_json::to_vec(what).ok()?;
    json.push(b'\n');
    Some(json.into())
}

/// The first line of what has come, with its end; `None` while that is not there.
/// Errors: [`ProbeError::NotUnderstood`] for one that is longer than [`LINE_BYTES_MAX`].
pub fn take_line(buffer: &mut BytesMut) -> Result<Option<BytesMut>, ProbeError> {
    let end = buffer.iter().take(LINE_BYTES_MAX).position(|byte| *byte == b'\n');
    match end {
        Some(end) => Ok(Some(buffer.split_to(end + 1))),
        None if buffer.len() >= LINE_BYTES_MAX => Err(ProbeError::NotUnderstood),
        None => Ok(None),
    }
}

/// Lines of a peer, none longer than it may be.
struct Lines {
    recv: RecvHalf,
    buffer: BytesMut,
}

impl Lines {
    async fn next<T: serde::de::DeserializeOwned>(&mut self) -> Result<T, ProbeError> {
        loop {
            if let Some(line) = take_line(&mut self.buffer)? {
                return printable::of_peer(&line).map_err(|_| ProbeError::NotUnderstood);
            }
            let chunk = self.recv.recv().await?.ok_or(ProbeError::NotUnderstood)?;
            self.recv.consumed(chunk.len());
            self.buffer.extend_from_slice(&chunk);
        }
    }
}
