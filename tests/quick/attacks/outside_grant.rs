//! A peer that has a grant, of a real QEMU that waits for its VM, and opens streams that were not granted.

use uuid::Uuid;
use vmferry::migrate::message::{DiskSpec, Offer, Prepared, Request, Response};
use vmferry::migrate::problem::ProblemKind;
use vmferry::mux::{Code, Open, purpose};
use vmferry::net::message::{self, MessageReceiver, MessageSender};
use vmferry::net::session::{OpenStreamError, Session};
use vmferry::net::stream::Stream;

use super::victim::{Attacker, Victim, answer, control, offer};
use crate::qmp_real::machine::{Machine, binary, image};
use crate::rig::soon;

const DISK_BYTES: u64 = 1 << 20;

/// Opens a data stream of this migration.
async fn open(session: &Session, migration: Uuid, purpose: u16, channel: u16) -> Result<Stream, Code> {
    let open = Open { purpose, channel, ..control(migration) };
    match soon("an answer to a stream", session.open(open)).await {
        Ok(stream) => Ok(stream),
        Err(OpenStreamError::Refused { source, .. }) => Err(source.0),
        Err(other) => panic!("{other:?}"),
    }
}

/// A QEMU that waits for a guest with one disk, at the monitor that the configuration has for web1.
pub(super) async fn waiting_qemu(victim: &Victim) -> Machine {
    let folder = victim.folder.path();
    let disk = image(folder, "disk", DISK_BYTES, b"what was there");
    let monitor = format!("socket,id=agent,path={},server=on,wait=off", folder.join("web1.qmp").display());
    let node = format!("driver=raw,node-name=vda,file.driver=file,file.filename={}", disk.display());
    let more =
        ["-incoming", "defer", "-chardev", &monitor, "-mon", "chardev=agent,mode=control", "-blockdev"];
    let more = [&more[..], &[&node, "-device", "virtio-blk-pci,id=disk0,drive=vda"]].concat();
    let more: Vec<String> = more.into_iter().map(str::to_owned).collect();
    Machine::start(&binary("VMFERRY_QEMU10"), folder, "test", &more).await
}

pub(super) fn one_disk() -> Offer {
    let disk = DiskSpec {
        name: "disk0".into(),
        virtual_size: DISK_BYTES,
        format: "raw".into(),
        read_only: false,
        left_out: false,
        incremental: false,
        bitmaps: None,
        place: None,
    };
    Offer { disks: vec![disk], ..offer("web1") }
}

/// What is granted for that disk, on a control stream of its own; where the migration before is about to end, once it
/// has.
pub(super) async fn granted(session: &Session) -> (Uuid, Prepared, MessageSender, MessageReceiver) {
    soon("a grant", async {
        loop {
            let migration = Uuid::new_v4();
            let stream = session.open(control(migration)).await.unwrap();
            let (mut sender, mut receiver) = message::split(stream, session);
            match answer(&mut sender, &mut receiver, Request::Prepare(one_disk())).await {
                Response::Prepared(prepared) => return (migration, prepared, sender, receiver),
                Response::Refused(refusal) if refusal.problems[0].kind == ProblemKind::Busy => {}
                other => panic!("{other:?}"),
            }
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_grant_is_for_its_peer_and_its_streams_alone() {
    let victim = Victim::start();
    let _qemu = waiting_qemu(&victim).await;
    let (bravo, charlie) = (Attacker::new(&victim, "bravo"), Attacker::new(&victim, "charlie"));
    let (of_bravo, of_charlie) = (bravo.session(&victim).await, charlie.session(&victim).await);
    let (migration, prepared, mut sender, mut receiver) = granted(&of_bravo).await;
    let channel = prepared.exports[0].channel;
    let refusals = |peer: &str, reason: &str| {
        victim.metric(&format!("vmferry_peer_refusals_total{{peer=\"{peer}\",reason=\"{reason}\"}}"))
    };

    let strange = open(&of_bravo, migration, purpose::NBD, channel + 7).await;
    assert_eq!(strange.err(), Some(Code::Denied), "a disk that was not granted");
    let anothers = open(&of_charlie, migration, purpose::NBD, channel).await;
    assert_eq!(anothers.err(), Some(Code::Denied), "another peer's grant");
    let early = open(&of_bravo, migration, purpose::RAM, 0).await;
    assert!(early.is_err(), "RAM before the destination is ready for it");
    let disk = open(&of_bravo, migration, purpose::NBD, channel).await.unwrap();
    let twice = open(&of_bravo, migration, purpose::NBD, channel).await;
    assert_eq!(twice.err(), Some(Code::Denied), "a disk for the second time");
    assert_eq!(refusals("bravo", "outside_grant"), 3.0);
    assert_eq!(refusals("charlie", "anothers_grant"), 1.0);
    victim.logs(|line| line.contains("a stream outside the grant was refused")).await;
    let told =
        victim.log().iter().filter(|line| line.contains("a stream outside the grant was refused")).count();
    assert_eq!(told, 1, "{:?}", victim.log());

    // None of it has done anything to what was granted.
    let progress = victim.get(&format!("/v1/migrations/{migration}"));
    assert!(progress["outcome"].is_null() && progress["phase"] == "mirror", "{progress}");
    let abort = Request::Abort { reason: "over".into() };
    let done = answer(&mut sender, &mut receiver, abort).await;
    assert!(!matches!(done, Response::Refused(_)), "{done:?}");
    // What it may have written stays, and that is said.
    let progress = victim.get(&format!("/v1/migrations/{migration}"));
    assert!(progress["notes"].to_string().contains("hold what was copied"), "{progress}");
    drop(disk);
    let late = open(&of_bravo, migration, purpose::NBD, channel).await;
    assert_eq!(late.err(), Some(Code::Denied), "after its end");
}
