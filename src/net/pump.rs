//! Pumps: bytes between a local socket and a stream, both ways, as they come.
//!
//! A pump passes on half-closes as half-closes and anything abnormal as an abort of both ends:
//! a peer that only stopped reading would leave QEMU's writer waiting for ever. It can be cut
//! at any time without QEMU's help. Knows no QEMU and changes no byte. One direction may be
//! compressed (`compress`), and what goes to an NBD server is written so that each request's header is in
//! one piece (`nbd_requests`).
//!
//! A local socket is a unix socket or TCP. Of both the same calls are made; a TCP socket that does not
//! end in order is reset.

use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use socket2::SockRef;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::net::unix::{ReadHalf, WriteHalf};
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

use super::compress::{self, Coding, DecodeError, Encoder};
use super::inbox::{Inbox, WRITE_CHUNKS};
use super::nbd_requests::NbdRequests;
use super::stream::{RecvHalf, SendHalf, StoppedStream, Stream, StreamEnded};
use super::waits::{Wait, Waited, Waits};
use crate::mux::Code;
use crate::mux::frame::PAYLOAD_MAX;

/// A read buffer with less room than this is replaced.
const READ_BYTES_MIN: usize = 16 * 1024;
/// A block with its header.
const BLOCK_BYTES: usize = compress::HEADER_LEN + compress::PLAIN_MAX;
/// Buffer asked of the kernel for our end; the kernel may give less (`net.core.wmem_max`).
const SOCKET_BUFFER_BYTES: usize = 1024 * 1024;

/// How a pump ended.
#[derive(Debug, thiserror::Error)]
pub enum PumpEnd {
    #[error("ended in order")]
    Finished,
    /// The local socket failed: its program is gone or cut it.
    #[error("the local socket failed")]
    Local(#[source] io::Error),
    #[error("what was received could not be decompressed")]
    Coding(#[source] DecodeError),
    #[error("cut from the other side")]
    Remote(#[source] StreamEnded),
}

/// Bytes that a pump has moved.
#[derive(Debug, Default)]
pub struct PumpCounters {
    pub sent_bytes: AtomicU64,
    pub received_bytes: AtomicU64,
    /// By how much compression has made the first of these smaller.
    pub saved_bytes: AtomicU64,
    /// What the way into the stream has waited for.
    waits: Waits,
    first_end: AtomicU8,
}

/// Which end of a pump ended first, in order or not: the other one's end is an echo of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FirstEnd {
    Local = 1,
    /// The stream, by the peer or with its session.
    Stream = 2,
}

impl PumpCounters {
    /// Both directions together.
    pub fn total(&self) -> u64 {
        self.sent_bytes.load(Relaxed) + self.received_bytes.load(Relaxed)
    }

    /// What the way into the stream has waited for, in this process.
    pub fn waited(&self) -> Waited {
        self.waits.waited()
    }

    /// Which end ended first; none while both are open.
    pub fn first_end(&self) -> Option<FirstEnd> {
        match self.first_end.load(Relaxed) {
            1 => Some(FirstEnd::Local),
            2 => Some(FirstEnd::Stream),
            _ => None,
        }
    }

    fn note_end(&self, ended: Result<Flow, PumpEnd>, in_order: FirstEnd) -> Result<Flow, PumpEnd> {
        let end = match &ended {
            Ok(Flow::Frozen) => return ended,
            Ok(Flow::Done) => in_order,
            Err(PumpEnd::Local(_)) => FirstEnd::Local,
            Err(_) => FirstEnd::Stream,
        };
        // Only the first counts.
        let _ = self.first_end.compare_exchange(0, end as u8, Relaxed, Relaxed);
        ended
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
    pub local: OwnedFd,
    pub stream: StoppedStream,
    /// What it had moved, and how.
    pub state: PumpState,
}

/// A pump's memory.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct PumpState {
    /// Bytes into the stream, and into the local socket.
    moved: (u64, u64),
    // What follows is of format 2.
    /// Bytes that compression has saved.
    #[serde(default)]
    saved_bytes: u64,
    #[serde(default)]
    coding: Coding,
    // What follows is of format 3: an agent that does not know of it hands requests over as they come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    requests: Option<NbdRequests>,
}

impl PumpState {
    /// One that begins.
    pub fn new(coding: Coding) -> Self {
        Self { coding, ..Self::default() }
    }

    /// So many bytes were moved before it, into the stream and from it.
    pub fn after(self, sent: u64, received: u64) -> Self {
        Self { moved: (sent, received), ..self }
    }

    /// What comes out of the stream goes to an NBD server: each request's header is written whole.
    pub fn to_nbd_server(self) -> Self {
        Self { requests: Some(NbdRequests::default()), ..self }
    }

    /// Bytes that it has moved into the stream, and into the local socket.
    pub fn moved(&self) -> (u64, u64) {
        self.moved
    }
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
    /// Starts a pump that changes no byte on `runtime`, the one its session runs on. `ended` is
    /// called once, unless the pump is cut or frozen first. A direction of the stream that has
    /// ended is left alone.
    pub fn start(
        runtime: &tokio::runtime::Handle,
        local: OwnedFd,
        stream: Stream,
        ended: impl FnOnce(PumpEnd) + Send + 'static,
    ) -> Self {
        Self::resume(runtime, local, stream, PumpState::default(), ended)
    }

    /// As [`Pump::start`], with a memory: of how bytes are coded, or of an earlier process.
    pub fn resume(
        runtime: &tokio::runtime::Handle,
        local: OwnedFd,
        stream: Stream,
        state: PumpState,
        ended: impl FnOnce(PumpEnd) + Send + 'static,
    ) -> Self {
        let PumpState { moved: (sent_bytes, received_bytes), saved_bytes, coding, requests } = state;
        let counters = Arc::new(PumpCounters {
            sent_bytes: sent_bytes.into(),
            received_bytes: received_bytes.into(),
            saved_bytes: saved_bytes.into(),
            waits: Waits::default(),
            first_end: 0.into(),
        });
        let counting = Arc::clone(&counters);
        let freeze = CancellationToken::new();
        let freezing = freeze.clone();
        let (leave, frozen) = oneshot::channel();
        let task = runtime.spawn(async move {
            match run(local, stream, coding, requests, &counting, &freezing).await {
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
    pub fn counters(&self) -> &Arc<PumpCounters> {
        &self.counters
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.cut();
    }
}

async fn run(
    local: OwnedFd,
    stream: Stream,
    coding: Coding,
    requests: Option<NbdRequests>,
    counters: &PumpCounters,
    freeze: &CancellationToken,
) -> Outcome {
    let prepared =
        adopt(local).and_then(|local| Ok((local, Outbox::new(&coding)?, Inbox::new(&coding, requests)?)));
    let (mut local, mut outbox, mut inbox) = match prepared {
        Ok(prepared) => prepared,
        Err(e) => return Outcome::Ended(PumpEnd::Local(e)),
    };
    let Stream { mut send, mut recv, .. } = stream;
    let (reader, writer) = local.split();
    let ended = tokio::try_join!(
        async {
            let ended = outward(reader, &mut send, &mut outbox, counters, freeze).await;
            counters.note_end(ended, FirstEnd::Local)
        },
        async {
            let ended = inward(writer, &mut recv, &mut inbox, counters, freeze).await;
            counters.note_end(ended, FirstEnd::Stream)
        },
    );
    match ended {
        Ok((Flow::Done, Flow::Done)) => {
            // What is still in the kernel is delivered.
            let _ = SockRef::from(&local).set_linger(None);
            Outcome::Ended(PumpEnd::Finished)
        }
        Ok(_) => match local.into_std() {
            Ok(local) => {
                let (untaken, undelivered, requests) = inbox.into_rest();
                let coding = match coding {
                    Coding::Decompress(_) => Coding::Decompress(undelivered),
                    other => other,
                };
                Outcome::Frozen(FrozenPump {
                    local: local.into(),
                    stream: StoppedStream::new(send, recv, untaken),
                    state: PumpState {
                        moved: (counters.sent_bytes.load(Relaxed), counters.received_bytes.load(Relaxed)),
                        saved_bytes: counters.saved_bytes.load(Relaxed),
                        coding,
                        requests,
                    },
                })
            }
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
    // However it is closed, even with this process, that is no end in order; unix sockets ignore it.
    let _ = socket.set_linger(Some(Duration::ZERO));
    // Larger buffers mean fewer wake-ups; a refusal costs only those.
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER_BYTES);
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES);
    UnixStream::from_std(local)
}

/// What was read and is not sent.
struct Outbox {
    buffer: BytesMut,
    encoder: Option<Encoder>,
}

impl Outbox {
    fn new(coding: &Coding) -> io::Result<Self> {
        let encoder = matches!(coding, Coding::Compress).then(Encoder::new).transpose()?;
        Ok(Self { buffer: BytesMut::new(), encoder })
    }

    /// Room to read into: a whole frame, so that a full read leaves no crumb that would travel in a
    /// record of its own, and no more, so that it is sealed while the cache still has it.
    fn room(&mut self) -> impl BufMut {
        let (least, size, header, most) = match self.encoder {
            None => (READ_BYTES_MIN, PAYLOAD_MAX, 0, PAYLOAD_MAX),
            Some(_) => (BLOCK_BYTES, BLOCK_BYTES, compress::HEADER_LEN, compress::PLAIN_MAX),
        };
        if self.buffer.capacity() < least {
            self.buffer = BytesMut::with_capacity(size);
        }
        if self.buffer.is_empty() {
            self.buffer.put_bytes(0, header);
        }
        (&mut self.buffer).limit(most)
    }

    /// What was read, as it is sent, and how much shorter that is.
    fn take(&mut self) -> (Bytes, u64) {
        match &mut self.encoder {
            None => (self.buffer.split().freeze(), 0),
            Some(encoder) => encoder.encode(&mut self.buffer),
        }
    }
}

async fn outward(
    mut local: ReadHalf<'_>,
    send: &mut SendHalf,
    outbox: &mut Outbox,
    counters: &PumpCounters,
    freeze: &CancellationToken,
) -> Result<Flow, PumpEnd> {
    if send.is_finished() {
        return Ok(Flow::Done);
    }
    let freezing = freeze.cancelled();
    tokio::pin!(freezing);
    loop {
        counters.waits.enter(Wait::Session);
        let permit = tokio::select! {
            biased;
            permit = send.reserve() => permit.map_err(PumpEnd::Remote)?,
            () = &mut freezing => return Ok(Flow::Frozen),
        };
        counters.waits.enter_read();
        let n = tokio::select! {
            biased;
            n = read_some(&mut local, outbox) => n.map_err(PumpEnd::Local)?,
            () = &mut freezing => return Ok(Flow::Frozen),
        };
        counters.waits.given();
        if n == 0 {
            break;
        }
        let (chunk, saved) = outbox.take();
        counters.sent_bytes.fetch_add(chunk.len() as u64, Relaxed);
        counters.saved_bytes.fetch_add(saved, Relaxed);
        send.send_reserved(permit, chunk).map_err(PumpEnd::Remote)?;
        if freeze.is_cancelled() {
            return Ok(Flow::Frozen);
        }
    }
    send.finish().map_err(PumpEnd::Remote)?;
    Ok(Flow::Done)
}

/// Reads what is there, once there is something: an idle pump needs no buffer. A read that leaves
/// room has emptied the socket, and tokio knows it: the next one waits without asking the kernel.
async fn read_some(local: &mut ReadHalf<'_>, outbox: &mut Outbox) -> io::Result<usize> {
    local.readable().await?;
    local.read_buf(&mut outbox.room()).await
}

async fn inward(
    local: WriteHalf<'_>,
    recv: &mut RecvHalf,
    inbox: &mut Inbox,
    counters: &PumpCounters,
    freeze: &CancellationToken,
) -> Result<Flow, PumpEnd> {
    if recv.is_ended() && inbox.is_empty() {
        return Ok(Flow::Done);
    }
    let freezing = freeze.cancelled();
    tokio::pin!(freezing);
    loop {
        inbox.fill(recv).map_err(PumpEnd::Coding)?;
        let mut slices = [IoSlice::new(&[]); WRITE_CHUNKS];
        let used = inbox.next_write(&mut slices);
        if used == 0 {
            let next = tokio::select! {
                biased;
                () = &mut freezing => return Ok(Flow::Frozen),
                next = recv.recv() => next.map_err(PumpEnd::Remote)?,
            };
            match next {
                Some(chunk) => inbox.push(chunk),
                None if inbox.is_empty() => break,
                None => inbox.release(),
            }
            continue;
        }
        let n = tokio::select! {
            biased;
            n = write_some(&local, &slices[..used]) => n.map_err(PumpEnd::Local)?,
            () = &mut freezing => return Ok(Flow::Frozen),
        };
        counters.received_bytes.fetch_add(n as u64, Relaxed);
        counters.waits.answer();
        inbox.delivered(n, recv);
    }
    inbox.end().map_err(PumpEnd::Coding)?;
    // The program may already have closed its end; then there is nobody left to tell.
    let _ = SockRef::from(local.as_ref()).shutdown(Shutdown::Write);
    Ok(Flow::Done)
}

async fn write_some(local: &WriteHalf<'_>, slices: &[IoSlice<'_>]) -> io::Result<usize> {
    loop {
        match local.try_write_vectored(slices) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => local.writable().await?,
            done => return done,
        }
    }
}
