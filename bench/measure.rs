//! Runs contenders in interleaved rounds. Must not know what tables say.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use crate::contender::{Contender, Pair, Place};
use crate::latency::{self, Asked, Latency};
use crate::load::{self, Moved};
use crate::resets;
use crate::road::Road;
use crate::rounds::Rounds;
use crate::table::Sample;
use crate::usage::Used;

const MIB: u64 = 1024 * 1024;
/// Bytes per second are counted when windows have grown and the slow start is over.
const WARM_UP: Duration = Duration::from_secs(2);
/// Between two resets of a connection.
pub(crate) const RESET_EVERY: Duration = Duration::from_secs(5);

/// Where contenders run, and how often.
pub(crate) struct Ground<'a> {
    pub(crate) place: &'a Place,
    pub(crate) road: &'a Road,
    pub(crate) rounds: usize,
}

impl Ground<'_> {
    /// So many MiB over all streams together, one unless the contender says otherwise.
    pub(crate) fn transfers(&self, contenders: &[Contender], mib: u64) -> anyhow::Result<Rounds<Sample>> {
        self.interleaved(contenders, |contender| {
            let streams = contender.streams.unwrap_or(1);
            let each = (mib * MIB / u64::from(streams)).next_multiple_of(load::CHUNK as u64);
            let run = |local: &Path, sink: &UnixListener| load::amount(local, sink, streams, each);
            self.relayed(contender, true, run).map(sample)
        })
    }

    /// One stream for so long, after a warm-up; with resets for those contenders that have them.
    pub(crate) fn steady(&self, contenders: &[Contender], span: Duration) -> anyhow::Result<Rounds<Sample>> {
        self.interleaved(contenders, |contender| {
            let during = || {
                if contender.with_resets {
                    return resets::every(RESET_EVERY, span);
                }
                std::thread::sleep(span);
                Ok(())
            };
            let run = |local: &Path, sink: &UnixListener| load::steady(local, sink, WARM_UP, during);
            self.relayed(contender, true, run).map(sample)
        })
    }

    /// Small requests, alone and beside bulk streams.
    pub(crate) fn latencies(
        &self,
        contenders: &[Contender],
        asked: Asked,
    ) -> anyhow::Result<Rounds<Latency>> {
        self.interleaved(contenders, |contender| {
            let run = |local: &Path, sink: &UnixListener| latency::run(local, sink, asked);
            self.relayed(contender, false, run).map(|(latency, ..)| latency)
        })
    }

    /// Runs something through a fresh pair of relays; also what the pair has used. A warm pair has
    /// had a connection before: what the first one costs a program (the first handshake alone, tens
    /// of milliseconds with some libraries) is not what moving a byte costs.
    pub(crate) fn relayed<T>(
        &self,
        contender: &Contender,
        is_warm: bool,
        run: impl FnOnce(&Path, &UnixListener) -> anyhow::Result<T>,
    ) -> anyhow::Result<(T, Used, Used)> {
        let remote = self.place.remote();
        let _ = std::fs::remove_file(&remote);
        let sink = UnixListener::bind(&remote)?;
        sink.set_nonblocking(true)?;
        let mut pair = Pair::start(contender, self.place, self.road)?;
        let local = self.place.local();
        if is_warm {
            load::amount(&local, &sink, 1, load::CHUNK as u64)?;
        }
        pair.begin();
        let outcome = run(&local, &sink);
        let used = pair.end();
        let (near, far) = used?;
        Ok((outcome?, near, far))
    }

    /// Who fails is out and is named in the table; the reference must not fail.
    fn interleaved<T: Clone>(
        &self,
        contenders: &[Contender],
        measure: impl Fn(&Contender) -> anyhow::Result<T>,
    ) -> anyhow::Result<Rounds<T>> {
        let names = contenders.iter().map(|c| c.name.clone()).collect();
        Rounds::take(names, self.rounds, |index| measure(&contenders[index]))
    }
}

fn sample((moved, near, far): (Moved, Used, Used)) -> Sample {
    #[allow(clippy::cast_precision_loss)]
    let gib = moved.bytes as f64 / (1u64 << 30) as f64;
    Sample { gib, gigabits: moved.bytes_per_second * 8e-9, near, far }
}
