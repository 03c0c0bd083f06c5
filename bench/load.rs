//! The load: generators that write into the near relay's local socket, sinks behind the far
//! relay. Every 64 KiB block carries its stream and its offset, and the sink looks at them:
//! what arrives too early, twice or not at all fails the round.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

const BLOCK: usize = 64 * 1024;
/// Bytes of one write and of one read at most.
pub(crate) const CHUNK: usize = 4 * BLOCK;
/// No relay stands still this long unless it is broken.
pub(crate) const STALL: Duration = Duration::from_secs(60);

/// What was moved.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moved {
    /// From the first byte to the last.
    pub(crate) bytes: u64,
    /// Per second, of the time that counts.
    pub(crate) bytes_per_second: f64,
}

/// Sends `bytes` (a multiple of [`CHUNK`]) over each of `streams` connections. What counts is the
/// time from the first write, when all are connected, until the last byte has come.
pub(crate) fn amount(local: &Path, sink: &UnixListener, streams: u32, bytes: u64) -> anyhow::Result<Moved> {
    ensure!(bytes.is_multiple_of(CHUNK as u64), "bytes must be a multiple of {CHUNK}");
    let moved = AtomicU64::new(0);
    let more = |offset| offset < bytes;
    let (begin, end) = bulk(local, sink, streams, &moved, &more, Instant::now)?;
    let seconds = (end - begin).as_secs_f64();
    let (came, sent) = (moved.into_inner(), bytes * u64::from(streams));
    ensure!(came == sent, "{came} bytes came of {sent}");
    Ok(Moved { bytes: came, bytes_per_second: rate(came, seconds) })
}

/// Sends for as long as `during` takes, after `warm_up`, and counts what comes in `during`.
pub(crate) fn steady(
    local: &Path,
    sink: &UnixListener,
    warm_up: Duration,
    during: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<Moved> {
    let (moved, enough) = (AtomicU64::new(0), AtomicBool::new(false));
    let more = |_| !enough.load(Relaxed);
    let (bytes_per_second, _) = bulk(local, sink, 1, &moved, &more, || {
        thread::sleep(warm_up);
        let (begin, before) = (Instant::now(), moved.load(Relaxed));
        let outcome = during();
        let measured = rate(moved.load(Relaxed) - before, begin.elapsed().as_secs_f64());
        enough.store(true, Relaxed);
        outcome.map(|()| measured)
    })?;
    Ok(Moved { bytes: moved.into_inner(), bytes_per_second: bytes_per_second? })
}

#[allow(clippy::cast_precision_loss)]
fn rate(bytes: u64, seconds: f64) -> f64 {
    bytes as f64 / seconds
}

/// Connects all streams, then runs generators that go on while `more` says so of their offset,
/// their sinks, and `meanwhile` on this thread. `moved` counts what the sinks have seen. Also
/// returns when the last byte had come; only then are the streams ended, for not every relay
/// brings to its end what a half-closed connection still has.
pub(crate) fn bulk<T>(
    local: &Path,
    sink: &UnixListener,
    streams: u32,
    moved: &AtomicU64,
    more: &(impl Fn(u64) -> bool + Sync),
    meanwhile: impl FnOnce() -> T,
) -> anyhow::Result<(T, Instant)> {
    let sources = (0..streams).map(|_| UnixStream::connect(local)).collect::<Result<Vec<_>, _>>();
    let sources = sources.context("can't reach the near relay")?;
    let drains = (0..streams).map(|_| accept(sink)).collect::<anyhow::Result<Vec<_>>>()?;
    thread::scope(|scope| {
        let sinks: Vec<_> =
            drains.into_iter().map(|socket| scope.spawn(move || swallow(socket, moved))).collect();
        let generators: Vec<_> = (0..)
            .zip(&sources)
            .map(|(stream, socket)| scope.spawn(move || generate(socket, stream, more)))
            .collect();
        let outcome = meanwhile();
        let sent = sum(generators);
        let all_came = || sent.as_ref().is_ok_and(|sent| moved.load(Relaxed) == *sent);
        while !all_came() && sent.is_ok() && !sinks.iter().any(|s| s.is_finished()) {
            thread::sleep(Duration::from_millis(1));
        }
        let end = Instant::now();
        for socket in &sources {
            // One that has failed is seen by its generator or its sink.
            let _ = socket.shutdown(Shutdown::Write);
        }
        let (came, sent) = (sum(sinks)?, sent?);
        ensure!(came == sent, "{came} bytes came of {sent}");
        Ok((outcome, end))
    })
}

fn sum(threads: Vec<thread::ScopedJoinHandle<'_, anyhow::Result<u64>>>) -> anyhow::Result<u64> {
    let counts = threads
        .into_iter()
        .map(|thread| thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?)
        .collect::<Vec<_>>();
    counts.into_iter().sum()
}

/// The listener does not block, so that a relay that never connects can't hang the round.
pub(crate) fn accept(sink: &UnixListener) -> anyhow::Result<UnixStream> {
    let deadline = Instant::now() + STALL;
    loop {
        match sink.accept() {
            Ok((socket, _)) => {
                socket.set_nonblocking(false)?;
                socket.set_read_timeout(Some(STALL))?;
                socket.set_write_timeout(Some(STALL))?;
                return Ok(socket);
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                ensure!(Instant::now() < deadline, "no connection came out of the far relay");
                thread::sleep(Duration::from_millis(1));
            }
            Err(e) => return Err(e.into()),
        }
    }
}

/// Bytes sent.
fn generate(mut socket: &UnixStream, stream: u32, more: &impl Fn(u64) -> bool) -> anyhow::Result<u64> {
    socket.set_write_timeout(Some(STALL))?;
    let mut chunk = noise();
    let mut offset = 0;
    while more(offset) {
        for (index, block) in chunk.chunks_mut(BLOCK).enumerate() {
            let at = offset + (index * BLOCK) as u64;
            block[..8].copy_from_slice(&at.to_be_bytes());
            block[8..12].copy_from_slice(&stream.to_be_bytes());
        }
        socket.write_all(&chunk).context("the near relay takes no more")?;
        offset += CHUNK as u64;
    }
    Ok(offset)
}

/// Bytes received, all of them in order.
fn swallow(mut socket: UnixStream, moved: &AtomicU64) -> anyhow::Result<u64> {
    let mut buffer = vec![0; CHUNK];
    let mut stream = None;
    let (mut offset, mut filled) = (0, 0);
    loop {
        let n = socket.read(&mut buffer[filled..]).context("nothing comes any more")?;
        moved.fetch_add(n as u64, Relaxed);
        filled += n;
        let whole = filled / BLOCK * BLOCK;
        for block in buffer[..whole].chunks(BLOCK) {
            check(block, offset, &mut stream)?;
            offset += BLOCK as u64;
        }
        buffer.copy_within(whole..filled, 0);
        filled -= whole;
        if n == 0 {
            ensure!(filled == 0, "the stream ended {filled} bytes into a block");
            return Ok(offset);
        }
    }
}

fn check(block: &[u8], offset: u64, stream: &mut Option<u32>) -> anyhow::Result<()> {
    let (Some(at), Some(of)) = (block.first_chunk(), block[8..].first_chunk()) else {
        bail!("a block is too short");
    };
    let (at, of) = (u64::from_be_bytes(*at), u32::from_be_bytes(*of));
    let expected = *stream.get_or_insert(of);
    ensure!(
        at == offset && of == expected,
        "block {at} of stream {of} came as block {offset} of stream {expected}"
    );
    Ok(())
}

/// Bytes that nobody can compress (xorshift).
fn noise() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = Vec::with_capacity(CHUNK);
    while bytes.len() < CHUNK {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes
}
