//! The listeners for local callers: nobody on the host takes the agent's descriptors, or keeps others from
//! their answers.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use super::victim::Victim;
use crate::rig::{PATIENCE, blocking};

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
    let now = victim.descriptors();
    assert!(now < before + DESCRIPTORS_MORE, "{now} descriptors, {before} before");
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
    let held: Vec<_> = (0..300).map(|_| UnixStream::connect(victim.socket()).unwrap()).collect();
    // Those beyond the number are closed at once; the kernel keeps the order.
    let mut last = held.last().unwrap();
    last.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(last.read(&mut [0]).unwrap_or(0), 0);
    // The first has not come to the end of its time meanwhile.
    held[0].set_nonblocking(true).unwrap();
    assert_eq!((&held[0]).read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
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
