//! Forwarded sockets between two agents that run as processes, with TLS on loopback.

mod agents;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use crate::rig::pattern;
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

/// The order in which a forwarding accepts is that in which its target does.
#[test]
fn the_target_accepts_in_the_order_in_which_programs_connected() {
    const MANY: u32 = 100;
    let ground = Ground::new();
    // Its queue holds one, so each further connect(2) waits until the target has accepted another.
    let far = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
    far.bind(&socket2::SockAddr::unix(ground.path("far")).unwrap()).unwrap();
    far.listen(0).unwrap();
    let far = UnixListener::from(std::os::fd::OwnedFd::from(far));
    let (_bravo, _alpha) = (ground.bravo(TARGET), ground.alpha(FORWARD));
    // A queue is in the order of connect(2): who is accepted n-th has connected n-th.
    let mut near_ends = Vec::new();
    for n in 0..MANY {
        let mut near_end = connect(&ground.path("near"));
        near_end.write_all(&n.to_be_bytes()).unwrap();
        near_ends.push(near_end);
    }
    for n in 0..MANY {
        let mut number = [0; 4];
        accept(&far).read_exact(&mut number).unwrap();
        assert_eq!(u32::from_be_bytes(number), n);
    }
}
