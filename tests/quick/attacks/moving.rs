//! A migration to the agent under attack that is under way: bravo writes to the disk that it was granted, all the time.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use tokio::task::JoinHandle;
use uuid::Uuid;
use vmferry::mux::{Open, purpose};
use vmferry::net::message::{MessageReceiver, MessageSender};
use vmferry::net::session::Session;
use vmferry::net::stream::Stream;
use vmferry::qemu::NbdWriter;

use super::outside_grant::{granted, waiting_qemu};
use super::victim::{Attacker, Victim, control, patient};
use crate::qmp_real::machine::Machine;
use crate::rig::{soon, until};

const BLOCK_BYTES: usize = 4096;
/// It goes round in so many blocks.
const BLOCKS: u64 = 64;

pub(super) struct Moving {
    pub(super) session: Session,
    pub(super) migration: Uuid,
    written: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    writing: JoinHandle<()>,
    _control: (MessageSender, MessageReceiver),
    _qemu: Machine,
    _bravo: Attacker,
}

/// What the writer reads and writes is the stream's.
fn bridged(stream: Stream) -> UnixStream {
    let (near, far) = UnixStream::pair().unwrap();
    let (mut reading, mut writing) = (far.try_clone().unwrap(), far);
    let Stream { mut send, mut recv, .. } = stream;
    let runtime = tokio::runtime::Handle::current();
    let to_peer = runtime.clone();
    std::thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(n @ 1..) = reading.read(&mut buffer) {
            if to_peer.block_on(send.send(Bytes::copy_from_slice(&buffer[..n]))).is_err() {
                return;
            }
        }
    });
    std::thread::spawn(move || {
        while let Ok(Some(chunk)) = runtime.block_on(recv.recv()) {
            if writing.write_all(&chunk).is_err() {
                return;
            }
            recv.consumed(chunk.len());
        }
    });
    near
}

fn block(number: u64) -> Vec<u8> {
    number.to_be_bytes().repeat(BLOCK_BYTES / 8)
}

impl Moving {
    /// That the copy keeps its connection is asked of a victim that is as patient as bravo is (`PATIENT`).
    pub(super) async fn begin(victim: &Victim) -> Self {
        let qemu = waiting_qemu(victim).await;
        let bravo = Attacker::with(victim, "bravo", patient());
        let session = bravo.session(victim).await;
        let (migration, prepared, sender, receiver) = granted(&session).await;
        let export = prepared.exports[0].clone();
        let open = Open { purpose: purpose::NBD, channel: export.channel, ..control(migration) };
        let mut disk = soon("the disk's stream", session.open(open)).await.unwrap();
        disk.accepted().await.unwrap();
        let socket = bridged(disk).into();
        let mut writer = soon("QEMU's NBD server", NbdWriter::connect(socket, &export.export)).await.unwrap();
        let (written, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (counts, stops) = (Arc::clone(&written), Arc::clone(&stop));
        let writing = tokio::spawn(async move {
            while !stops.load(Relaxed) {
                let number = counts.load(Relaxed);
                let at = number % BLOCKS * BLOCK_BYTES as u64;
                writer.write(at, &block(number)).await.unwrap();
                counts.fetch_add(1, Relaxed);
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            writer.flush().await.unwrap();
        });
        let moving = Self {
            session,
            migration,
            written,
            stop,
            writing,
            _control: (sender, receiver),
            _qemu: qemu,
            _bravo: bravo,
        };
        moving.goes_on("before anything").await;
        moving
    }

    /// Its writes arrive, over the connection that it had from the beginning.
    pub(super) async fn goes_on(&self, what: &str) {
        let before = self.written.load(Relaxed);
        until(&format!("the copy to go on: {what}"), || {
            assert!(!self.writing.is_finished(), "the copy has ended: {what}");
            self.written.load(Relaxed) >= before + 2
        })
        .await;
        assert!(self.session.is_live() && self.session.stats().await.reconnects == 0, "{what}");
    }

    /// Every block is as it was written last.
    pub(super) async fn ends_whole(self, victim: &Victim) {
        self.stop.store(true, Relaxed);
        soon("the last write", self.writing).await.unwrap();
        let written = self.written.load(Relaxed);
        let image = std::fs::read(victim.folder.path().join("disk")).unwrap();
        for number in written.saturating_sub(BLOCKS)..written {
            let at = (number % BLOCKS) as usize * BLOCK_BYTES;
            assert_eq!(image[at..at + BLOCK_BYTES], block(number), "write {number} of {written}");
        }
    }
}
