//! Forwarded connections when something happens to the road between the agents, or to an agent.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::ops::Range;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use super::agents::{Agent, Ground, wait};
use super::{FORWARD, TARGET, accept, connect, exchange};
use crate::rig::pattern;
use crate::rig::road::{Road, State};

/// Sends `len` bytes each way, some of them before and some after `meanwhile`.
fn exchange_around(near: &UnixStream, far: &UnixStream, len: usize, mut meanwhile: impl FnMut()) {
    std::thread::scope(|scope| {
        let mut readers = Vec::new();
        for (seed, from, to) in [(3, near, far), (4, far, near)] {
            let (go_on, wait_for_it) = std::sync::mpsc::channel::<()>();
            let all = pattern(seed, len);
            scope.spawn({
                let all = all.clone();
                let mut from = from;
                move || {
                    let (first, second) = all.split_at(len / 2);
                    from.write_all(first).unwrap();
                    wait_for_it.recv().unwrap();
                    from.write_all(second).unwrap();
                    from.shutdown(Shutdown::Write).unwrap();
                }
            });
            let mut to = to;
            let reader = scope.spawn(move || {
                let mut got = Vec::new();
                to.read_to_end(&mut got).unwrap();
                assert!(got == all, "seed {seed}: {} of {len} bytes", got.len());
            });
            readers.push((go_on, reader));
        }
        meanwhile();
        for (go_on, reader) in readers {
            go_on.send(()).unwrap();
            reader.join().unwrap();
        }
    });
}

fn closed(end: &mut UnixStream) -> bool {
    matches!(end.read(&mut [0]), Ok(0) | Err(_))
}

fn opened(agent: &Agent, what: &str) -> u64 {
    agent.api("/v1/forwards")[what][0]["opened"].as_u64().unwrap()
}

/// More is under way than sockets and queues hold, so each process leaves bytes in all of them.
#[test]
fn another_process_takes_connections_and_listeners_over_on_either_side() {
    let ground = Ground::new();
    let far = ground.listen("far");
    let (mut bravo, mut alpha) = (ground.bravo(TARGET), ground.alpha(FORWARD));
    let added = ground.path("added");
    let (is_added, id) =
        alpha.run(&["forward", "add", added.to_str().unwrap(), "--to", "bravo", "--target", "vnc"]);
    assert!(is_added, "{id}");
    let near = ground.path("near");
    let (near_end, far_end) = (connect(&near), accept(&far));
    exchange_around(&near_end, &far_end, 12_000_000, || {
        alpha.take_over();
        bravo.take_over();
        alpha.take_over();
    });
    // What is static and what was added listens still, and counts on.
    for socket in [&near, &added] {
        let (near_end, far_end) = (connect(socket), accept(&far));
        exchange(&near_end, &far_end, 10_000);
    }
    assert_eq!(opened(&alpha, "forwards"), 2);
    assert_eq!(opened(&bravo, "targets"), 3);
    let all = alpha.api("/v1/forwards");
    assert_eq!(all["forwards"][1]["id"], id.trim());
    assert_eq!(all["forwards"][0]["sent_bytes"], 12_010_000, "{all}");
    // Each byte is counted once, by whichever process; what is more is what agents say to each other.
    let sent = alpha.metric("vmferry_session_sent_bytes_total{peer=\"bravo\"}");
    assert!((12_020_000..13_000_000).contains(&sent), "{sent}");
    let forwarded = alpha.metric("vmferry_forward_sent_bytes_total{name=\"vnc\",side=\"forward\"}");
    assert_eq!(forwarded, 12_010_000);
    // A take-over does not end the sockets, the agent's end does.
    alpha.stop();
    assert!(!near.exists() && !added.exists());
}

/// Accepts connections that must come in this order.
fn come(far: &UnixListener, numbers: Range<u32>) {
    for n in numbers {
        let mut number = [0; 4];
        accept(far).read_exact(&mut number).unwrap();
        assert_eq!(u32::from_be_bytes(number), n);
    }
}

/// The same while something goes on, and only some of them: a target that accepts nothing for 10 s is given up.
/// Which of them are left.
fn come_during(far: &UnixListener, mut numbers: Range<u32>, work: impl FnOnce() + Send) -> Range<u32> {
    std::thread::scope(|scope| {
        let working = scope.spawn(work);
        let mut since = Instant::now();
        while !working.is_finished() {
            if since.elapsed() > Duration::from_secs(1) && !numbers.is_empty() {
                come(far, numbers.start..numbers.start + 1);
                (numbers.start, since) = (numbers.start + 1, Instant::now());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        working.join().unwrap();
    });
    numbers
}

/// Connections that wait: for a target whose queue is full, for the peer's answer, in the listener's queue.
#[test]
fn a_take_over_loses_no_connection_that_waits_and_keeps_their_order() {
    const MANY: u32 = 60;
    let ground = Ground::new();
    let far = super::narrow(&ground);
    let (mut bravo, mut alpha) = (ground.bravo(TARGET), ground.alpha(FORWARD));
    let mut near_ends = Vec::new();
    for n in 0..MANY {
        let mut near_end = connect(&ground.path("near"));
        near_end.write_all(&n.to_be_bytes()).unwrap();
        near_ends.push(near_end);
    }
    come(&far, 0..10);
    let left = come_during(&far, 10..MANY, || alpha.take_over());
    let some = left.start..MANY.min(left.start + 10);
    come(&far, some.clone());
    let left = come_during(&far, some.end..MANY, || bravo.take_over());
    come(&far, left);
}

/// An agent that was killed leaves its socket's file, and the next one takes its place.
#[test]
fn a_socket_that_a_killed_agent_has_left_is_replaced() {
    let ground = Ground::new();
    let far = ground.listen("far");
    let (_bravo, mut alpha) = (ground.bravo(TARGET), ground.alpha(FORWARD));
    alpha.kill();
    assert!(ground.path("near").exists());
    alpha.start();
    let (near_end, far_end) = (connect(&ground.path("near")), accept(&far));
    exchange(&near_end, &far_end, 10_000);
}

#[test]
fn what_cannot_listen_keeps_the_agent_from_starting_and_is_named() {
    let ground = Ground::new();
    let _other = ground.listen("near");
    let said = ground.alpha_fails(FORWARD);
    assert!(said.contains("cannot begin [forward.vnc]"), "{said}");
    assert!(said.contains("another program listens on"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn resets_of_the_connection_lose_and_double_no_byte() {
    let ground = Ground::new();
    let far = ground.listen("far");
    let road = Road::to(ground.bravo).await;
    let (_bravo, alpha) = (ground.bravo(TARGET), ground.alpha_by(road.address(), FORWARD));
    let (near_end, far_end) = (connect(&ground.path("near")), accept(&far));
    let cutting = tokio::spawn({
        let road = road.clone();
        async move {
            let mut bytes = 0;
            loop {
                // By bytes and not by time: every part of the transfer is hit, however fast it is.
                road.passed(bytes + 700_000).await;
                bytes = road.bytes();
                road.reset();
            }
        }
    });
    tokio::task::spawn_blocking(move || exchange(&near_end, &far_end, 8_000_000)).await.unwrap();
    cutting.abort();
    let reconnects = wait("the count of reconnections", || {
        Some(alpha.metric("vmferry_session_reconnects_total{peer=\"bravo\"}")).filter(|n| *n >= 5)
    });
    eprintln!("{reconnects} reconnections");
}

/// A tunnel that is dead must not keep its programs waiting, on neither host.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_is_given_up_closes_all_its_connections_on_both_hosts() {
    let ground = Ground::new();
    let far = ground.listen("far");
    let road = Road::to(ground.bravo).await;
    let deadlines = "[deadlines]\ndead_peer_s = 1\nresume_s = 10\n";
    let (_bravo, _alpha) = (
        ground.bravo(&format!("{deadlines}{TARGET}")),
        ground.alpha_by(road.address(), &format!("{deadlines}{FORWARD}")),
    );
    let mut ends = Vec::new();
    for _ in 0..5 {
        let mut near_end = connect(&ground.path("near"));
        near_end.write_all(b"x").unwrap();
        let mut far_end = accept(&far);
        far_end.read_exact(&mut [0]).unwrap();
        ends.extend([near_end, far_end]);
    }
    road.set(State::Hole);
    // One that came too late, too.
    tokio::time::sleep(Duration::from_millis(100)).await;
    ends.push(connect(&ground.path("near")));
    tokio::task::spawn_blocking(move || {
        for mut end in ends {
            assert!(closed(&mut end));
        }
    })
    .await
    .unwrap();
}
