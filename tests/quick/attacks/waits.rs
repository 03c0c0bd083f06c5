//! A peer that keeps the agent waiting, or busy with what nobody needs: it asks and does not read, says nothing, says the
//! same in turns.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use uuid::Uuid;
use vmferry::migrate::message::{Asked, DiskSpec, Offer, Reply, Request, Response};
use vmferry::mux::{Open, purpose};
use vmferry::net::message::{self, MessageReceiver, MessageSender};
use vmferry::net::session::Session;

use super::outside_grant::{granted, one_disk, waiting_qemu};
use super::victim::{Attacker, Victim, control, offer};
use crate::rig::{soon, until};

/// More answers than credit and queues have room for.
const UNREAD: u64 = 20_000;

async fn channel(session: &Session, open: Open) -> (MessageSender, MessageReceiver) {
    message::split(soon("a stream", session.open(open)).await.unwrap(), session)
}

/// Asks, and reads nothing, until it is not listened to any more.
async fn asks_unread(mut sender: MessageSender) {
    for number in 0..UNREAD {
        let asked = Asked { number, request: Request::Settle, summary: None };
        if sender.send(&asked).await.is_err() {
            return;
        }
    }
    std::future::pending().await
}

/// The VM and its place here are free again for others, however long that source stays.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_reads_no_answers_loses_its_migration() {
    let victim = Victim::start();
    let _qemu = waiting_qemu(&victim).await;
    let session = Attacker::new(&victim, "bravo").session(&victim).await;
    let (migration, _, sender, _unread) = granted(&session).await;
    soon("not to be listened to any more", asks_unread(sender)).await;
    let outcome = || victim.get(&format!("/v1/migrations/{migration}"))["outcome"].clone();
    until("its end", || outcome()["result"] == "failed").await;
    victim.logs(|line| line.contains("was not read for 10 s")).await;
    granted(&session).await;
}

/// What a known peer without any permission can have open.
async fn says_nothing(session: &Session) -> Vec<(MessageSender, MessageReceiver)> {
    let mut silent = Vec::new();
    for _ in 0..3 {
        for purpose in [purpose::CONTROL, purpose::LIBVIRT] {
            silent.push(channel(session, Open { purpose, ..control(Uuid::new_v4()) }).await);
        }
    }
    silent
}

/// A planned restart keeps all copies waiting until the last stream has stopped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_that_say_nothing_hold_up_neither_a_take_over_nor_a_stop() {
    for takes_over in [true, false] {
        let victim = Victim::start();
        let session = Attacker::new(&victim, "charlie").session(&victim).await;
        let _silent = says_nothing(&session).await;
        let (sender, _unread) = channel(&session, control(Uuid::new_v4())).await;
        let asking = tokio::spawn(asks_unread(sender));
        let next = takes_over.then(|| victim.next_process());
        if !takes_over {
            kill(Pid::from_raw(victim.pid()), Signal::SIGTERM).unwrap();
        }
        until("the end of the process", || victim.has_ended()).await;
        let late: Vec<_> = victim.log().into_iter().filter(|line| line.contains("in time")).collect();
        assert!(late.is_empty(), "{late:?}");
        asking.abort();
        if let Some(mut next) = next {
            next.kill().unwrap();
            next.wait().unwrap();
        }
    }
}

/// Each is a record in the destination's journal.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_says_again_and_again_whether_its_guest_runs_is_ended() {
    let victim = Victim::start();
    let _qemu = waiting_qemu(&victim).await;
    let session = Attacker::new(&victim, "bravo").session(&victim).await;
    let (.., mut sender, mut receiver) = granted(&session).await;
    // Each of them has its own time: thousands are written to a disk.
    let mut refused = None;
    for number in 0..10_000 {
        let request = Request::ToRun { running: number % 2 == 1 };
        let asked = Asked { number, request, summary: None };
        soon("a request to be taken", sender.send(&asked)).await.unwrap();
        let Some(Reply::Response { response, .. }) =
            soon("an answer", receiver.recv::<Reply>()).await.unwrap()
        else {
            panic!("no answer to {number}")
        };
        if !matches!(response, Response::Done) {
            refused = Some((number, response));
            break;
        }
    }
    assert!(matches!(&refused, Some((4096, Response::Refused(_)))), "{refused:?}");
    let journals = std::fs::read_dir(victim.folder.path().join("state/migrations")).unwrap().flatten();
    let longest = journals.map(|file| file.metadata().unwrap().len()).max().unwrap();
    assert!(longest < 1 << 20, "{longest} bytes");
}

/// Long requests that are whole wait for their turn: they are in the budget of their peer as those that are not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_requests_that_wait_for_their_turn_cost_no_more_than_their_peer_may() {
    const STREAMS: usize = 250;
    let victim = Victim::start();
    // A check of it lasts.
    let _monitor = std::os::unix::net::UnixListener::bind(victim.folder.path().join("web1.qmp")).unwrap();
    let session = Attacker::new(&victim, "bravo").session(&victim).await;
    let disk = DiskSpec { name: "d".into(), ..one_disk().disks.remove(0) };
    let one = serde_json::to_vec(&disk).unwrap().len() + 1;
    let long = Offer { disks: vec![disk; 250 * 1024 / one], ..offer("web1") };
    let before = victim.resident_bytes();
    let mut open = Vec::new();
    let mut asking = tokio::task::JoinSet::new();
    for _ in 0..STREAMS {
        let (mut sender, receiver) = channel(&session, control(Uuid::new_v4())).await;
        open.push(receiver);
        let asked = Asked { number: 1, request: Request::Check(long.clone()), summary: None };
        asking.spawn(async move {
            let _ = sender.send(&asked).await;
            std::future::pending::<()>().await;
        });
    }
    let most = soon("as many as are taken to be taken", async {
        let (mut most, mut same) = (0, 0);
        while same < 30 {
            let now = victim.resident_bytes();
            (most, same) = if now > most + (1 << 20) { (now, 0) } else { (most.max(now), same + 1) };
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        most
    })
    .await;
    let more = most.saturating_sub(before) >> 20;
    println!("{more} MiB more");
    assert!(more < 96, "{more} MiB more");
}
