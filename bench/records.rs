//! More records on one connection than one key may seal: TLS has to change its keys meanwhile
//! (RFC 8446 §5.5, §7.2), or the connection ends.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Instant;

use anyhow::ensure;

use crate::field;
use crate::load::{self, CHUNK};
use crate::measure::Ground;
use crate::resets;

/// Records that rustls seals with one key of AES-GCM.
const RECORDS_PER_KEY: u64 = 1 << 24;
/// Largest plaintext of a record.
const RECORD_BYTES: u64 = 16 * 1024;

/// Sends so many GiB over one stream, and tells of it.
pub(crate) fn run(ground: &Ground<'_>, gib: u64) -> anyhow::Result<String> {
    let bytes = (gib << 30).next_multiple_of(CHUNK as u64);
    let records = bytes / RECORD_BYTES;
    let begin = Instant::now();
    let run = |local: &Path, sink: &UnixListener| {
        let before = resets::connections()?;
        let moved = load::amount(local, sink, 1, bytes)?;
        ensure!(before == resets::connections()?, "the connection was replaced on the way");
        Ok(moved)
    };
    let (moved, near, far) = ground.relayed(&field::vmferry("vmferry")?, true, run)?;
    Ok(format!(
        "{gib} GiB over one stream and one connection, which was the same at the end: at least {records} \
         records, {} the {RECORDS_PER_KEY} that rustls seals with one key. Every byte came, once and in \
         order. {:.0} s, {:.1} Gbit/s, {:.2} and {:.2} CPU s/GiB.",
        if records > RECORDS_PER_KEY { "more than" } else { "**not more** than" },
        begin.elapsed().as_secs_f64(),
        moved.bytes_per_second * 8e-9,
        near.cpu.total() / cast(gib),
        far.cpu.total() / cast(gib),
    ))
}

#[allow(clippy::cast_precision_loss)]
fn cast(gib: u64) -> f64 {
    gib as f64
}
