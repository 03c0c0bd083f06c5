//! A peer that is permitted and does what no agent would, and programs that open too much.

use std::io::{Read, Write};
use std::time::Duration;

use serde_json::Value;
use vmferry::audit::judge;
use vmferry::libvirt::message::{Answer, Ask};
use vmferry::mux::{Class, Code, Config, Name, Open, purpose};
use vmferry::net::message;
use vmferry::net::session::{OpenStreamError, Session};
use vmferry::net::stream::{Stream, StreamEnded};

use super::agents::{Ground, wait};
use super::{FORWARD, TARGET, accept, connect};
use crate::rig::{PATIENCE, Side, soon};

/// A session with bravo of somebody who has alpha's certificate.
async fn intruder(ground: &Ground) -> (Side, Session) {
    let side = Side::new(&ground.path("pki"), "alpha", Config::default(), PATIENCE);
    let bravo = "bravo".parse().unwrap();
    let session =
        soon("a session", side.pool.session(&bravo, Some(&ground.bravo.to_string()))).await.unwrap();
    (side, session)
}

fn open(name: &[u8]) -> Open {
    Open {
        purpose: purpose::FORWARD,
        class: Class::Bulk,
        weight: 16,
        migration: [7; 16],
        channel: 0,
        name: Name::new(name).unwrap(),
    }
}

async fn ask(session: &Session, name: &[u8]) -> Result<Stream, Code> {
    match soon("an answer", session.open(open(name))).await {
        Ok(stream) => Ok(stream),
        Err(OpenStreamError::Refused { source: StreamEnded(code), .. }) => Err(code),
        Err(e) => panic!("{e}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_cannot_name_a_path() {
    let ground = Ground::new();
    std::fs::create_dir_all(ground.path("vnc/sub")).unwrap();
    // All that a path could lead to.
    let sockets = ["far", "vnc/x", "vnc/sub/x", "vnc/.hidden"].map(|name| ground.listen(name));
    let targets = "[target.'vnc-*']\nconnect = 'DIR/vnc/{}'\nfrom = ['alpha']\n\
                   [target.'other-*']\nconnect = 'DIR/vnc/{}'\n";
    let bravo = ground.bravo(targets);
    let (_side, session) = intruder(&ground).await;
    let outside = ground.path("far");
    let hostile: &[&[u8]] = &[
        b"",
        b"vnc-",
        b"vnc-../far",
        b"vnc-sub/x",
        b"vnc-.hidden",
        b"vnc-..",
        b"vnc-.",
        b"vnc-x\0",
        b"vnc-x\n",
        b"vnc-\x1b[31m",
        b"vnc-*",
        b"vnc-{}",
        b"../far",
        b"vnc-\xff\xfe",
        "vnc-\u{202e}x".as_bytes(),
        &[b'/'; 128],
        outside.to_str().unwrap().as_bytes(),
    ];
    for name in hostile {
        let answer = ask(&session, name).await.map(drop);
        assert_eq!(answer, Err(Code::NoTarget), "{:?}", String::from_utf8_lossy(name));
    }
    assert_eq!(ask(&session, b"other-x").await.map(drop), Err(Code::Denied));
    let long = [b"vnc-".as_slice(), &[b'x'; 124]].concat();
    assert_eq!(ask(&session, &long).await.map(drop), Err(Code::TargetAbsent), "too long for a socket's path");
    assert_eq!(ask(&session, b"vnc-sub").await.map(drop), Err(Code::TargetRefused), "a folder");
    let _good = ask(&session, b"vnc-x").await.unwrap();
    for (n, socket) in sockets.iter().enumerate() {
        socket.set_nonblocking(true).unwrap();
        assert_eq!(socket.accept().is_ok(), n == 1, "socket {n}");
        assert!(socket.accept().is_err(), "socket {n}");
    }
    assert!(!bravo.log().contains('\x1b'), "a peer's control characters are in the log");
}

/// Whatever a peer asks for in vain, however often: counted each time, recorded and said once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_refused_to_a_peer_is_counted_recorded_and_no_flood() {
    const TIMES: usize = 40;
    let ground = Ground::new();
    let bravo = ground.bravo("[target.mine]\nconnect = 'DIR/far'\n");
    let (_side, session) = intruder(&ground).await;
    let libvirt = Open { purpose: purpose::LIBVIRT, class: Class::Urgent, name: Name::NONE, ..open(b"") };
    let look = Ask::Look { domain: "web1".into(), folder: "/run/vmferry/libvirt".into() };
    for _ in 0..TIMES {
        assert_eq!(ask(&session, b"mine").await.map(drop), Err(Code::Denied));
        assert_eq!(ask(&session, b"yours").await.map(drop), Err(Code::NoTarget));
        let stream = soon("a question's stream", session.open(libvirt)).await.unwrap();
        let (mut sender, mut receiver) = message::split(stream, &session);
        sender.send(&look).await.unwrap();
        let answer = soon("an answer", receiver.recv::<Answer>()).await.unwrap();
        assert!(matches!(answer, Some(Answer::Refused(_))), "{answer:?}");
    }
    let count = |reason: &str| {
        bravo.metric(&format!("vmferry_peer_refusals_total{{peer=\"alpha\",reason=\"{reason}\"}}")) as usize
    };
    assert_eq!((count("not_permitted"), count("no_target")), (2 * TIMES, TIMES));
    let log = bravo.log();
    assert_eq!(log.matches("was refused").count(), 2, "of each reason one: {log}");
    let folder = ground.path("bravo/state/audit");
    let recorded = |reason: &str| {
        let mut found = 0;
        let is = |line: &Value| {
            line["event"] == "refused" && line["source"] == "alpha" && line["reason"] == reason
        };
        judge(&folder, &[], |line| found += usize::from(is(&line.whole))).unwrap();
        found
    };
    wait("the record of it", || (recorded("no-target") == 1 && recorded("not-permitted") == 1).then_some(()));
}

/// A peer that opens more than a target may have is refused, and takes no place from others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_opens_too_much_is_bounded() {
    const MAX: usize = vmferry::forward::CONNECTIONS_MAX;
    let ground = Ground::new();
    let [far, other] = ["far", "other"].map(|name| ground.listen(name));
    let other_target = "[target.other]\nconnect = 'DIR/other'\nfrom = ['alpha']\n";
    let _bravo = ground.bravo(&format!("{TARGET}{other_target}"));
    let (_side, session) = intruder(&ground).await;
    let accepting = std::thread::spawn(move || (0..MAX).map(|_| accept(&far)).collect::<Vec<_>>());
    let mut streams = Vec::new();
    while streams.len() < MAX {
        match session.open(open(b"vnc")).await {
            Ok(stream) => streams.push(stream),
            // So fast no agent opens streams.
            Err(OpenStreamError::Limit { .. }) => tokio::time::sleep(Duration::from_millis(20)).await,
            Err(e) => panic!("{e}"),
        }
    }
    let held = accepting.join().unwrap();
    let refused = loop {
        match session.open(open(b"vnc")).await {
            Err(OpenStreamError::Limit { .. }) => tokio::time::sleep(Duration::from_millis(20)).await,
            Err(OpenStreamError::Refused { source, .. }) => break source,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(refused, StreamEnded(Code::Limit));
    tokio::time::sleep(Duration::from_millis(50)).await;
    ask(&session, b"other").await.unwrap();
    drop((held, other));
}

/// Of one forwarding there are so many connections, and no more; what ends makes room.
#[test]
fn programs_that_connect_too_often_are_bounded() {
    const MAX: usize = vmferry::forward::CONNECTIONS_MAX;
    let ground = Ground::new();
    let far = ground.listen("far");
    let (_bravo, alpha) = (ground.bravo(TARGET), ground.alpha(FORWARD));
    let near = ground.path("near");
    let mut ends: Vec<_> = (0..MAX).map(|_| (connect(&near), accept(&far))).collect();
    assert!(matches!(connect(&near).read(&mut [0]), Ok(0) | Err(_)));
    let failed = "vmferry_forward_failed_total{name=\"vnc\",reason=\"limit\",side=\"forward\"}";
    assert_eq!(alpha.metric(failed), 1);
    alpha.says("too many connections");
    ends.pop();
    let open = "vmferry_forward_connections{name=\"vnc\",side=\"forward\"}";
    wait("a place", || (alpha.metric(open) < MAX as u64).then_some(()));
    let (mut near_end, mut far_end) = (connect(&near), accept(&far));
    near_end.write_all(b"x").unwrap();
    far_end.read_exact(&mut [0]).unwrap();
}
