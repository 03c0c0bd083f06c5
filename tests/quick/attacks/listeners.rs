//! The listeners for local callers: nobody on the host takes the agent's descriptors, or keeps others from
//! their answers.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::roles::{VIEWERS, ask, open_to_all};
use super::victim::Victim;
use crate::rig::{PATIENCE, blocking, until};

/// What the metrics listener may hold, and a few for what else goes on.
const DESCRIPTORS_MORE: usize = 32 + 40;

/// Hundreds of connections that say nothing, half a request, or ask and do not read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_takes_the_agents_descriptors_through_the_metrics_listener() {
    let victim = Victim::start();
    let _ = victim.metric("vmferry_build_info");
    let before = victim.descriptors();
    let mut held = Vec::new();
    for n in 0..800 {
        let mut stream = TcpStream::connect(victim.metrics).unwrap();
        let said: &[u8] = match n % 3 {
            0 => b"",
            1 => b"GET /metrics HTTP/1.1\r\nhost: a\r\n",
            _ => b"GET /metrics HTTP/1.1\r\nhost: a\r\n\r\n",
        };
        let _ = stream.write_all(said);
        held.push(stream);
        if n % 100 == 0 {
            assert!(victim.metric("vmferry_certificate_expiry_timestamp_seconds") > 0.0, "after {n}");
        }
    }
    assert!(victim.metric("vmferry_certificate_expiry_timestamp_seconds") > 0.0);
    // Those that made room are closed by the threads that served them, when these have a processor.
    let few = || victim.descriptors() < before + DESCRIPTORS_MORE;
    until("the agent to have few descriptors, with all connections held", few).await;
    drop(held);
}

/// What a request with so long a head is answered, if the agent hears it to its end.
fn asked_with(victim: &Victim, head_bytes: usize) -> String {
    let mut stream = TcpStream::connect(victim.metrics).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let head = format!("GET /metrics HTTP/1.0\r\nx: {}\r\n\r\n", "a".repeat(head_bytes));
    let _ = stream.write_all(head.as_bytes());
    let mut answer = Vec::new();
    // What is not heard to its end is answered, or cut off before the answer is here.
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).lines().next().unwrap_or_default().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_has_a_size() {
    let victim = Victim::start();
    let (short, long) =
        blocking(move || (asked_with(&victim, 8 * 1024), asked_with(&victim, 64 * 1024))).await;
    assert!(short.starts_with("HTTP/1.0 200"), "{short}");
    assert!(long.is_empty() || long.contains(" 431 "), "{long}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_of_the_local_api_has_its_number_of_connections_and_requests_have_a_size() {
    let victim = Victim::start();
    let before = victim.descriptors();
    let held = loop {
        let begun = Instant::now();
        let held: Vec<_> = (0..300).map(|_| UnixStream::connect(victim.socket()).unwrap()).collect();
        // Those beyond the number are closed at once; the kernel keeps the order.
        let mut last = held.last().unwrap();
        last.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(last.read(&mut [0]).unwrap_or(0), 0);
        held[0].set_nonblocking(true).unwrap();
        let first = (&held[0]).read(&mut [0]);
        // On a slow machine the first has come to the end of its time meanwhile, which is 10 s: then all is begun again.
        if first.is_ok() && begun.elapsed() > Duration::from_secs(9) {
            drop(held);
            until("all to be gone", || victim.descriptors() <= before + 4).await;
            continue;
        }
        assert_eq!(first.unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        break held;
    };
    assert!(victim.descriptors() < before + 64 + 40, "{} descriptors, {before} before", victim.descriptors());
    drop(held);
    let body = format!("{{\"vm\": \"{}\"}}", "x".repeat(100_000));
    let answer = crate::rig::soon("an answer", async {
        loop {
            // Until the agent has seen that the others are gone.
            let mut stream = UnixStream::connect(victim.socket()).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let head = "POST /v1/check HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n";
            let _ = write!(stream, "{head}content-length: {}\r\n\r\n{body}", body.len());
            let mut answer = String::new();
            if stream.read_to_string(&mut answer).is_ok() && !answer.is_empty() {
                return answer;
            }
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(answer.starts_with("HTTP/1.1 413") && answer.contains("at most 65536 bytes"), "{answer}");
}

/// Connects as often as it is told, says when all are held, and ends when nobody listens any more.
const HOLD: &str = "use IO::Socket::UNIX; $| = 1; \
                    my @held = map { IO::Socket::UNIX->new(Peer => $ARGV[0]) // () } 1 .. $ARGV[1]; \
                    print scalar(@held), \"\\n\"; <STDIN>;";

/// A user of this host has thousands of numbers in a namespace (subuid(5)), each with as many connections as a user may
/// have. Where groups have roles everybody gets as far as the socket.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_of_many_numbers_take_neither_the_agents_descriptors_nor_others_answers() {
    assert!(nix::unistd::geteuid().is_root(), "this test takes the part of other users: run it as root");
    const USERS: u32 = 20;
    /// 512 connections, and those that are about to be closed.
    const IN_ALL: usize = 512 + 256;
    let victim = Victim::start_with(|text| format!("{text}\n[api]\nview = ['{VIEWERS}']\n"));
    open_to_all(&victim);
    let before = victim.descriptors();
    blocking(move || {
        let mut held = Vec::new();
        for user in 0..USERS {
            let mut holding = Command::new("perl");
            holding
                .arg("-e")
                .arg(HOLD)
                .arg(victim.socket())
                .arg("64")
                .uid(100_000 + user)
                .gid(100_000 + user);
            let mut holding = holding.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
            let mut said = String::new();
            BufReader::new(holding.stdout.take().unwrap()).read_line(&mut said).unwrap();
            assert_eq!(said, "64\n");
            held.push(holding);
            // Who may look is answered, and so is root.
            let answer = ask(&victim, VIEWERS, "get", "/v1/status");
            assert!(answer.starts_with("HTTP/1.0 200"), "beside {user}: {answer}");
            assert!(victim.get("/v1/status")["version"].is_string());
            let now = victim.descriptors();
            assert!(now < before + IN_ALL, "{now} descriptors, {before} before");
        }
        for mut one in held {
            drop(one.stdin.take());
            one.wait().unwrap();
        }
    })
    .await;
}
