//! Sessions that outlive their connections, over real TLS and real sockets: whatever happens to
//! the road between two agents, bytes come out as they went in; and nobody but the peer can go on
//! with a session.

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Duration;

use crate::rig::road::{Road, State};
use crate::rig::{PATIENCE, Pair, Side, exchange, open, pattern, soon, tls, until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use vmferry::mux::hello::{Hello, Mode};
use vmferry::mux::{Code, Config};
use vmferry::net::handshake;
use vmferry::net::lanes::Lanes;
use vmferry::net::pump::PumpEnd;
use vmferry::net::session::EndCause;
use vmferry::net::stream::StreamEnded;

/// Dead connections are noticed within half a second.
fn quick() -> Config {
    Config {
        ping_after: Duration::from_millis(100),
        dead_after: Duration::from_millis(700),
        ..Config::default()
    }
}

/// Live connections are never thought dead, however long this machine stalls.
fn patient() -> Config {
    Config { dead_after: PATIENCE, ..quick() }
}

/// Two sides whose sessions wait for so long, and the road between them.
async fn pair(resume: Duration) -> (Pair, Road) {
    Pair::by_road(quick(), resume).await
}

/// Another process of a host.
fn successor(pair: &Pair, name: &str) -> Side {
    Side::new(pair.dir.path(), name, quick(), PATIENCE)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_survive_a_connection_that_is_reset_over_and_over() {
    let (mut pair, road) = pair(PATIENCE).await;
    let pumped = vec![(pair.pumped(1).await, 12_000_000), (pair.pumped(2).await, 12_000_000)];
    let cutting = tokio::spawn(async move {
        let mut bytes = 0;
        loop {
            // By bytes and not by time: every part of the transfer is hit, however fast it is.
            road.passed(bytes + 700_000).await;
            bytes = road.bytes();
            road.reset();
        }
    });
    exchange(pumped).await;
    cutting.abort();
    let stats = pair.session.stats().await;
    assert!(stats.reconnects >= 20, "only {} reconnections", stats.reconnects);
    assert!(stats.replayed_bytes > 0);
    eprintln!("{} reconnections, {} bytes sent again from this side", stats.reconnects, stats.replayed_bytes);
}

/// What a side does when a certificate has expired that was shown to it long ago.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_whose_peer_has_to_prove_itself_again_goes_on_over_another_connection() {
    let (mut pair, _road) = pair(PATIENCE).await;
    let pumped = vec![(pair.pumped(1).await, 8_000_000)];
    let (near, far) = (pair.session.clone(), pair.far_session());
    let renewing = tokio::spawn(async move {
        for session in [&near, &far, &near, &far] {
            let before = session.link().connection.since;
            session.renew_connection();
            let mut link = session.watch_link();
            let is_new =
                |now: &vmferry::net::session::LinkState| now.away.is_none() && now.connection.since != before;
            soon("another connection", link.wait_for(is_new)).await.unwrap();
        }
    });
    exchange(pumped).await;
    soon("all connections", renewing).await.unwrap();
    let reconnects = pair.session.stats().await.reconnects;
    // Both may have asked for the same one.
    assert!(reconnects >= 2, "only {reconnects} reconnections");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_survive_black_holes_in_either_direction_and_a_peer_that_is_half_gone() {
    let (mut pair, road) = pair(PATIENCE).await;
    let pumped = vec![(pair.pumped(1).await, 24_000_000)];
    let session = pair.session.clone();
    let hurting = tokio::spawn(async move {
        for state in [State::Hole, State::UpOnly, State::DownOnly, State::ResetNear, State::ResetFar] {
            let bytes = road.bytes();
            road.passed(bytes + 1_000_000).await;
            until("the connection", || session.away_since().is_none()).await;
            road.set(state);
            until("the word that it is dead", || session.away_since().is_some()).await;
            tokio::time::sleep(Duration::from_millis(800)).await;
            road.set(State::Open);
        }
    });
    exchange(pumped).await;
    soon("all faults", hurting).await.unwrap();
    let stats = pair.session.stats().await;
    assert!(stats.reconnects >= 4, "only {} reconnections", stats.reconnects);
    assert!(stats.away > Duration::from_secs(1), "{:?}", stats.away);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_there_is_no_connection_little_is_taken_and_it_is_told() {
    let (mut pair, road) = pair(PATIENCE).await;
    let one = pair.pumped(1).await;
    road.set(State::Hole);
    let mut near = one.near.try_clone().unwrap();
    let taken = tokio::task::spawn_blocking(move || {
        near.set_write_timeout(Some(Duration::from_millis(1500))).unwrap();
        let chunk = vec![1; 1 << 16];
        let mut taken = 0;
        while let Ok(n) = near.write(&chunk) {
            taken += n;
        }
        taken
    })
    .await
    .unwrap();
    // The send queue, the stream's credit on a connection that was still thought to be there, and
    // two kernels' buffers.
    assert!(taken < 12 << 20, "{taken} bytes were taken without a connection");
    until("the word that there is no connection", || pair.session.away_since().is_some()).await;
    let away = pair.session.link().away.unwrap();
    assert!(away.until > away.since && !away.cause.is_empty(), "{away:?}");
    // A stream can be asked for meanwhile; it comes about when there is a connection again.
    let opening = tokio::spawn({
        let session = pair.session.clone();
        async move { session.open(open(2)).await }
    });
    // Time that is spent without a connection is nobody's.
    let waited = tokio::spawn({
        let lanes = Lanes::from(pair.session.clone());
        async move { lanes.within(Duration::from_millis(400), std::future::pending::<()>()).await }
    });
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert!(!opening.is_finished() && !waited.is_finished());
    road.set(State::Open);
    let offered = pair.b.offered().await;
    let _theirs = offered.accept().await.unwrap();
    soon("the stream", opening).await.unwrap().unwrap();
    assert!(soon("the deadline", waited).await.unwrap().is_none());
    until("the word that there is one again", || pair.session.link().away.is_none()).await;
    drop(one);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_whose_time_is_over_ends_at_both_sides() {
    let (mut pair, road) = pair(Duration::from_secs(2)).await;
    let mut one = pair.pumped(1).await;
    let far_session = pair.far_session();
    road.set(State::Hole);
    for session in [&pair.session, &far_session] {
        let end = soon("the session's end", session.ended()).await;
        assert!(matches!(end.cause, EndCause::Lost { .. }), "{:?}", end.cause);
        assert!(!session.is_live());
    }
    // The pumps end with their session's runtime, perhaps before they can say so.
    for end in [&mut one.near_end, &mut one.far_end] {
        let end = soon("the pump's end", end.recv()).await;
        assert!(matches!(end, None | Some(PumpEnd::Remote(StreamEnded(Code::SessionLost)))), "{end:?}");
    }
    let mut rest = [0; 16];
    assert!(matches!(one.near.read(&mut rest), Ok(0) | Err(_)), "the local program hears of it");
}

/// Where handshakes pass and data does not, a session is resumed again and again; that ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_is_resumed_and_moves_nothing_ends_when_its_time_is_over() {
    let (mut pair, road) = pair(Duration::from_secs(15)).await;
    let one = pair.pumped(1).await;
    road.set(State::Small);
    let near = one.near.try_clone().unwrap();
    near.set_nonblocking(true).unwrap();
    let _full = (&near).write(&pattern(1, 1 << 17));
    let end = soon("the session's end", pair.session.ended()).await;
    assert!(matches!(end.cause, EndCause::Lost { .. }), "{:?}", end.cause);
    let said = std::error::Error::source(&end.cause).unwrap().to_string();
    assert!(said.contains("full-size packets"), "{said}");
    assert!(end.stats.reconnects >= 1, "only {} reconnections", end.stats.reconnects);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_process_does_not_know_the_old_ones_session() {
    let (mut pair, road) = pair(PATIENCE).await;
    let mut one = pair.pumped(1).await;
    let successor = successor(&pair, "bravo");
    road.lead_to(successor.address);
    road.reset();
    let end = soon("the session's end", pair.session.ended()).await;
    let EndCause::Lost { refusal: Some(refusal), .. } = &end.cause else { panic!("{:?}", end.cause) };
    assert!(refusal.to_string().contains("no_session"), "{refusal}");
    let mut rest = [0; 16];
    assert!(matches!(one.near.read(&mut rest), Ok(0) | Err(_)), "the local program hears of it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peers_new_process_ends_the_old_ones_session_at_once() {
    let (pair, road) = pair(PATIENCE).await;
    let old = pair.far_session();
    // The process dies without a word, and another takes its place.
    road.set(State::Hole);
    let successor = successor(&pair, "alpha");
    let new = successor.dial(&pair.b).await.unwrap();
    let end = soon("the old session's end", old.ended()).await;
    assert!(matches!(end.cause, EndCause::Closed(Code::NoSession)), "{:?}", end.cause);
    assert!(new.is_live());
}

/// A copy of a host must not end what the host is about.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_with_the_identity_of_a_live_one_is_refused() {
    let (pair, _road) = Pair::by_road(patient(), PATIENCE).await;
    let clone = Side::new(pair.dir.path(), "alpha", patient(), PATIENCE);
    let refused = clone.dial(&pair.b).await.unwrap_err();
    let text = format!("{refused:?}");
    assert!(text.contains("Limit") && text.contains("another agent with this identity"), "{text}");
    assert!(pair.session.is_live() && pair.session.away_since().is_none(), "the first one's session goes on");
}

/// A session whose dialer is gone for good is not what a new migration is bound to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_asked_for_a_session_dials_when_the_other_side_does_not() {
    let (pair, road) = pair(PATIENCE).await;
    let old = pair.far_session();
    road.set(State::Hole);
    road.reset();
    soon("the loss", old.missed()).await;
    let successor = successor(&pair, "alpha");
    let (alpha, address) = (successor.identity.clone(), successor.address.to_string());
    let new = soon("a session", pair.b.pool.session(&alpha, Some(&address))).await.unwrap();
    assert!(new.id() != old.id() && new.is_live() && new.away_since().is_none());
    soon("the old session's end", old.ended()).await;
}

/// Where nobody answers, the other side may still come back by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_asked_for_a_session_waits_when_nobody_answers() {
    let (pair, road) = pair(PATIENCE).await;
    let old = pair.far_session();
    road.set(State::Hole);
    road.reset();
    soon("the loss", old.missed()).await;
    let (pool, alpha) = (Arc::clone(&pair.b.pool), pair.a.identity.clone());
    let asked = tokio::spawn(async move { pool.session(&alpha, Some("127.0.0.1:1")).await });
    // The dial has failed by the time that its failure is counted.
    until("the failed dial", || !pair.b.pool.dial_failures().is_empty()).await;
    assert!(!asked.is_finished(), "it gave up although the session may come back");
    road.set(State::Open);
    road.reset();
    let session = soon("the session", asked).await.unwrap().unwrap();
    assert_eq!(session.id(), old.id());
    // And who has dialed a session waits for it, because it is dialing already.
    road.reset();
    let same = soon("the session", pair.a.dial_at(&pair.b, road.address())).await.unwrap();
    assert_eq!(same.id(), old.id());
}

/// What somebody says who has a certificate of the CA, but not the session.
async fn attempt(pair: &Pair, name: &str, generation: u64, proof: [u8; 32], instance: [u8; 16]) -> Vec<u8> {
    let own = tls(pair.dir.path(), name);
    let tcp = TcpStream::connect(pair.b.address).await.unwrap();
    let mut stream = handshake::connect(&own, tcp, &pair.b.identity, PATIENCE).await.unwrap();
    let session_id = pair.session.id();
    let mode = Mode::Resume { session_id, generation, rx_seq: 0, proof };
    stream.write_all(&Hello::new(&quick(), instance, mode).encode()).await.unwrap();
    let mut answer = Vec::new();
    let _ = soon("the refusal", stream.read_to_end(&mut answer)).await;
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_else_can_take_a_session() {
    let (mut pair, _road) = Pair::by_road(patient(), PATIENCE).await;
    let one = pair.pumped(1).await;
    let goaway = |answer: &[u8]| u32::from_be_bytes(answer[8..12].try_into().unwrap());
    // The same host's certificate in another process; another host's; a session of another peer.
    let forged = attempt(&pair, "alpha", 99, [7; 32], [1; 16]).await;
    assert_eq!(goaway(&forged), Code::Auth.to_wire());
    let zero = attempt(&pair, "alpha", 0, [0; 32], [1; 16]).await;
    assert_eq!(goaway(&zero), Code::Auth.to_wire());
    let stranger = attempt(&pair, "charlie", 99, [7; 32], [1; 16]).await;
    assert_eq!(goaway(&stranger), Code::NoSession.to_wire());
    // The session has not even noticed.
    exchange(vec![(one, 1_000_000)]).await;
    let stats = pair.session.stats().await;
    assert_eq!(stats.reconnects, 0);
    assert_eq!(pair.b.pool.all().len(), 1);
}
