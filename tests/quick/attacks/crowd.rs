//! Ten thousand connections that are begun and not gone on with, all held at once.

use std::io::Write;
use std::net::TcpStream;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use vmferry::mux::Code;

use super::victim::{Attacker, Victim};
use crate::rig::{blocking, soon, until};

const CROWD: usize = 10_000;
/// The agent's places for those who have proved nothing, and a few for what else goes on.
const DESCRIPTORS_MORE: usize = 512 + 256 + 100;
const MIB: u64 = 1 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_half_open_connections_keep_nobody_out_and_hold_little() {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard.max(soft), hard).unwrap();
    assert!(hard as usize > CROWD + 2000, "this test needs {CROWD} descriptors, {hard} are allowed");
    let victim = Victim::start();
    let honest = Attacker::new(&victim, "bravo");
    let (memory, descriptors) = (victim.resident_bytes(), victim.descriptors());
    let to = victim.address;
    let crowd = blocking(move || {
        let begin = |n: usize| {
            let mut stream = TcpStream::connect(to).unwrap();
            // Half of a record's head, or nothing.
            let _ = stream.write_all(if n.is_multiple_of(2) { b"\x16\x03\x01" } else { b"" });
            stream
        };
        (0..CROWD).map(begin).collect::<Vec<_>>()
    })
    .await;
    let held = victim.descriptors();
    assert!(held < descriptors + DESCRIPTORS_MORE, "{held} descriptors, {descriptors} before");
    let more = victim.resident_bytes().saturating_sub(memory) / MIB;
    assert!(more < 48, "{more} MiB more");
    let session = honest.session(&victim).await;
    session.close(Code::Shutdown, "it came about");
    let reason = |reason| {
        victim.metric(&format!("vmferry_connect_failures_total{{direction=\"in\",reason=\"{reason}\"}}"))
    };
    // Those who made room, and those whose time was over.
    until("all of them to be counted", || {
        reason("too_many") + reason("timeout") >= (CROWD - DESCRIPTORS_MORE) as f64
    })
    .await;
    println!("{} made room, {held} descriptors, {more} MiB more", reason("too_many"));
    drop(crowd);
    let told = victim.log().iter().filter(|line| line.contains("was refused")).count();
    assert!(told <= 4, "{told} refusals told");
    let _ = soon("the next session", honest.dial(&victim)).await.unwrap();
}
