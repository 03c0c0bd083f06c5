//! Forwarded sockets between two agents that run as processes, with TLS on loopback.

pub(crate) mod agents;
mod hostile;
mod life;
mod managers;
mod shares;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use crate::rig::{own_address, pattern};
use agents::{Ground, PATIENCE, wait};

/// One forwarding of alpha, `vnc`.
const FORWARD: &str = "[forward.vnc]\nlisten = 'DIR/near'\nto = 'bravo'\n";
/// What it goes to at bravo.
const TARGET: &str = "[target.vnc]\nconnect = 'DIR/far'\nfrom = ['alpha']\n";

fn patient(socket: UnixStream) -> UnixStream {
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.set_write_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn connect(path: &Path) -> UnixStream {
    patient(UnixStream::connect(path).unwrap())
}

/// The next connection that comes to a program.
fn accept(listener: &UnixListener) -> UnixStream {
    listener.set_nonblocking(true).unwrap();
    let (socket, _) = wait("a connection at the target", || listener.accept().ok());
    socket.set_nonblocking(false).unwrap();
    patient(socket)
}

/// Sends so much each way, each direction to its end, and compares.
fn exchange(near: &UnixStream, far: &UnixStream, len: usize) {
    std::thread::scope(|scope| {
        for (seed, mut from, mut to) in [(1, near, far), (2, far, near)] {
            scope.spawn(move || {
                from.write_all(&pattern(seed, len)).unwrap();
                from.shutdown(Shutdown::Write).unwrap();
            });
            scope.spawn(move || {
                let mut got = Vec::new();
                to.read_to_end(&mut got).unwrap();
                assert!(got == pattern(seed, len), "seed {seed}: {} of {len} bytes", got.len());
            });
        }
    });
}

#[test]
fn bytes_go_both_ways_and_either_direction_may_end_first() {
    let ground = Ground::new();
    let far = ground.listen("far");
    let (_bravo, _alpha) = (ground.bravo(TARGET), ground.alpha(FORWARD));
    let (mut near_end, mut far_end) = (connect(&ground.path("near")), accept(&far));
    exchange(&near_end, &far_end, 3_000_000);
    for near_first in [true, false] {
        (near_end, far_end) = (connect(&ground.path("near")), accept(&far));
        let (first, second) =
            if near_first { (&mut near_end, &mut far_end) } else { (&mut far_end, &mut near_end) };
        first.write_all(b"question").unwrap();
        first.shutdown(Shutdown::Write).unwrap();
        let mut asked = String::new();
        second.read_to_string(&mut asked).unwrap();
        assert_eq!(asked, "question");
        // The other direction is still open.
        second.write_all(b"answer").unwrap();
        second.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        first.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "answer");
    }
}

/// 200 programs connect at the same moment; each gets a stream of its own, and its own bytes.
#[test]
fn two_hundred_connections_at_once_are_carried() {
    const MANY: u64 = 200;
    let ground = Ground::new();
    let far = ground.listen("far");
    let (_bravo, _alpha) = (ground.bravo(TARGET), ground.alpha(FORWARD));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..MANY {
                let mut far_end = accept(&far);
                // What comes goes back.
                scope.spawn(move || {
                    let mut all = Vec::new();
                    far_end.read_to_end(&mut all).unwrap();
                    far_end.write_all(&all).unwrap();
                });
            }
        });
        for seed in 0..MANY {
            let mut near_end = connect(&ground.path("near"));
            scope.spawn(move || {
                near_end.write_all(&pattern(seed, 10_000)).unwrap();
                near_end.shutdown(Shutdown::Write).unwrap();
                let mut all = Vec::new();
                near_end.read_to_end(&mut all).unwrap();
                assert!(all == pattern(seed, 10_000), "connection {seed}: {} bytes came back", all.len());
            });
        }
    });
}

/// A program's socket whose queue holds one connection: each further connect(2) waits until it is accepted.
fn narrow(ground: &Ground) -> UnixListener {
    let far = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
    far.bind(&socket2::SockAddr::unix(ground.path("far")).unwrap()).unwrap();
    far.listen(0).unwrap();
    UnixListener::from(std::os::fd::OwnedFd::from(far))
}

/// The order in which a forwarding accepts is that in which its target does, however slow that is and
/// whatever the programs do at the same time.
#[test]
fn the_target_accepts_in_the_order_in_which_programs_connected() {
    const MANY: u32 = 100;
    let ground = Ground::new();
    let far = narrow(&ground);
    let (_bravo, _alpha) = (ground.bravo(TARGET), ground.alpha(FORWARD));
    let connected = std::sync::Mutex::new(0);
    std::thread::scope(|scope| {
        for _ in 0..10 {
            scope.spawn(|| {
                let mut near_ends = Vec::new();
                for _ in 0..MANY / 10 {
                    // A listener's queue is in the order of connect(2), which is known here.
                    let (mut near_end, n) = {
                        let mut connected = connected.lock().unwrap();
                        *connected += 1;
                        (connect(&ground.path("near")), *connected)
                    };
                    near_end.write_all(&u32::to_be_bytes(n)).unwrap();
                    near_ends.push(near_end);
                }
                // Until the target has all that it was sent.
                for mut near_end in near_ends {
                    near_end.read_exact(&mut [0]).unwrap();
                }
            });
        }
        for n in 1..=MANY {
            let mut number = [0; 4];
            let mut far_end = accept(&far);
            far_end.read_exact(&mut number).unwrap();
            assert_eq!(u32::from_be_bytes(number), n);
            far_end.write_all(&[0]).unwrap();
        }
    });
}

/// A target that takes nothing stalls its own forwarding and no other.
#[test]
fn a_target_that_is_slow_holds_up_nobody_else() {
    let ground = Ground::new();
    let [stuck, far] = ["stuck", "far"].map(|name| ground.listen(name));
    let targets = format!("{TARGET}[target.stuck]\nconnect = 'DIR/stuck'\nfrom = ['alpha']\n");
    let forwards = format!("{FORWARD}[forward.stuck]\nlisten = 'DIR/stuck-near'\nto = 'bravo'\n");
    let (_bravo, alpha) = (ground.bravo(&targets), ground.alpha(&forwards));
    let (mut stuck_near, _stuck_far) = (connect(&ground.path("stuck-near")), accept(&stuck));
    stuck_near.set_nonblocking(true).unwrap();
    let stalled = || {
        let all = alpha.api("/v1/forwards");
        let of_stuck =
            all["forwards"].as_array().unwrap().iter().find(|f| f["name"] == "stuck").unwrap().clone();
        of_stuck["stalls"].as_u64().unwrap() > 0
    };
    let chunk = pattern(9, 1 << 16);
    wait("a stall", || {
        while stuck_near.write(&chunk).is_ok() {}
        stalled().then_some(())
    });
    let (near_end, far_end) = (connect(&ground.path("near")), accept(&far));
    exchange(&near_end, &far_end, 3_000_000);
}

/// TCP on loopback, at both ends; what breaks on one side is broken on the other, and no end in order.
#[test]
fn tcp_is_carried_and_its_resets_with_it() {
    let ground = Ground::new();
    let far = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let near = own_address();
    let target = format!("[target.vnc]\nconnect = '{}'\nfrom = ['alpha']\n", far.local_addr().unwrap());
    let forward = format!("[forward.vnc]\nlisten = '{near}'\nto = 'bravo'\n");
    let (_bravo, alpha) = (ground.bravo(&target), ground.alpha(&forward));
    let both = || {
        let near_end = std::net::TcpStream::connect(near).unwrap();
        let (far_end, _) = far.accept().unwrap();
        for end in [&near_end, &far_end] {
            end.set_read_timeout(Some(PATIENCE)).unwrap();
        }
        (near_end, far_end)
    };
    let (mut near_end, mut far_end) = both();
    near_end.write_all(&pattern(1, 1_000_000)).unwrap();
    near_end.shutdown(Shutdown::Write).unwrap();
    let mut all = Vec::new();
    far_end.read_to_end(&mut all).unwrap();
    assert!(all == pattern(1, 1_000_000));
    far_end.write_all(b"answer").unwrap();
    drop(far_end);
    let mut answer = String::new();
    near_end.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
    for near_breaks in [true, false] {
        let (near_end, far_end) = both();
        let (breaks, mut other) = if near_breaks { (near_end, far_end) } else { (far_end, near_end) };
        socket2::SockRef::from(&breaks).set_linger(Some(std::time::Duration::ZERO)).unwrap();
        drop(breaks);
        let error = other.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "near breaks: {near_breaks}");
    }
    // An agent that dies in mid-stream is no end in order either.
    let (mut near_end, _far_end) = both();
    drop(alpha);
    let error = near_end.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

/// A limit holds what is sent, and the session says that it did.
#[test]
fn a_limit_is_kept() {
    let ground = Ground::new();
    let far = ground.listen("far");
    let (_bravo, alpha) = (ground.bravo(TARGET), ground.alpha(&format!("{FORWARD}limit = '512KiB/s'\n")));
    let (near_end, far_end) = (connect(&ground.path("near")), accept(&far));
    exchange(&near_end, &far_end, 1_000_000);
    let limited = "vmferry_session_limited_seconds_total{peer=\"bravo\"}";
    wait("the time that it was limited", || (alpha.figure(limited) > 0.5).then_some(()));
}

/// What comes to nothing is closed at once, said in the log of both sides, and counted by its reason.
#[test]
fn what_cannot_be_connected_is_closed_and_told_and_counted() {
    let ground = Ground::new();
    let targets = "[target.mine]\nconnect = 'DIR/far'\n\
                   [target.absent]\nconnect = 'DIR/absent'\nfrom = ['alpha']\n\
                   [target.deaf]\nconnect = 'DIR/deaf'\nfrom = ['alpha']\n\
                   [target.file]\nconnect = 'DIR/pki/ca-cert.pem'\nfrom = ['alpha']\n";
    let _far = ground.listen("far");
    drop(ground.listen("deaf"));
    let cases = [
        ("mine", "denied", "does not let this host use"),
        ("absent", "target_absent", "socket is not there"),
        ("deaf", "target_refused", "nobody listens"),
        ("file", "target_refused", "nobody listens"),
        ("unknown", "no_target", "no target of that name"),
    ];
    let forwards =
        cases.map(|(name, ..)| format!("[forward.{name}]\nlisten = 'DIR/{name}-near'\nto = 'bravo'\n"));
    // A session that is lost is not waited for.
    let soon = "[deadlines]\nresume_s = 1\n";
    let (bravo, alpha) = (ground.bravo(targets), ground.alpha(&(soon.to_owned() + &forwards.concat())));
    for (name, reason, words) in cases {
        let mut near_end = connect(&ground.path(&format!("{name}-near")));
        let mut all = Vec::new();
        assert!(matches!(near_end.read_to_end(&mut all), Ok(0) | Err(_)), "{name}: {all:?}");
        alpha.says(words);
        let failed =
            format!("vmferry_forward_failed_total{{name=\"{name}\",reason=\"{reason}\",side=\"forward\"}}");
        assert_eq!(alpha.metric(&failed), 1, "{name}");
        let whose = if ["mine", "unknown"].contains(&name) { "none" } else { name };
        let failed =
            format!("vmferry_forward_failed_total{{name=\"{whose}\",reason=\"{reason}\",side=\"target\"}}");
        assert_eq!(bravo.metric(&failed), 1, "{name}");
        bravo.says(reason);
    }
    // A peer that is not there.
    drop(bravo);
    alpha.says("session ends");
    let mut near_end = connect(&ground.path("mine-near"));
    assert!(matches!(near_end.read(&mut [0]), Ok(0) | Err(_)));
    let failed = "vmferry_forward_failed_total{name=\"mine\",reason=\"no_session\",side=\"forward\"}";
    assert_eq!(alpha.metric(failed), 1);
}

#[test]
fn forwardings_are_added_shown_and_ended() {
    let ground = Ground::new();
    let far = ground.listen("far");
    let (bravo, alpha) = (ground.bravo(TARGET), ground.alpha(""));
    let near = ground.path("near");
    let add = |socket: &Path, more: &[&str]| {
        let socket = socket.to_str().unwrap();
        alpha.run(&[&["forward", "add", socket, "--to", "bravo", "--target", "vnc"], more].concat())
    };
    let (is_added, id) = add(&near, &["--mode", "0640"]);
    assert!(is_added, "{id}");
    let id = id.trim();
    let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&near).unwrap());
    assert_eq!(mode & 0o7777, 0o640);
    let (mut near_end, far_end) = (connect(&near), accept(&far));
    exchange(&near_end, &far_end, 10_000);
    let (mut near_open, _far_open) = (connect(&near), accept(&far));
    let of = |agent: &agents::Agent, what: &str| agent.api("/v1/forwards")[what][0].clone();
    let forward = wait("one connection that is left", || {
        Some(of(&alpha, "forwards")).filter(|f| f["connections"] == 1 && f["opened"] == 2)
    });
    assert_eq!((&forward["opened"], &forward["intact"]), (&2.into(), &true.into()), "{forward}");
    assert_eq!((&forward["sent_bytes"], &forward["received_bytes"]), (&10_000.into(), &10_000.into()));
    let target = of(&bravo, "targets");
    assert_eq!((&target["name"], &target["opened"]), (&"vnc".into(), &2.into()), "{target}");
    let (_, shown) = alpha.run(&["forward", "list"]);
    assert!(shown.contains(id) && shown.contains("1 of 2 connections open"), "{shown}");
    // Not twice at the same place, and not in the place of a file or of another program.
    let (is_added, said) = add(&near, &[]);
    assert!(!is_added && said.contains("listens on"), "{said}");
    let (is_added, said) = add(&ground.path("far"), &[]);
    assert!(!is_added && said.contains("another program listens"), "{said}");
    let (is_added, said) = add(&ground.path("pki/ca-cert.pem"), &[]);
    assert!(!is_added && said.contains("is no socket"), "{said}");
    let (is_added, said) = add(&ground.path("other"), &["--owner", "nobody-of-that-name"]);
    assert!(!is_added && said.contains("there is no user"), "{said}");
    assert!(!ground.path("other").exists());
    // Somebody else's socket in its place is seen, and left alone at the end.
    std::fs::remove_file(&near).unwrap();
    let other = ground.listen("near");
    assert_eq!(of(&alpha, "forwards")["intact"], false);
    assert_eq!(alpha.metric("vmferry_forward_bypassed"), 1);
    let (is_ended, said) = alpha.run(&["forward", "end", &id[..8]]);
    assert!(is_ended && said.contains("has ended"), "{said}");
    assert!(matches!(near_open.read(&mut [0]), Ok(0) | Err(_)), "an open connection ends with it");
    assert!(matches!(near_end.read(&mut [0]), Ok(0) | Err(_)));
    let _its_own = connect(&near);
    assert!(other.accept().is_ok());
    assert_eq!(alpha.api("/v1/forwards")["forwards"], serde_json::json!([]));
}
