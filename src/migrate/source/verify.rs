//! `--verify`: both sides hash the disks while the mirrors are in step, and compare before the RAM follows.
//!
//! What counts as equal or different is in `transfer/verify/ledger.rs`. Each side hashes what its own QEMU
//! shows, and only hashes travel. At the source that is a private read-only export of the disk's node, at the
//! destination the granted one. So it finds what was changed on the way or at the destination's storage, as
//! the destination's QEMU sees it at that moment; a destination's agent that lies is not found out.
//!
//! The guest never waits for it: all of it is before QEMU's pause, and only a number is asked for in the
//! pause, beside what takes longer. Another process of this agent begins anew.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::time::Instant;
use uuid::Uuid;

use super::event::Event;
use super::failure::Failure;
use super::state::Source;
use super::{any_phase, changes, copies};
use crate::migrate::guest::nbd_server::NbdServer;
use crate::migrate::journal::Undo;
use crate::migrate::model::plan::DiskPlan;
use crate::migrate::model::problem::{Problem, ProblemKind};
use crate::migrate::model::progress::Comparison;
use crate::migrate::model::sample::DiskSample;
use crate::migrate::protocol::client::LinkError;
use crate::migrate::protocol::message::{Parts, Piece, Pieces, Request, Response};
use crate::migrate::transfer::disk::bitmaps::Bitmaps;
use crate::migrate::transfer::disk::error::DeltaError;
use crate::migrate::transfer::verify::hashes;
use crate::migrate::transfer::verify::ledger::{Ledger, PIECE_BYTES_MAX};
use crate::qemu::{
    BlockExportAdd, NbdReader, Qmp, QmpError, QueryNamedBlockNodes, delete_bitmap, delete_export, names,
};

/// How long the destination may take to hash what one request asks for.
const HASH_DEADLINE: Duration = Duration::from_secs(45);
/// A request is as long as what both sides hash in about this time.
const BATCH_TIME: Duration = Duration::from_millis(300);
/// So many rounds of one disk in a row, as long as each leaves clearly less than the one before.
const ROUNDS_MAX: u32 = 12;
/// So many to be sure of a part that differs.
const SUSPICIOUS_ROUNDS_MAX: u32 = 40;
/// Between two of these.
const SUSPICIOUS_PAUSE: Duration = Duration::from_millis(700);

/// Why disks cannot be compared as the source's QEMU is; none when they can.
pub(crate) async fn hindrance(qmp: &Qmp) -> Result<Option<Problem>, QmpError> {
    if !crate::qemu::nbd_server_runs(qmp).await? {
        return Ok(None);
    }
    Ok(Some(not_comparable("the source's QEMU has an NBD server of somebody else's")))
}

pub(super) fn not_comparable(why: &str) -> Problem {
    let text = format!("the disks cannot be compared: {why}");
    let remedy = "end what uses it, or move the VM without `--verify`";
    Problem::new(ProblemKind::NotComparable, text, remedy)
}

/// Compares all disks, if that was asked for. A difference is a failure.
pub(crate) async fn verify(source: &mut Source) -> Result<(), Failure> {
    let Some(sample) = source.context.request.options.verify else { return Ok(()) };
    if let Some(doubt) = changes::serve(source).await? {
        return Err(Failure::Problems(vec![not_comparable(&doubt)]));
    }
    let Some(server) = source.copy.delta.server() else { return Ok(()) };
    tracing::info!(percent = sample.percent(), "the disks are compared");
    let mut comparing = Comparing { disks: Vec::new(), hashed_bytes: 0, began: Instant::now() };
    for plan in source.copy.plan.disks.clone() {
        comparing.disks.push(Disk::begin(source, plan, sample, &server).await?);
    }
    // While one is compared, the guest writes to those before it.
    let passes = comparing.disks.len().min(2);
    for at in (0..comparing.disks.len()).cycle().take(passes * comparing.disks.len()) {
        comparing.disk(source, at).await?;
    }
    let Comparison { of_bytes, equal_bytes, elapsed_ms, .. } = comparing.tell(source);
    tracing::info!(of_bytes, equal_bytes, elapsed_ms, "the disks were compared");
    Ok(())
}

/// The comparison of all disks.
struct Comparing {
    disks: Vec<Disk>,
    hashed_bytes: u64,
    began: Instant,
}

impl Comparing {
    /// Compares one disk until no round makes much of a difference any more.
    async fn disk(&mut self, source: &mut Source, at: usize) -> Result<(), Failure> {
        let mut before = u64::MAX;
        for round in 1.. {
            let disk = &mut self.disks[at];
            let mut reader = disk.next_round(source).await?;
            let (open, suspicious) = (disk.ledger.open_bytes(), disk.ledger.has_suspects());
            self.tell(source);
            let disk = &self.disks[at];
            if let Some(range) = disk.ledger.difference() {
                let disk = disk.plan.disk.name.clone();
                return Err(Failure::Differs { disk, range });
            }
            let worth_it = open > 0 && (round == 1 || round <= ROUNDS_MAX && open <= before / 4 * 3);
            let goes_on = worth_it || suspicious && round <= SUSPICIOUS_ROUNDS_MAX;
            if goes_on {
                if suspicious {
                    wait(source, SUSPICIOUS_PAUSE).await?;
                }
                if copies::has_all_until_now(source, &self.disks[at].plan).await? {
                    if round == 1 {
                        self.zeroes(source, at).await?;
                    }
                    self.open_parts(source, at, &mut reader).await?;
                }
            }
            drop(reader);
            self.disks[at].end_round(source).await?;
            if !goes_on {
                break;
            }
            before = open;
        }
        Ok(())
    }

    /// What reads as zeroes on both hosts by the word of both QEMUs is equal, and is not read. Each tells what its
    /// guest would read; a hole that somebody has written into is none any more.
    async fn zeroes(&mut self, source: &mut Source, at: usize) -> Result<(), Failure> {
        if !source.peer.grant.as_ref().is_some_and(|grant| grant.tells_zeroes) {
            return Ok(());
        }
        let disk = &self.disks[at];
        let (name, export, server) = (disk.plan.disk.name.clone(), &disk.export, &disk.server);
        let connect = async {
            let socket = server.connect().map_err(DeltaError::Connect)?;
            Ok(NbdReader::plain(socket, export).await?)
        };
        let mut reader = guarded(source, &name, connect).await?;
        let (mut from, mut parts) = (0, VecDeque::new());
        while from < reader.size() || !parts.is_empty() {
            heed(source).await?;
            if from < reader.size() && parts.len() < hashes::PARTS_MAX {
                let told = async { Ok::<_, DeltaError>(reader.zeroes(from).await?) };
                let (zeroes, next) = guarded(source, &name, told).await?;
                let whole = zeroes.iter().map(|part| self.disks[at].ledger.whole_units(part));
                parts.extend(whole.flat_map(short));
                from = next;
                continue;
            }
            let batch: Vec<_> = parts.drain(..parts.len().min(hashes::PARTS_MAX)).collect();
            let zeroes = are_zeroes(source, &name, &batch).await?;
            let both = batch.iter().zip(zeroes).filter(|(_, is_zero)| *is_zero);
            both.for_each(|((begin, end), _)| self.disks[at].ledger.is_equal(&(*begin..*end)));
        }
        Ok(())
    }

    /// Both sides hash what of a disk is not known to be equal.
    async fn open_parts(
        &mut self,
        source: &mut Source,
        at: usize,
        reader: &mut NbdReader,
    ) -> Result<(), Failure> {
        let (mut from, mut again, mut bytes_max) = (0, VecDeque::new(), PIECE_BYTES_MAX);
        loop {
            heed(source).await?;
            let disk = &mut self.disks[at];
            let batch = batch(&disk.ledger, &mut from, &mut again, bytes_max);
            if batch.is_empty() {
                return Ok(());
            }
            let began = Instant::now();
            let (ours, theirs) = hash_both(source, &disk.plan.disk.name, reader, &batch).await?;
            for (piece, equal) in batch.iter().zip(ours.iter().zip(&theirs).map(|(a, b)| a == b)) {
                match equal {
                    true => disk.ledger.is_equal(piece),
                    false => again.extend(disk.ledger.differs(piece, std::time::Instant::now())),
                }
                self.hashed_bytes += piece.end - piece.start;
            }
            bytes_max = match began.elapsed() {
                took if took < BATCH_TIME => (bytes_max * 2).min(hashes::BATCH_BYTES_MAX),
                took if took > BATCH_TIME * 3 => (bytes_max / 2).max(PIECE_BYTES_MAX),
                _ => bytes_max,
            };
            self.tell(source);
        }
    }

    /// Brings it into the progress.
    fn tell(&self, source: &Source) -> Comparison {
        let ledgers = || self.disks.iter().map(|disk| &disk.ledger);
        let of_bytes: u64 = ledgers().map(Ledger::asked_bytes).sum();
        let different = ledgers().filter_map(Ledger::difference).map(|range| range.end - range.start);
        let comparison = Comparison {
            of_bytes,
            equal_bytes: of_bytes - ledgers().map(Ledger::open_bytes).sum::<u64>(),
            different_bytes: different.sum(),
            written_bytes: None,
            hashed_bytes: self.hashed_bytes,
            elapsed_ms: self.began.elapsed().as_millis() as u64,
        };
        source.context.progress.update(|p| p.comparison = Some(comparison));
        comparison
    }
}

/// Which of these parts read as zeroes at the destination.
pub(super) async fn are_zeroes(
    source: &mut Source,
    disk: &str,
    parts: &[(u64, u64)],
) -> Result<Vec<bool>, Failure> {
    let request = Request::Zeroes(Parts { disk: disk.to_owned(), parts: parts.to_vec() });
    match ask(source, request).await? {
        Response::AreZeroes(zeroes) if zeroes.len() == parts.len() => Ok(zeroes),
        _ => Err(LinkError::Unexpected { request: "zeroes" }.into()),
    }
}

/// A part in such as can be asked of.
pub(super) fn short(part: Range<u64>) -> impl Iterator<Item = (u64, u64)> {
    let begins = part.clone().step_by(hashes::PART_BYTES_MAX as usize);
    begins.map(move |at| (at, part.end.min(at + hashes::PART_BYTES_MAX)))
}

/// The next pieces to hash, of so many bytes at most, or one.
fn batch(
    ledger: &Ledger,
    from: &mut u64,
    again: &mut VecDeque<Range<u64>>,
    bytes_max: u64,
) -> Vec<Range<u64>> {
    let (mut batch, mut bytes) = (Vec::new(), 0);
    while bytes < bytes_max && batch.len() < hashes::PIECES_MAX {
        let piece = again.pop_front().or_else(|| {
            let next = ledger.next_piece(*from)?;
            *from = next.end;
            Some(next)
        });
        let Some(piece) = piece else { break };
        let longer = bytes + piece.end - piece.start;
        if longer > hashes::BATCH_BYTES_MAX {
            again.push_front(piece);
            break;
        }
        bytes = longer;
        batch.push(piece);
    }
    batch
}

/// A disk that is compared.
struct Disk {
    plan: DiskPlan,
    bitmaps: Bitmaps,
    ledger: Ledger,
    export: String,
    server: Arc<NbdServer>,
    /// The bitmap of the round before, while it is shown.
    frozen: Option<String>,
}

impl Disk {
    async fn begin(
        source: &mut Source,
        plan: DiskPlan,
        sample: DiskSample,
        server: &Arc<NbdServer>,
    ) -> Result<Self, Failure> {
        let bitmaps = Bitmaps::compared(&plan.disk.node_name, source.context.request.id);
        let export = names::compared_export(&plan.disk.name);
        source.journal.will_make(Undo::Export(export.clone()))?;
        for undo in bitmaps.undo() {
            source.journal.will_make(undo)?;
        }
        let (qmp, id, begun) = (source.guest.qmp.clone(), export.clone(), bitmaps.clone());
        let begin = async move {
            // Of an earlier process.
            delete_export(&qmp, &id).await?;
            Ok(begun.begin(&qmp).await?)
        };
        guarded(source, &plan.disk.name, begin).await?;
        let chosen = chosen(sample);
        let ledger = Ledger::new(plan.disk.virtual_size, chosen);
        Ok(Self { plan, bitmaps, ledger, export, server: Arc::clone(server), frozen: None })
    }

    /// Ends a round and begins the next: what was written in the one is taken note of, and written down for
    /// the other.
    async fn next_round(&mut self, source: &Source) -> Result<NbdReader, Failure> {
        let (qmp, bitmaps) = (source.guest.qmp.clone(), self.bitmaps.clone());
        let (export, server) = (self.export.clone(), Arc::clone(&self.server));
        let round = async move {
            let (frozen, _) = bitmaps.freeze(&qmp).await?;
            let add = BlockExportAdd {
                id: export.clone(),
                node_name: bitmaps.node.clone(),
                name: export.clone(),
                writable: false,
                bitmaps: vec![frozen.clone()],
                allocation_depth: false,
            };
            qmp.execute(add).await?;
            let socket = server.connect().map_err(DeltaError::Connect)?;
            let mut reader = NbdReader::connect(socket, &export, &frozen).await?;
            let (mut written, mut from) = (Vec::new(), 0);
            while from < reader.size() {
                let (dirty, next) = reader.dirty(from).await?;
                written.extend(dirty);
                from = next;
            }
            Ok((frozen, reader, written))
        };
        let (frozen, reader, written) = guarded(source, &self.plan.disk.name, round).await?;
        self.frozen = Some(frozen);
        written.iter().for_each(|part| self.ledger.was_written(part));
        self.ledger.end_round();
        Ok(reader)
    }

    /// What showed the round before goes. The caller has let the reader go.
    async fn end_round(&mut self, source: &Source) -> Result<(), Failure> {
        let Some(frozen) = self.frozen.take() else { return Ok(()) };
        let (qmp, export, node) = (source.guest.qmp.clone(), self.export.clone(), self.bitmaps.node.clone());
        let end = async move {
            delete_export(&qmp, &export).await?;
            Ok(delete_bitmap(&qmp, &node, &frozen).await?)
        };
        guarded(source, &self.plan.disk.name, end).await
    }
}

/// Which pieces of a disk are compared: the first, and others at random.
fn chosen(sample: DiskSample) -> impl FnMut(u64) -> bool {
    let (mut state, _) = Uuid::new_v4().as_u64_pair();
    move |piece| {
        // splitmix64
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        piece == 0 || (mixed ^ (mixed >> 31)) % 100 < u64::from(sample.percent())
    }
}

/// Asks the destination for as long as that is waited for.
async fn ask(source: &mut Source, request: Request) -> Result<Response, Failure> {
    let (policy, cancel) = (source.reconnect_policy(), source.context.cancel.clone());
    let asked = policy.with(source.peer.link.ask(request, HASH_DEADLINE));
    let answer = tokio::select! {
        biased;
        answer = asked => Some(answer),
        () = cancel.cancelled() => None,
    };
    answer.unwrap_or_else(|| Err(source.context.cancelled()))
}

/// Hashes the same pieces on both sides.
pub(super) async fn hash_both(
    source: &mut Source,
    disk: &str,
    reader: &mut NbdReader,
    batch: &[Range<u64>],
) -> Result<(Vec<String>, Vec<String>), Failure> {
    let pieces: Vec<_> = batch
        .iter()
        .map(|piece| Piece { at: piece.start, bytes: (piece.end - piece.start) as u32 })
        .collect();
    let request = Request::Hash(Pieces { disk: disk.to_owned(), pieces: pieces.clone() });
    let (policy, cancel, lanes) =
        (source.reconnect_policy(), source.context.cancel.clone(), source.peer.lanes.clone());
    let stall = source.context.stall();
    let link = &mut source.peer.link;
    let theirs = async {
        match link.ask(request, HASH_DEADLINE).await? {
            Response::Hashes(hashes) if hashes.len() == pieces.len() => Ok(hashes),
            _ => Err(Failure::from(LinkError::Unexpected { request: "hash" })),
        }
    };
    let not_compared = |source| Failure::NotCompared { disk: disk.to_owned(), source };
    let ours = async {
        let hashed = lanes.within(stall, hashes::of(reader, &pieces)).await;
        let hashed = hashed.ok_or_else(|| Failure::stalled("reading a disk to compare it", stall))?;
        hashed.map_err(|e| not_compared(e.into()))
    };
    let both = policy.with(async { tokio::try_join!(ours, theirs) });
    let hashed = tokio::select! {
        biased;
        hashed = both => Some(hashed),
        () = cancel.cancelled() => None,
    };
    let (ours, theirs) = hashed.unwrap_or_else(|| Err(source.context.cancelled()))?;
    source.hashed.add(disk, &pieces, &ours, Some(&theirs));
    Ok((ours, theirs))
}

/// Works at the source's QEMU for as long as that is waited for.
pub(super) async fn guarded<T>(
    source: &Source,
    disk: &str,
    work: impl Future<Output = Result<T, DeltaError>>,
) -> Result<T, Failure> {
    let stall = source.context.stall();
    let within = async {
        let done = source.peer.lanes.within(stall, work).await;
        let done = done.ok_or_else(|| Failure::stalled("the comparison of a disk", stall))?;
        done.map_err(|source| Failure::NotCompared { disk: disk.to_owned(), source })
    };
    tokio::select! {
        biased;
        done = source.reconnect_policy().with(within) => done,
        () = source.context.cancel.cancelled() => Err(source.context.cancelled()),
    }
}

/// Sees to everything that has happened.
pub(super) async fn heed(source: &mut Source) -> Result<(), Failure> {
    while let Some(event) = source.next().now_or_never() {
        on_event(source, event?).await?;
    }
    Ok(())
}

/// The same for a while.
async fn wait(source: &mut Source, for_so_long: Duration) -> Result<(), Failure> {
    let until = Instant::now() + for_so_long;
    while Instant::now() < until {
        let event = source.next().await?;
        on_event(source, event).await?;
    }
    Ok(())
}

async fn on_event(source: &mut Source, event: Event) -> Result<(), Failure> {
    match event {
        Event::Tick => copies::look(source).await.map(drop),
        event => any_phase::on_event(source, event).await,
    }
}

/// The guest is at rest: what it has written since its disks were compared, at most.
pub(crate) async fn written_since(qmp: &Qmp, asked: bool) -> Option<u64> {
    if !asked {
        return None;
    }
    let nodes = qmp.execute(QueryNamedBlockNodes { flat: true }).await.ok()?;
    let ours = nodes.iter().flat_map(|node| &node.dirty_bitmaps).filter(|b| names::is_compared(&b.name));
    Some(ours.map(|bitmap| bitmap.count).sum())
}

/// Says what is known of the disks by now.
pub(crate) fn conclude(source: &Source, written_bytes: Option<u64>) {
    let Some(before) = source.context.progress.now().comparison else { return };
    let comparison = Comparison { written_bytes, ..before };
    source.context.progress.update(|p| p.comparison = Some(comparison));
    source.context.note(comparison.in_words());
}
