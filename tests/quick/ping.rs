//! `vmferry ping`, to nobody and between two agents.

use serde_json::Value;

use crate::forward::agents::{Agent, Ground};

fn ping(agent: &Agent, words: &[&str]) -> (bool, Value) {
    let (is_well, said) = agent.run(&[&["ping", "bravo", "--json"], words].concat());
    let report = serde_json::from_str(&said).unwrap_or_else(|e| panic!("{e}: {said}"));
    (is_well, report)
}

/// The receiver's word counts, whatever the sender would like: an upper bound, which a busy machine only leaves the
/// further below.
#[test]
fn a_peer_sends_no_faster_than_it_may() {
    const MIB: u64 = 1 << 20;
    let ground = Ground::new();
    let bravo = ground.bravo("receive_rate = '4MiB/s'\n");
    let alpha = ground.alpha("");
    let (is_well, report) = ping(&alpha, &["--bytes", &(8 * MIB).to_string()]);
    assert!(is_well, "{report}");
    let rate = report["reached"]["probe"]["bytes_per_s"].as_u64().unwrap();
    // What a stream has from the beginning does not wait, and a timer that comes late may be made up for.
    assert!(rate <= 5 * MIB, "{rate} bytes a second");
    assert_eq!(bravo.metric("vmferry_session_receive_limit_bytes_per_second{peer=\"alpha\"}"), 4 * MIB);
    // The other direction has no limit, and neither has another session of the same peer one of its own.
    assert_eq!(alpha.metric("vmferry_session_receive_limit_bytes_per_second{peer=\"bravo\"}"), 0);
}

#[test]
fn who_is_reached_says_so_and_who_is_not_is_told_why() {
    let ground = Ground::new();
    // Nobody listens there.
    let alpha = ground.alpha("");
    let (is_well, nobody) = ping(&alpha, &[]);
    assert!(!is_well && nobody["reached"].is_null(), "{nobody}");
    assert!(nobody["cause"].as_str().unwrap().contains("cannot connect"), "{nobody}");
    assert_eq!(alpha.metric("vmferry_peer_reachable{peer=\"bravo\"}"), 0);

    let _bravo = ground.bravo("");
    let (is_well, first) = ping(&alpha, &[]);
    assert!(is_well, "{first}");
    let reached = &first["reached"];
    assert_eq!((first["identity"].as_str(), reached["dialed"].as_bool()), (Some("bravo"), Some(true)));
    assert!(reached["connected_in_ms"].as_f64().unwrap() > 0.0, "{first}");
    assert!(reached["cipher"].as_str().unwrap().contains("TLS13"), "{first}");
    assert!(reached["segment_bytes"].as_u64().unwrap() > 500, "{first}");
    let probe = &reached["probe"];
    assert_eq!(probe["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(probe["sent_bytes"], 8 * 1024 * 1024);
    assert!(probe["bytes_per_s"].as_u64().unwrap() > 0, "{first}");
    // The session is there by now, and nothing is sent that nobody wants.
    let (_, second) = ping(&alpha, &["--bytes", "0"]);
    assert!(second["reached"]["connected_in_ms"].is_null(), "{second}");
    assert_eq!(second["reached"]["probe"]["sent_bytes"], 0);
    assert_eq!(alpha.metric("vmferry_peer_reachable{peer=\"bravo\"}"), 1);
}
