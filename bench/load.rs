//! The load: generators that write into the near relay's local socket, sinks behind the far
//! relay. Every 64 KiB block carries its stream and its offset, and the sink looks at them:
//! what arrives too early, twice or not at all fails the round.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

const BLOCK: usize = 64 * 1024;
/// Bytes of one write and of one read at most.
pub(crate) const CHUNK: usize = 4 * BLOCK;
/// No relay stands still this long unless it is broken.
pub(crate) const STALL: Duration = Duration::from_secs(60);

/// Sends `bytes` (a multiple of [`CHUNK`]) over each of `streams` connections, and returns the
/// seconds from the first write until the last sink has seen the end.
pub(crate) fn run(local: &Path, sink: &UnixListener, streams: u32, bytes: u64) -> anyhow::Result<f64> {
    ensure!(bytes.is_multiple_of(CHUNK as u64), "bytes must be a multiple of {CHUNK}");
    let begin = Instant::now();
    let moved = AtomicU64::new(0);
    let more = |offset| offset < bytes;
    bulk(local, sink, streams, &moved, &more, || ())?;
    let seconds = begin.elapsed().as_secs_f64();
    let (came, sent) = (moved.into_inner(), bytes * u64::from(streams));
    ensure!(came == sent, "{came} bytes came of {sent}");
    Ok(seconds)
}

/// Generators that go on while `more` says so of their offset, their sinks, and `meanwhile` on
/// this thread. `moved` counts what the sinks have seen.
pub(crate) fn bulk<T>(
    local: &Path,
    sink: &UnixListener,
    streams: u32,
    moved: &AtomicU64,
    more: &(impl Fn(u64) -> bool + Sync),
    meanwhile: impl FnOnce() -> T,
) -> anyhow::Result<T> {
    thread::scope(|scope| {
        let generators: Vec<_> =
            (0..streams).map(|stream| scope.spawn(move || generate(local, stream, more))).collect();
        let mut sinks = Vec::new();
        for _ in 0..streams {
            let socket = accept(sink)?;
            sinks.push(scope.spawn(move || swallow(socket, moved)));
        }
        let outcome = meanwhile();
        let came = sum(sinks)?;
        let sent = sum(generators)?;
        ensure!(came == sent, "{came} bytes came of {sent}");
        Ok(outcome)
    })
}

fn sum(threads: Vec<thread::ScopedJoinHandle<'_, anyhow::Result<u64>>>) -> anyhow::Result<u64> {
    let mut total = 0;
    for thread in threads {
        total += thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
    }
    Ok(total)
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
fn generate(local: &Path, stream: u32, more: &impl Fn(u64) -> bool) -> anyhow::Result<u64> {
    let mut socket = UnixStream::connect(local).context("can't reach the near relay")?;
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
    socket.shutdown(Shutdown::Write)?;
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
