//! Of a disk of which only the topmost image is copied, what that stands on is proved equal before anything is
//! copied.
//!
//! What the source's topmost image has is copied. Of all the rest the guest sees what lies below, and there the
//! destination's disk must show the same by then. So the rest is hashed on both sides, but for what reads as zeroes
//! on both by the word of both QEMUs: at the source in an export of the backing file, whose contents do not change; at the destination in the disk itself, so that what is left in
//! its topmost image counts as well. What the guest writes meanwhile gets into the source's topmost image, and is
//! copied. What was in it stays in it: QEMU makes zeroes of what the guest discards there, no holes.
//!
//! Another process of this agent begins anew, with the disks whose copy has not begun.

use std::ops::Range;
use std::sync::Arc;

use super::changes;
use super::failure::Failure;
use super::state::Source;
use super::verify::{are_zeroes, guarded, hash_both, heed, not_comparable, short};
use crate::migrate::guest::nbd_server::NbdServer;
use crate::migrate::journal::Undo;
use crate::migrate::model::plan::{Base, CopiedDisk, Way};
use crate::migrate::model::problem::{Problem, ProblemKind};
use crate::migrate::transfer::disk::error::DeltaError;
use crate::migrate::transfer::verify::hashes::{BATCH_BYTES_MAX, PARTS_MAX, PIECES_MAX};
use crate::migrate::transfer::verify::ledger::{PIECE_BYTES_MAX, UNIT_BYTES};
use crate::qemu::{BlockExportAdd, NbdError, NbdReader, delete_export, names};

/// Proves it of all disks of which only the topmost image is to be copied and whose copy has not begun.
pub(crate) async fn prove(source: &mut Source) -> Result<(), Failure> {
    let copy = &source.copy;
    let open = copy.plan.disks.iter().filter(|plan| plan.way == Way::Top && !copy.is_under_way(plan));
    let disks: Vec<CopiedDisk> = open.map(|plan| plan.disk.clone()).collect();
    if disks.is_empty() {
        return Ok(());
    }
    if let Some(doubt) = changes::serve(source).await? {
        return Err(Failure::Problems(vec![not_comparable(&doubt)]));
    }
    let Some(server) = source.copy.delta.server() else { return Ok(()) };
    for disk in &disks {
        let Some(base) = &disk.base else { continue };
        tracing::info!(disk = disk.name, "what it stands on is compared");
        let Compared { hashed, zeroes } = compare(source, disk, base, &server).await?;
        let text = format!(
            "{}: what it stands on is the same on both hosts ({} MiB were hashed, {} MiB read as zeroes), only its \
             topmost image is copied",
            disk.name,
            hashed.div_ceil(1 << 20),
            zeroes >> 20
        );
        source.context.note(text);
    }
    Ok(())
}

/// What is equal on both hosts, in bytes.
#[derive(Default)]
struct Compared {
    hashed: u64,
    zeroes: u64,
}

/// Compares what one disk stands on, where its topmost image has nothing.
async fn compare(
    source: &mut Source,
    disk: &CopiedDisk,
    base: &Base,
    server: &Arc<NbdServer>,
) -> Result<Compared, Failure> {
    let (mut top, mut below) = open(source, disk, base, server).await?;
    let (mut at, mut compared) = (0, Compared::default());
    while at < disk.virtual_size {
        heed(source).await?;
        let parts = async { Ok::<_, DeltaError>(top.of_the_top(at).await?) };
        let (copied, next) = guarded(source, &disk.name, parts).await?;
        let of_below = gaps(at..next, &copied);
        let zeroes = zeroes_of_both(source, disk, &mut below, &of_below).await?;
        let rest: Vec<_> =
            of_below.into_iter().flat_map(|part| gaps(part.clone(), &within(&zeroes, &part))).collect();
        for batch in batches(&rest) {
            heed(source).await?;
            same(source, disk, &mut below, &batch).await?;
        }
        compared.hashed += bytes(&rest);
        compared.zeroes += bytes(&zeroes);
        at = next;
    }
    drop((top, below));
    close(source, disk).await?;
    Ok(compared)
}

/// What of these parts reads as zeroes on both hosts by the word of both QEMUs: it is equal, and need not be read. In
/// the order of the parts.
async fn zeroes_of_both(
    source: &mut Source,
    disk: &CopiedDisk,
    below: &mut NbdReader,
    parts: &[Range<u64>],
) -> Result<Vec<Range<u64>>, Failure> {
    if !source.peer.grant.as_ref().is_some_and(|grant| grant.tells_zeroes) {
        return Ok(Vec::new());
    }
    let mut ours = Vec::new();
    for part in parts {
        heed(source).await?;
        let told = async { Ok::<_, DeltaError>(zeroes_below(below, part.clone()).await?) };
        ours.extend(guarded(source, &disk.name, told).await?);
    }
    let asked: Vec<_> = ours.into_iter().flat_map(short).collect();
    let mut both = Vec::new();
    for batch in asked.chunks(PARTS_MAX) {
        heed(source).await?;
        let theirs = are_zeroes(source, &disk.name, batch).await?;
        both.extend(batch.iter().zip(theirs).filter(|(_, zero)| *zero).map(|((begin, end), _)| *begin..*end));
    }
    Ok(both)
}

/// What of a part reads as zeroes in what a disk stands on, but for short parts. Beyond its end all does.
async fn zeroes_below(below: &mut NbdReader, part: Range<u64>) -> Result<Vec<Range<u64>>, NbdError> {
    let (mut zeroes, mut at, end) = (Vec::new(), part.start, part.end.min(below.size()));
    while at < end {
        let (parts, next) = below.zeroes_of(at..end).await?;
        zeroes.extend(parts);
        at = next;
    }
    zeroes.extend((at < part.end).then_some(at..part.end));
    zeroes.retain(|zero| zero.end - zero.start >= UNIT_BYTES);
    Ok(zeroes)
}

/// Exports the topmost image and what it stands on, to this agent alone.
async fn open(
    source: &mut Source,
    disk: &CopiedDisk,
    base: &Base,
    server: &Arc<NbdServer>,
) -> Result<(NbdReader, NbdReader), Failure> {
    // Of an earlier process.
    close(source, disk).await?;
    let ids = [names::top_export(&disk.name), names::compared_export(&disk.name)];
    for id in &ids {
        source.journal.will_make(Undo::Export(id.clone()))?;
    }
    let (qmp, server, nodes) =
        (source.guest.qmp.clone(), Arc::clone(server), [base.top_node.clone(), base.node_name.clone()]);
    let open = async move {
        for (id, node) in ids.iter().zip(&nodes) {
            let add = BlockExportAdd {
                id: id.clone(),
                node_name: node.clone(),
                name: id.clone(),
                writable: false,
                bitmaps: Vec::new(),
                allocation_depth: *id == ids[0],
            };
            qmp.execute(add).await?;
        }
        let connect = || server.connect().map_err(DeltaError::Connect);
        let top = NbdReader::of_chain(connect()?, &ids[0]).await?;
        Ok((top, NbdReader::plain(connect()?, &ids[1]).await?))
    };
    guarded(source, &disk.name, open).await
}

/// The caller has let its readers go.
async fn close(source: &Source, disk: &CopiedDisk) -> Result<(), Failure> {
    let qmp = source.guest.qmp.clone();
    let ids = [names::top_export(&disk.name), names::compared_export(&disk.name)];
    let close = async move {
        for id in &ids {
            delete_export(&qmp, id).await?;
        }
        Ok(())
    };
    guarded(source, &disk.name, close).await
}

/// Both sides hash these pieces; a difference is a failure.
async fn same(
    source: &mut Source,
    disk: &CopiedDisk,
    below: &mut NbdReader,
    pieces: &[Range<u64>],
) -> Result<(), Failure> {
    let Some(at) = first_difference(source, &disk.name, below, pieces).await? else { return Ok(()) };
    let units = split(&pieces[at], UNIT_BYTES);
    let unit = first_difference(source, &disk.name, below, &units).await?;
    let different = unit.map_or_else(|| pieces[at].clone(), |unit| units[unit].clone());
    let text = format!(
        "disk {} shows other contents at the destination than what its topmost image stands on at the source: bytes \
         {} to {} differ. Nothing was copied",
        disk.name,
        different.start,
        different.end - 1
    );
    let remedy = "make the destination's image anew on a copy of what the source's stands on, with nothing in it; or \
                  move the VM without `--incremental`";
    Err(Failure::Problems(vec![Problem::new(ProblemKind::BaseDiffers, text, remedy)]))
}

/// The first of these pieces of which both sides have other hashes.
pub(super) async fn first_difference(
    source: &mut Source,
    disk: &str,
    reader: &mut NbdReader,
    pieces: &[Range<u64>],
) -> Result<Option<usize>, Failure> {
    let (ours, theirs) = hash_both(source, disk, reader, pieces).await?;
    Ok(ours.iter().zip(&theirs).position(|(ours, theirs)| ours != theirs))
}

/// What of a part lies between these parts of it.
fn gaps(of: Range<u64>, parts: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut at = of.start;
    let mut gaps = Vec::new();
    for part in parts.iter().cloned().chain(std::iter::once(of.end..of.end)) {
        if at < part.start {
            gaps.push(at..part.start);
        }
        at = at.max(part.end);
    }
    gaps
}

/// Those of sorted parts that lie within this one.
fn within(parts: &[Range<u64>], of: &Range<u64>) -> Vec<Range<u64>> {
    let first = parts.partition_point(|part| part.start < of.start);
    let rest = parts[first..].iter();
    rest.take_while(|part| part.end <= of.end).cloned().collect()
}

fn bytes(parts: &[Range<u64>]) -> u64 {
    parts.iter().map(|part| part.end - part.start).sum()
}

fn split(part: &Range<u64>, bytes: u64) -> Vec<Range<u64>> {
    let begins = (part.start..part.end).step_by(bytes as usize);
    begins.map(|at| at..part.end.min(at + bytes)).collect()
}

/// Pieces of these parts, as many at a time as one request may ask for.
pub(super) fn batches(parts: &[Range<u64>]) -> Vec<Vec<Range<u64>>> {
    let pieces: Vec<_> = parts.iter().flat_map(|part| split(part, PIECE_BYTES_MAX)).collect();
    let most = PIECES_MAX.min((BATCH_BYTES_MAX / PIECE_BYTES_MAX) as usize);
    pieces.chunks(most).map(<[_]>::to_vec).collect()
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "they are lists of parts")]
mod tests {
    use super::*;

    #[test]
    fn what_the_topmost_image_has_is_not_compared_and_all_the_rest_is() {
        assert_eq!(gaps(0..10, &[]), [0..10]);
        assert_eq!(gaps(0..10, &[0..10]), []);
        assert_eq!(gaps(5..30, &[5..7, 10..12, 12..13, 20..30]), [7..10, 13..20]);
    }

    #[test]
    fn what_is_zeroes_on_both_hosts_is_taken_out_of_its_own_part() {
        let zeroes = [2..4, 10..12, 12..20, 25..30];
        assert_eq!(within(&zeroes, &(0..5)), [2..4]);
        assert_eq!(within(&zeroes, &(10..20)), [10..12, 12..20]);
        assert_eq!(within(&zeroes, &(20..25)), []);
        assert_eq!(gaps(22..40, &within(&zeroes, &(22..40))), [22..25, 30..40]);
    }

    #[test]
    fn no_request_asks_for_more_than_it_may() {
        let parts = [7..9, (1 << 20)..(40 << 20) + 5];
        let batches = batches(&parts);
        let bytes = |batch: &[Range<u64>]| batch.iter().map(|p| p.end - p.start).sum::<u64>();
        assert!(batches.iter().all(|batch| bytes(batch) <= BATCH_BYTES_MAX && batch.len() <= PIECES_MAX));
        let joined: Vec<_> = batches.concat();
        assert_eq!(joined.first(), Some(&(7..9)));
        assert!(joined[1..].windows(2).all(|pair| pair[0].end == pair[1].start));
        assert_eq!(joined.last().map(|last| last.end), Some((40 << 20) + 5));
    }
}
