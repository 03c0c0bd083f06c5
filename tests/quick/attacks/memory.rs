//! What a peer can make the agent hold, by the kernel's word.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use vmferry::migrate::message::{Request, Response};
use vmferry::mux::{Config, RateLimit};
use vmferry::net::session::Session;

use super::victim::{Attacker, Victim, ask, control, offer};
use crate::rig::soon;

const MIB: u64 = 1 << 20;

/// The beginning of a message that says that it is much longer, on as many streams as there may be.
async fn unfinished(session: Session, streams: usize) {
    let mut opening = tokio::task::JoinSet::new();
    for _ in 0..streams {
        let session = session.clone();
        opening.spawn(async move {
            let Ok(stream) = session.open(control(uuid::Uuid::new_v4())).await else { return };
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

/// A hundred and more streams on each of four sessions. `most`: what they may cost.
async fn costs(name: &str, most: u64) {
    let victim = Victim::start();
    let other = Attacker::new(&victim, if name == "bravo" { "charlie" } else { "bravo" });
    let served = other.session(&victim).await;
    let before = settled(&victim).await;
    let fast = RateLimit { per_second: 4000, burst: 8192 };
    let attacker = Arc::new(Attacker::with(&victim, name, Config { opens: fast, ..Config::default() }));
    let peer = "alpha".parse().unwrap();
    attacker.pool.set_lanes(&peer, 4);
    let first = attacker.session(&victim).await;
    let address = victim.address.to_string();
    let mut sessions = vec![first.clone()];
    while sessions.len() < 4 {
        let lane = soon("a lane", attacker.pool.lane(&first, Some(&address))).await;
        if !sessions.iter().any(|s| s.id() == lane.id()) {
            sessions.push(lane);
        }
    }
    let attacks: Vec<_> =
        sessions.into_iter().map(|session| tokio::spawn(unfinished(session, 300))).collect();
    let now = settled(&victim).await;
    // Others are served meanwhile.
    let answer = ask(&served, Request::Check(offer("db1"))).await;
    assert!(matches!(answer, Response::Checked(_)), "{answer:?}");
    attacks.iter().for_each(tokio::task::JoinHandle::abort);
    let more = now.saturating_sub(before) / MIB;
    println!("{name}: {more} MiB more");
    assert!(more < most, "{name} made the agent hold {more} MiB more");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_may_send_nothing_makes_the_agent_hold_little() {
    costs("charlie", 32).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unfinished_messages_of_a_peer_have_one_budget() {
    costs("bravo", 96).await;
}
