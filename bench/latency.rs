//! The latency of a small request and its reply through the relays: first alone, then while
//! bulk streams keep the connection full. Must not know who relays.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::load::{self, STALL};

/// Bytes of a request, and of its reply.
const REQUEST: usize = 1024;
/// Where a request takes long, fewer are asked: they may take this long together.
const REQUESTS_FOR: Duration = Duration::from_secs(3);
/// Bulk streams beside it.
pub(crate) const BULK_STREAMS: u32 = 4;
/// Microseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Percentiles {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
}

/// What one round gave.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Latency {
    pub(crate) idle: Percentiles,
    pub(crate) loaded: Percentiles,
    /// Of the bulk streams while requests were timed.
    pub(crate) gigabits: f64,
}

/// What is asked of a round.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    /// Requests alone, and as many under load.
    pub(crate) requests: usize,
    /// Bytes that the bulk streams have moved before requests count: windows are open by then.
    pub(crate) warm_up_bytes: u64,
}

/// One round. The first connection is the requests'.
pub(crate) fn run(local: &Path, sink: &UnixListener, asked: Asked) -> anyhow::Result<Latency> {
    let mut client = UnixStream::connect(local).context("can't reach the near relay")?;
    client.set_read_timeout(Some(STALL))?;
    client.set_write_timeout(Some(STALL))?;
    let server = load::accept(sink)?;
    thread::scope(|scope| {
        let server = scope.spawn(move || answer(server));
        let outcome = ask(&mut client, local, sink, asked);
        client.shutdown(Shutdown::Both)?;
        let served = server.join().map_err(|_| anyhow::anyhow!("the server panicked"))?;
        let latency = outcome?;
        served?;
        Ok(latency)
    })
}

fn ask(client: &mut UnixStream, local: &Path, sink: &UnixListener, asked: Asked) -> anyhow::Result<Latency> {
    let idle = percentiles(timed(client, asked.requests)?);
    let (moved, enough) = (AtomicU64::new(0), AtomicBool::new(false));
    let more = |_| !enough.load(Relaxed);
    let (outcome, _) = load::bulk(local, sink, BULK_STREAMS, &moved, &more, || {
        let outcome = under_load(client, asked, &moved);
        enough.store(true, Relaxed);
        outcome
    })?;
    let (loaded, gigabits) = outcome?;
    Ok(Latency { idle, loaded: percentiles(loaded), gigabits })
}

fn under_load(client: &mut UnixStream, asked: Asked, moved: &AtomicU64) -> anyhow::Result<(Vec<f64>, f64)> {
    while moved.load(Relaxed) < asked.warm_up_bytes {
        timed(client, 1)?;
    }
    let (begin, before) = (Instant::now(), moved.load(Relaxed));
    let times = timed(client, asked.requests)?;
    #[allow(clippy::cast_precision_loss)]
    let gigabits = (moved.load(Relaxed) - before) as f64 * 8e-9 / begin.elapsed().as_secs_f64();
    Ok((times, gigabits))
}

fn timed(client: &mut UnixStream, requests: usize) -> anyhow::Result<Vec<f64>> {
    let mut message = [0x5a; REQUEST];
    let mut times = Vec::with_capacity(requests);
    let enough = Instant::now() + REQUESTS_FOR;
    for _ in 0..requests {
        let begin = Instant::now();
        if begin > enough {
            break;
        }
        client.write_all(&message).context("a request was not taken")?;
        client.read_exact(&mut message).context("a request was not answered")?;
        times.push(begin.elapsed().as_secs_f64() * 1e6);
    }
    Ok(times)
}

fn answer(mut socket: UnixStream) -> anyhow::Result<()> {
    let mut message = [0; REQUEST];
    loop {
        let mut filled = 0;
        while filled < REQUEST {
            match socket.read(&mut message[filled..])? {
                0 => return Ok(()),
                n => filled += n,
            }
        }
        socket.write_all(&message)?;
    }
}

fn percentiles(mut times: Vec<f64>) -> Percentiles {
    times.sort_by(f64::total_cmp);
    let at = |percent: usize| times.get(times.len() * percent / 100).copied().unwrap_or(f64::NAN);
    Percentiles { p50: at(50), p99: at(99) }
}
