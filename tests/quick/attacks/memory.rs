//! What a peer can make the agent hold, by the kernel's word.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use vmferry::migrate::message::{Request, Response};
use vmferry::mux::{Class, Config, Open, RateLimit, purpose};
use vmferry::net::session::{OpenStreamError, Session};

use super::victim::{Attacker, Victim, ask, control, offer};
use crate::rig::soon;

const MIB: u64 = 1 << 20;
/// Lanes of the attacker, each a session.
const SESSIONS: usize = 4;
/// Streams that it opens on each.
const STREAMS: usize = 300;

/// The beginning of a message that says that it is much longer, on as many streams as there may be.
async fn unfinished(session: Session, (purpose, class): (u16, Class)) {
    let mut opening = tokio::task::JoinSet::new();
    for _ in 0..STREAMS {
        let session = session.clone();
        opening.spawn(async move {
            let open = Open { purpose, class, ..control(uuid::Uuid::new_v4()) };
            let stream = loop {
                match session.open(open).await {
                    Ok(stream) => break stream,
                    // Too many wait for an answer.
                    Err(OpenStreamError::Limit { .. }) => tokio::time::sleep(Duration::from_millis(20)).await,
                    Err(_) => return,
                }
            };
            let mut sender = stream.send;
            let length = 250_u32 * 1024;
            let _ = sender.send(Bytes::copy_from_slice(&length.to_be_bytes())).await;
            for _ in 0..240 {
                if sender.send(Bytes::from_static(&[b' '; 1024])).await.is_err() {
                    return;
                }
            }
            std::future::pending::<()>().await;
        });
    }
    while opening.join_next().await.is_some() {}
}

/// Waits until it does not grow any more.
async fn settled(victim: &Victim) -> u64 {
    soon("the agent's memory to settle", async {
        let mut last = 0;
        let mut same = 0;
        loop {
            let now = victim.resident_bytes();
            same = if now <= last + MIB { same + 1 } else { 0 };
            last = last.max(now);
            if same == 20 {
                return last;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
    .await
}

/// Hundreds of streams on each of four sessions. `most`: what they may cost, in MiB.
async fn costs(name: &str, (purpose, class): (u16, Class), most: u64) {
    let victim = Victim::start();
    let other = Attacker::new(&victim, if name == "bravo" { "charlie" } else { "bravo" });
    let served = other.session(&victim).await;
    let before = settled(&victim).await;
    let fast = RateLimit { per_second: 4000, burst: 8192 };
    let attacker = Arc::new(Attacker::with(&victim, name, Config { opens: fast, ..Config::default() }));
    let peer = "alpha".parse().unwrap();
    attacker.pool.set_lanes(&peer, SESSIONS);
    let first = attacker.session(&victim).await;
    let address = victim.address.to_string();
    let mut sessions = vec![first.clone()];
    while sessions.len() < SESSIONS {
        let lane = soon("a lane", attacker.pool.lane(&first, Some(&address))).await;
        if !sessions.iter().any(|s| s.id() == lane.id()) {
            sessions.push(lane);
        }
    }
    let attacks: Vec<_> =
        sessions.into_iter().map(|session| tokio::spawn(unfinished(session, (purpose, class)))).collect();
    // Those that have a place may lose it and give it to another.
    let (reason, few) =
        if class == Class::Urgent { ("control_streams", 2 * places(name)) } else { ("wrong_class", 0) };
    let counter = format!("vmferry_peer_refusals_total{{peer=\"{name}\",reason=\"{reason}\"}}");
    let refused = (SESSIONS * STREAMS - few) as f64;
    soon("all but a few to be refused, and counted", async {
        while victim.metric(&counter) < refused {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    })
    .await;
    let now = settled(&victim).await;
    // Others are served meanwhile.
    let answer = ask(&served, Request::Check(offer("db1"))).await;
    assert!(matches!(answer, Response::Checked(_)), "{answer:?}");
    attacks.iter().for_each(tokio::task::JoinHandle::abort);
    let more = now.saturating_sub(before) / MIB;
    println!("{name}, purpose {purpose}, {class:?}: {more} MiB more");
    assert!(
        more < most,
        "{name} made the agent hold {more} MiB more by {class:?} streams of purpose {purpose}"
    );
}

/// Streams of messages that it may have at once.
fn places(name: &str) -> usize {
    if name == "bravo" { 256 } else { 16 }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_may_send_nothing_makes_the_agent_hold_little() {
    for class in [Class::Urgent, Class::Bulk] {
        costs("charlie", (purpose::CONTROL, class), 32).await;
    }
}

/// Questions about migrations of libvirt's are messages as well, and their places are the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_may_send_nothing_makes_the_agent_hold_little_by_questions_about_libvirt() {
    for class in [Class::Urgent, Class::Bulk] {
        costs("charlie", (purpose::LIBVIRT, class), 32).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unfinished_messages_of_a_peer_have_one_budget() {
    costs("bravo", (purpose::CONTROL, Class::Urgent), 96).await;
}
