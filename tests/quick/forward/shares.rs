//! What is changed of a forwarding while it runs, what is shown of it, and whose its socket is.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::process::Stdio;

use serde_json::{Value, json};

use super::agents::{Agent, Ground, wait};
use super::{FORWARD, TARGET, accept, connect, exchange};
use crate::rig::pattern;

fn forward(agent: &Agent) -> Value {
    agent.api("/v1/forwards")["forwards"][0].clone()
}

/// For how long its session has kept back what was to be sent.
fn limited(agent: &Agent) -> f64 {
    agent.figure("vmferry_session_limited_seconds_total{peer=\"bravo\"}")
}

#[test]
fn limit_and_weight_are_changed_while_it_runs_and_outlive_the_process() {
    let ground = Ground::new();
    let far = ground.listen("far");
    let (_bravo, mut alpha) = (ground.bravo(TARGET), ground.alpha(FORWARD));
    let near = ground.path("near");
    let (mut near_end, far_end) = (connect(&near), accept(&far));
    near_end.write_all(&pattern(1, 1000)).unwrap();
    let (is_done, said) = alpha.run(&["forward", "limit", "vnc", "--rate", "512KiB/s", "--weight", "7"]);
    assert!(is_done && said.contains("512") && said.contains("weight 7"), "{said}");
    let is_slow = |agent: &Agent| {
        let shown = forward(agent);
        assert_eq!((&shown["limit_bytes_per_s"], &shown["weight"]), (&524_288.into(), &7.into()), "{shown}");
    };
    is_slow(&alpha);
    // A connection that was there before the change.
    assert_eq!(limited(&alpha), 0.0);
    near_end.write_all(&pattern(1, 900_000)).unwrap();
    wait("the time that it was limited", || (limited(&alpha) > 0.5).then_some(()));
    drop((near_end, far_end));
    alpha.take_over();
    is_slow(&alpha);
    let before = limited(&alpha);
    let (near_end, far_end) = (connect(&near), accept(&far));
    exchange(&near_end, &far_end, 900_000);
    wait("the time that it was limited", || (limited(&alpha) > before + 0.5).then_some(()));
    // One is changed, the other stays; none is no limit.
    let (is_done, said) = alpha.run(&["forward", "limit", "vnc", "--rate", "none"]);
    assert!(is_done && said.contains("no limit, weight 7"), "{said}");
    assert_eq!(
        (&forward(&alpha)["limit_bytes_per_s"], &forward(&alpha)["weight"]),
        (&Value::Null, &7.into())
    );
    let (_, shown) = alpha.run(&["forward", "list"]);
    assert!(shown.contains("no limit, weight 7"), "{shown}");
    let (_, shown) = alpha.run(&["forward", "list", "--json"]);
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert!(shown["schema"] == 1 && shown["forwards"][0]["weight"] == 7, "{shown}");
    for (words, complaint) in [
        (&["forward", "limit", "vnc"][..], "--rate"),
        (&["forward", "limit", "other", "--rate", "1G"], "no forwarding other"),
        (&["forward", "limit", "vnc", "--rate", "1K"], "64KiB/s"),
    ] {
        let (is_done, said) = alpha.run(words);
        assert!(!is_done && said.contains(complaint), "{said}");
    }
}

/// `watch` follows a forwarding, by its name as by its id, until it ends.
#[test]
fn watch_shows_what_a_forwarding_carries() {
    let ground = Ground::new();
    let far = ground.listen("far");
    let (_bravo, alpha) = (ground.bravo(TARGET), ground.alpha(FORWARD));
    let id = forward(&alpha)["id"].as_str().unwrap().to_owned();
    let (near_end, far_end) = (connect(&ground.path("near")), accept(&far));
    exchange(&near_end, &far_end, 10_000);
    let follow = |words: &[&str]| {
        let mut child = alpha.command(words).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        (child, lines)
    };
    let (mut by_name, mut lines) = follow(&["watch", "vnc", "--json"]);
    let (mut by_id, mut words) = follow(&["watch", &id]);
    let shown = |line: &String| serde_json::from_str::<Value>(line).unwrap();
    let last = lines.find(|line| shown(line)["sent_bytes"] == 10_000 && shown(line)["connections"] == 0);
    assert_eq!(last.map(|line| shown(&line)["id"].clone()), Some(json!(id)));
    let line = words.find(|line| line.contains("0 of 1 connections open")).unwrap();
    assert!(line.starts_with("vnc: sends "), "{line}");
    let (is_ended, said) = alpha.run(&["forward", "end", "vnc"]);
    assert!(is_ended, "{said}");
    // Both come to their end by themselves.
    assert_eq!((lines.last().is_some(), words.last().as_deref()), (false, Some("it has ended")));
    for child in [&mut by_name, &mut by_id] {
        assert!(child.wait().unwrap().success());
    }
    let (is_done, said) = alpha.run(&["watch", "vnc"]);
    assert!(!is_done && said.contains("neither a migration nor a VM"), "{said}");
}

/// By name and by number. Only root, or who may chown, can give a socket to another user.
#[test]
fn a_socket_is_given_to_its_owner_and_group_with_its_mode() {
    let ground = Ground::new();
    let (_bravo, alpha) = (ground.bravo(TARGET), ground.alpha(""));
    let is_root = nix::unistd::geteuid().is_root();
    for (name, owner, group, mode) in
        [("by-name", "nobody", "nogroup", "0660"), ("by-number", "65533", "65532", "0606")]
    {
        let path = ground.path(name);
        let socket = path.to_str().unwrap();
        let words = ["forward", "add", socket, "--to", "bravo", "--target", "vnc"];
        let whose = ["--owner", owner, "--group", group, "--mode", mode];
        let (is_added, said) = alpha.run(&[&words[..], &whose].concat());
        assert_eq!(is_added, is_root, "{said}");
        if !is_root {
            assert!(said.contains("not permitted") && !path.exists(), "{said}");
            continue;
        }
        let file = std::fs::metadata(&path).unwrap();
        let expected = if name == "by-name" { (65534, 65534, 0o660) } else { (65533, 65532, 0o606) };
        assert_eq!((file.uid(), file.gid(), file.mode() & 0o7777), expected);
        let (is_ended, said) = alpha.run(&["forward", "end", said.trim()]);
        assert!(is_ended && !path.exists(), "the agent takes away what it has given: {said}");
    }
}
