//! Sessions over real TLS and real sockets, both ends in one process: streams, pumps, limits,
//! and what becomes of local sockets when something breaks.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use crate::rig::road::State;
use crate::rig::{
    LATE, Pair, Pumped, Side, blocking, credentials, exchange, open, pattern, soon, tls, until,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use vmferry::mux::{Code, Config, Open, purpose};
use vmferry::net::compress::{Coding, Undelivered};
use vmferry::net::identity::Identity;
use vmferry::net::message;
use vmferry::net::pump::PumpEnd;
use vmferry::net::purposes::Purposes;
use vmferry::net::session::{EndCause, OpenStreamError, Session};
use vmferry::net::stream::StreamEnded;

/// How long sessions wait for another connection.
const RESUME: Duration = Duration::from_secs(2);
/// How often this machine may be too slow for what a scene is about.
const TRIES: usize = 3;

async fn pair() -> Pair {
    Pair::new(Config::default(), RESUME).await
}

fn side(dir: &tempfile::TempDir, name: &str) -> Side {
    Side::new(dir.path(), name, Config::default(), RESUME)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_directions_of_many_pumps_carry_every_byte() {
    let mut pair = pair().await;
    let mut pumped = Vec::new();
    for channel in 0..8 {
        pumped.push((pair.pumped(channel).await, 3_000_000 + usize::from(channel) * 12_345));
    }
    exchange(pumped).await;
    soon("no stream to be left", async {
        while pair.session.stats().await.streams != 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// What a disk is like: runs of the same, text, and what cannot be made shorter.
fn like_a_disk(len: usize) -> Vec<u8> {
    let mut disk = Vec::with_capacity(len);
    for seed in 0.. {
        match seed % 3 {
            0 => disk.resize(disk.len() + 200_000, 0),
            1 => disk.extend(format!("line {seed} of a log\n").repeat(9_000).bytes()),
            _ => disk.extend(pattern(seed, 150_000)),
        }
        if disk.len() >= len {
            break;
        }
    }
    disk.truncate(len);
    disk
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_compressed_direction_delivers_the_same_bytes_in_fewer() {
    let mut pair = pair().await;
    let undelivered = Coding::Decompress(Undelivered::default());
    let mut pumped = pair.pumped_with(1, Coding::Compress, undelivered).await;
    let (disk, answer) = (like_a_disk(20 << 20), pattern(9, 3 << 20));
    let (near, far) = (pumped.near.try_clone().unwrap(), pumped.far.try_clone().unwrap());
    let sent = disk.clone();
    let up = blocking(move || {
        (&near).write_all(&sent).unwrap();
        near.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let received = blocking(move || {
        let mut all = Vec::new();
        (&far).read_to_end(&mut all).unwrap();
        all
    });
    let (_, received) = tokio::join!(up, received);
    assert!(received == disk, "other bytes arrived");
    // The other direction is as it was, and outlives the end of this one.
    let (mut far, mut near) = (pumped.far, pumped.near);
    let sending = answer.clone();
    let back = blocking(move || {
        far.write_all(&sending).unwrap();
        drop(far);
    });
    let got = blocking(move || {
        let mut all = Vec::new();
        near.read_to_end(&mut all).unwrap();
        all
    });
    let (_, got) = tokio::join!(back, got);
    assert!(got == answer, "other bytes came back");
    assert!(matches!(soon("the end", pumped.near_end.recv()).await, Some(PumpEnd::Finished)));
    let counters = pumped.near_pump.counters();
    let (sent, saved) = (counters.sent_bytes.load(Relaxed), counters.saved_bytes.load(Relaxed));
    assert!(sent + saved >= disk.len() as u64, "{sent} sent, {saved} saved of {}", disk.len());
    assert!(saved > disk.len() as u64 / 3, "{sent} sent, {saved} saved of {}", disk.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_block_cuts_its_stream_and_no_other() {
    let mut pair = pair().await;
    let mut other = pair.pumped(1).await;
    let bad = pair.pumped_with(2, Coding::Plain, Coding::Decompress(Undelivered::default())).await;
    let mut far_end = bad.far_end;
    let mut near = bad.near;
    blocking(move || drop(near.write_all(&pattern(5, 100_000)))).await;
    let end = soon("the end of the stream", far_end.recv()).await;
    assert!(matches!(end, Some(PumpEnd::Coding(_))), "{end:?}");
    let mut far = bad.far;
    assert_eq!(blocking(move || far.read(&mut [0; 16])).await.unwrap_or(0), 0, "nothing of it is delivered");
    other.near.write_all(b"still here").unwrap();
    let mut got = [0; 10];
    let mut far = other.far.try_clone().unwrap();
    let got = blocking(move || far.read_exact(&mut got).map(|()| got)).await.unwrap();
    assert_eq!(&got, b"still here");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_half_close_is_passed_on_as_one() {
    let mut pair = pair().await;
    let Pumped { mut near, mut far, near_pump, far_pump, mut near_end, mut far_end } = pair.pumped(1).await;
    let answer = blocking(move || {
        near.write_all(b"question").unwrap();
        near.shutdown(Shutdown::Write).unwrap();
        let mut asked = Vec::new();
        far.read_to_end(&mut asked).unwrap();
        assert_eq!(asked, b"question");
        // The other direction is still open.
        far.write_all(b"answer").unwrap();
        drop(far);
        let mut answer = Vec::new();
        near.read_to_end(&mut answer).unwrap();
        answer
    })
    .await;
    assert_eq!(answer, b"answer");
    for end in [&mut near_end, &mut far_end] {
        let end = soon("the pump's end", end.recv()).await.unwrap();
        assert!(matches!(end, PumpEnd::Finished), "{end:?}");
    }
    drop((near_pump, far_pump));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_goes_away_ends_the_writer_at_the_other_side() {
    let mut pair = pair().await;
    let Pumped { mut near, far, near_pump, far_pump, near_end: _near_end, mut far_end } =
        pair.pumped(1).await;
    drop(far);
    let error = blocking(move || {
        let chunk = vec![7; 1 << 16];
        loop {
            if let Err(e) = near.write_all(&chunk) {
                break e;
            }
        }
    })
    .await;
    assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "the writer must not be left waiting");
    let end = soon("the far pump's end", far_end.recv()).await.unwrap();
    assert!(matches!(end, PumpEnd::Local(_) | PumpEnd::Remote(_)), "{end:?}");
    drop((near_pump, far_pump));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_pump_ends_both_local_sockets() {
    let mut pair = pair().await;
    let Pumped { mut near, mut far, near_pump, far_pump, near_end: _near_end, mut far_end } =
        pair.pumped(1).await;
    near_pump.cut();
    let read = blocking(move || {
        let mut rest = [0; 16];
        (near.read(&mut rest), far.read(&mut rest))
    })
    .await;
    assert!(matches!(read.0, Ok(0) | Err(_)) && matches!(read.1, Ok(0) | Err(_)), "{read:?}");
    let end = soon("the far pump's end", far_end.recv()).await.unwrap();
    assert!(matches!(end, PumpEnd::Remote(StreamEnded(Code::Cancelled))), "{end:?}");
    drop(far_pump);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stalled_reader_stops_its_own_stream_and_no_other() {
    let mut pair = pair().await;
    let stalled = pair.pumped(1).await;
    let lively = pair.pumped(2).await;
    // Fill everything between the writer and the reader that never reads.
    let mut writer = stalled.near.try_clone().unwrap();
    blocking(move || {
        writer.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
        let chunk = vec![1; 1 << 16];
        while writer.write_all(&chunk).is_ok() {}
    })
    .await;
    let (mut from, mut to) = (lively.near.try_clone().unwrap(), lively.far.try_clone().unwrap());
    let sending = blocking_pair(
        move || from.write_all(&pattern(3, 20_000_000)).unwrap(),
        move || {
            let mut got = vec![0; 20_000_000];
            to.read_exact(&mut got).unwrap();
            assert!(got == pattern(3, 20_000_000));
        },
    );
    sending.await;
    let held = pair.far_session().stats().await.recv_queued_bytes;
    assert!(
        held as u64 <= Config::default().budget_bytes,
        "{held} bytes held for a reader that does not read"
    );
    drop((stalled, lively));
}

async fn blocking_pair(one: impl FnOnce() + Send + 'static, two: impl FnOnce() + Send + 'static) {
    tokio::join!(blocking(one), blocking(two));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_tells_its_code_and_an_unanswered_offer_is_refused() {
    let mut pair = pair().await;
    let session = pair.session.clone();
    let opening = tokio::spawn(async move { session.open(open(1)).await });
    pair.b.offered().await.refuse(Code::Denied);
    let refused = soon("the refusal", opening).await.unwrap();
    assert!(
        matches!(refused, Err(OpenStreamError::Refused { source: StreamEnded(Code::Denied), .. })),
        "{refused:?}"
    );
    let session = pair.session.clone();
    let opening = tokio::spawn(async move { session.open(open(2)).await });
    drop(pair.b.offered().await);
    let refused = soon("the refusal", opening).await.unwrap();
    assert!(
        matches!(refused, Err(OpenStreamError::Refused { source: StreamEnded(Code::Refused), .. })),
        "{refused:?}"
    );
    // The session is none the worse for it.
    let (ours, theirs) = pair.stream(3).await;
    let (mut asks, _answers) = message::split(ours, &pair.session);
    let (_says, mut hears) = message::split(theirs, &pair.far_session());
    asks.send(&"hello").await.unwrap();
    let heard: Option<String> = soon("a message", hears.recv()).await.unwrap();
    assert_eq!(heard.as_deref(), Some("hello"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_session_serves_both_directions_and_all_who_ask_at_once() {
    let mut pair = pair().await;
    let (one, two) = tokio::join!(pair.a.dial(&pair.b), pair.a.dial(&pair.b));
    let back = pair.b.dial(&pair.a).await.unwrap();
    assert_eq!((pair.a.pool.all().len(), pair.b.pool.all().len()), (1, 1));
    drop((one.unwrap(), two.unwrap()));
    let opening = tokio::spawn(async move { back.open(open(9)).await });
    let _theirs = pair.a.offered_on(9).await.accept().await.unwrap();
    soon("the stream from the accepting side", opening).await.unwrap().unwrap();
}

/// How many streams of so many go to each lane.
async fn lanes_of(side: &Side, first: &Session, address: Option<&str>, streams: usize) -> Vec<usize> {
    let mut used = BTreeMap::<_, usize>::new();
    for _ in 0..streams {
        *used.entry(side.pool.lane(first, address).await.id()).or_default() += 1;
    }
    used.into_values().collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_go_to_all_lanes_in_turn_and_a_peer_bounds_their_number() {
    let pair = pair().await;
    let address = pair.b.address.to_string();
    assert_eq!(lanes_of(&pair.a, &pair.session, Some(&address), 6).await, [6], "one is the default");
    pair.a.pool.set_lanes(&pair.b.identity, 3);
    let spread = lanes_of(&pair.a, &pair.session, Some(&address), 11).await;
    assert_eq!(spread.len(), 3);
    assert!(spread.iter().all(|streams| (3..=5).contains(streams)), "{spread:?}");
    // Its peer, which cannot dial, uses what is there.
    pair.b.pool.set_lanes(&pair.a.identity, 2);
    until("all sessions", || pair.b.pool.all().len() == 3).await;
    assert_eq!(lanes_of(&pair.b, &pair.b.pool.all()[0], None, 8).await, [4, 4]);
    pair.b.pool.set_lanes(&pair.a.identity, 1);
    pair.a.pool.set_lanes(&pair.b.identity, 8);
    let bounded = lanes_of(&pair.a, &pair.session, Some(&address), 40).await;
    assert_eq!(bounded.len(), 4, "{bounded:?}: a peer with one lane admits four sessions");
    assert_eq!(pair.a.pool.dial_failures().values().sum::<u64>(), 1, "it is not asked again and again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closed_session_ends_its_streams_at_both_sides() {
    let mut pair = pair().await;
    let Pumped { mut near, mut far, near_pump, far_pump, .. } = pair.pumped(1).await;
    let far_session = pair.far_session();
    pair.session.close(Code::Shutdown, "the test ends it");
    let end = soon("the session's end here", pair.session.ended()).await;
    assert!(matches!(end.cause, EndCause::Closed(Code::Shutdown)), "{:?}", end.cause);
    soon("the session's end there", far_session.ended()).await;
    let read = blocking(move || {
        let mut rest = [0; 16];
        (near.read(&mut rest), far.read(&mut rest))
    })
    .await;
    assert!(matches!(read.0, Ok(0) | Err(_)) && matches!(read.1, Ok(0) | Err(_)), "{read:?}");
    assert!(pair.a.pool.all().is_empty() && pair.b.pool.all().is_empty());
    // The next one who asks gets a new one.
    let again = pair.a.dial(&pair.b).await.unwrap();
    assert!(again.is_live());
    drop((near_pump, far_pump));
}

/// A peer that proves its identity, says HELLO and then nothing at all, not even a PONG.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_peer_is_given_up_and_its_streams_with_it() {
    let config = Config {
        ping_after: Duration::from_millis(50),
        dead_after: Duration::from_millis(400),
        ..Config::default()
    };
    // The session's own patience is the business of tests/resume.rs.
    let (mut pair, road) = Pair::by_road(config, RESUME).await;
    let _streams = pair.stream(1).await;
    road.set(State::Hole);
    let end = soon("the session's end", pair.session.ended()).await;
    assert!(matches!(end.cause, EndCause::Lost { .. }), "{:?}", end.cause);
    assert!(!pair.session.is_live());
}

/// Bytes after a good handshake that are no HELLO, and a HELLO that never ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_hello_is_refused_and_the_next_peer_is_served() {
    let mut pair = pair().await;
    let own = tls(pair.dir.path(), "alpha");
    for bytes in [vec![0xff; 64], vec![0; 16], [&[1u8, 0, 0xff, 0xff][..], &[0; 12]].concat()] {
        let tcp = TcpStream::connect(pair.b.address).await.unwrap();
        let deadline = Duration::from_secs(10);
        let mut stream =
            vmferry::net::handshake::connect(&own, tcp, &pair.b.identity, deadline).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        let mut rest = Vec::new();
        // An end of some kind, and not a session.
        let _ = soon("the refusal", stream.read_to_end(&mut rest)).await;
        assert!(!rest.starts_with(&[1]), "no HELLO answers {bytes:?}");
    }
    assert_eq!(pair.b.pool.all().len(), 1, "only the good session lives");
    pair.stream(1).await;
    assert!(pair.b.started.recv().await.is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dial_that_fails_is_counted_by_its_reason() {
    let dir = credentials();
    let a = side(&dir, "alpha");
    let b = side(&dir, "bravo");
    // It is bravo that answers there.
    let charlie: Identity = "charlie".parse().unwrap();
    let wrong = a.pool.session(&charlie, Some(&b.address.to_string())).await;
    assert!(wrong.is_err());
    let counted = a.pool.dial_failures();
    assert_eq!(counted.get("wrong_identity"), Some(&1), "{counted:?}");
}

/// A stranger opens connections by the hundred while a peer, at another address, is within its
/// handshake: that one comes about.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_connections_from_one_address_pushes_out_no_other() {
    for _ in 0..TRIES {
        if comes_about_beside_a_flood().await {
            return;
        }
    }
    panic!("the honest one's time was over before its handshake, {TRIES} times");
}

/// False: the flood took so long that the honest one's time was over.
async fn comes_about_beside_a_flood() -> bool {
    let dir = credentials();
    let b = side(&dir, "bravo");
    let since = Instant::now();
    // Its place is taken before the flood, and its handshake comes after.
    let honest = TcpStream::connect(b.address).await.unwrap();
    let stranger = || async {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
        soon("a place in the kernel's queue", socket.connect(b.address)).await.unwrap()
    };
    let mut flood = Vec::new();
    for _ in 0..500 {
        flood.push(stranger().await);
    }
    // All but its share are thrown out.
    for tcp in &mut flood[..100] {
        assert_eq!(soon("the end", tcp.read(&mut [0])).await.unwrap_or(0), 0);
    }
    let own = tls(dir.path(), "alpha");
    let deadline = Duration::from_secs(30);
    let shaken = vmferry::net::handshake::connect(&own, honest, &b.identity, deadline).await;
    if shaken.is_err() && since.elapsed() > LATE {
        return false;
    }
    assert!(shaken.is_ok(), "{:?}", shaken.err());
    for _ in 0..400 {
        flood.push(stranger().await);
    }
    let a = side(&dir, "alpha");
    soon("a session", a.dial(&b)).await.unwrap();
    drop(flood);
    true
}

/// An address at which nothing ever answers: its owner accepts no TCP, or no TLS.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_peer_keeps_no_other_from_being_dialed_and_is_dialed_once_for_all_who_ask() {
    for _ in 0..TRIES {
        if is_dialed_beside_a_dead_peer().await {
            return;
        }
    }
    panic!("the other dial has waited for the dead one, {TRIES} times");
}

/// False: the dead one had been given up when the other was there.
async fn is_dialed_beside_a_dead_peer() -> bool {
    let pair = pair().await;
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dead: Identity = "charlie".parse().unwrap();
    let at = silent.local_addr().unwrap().to_string();
    let (pool, since) = (Arc::clone(&pair.a.pool), Instant::now());
    let asked: Vec<_> = (0..4)
        .map(|_| {
            let (pool, dead, at) = (Arc::clone(&pool), dead.clone(), at.clone());
            tokio::spawn(async move { pool.session(&dead, Some(&at)).await.map(drop) })
        })
        .collect();
    let (_held, _) = soon("the dial", silent.accept()).await.unwrap();
    pair.session.close(Code::Shutdown, "the next one is dialed anew");
    soon("the end of the session", pair.session.ended()).await;
    soon("another session", pair.a.dial(&pair.b)).await.unwrap();
    let none_is_finished = asked.iter().all(|asked| !asked.is_finished());
    if !none_is_finished && since.elapsed() > LATE {
        return false;
    }
    assert!(none_is_finished, "the dead one was given up at once");
    for asked in asked {
        soon("the failure", asked).await.unwrap().unwrap_err();
    }
    assert_eq!(pool.dial_failures().values().sum::<u64>(), 1, "{:?}", pool.dial_failures());
    true
}

/// Whatever a peer writes, no text of it obeys or deceives a terminal, or grows without bound.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peers_texts_come_without_anything_that_a_terminal_obeys() {
    use vmferry::migrate::message::{Reply, Response};
    let mut pair = pair().await;
    let evil = format!("\u{1b}]0;mine\u{7}\u{1b}[2J\nroot@bravo:~# \u{202e}{}", "x".repeat(200_000));
    let refusal = serde_json::json!({"response": {"number": 1, "response": {"refused": {
        "problems": [{"kind": "other", "text": evil, "remedy": "\u{9b}31mred\r\n"}], "text": "\u{1b}c",
    }}}});
    let (ours, theirs) = pair.stream(1).await;
    let (mut says, _hears) = message::split(theirs, &pair.far_session());
    let (_says, mut hears) = message::split(ours, &pair.session);
    says.send(&refusal).await.unwrap();
    let Some(Reply::Response { response: Response::Refused(refusal), .. }) =
        soon("the refusal", hears.recv()).await.unwrap()
    else {
        panic!("another answer");
    };
    let problem = &refusal.problems[0];
    for text in [&problem.text, &problem.remedy, &refusal.text] {
        let obeyed = |c: char| c.is_control() || ('\u{202a}'..='\u{202e}').contains(&c);
        assert!(!text.chars().any(obeyed), "{text:?}");
        assert!(text.len() < 10_000, "{} bytes", text.len());
    }
    assert!(problem.text.contains("root@bravo:~# ") && problem.remedy.contains("31mred"), "{problem:?}");
    // What cannot be understood is repeated by the error.
    says.send(&serde_json::json!({"\u{1b}[5m": 1})).await.unwrap();
    let error = soon("the error", hears.recv::<Reply>()).await.unwrap_err();
    let words = vmferry::error_chain::chain(&error);
    assert!(words.contains("[5m") && !words.contains('\u{1b}'), "{words:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_goes_to_the_acceptor_of_its_purpose_and_any_other_is_refused() {
    let mut pair = pair().await;
    let mut purposes = Purposes::default();
    let (taken, mut got) = mpsc::unbounded_channel();
    for purpose in [purpose::NBD, purpose::RAM] {
        let taken = taken.clone();
        purposes.register(purpose, move |stream| {
            let taken = taken.clone();
            async move {
                let wanted = stream.open.purpose;
                // Kept: a stream that is dropped is cancelled, perhaps before its opener has seen it.
                let stream = stream.accept().await.unwrap();
                assert!(taken.send((purpose, wanted, stream)).is_ok());
            }
        });
    }
    for (wanted, is_taken) in [(purpose::RAM, true), (purpose::FILE, false), (purpose::NBD, true)] {
        let opening = pair.session.open(Open { purpose: wanted, ..open(1) });
        let serving = async { purposes.accept(pair.b.offered().await).await };
        let (opened, ()) = tokio::join!(opening, serving);
        match opened {
            Ok(_) => assert!(is_taken, "purpose {wanted} was taken"),
            Err(OpenStreamError::Refused { source, .. }) => {
                assert!(!is_taken && source == StreamEnded(Code::Unsupported), "{wanted}: {source}");
            }
            Err(e) => panic!("{e}"),
        }
    }
    drop((purposes, taken));
    let mut by = Vec::new();
    while let Some((registered, wanted, _)) = got.recv().await {
        by.push((registered, wanted));
    }
    assert_eq!(by, [(purpose::RAM, purpose::RAM), (purpose::NBD, purpose::NBD)]);
}
