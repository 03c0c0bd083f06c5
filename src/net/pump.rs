//! Pumps: bytes between a local socket and a stream, both ways, as they come.
//!
//! A pump passes on half-closes as half-closes and anything abnormal as an abort of both ends:
//! a peer that only stopped reading would leave QEMU's writer waiting for ever. It can be cut
//! at any time without QEMU's help. Knows no QEMU and looks at no byte.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use bytes::{Buf, Bytes, BytesMut};
use socket2::SockRef;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::net::unix::{ReadHalf, WriteHalf};
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

use super::frozen::Halves;
use super::stream::{RecvHalf, SendHalf, Stream, StreamEnded};
use crate::mux::Code;
use crate::mux::frame::PAYLOAD_MAX;

/// Bytes asked of a local socket at once: whole frames, so that a full read leaves no crumb that
/// would travel in a record of its own, and a batch of them, so that they are sealed while the
/// cache still has them.
const READ_BYTES: usize = 4 * PAYLOAD_MAX;
/// A read buffer with less room than this is replaced.
const READ_BYTES_MIN: usize = 16 * 1024;
/// Received chunks written to a local socket in one call.
const WRITE_CHUNKS: usize = 16;
/// Buffer asked of the kernel for our end; the kernel may give less (`net.core.wmem_max`).
const SOCKET_BUFFER_BYTES: usize = 1024 * 1024;

/// How a pump ended.
#[derive(Debug, thiserror::Error)]
pub enum PumpEnd {
    /// Both directions ended in order.
    #[error("ended in order")]
    Finished,
    /// The local socket failed: its program is gone or cut it.
    #[error("the local socket failed")]
    Local(#[source] io::Error),
    /// The stream was ended by the peer or with its session.
    #[error("cut from the other side")]
    Remote(#[source] StreamEnded),
}

/// Bytes that a pump has moved.
#[derive(Debug, Default)]
pub struct PumpCounters {
    /// From the local socket into the stream.
    pub sent_bytes: AtomicU64,
    /// From the stream into the local socket.
    pub received_bytes: AtomicU64,
}

impl PumpCounters {
    /// Both directions together.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.sent_bytes.load(Relaxed) + self.received_bytes.load(Relaxed)
    }
}

/// A running pump; dropped, it is cut.
#[derive(Debug)]
pub struct Pump {
    task: AbortHandle,
    counters: Arc<PumpCounters>,
    freeze: CancellationToken,
    frozen: oneshot::Receiver<FrozenPump>,
}

/// A pump that has stopped between two bytes, to begin again in another process.
#[derive(Debug)]
pub struct FrozenPump {
    /// The local socket.
    pub local: OwnedFd,
    /// What it had of the stream.
    pub halves: Halves,
    /// What it had moved: into the stream, and out of it.
    pub moved: (u64, u64),
}

/// How a pump's task came to its end.
enum Outcome {
    Ended(PumpEnd),
    Frozen(FrozenPump),
}

/// How one direction came to its end, other than by a failure.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flow {
    Done,
    Frozen,
}

impl Pump {
    /// Starts a pump on `runtime`, the one its session runs on. `ended` is called once, unless
    /// the pump is cut or frozen first. A direction of the stream that has ended is left alone.
    pub fn start(
        runtime: &tokio::runtime::Handle,
        local: OwnedFd,
        stream: Stream,
        ended: impl FnOnce(PumpEnd) + Send + 'static,
    ) -> Self {
        Self::resume(runtime, local, stream, (0, 0), ended)
    }

    /// As [`Pump::start`], for one that has moved so many bytes in an earlier process.
    pub fn resume(
        runtime: &tokio::runtime::Handle,
        local: OwnedFd,
        stream: Stream,
        moved: (u64, u64),
        ended: impl FnOnce(PumpEnd) + Send + 'static,
    ) -> Self {
        let counters = Arc::new(PumpCounters { sent_bytes: moved.0.into(), received_bytes: moved.1.into() });
        let counting = Arc::clone(&counters);
        let freeze = CancellationToken::new();
        let freezing = freeze.clone();
        let (leave, frozen) = oneshot::channel();
        let task = runtime.spawn(async move {
            match run(local, stream, &counting, &freezing).await {
                Outcome::Ended(end) => ended(end),
                Outcome::Frozen(pump) => drop(leave.send(pump)),
            }
        });
        Self { task: task.abort_handle(), counters, freeze, frozen }
    }

    /// Cuts both ends: the local program sees its socket close, the peer a reset.
    pub fn cut(&self) {
        self.task.abort();
    }

    /// Stops between two bytes, and leaves both ends as they are. `None`: it has ended.
    pub async fn freeze(mut self) -> Option<FrozenPump> {
        self.freeze.cancel();
        (&mut self.frozen).await.ok()
    }

    /// What it has moved so far.
    #[must_use]
    pub fn counters(&self) -> &Arc<PumpCounters> {
        &self.counters
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.cut();
    }
}

async fn run(local: OwnedFd, stream: Stream, counters: &PumpCounters, freeze: &CancellationToken) -> Outcome {
    let mut local = match adopt(local) {
        Ok(local) => local,
        Err(e) => return Outcome::Ended(PumpEnd::Local(e)),
    };
    let Stream { mut send, mut recv, .. } = stream;
    let mut untaken = VecDeque::with_capacity(WRITE_CHUNKS);
    let (reader, writer) = local.split();
    let ended = tokio::try_join!(
        outward(reader, &mut send, &counters.sent_bytes, freeze),
        inward(writer, &mut recv, &mut untaken, &counters.received_bytes, freeze),
    );
    match ended {
        Ok((Flow::Done, Flow::Done)) => Outcome::Ended(PumpEnd::Finished),
        Ok(_) => match local.into_std() {
            Ok(local) => Outcome::Frozen(FrozenPump {
                local: local.into(),
                halves: Halves::new(send, recv, untaken.into()),
                moved: (counters.sent_bytes.load(Relaxed), counters.received_bytes.load(Relaxed)),
            }),
            Err(e) => Outcome::Ended(PumpEnd::Local(e)),
        },
        Err(end) => {
            send.reset(match &end {
                PumpEnd::Local(_) => Code::IoError,
                _ => Code::Cancelled,
            });
            Outcome::Ended(end)
        }
    }
}

fn adopt(local: OwnedFd) -> io::Result<UnixStream> {
    let local = std::os::unix::net::UnixStream::from(local);
    local.set_nonblocking(true)?;
    let socket = SockRef::from(&local);
    // Larger buffers mean fewer wake-ups; a refusal costs only those.
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER_BYTES);
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES);
    UnixStream::from_std(local)
}

async fn outward(
    mut local: ReadHalf<'_>,
    send: &mut SendHalf,
    count: &AtomicU64,
    freeze: &CancellationToken,
) -> Result<Flow, PumpEnd> {
    if send.is_finished() {
        return Ok(Flow::Done);
    }
    let mut buffer = BytesMut::new();
    let freezing = freeze.cancelled();
    tokio::pin!(freezing);
    loop {
        if buffer.capacity() < READ_BYTES_MIN {
            buffer = BytesMut::with_capacity(READ_BYTES);
        }
        // A read that leaves room has emptied the socket, and tokio knows it: the next one
        // waits without asking the kernel.
        let n = tokio::select! {
            biased;
            n = local.read_buf(&mut buffer) => n.map_err(PumpEnd::Local)?,
            () = &mut freezing => return Ok(Flow::Frozen),
        };
        if n == 0 {
            break;
        }
        count.fetch_add(n as u64, Relaxed);
        let chunk = buffer.split().freeze();
        tokio::select! {
            biased;
            sent = send.send(chunk.clone()) => sent.map_err(PumpEnd::Remote)?,
            () = &mut freezing => {
                send.send_last(chunk);
                return Ok(Flow::Frozen);
            }
        }
        if freeze.is_cancelled() {
            return Ok(Flow::Frozen);
        }
    }
    send.finish().map_err(PumpEnd::Remote)?;
    Ok(Flow::Done)
}

async fn inward(
    local: WriteHalf<'_>,
    recv: &mut RecvHalf,
    queue: &mut VecDeque<Bytes>,
    count: &AtomicU64,
    freeze: &CancellationToken,
) -> Result<Flow, PumpEnd> {
    if recv.is_ended() {
        return Ok(Flow::Done);
    }
    let freezing = freeze.cancelled();
    tokio::pin!(freezing);
    loop {
        let first = tokio::select! {
            biased;
            () = &mut freezing => return Ok(Flow::Frozen),
            first = recv.recv() => first.map_err(PumpEnd::Remote)?,
        };
        let Some(first) = first else { break };
        queue.push_back(first);
        while !queue.is_empty() {
            while queue.len() < WRITE_CHUNKS {
                let Some(next) = recv.try_recv() else { break };
                queue.push_back(next);
            }
            let n = tokio::select! {
                biased;
                n = write_some(&local, queue) => n.map_err(PumpEnd::Local)?,
                () = &mut freezing => return Ok(Flow::Frozen),
            };
            count.fetch_add(n as u64, Relaxed);
            recv.consumed(n);
            discard(queue, n);
        }
    }
    // The program may already have closed its end; then there is nobody left to tell.
    let _ = SockRef::from(local.as_ref()).shutdown(Shutdown::Write);
    Ok(Flow::Done)
}

async fn write_some(local: &WriteHalf<'_>, queue: &VecDeque<Bytes>) -> io::Result<usize> {
    let mut slices = [IoSlice::new(&[]); WRITE_CHUNKS];
    for (slice, chunk) in slices.iter_mut().zip(queue) {
        *slice = IoSlice::new(chunk);
    }
    let slices = &slices[..queue.len().min(WRITE_CHUNKS)];
    loop {
        match local.try_write_vectored(slices) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => local.writable().await?,
            done => return done,
        }
    }
}

fn discard(queue: &mut VecDeque<Bytes>, mut written: usize) {
    while let Some(front) = queue.front_mut() {
        if front.len() > written {
            front.advance(written);
            return;
        }
        written -= front.len();
        queue.pop_front();
    }
}
