//! What a known peer may have of this host: no stream without a grant, no more VMs and no larger ones than it may
//! send, no request that is not understood.

use std::os::unix::net::UnixListener;

use serde_json::{Value, json};
use uuid::Uuid;
use vmferry::migrate::message::{Offer, Reply, Request, Response};
use vmferry::migrate::problem::ProblemKind;
use vmferry::mux::{Code, Open, purpose};
use vmferry::net::message;
use vmferry::net::session::{OpenStreamError, Session};

use super::audit::events;
use super::victim::{Attacker, Victim, ask, control, offer, open_control};
use crate::api::drained::left_for_ever;
use crate::rig::{blocking, soon, until};

fn refusals(victim: &Victim, peer: &str, reason: &str) -> f64 {
    victim.metric(&format!("vmferry_peer_refusals_total{{peer=\"{peer}\",reason=\"{reason}\"}}"))
}

fn said(victim: &Victim, words: &str) -> usize {
    victim.log().iter().filter(|line| line.contains(words)).count()
}

/// Opens a data stream of some migration; with what it was refused.
async fn data(session: &Session, purpose: u16, migration: Uuid) -> Code {
    let open = Open { purpose, channel: 1, ..control(migration) };
    match soon("an answer to a stream", session.open(open)).await {
        Err(OpenStreamError::Refused { source, .. }) => source.0,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_without_a_grant_are_refused_counted_and_said_once() {
    let victim = Victim::start();
    let (bravo, charlie) = (Attacker::new(&victim, "bravo"), Attacker::new(&victim, "charlie"));
    let (of_bravo, of_charlie) = (bravo.session(&victim).await, charlie.session(&victim).await);
    for n in 0..100 {
        let purpose = [purpose::NBD, purpose::RAM][n % 2];
        assert_eq!(data(&of_bravo, purpose, Uuid::new_v4()).await, Code::Denied);
    }
    assert_eq!(data(&of_charlie, purpose::NBD, Uuid::new_v4()).await, Code::Denied);
    assert_eq!(refusals(&victim, "bravo", "no_grant"), 100.0);
    assert_eq!(refusals(&victim, "charlie", "no_grant"), 1.0);
    victim
        .logs(|line| line.contains("a stream without a grant was refused") && line.contains("charlie"))
        .await;
    assert_eq!(said(&victim, "a stream without a grant was refused"), 2, "one for each peer");
    assert!(of_bravo.is_live() && of_charlie.is_live());
}

/// Asks in JSON of the attacker's own making.
async fn ask_raw(session: &Session, json: Value) -> Response {
    let (mut sender, mut receiver) = message::split(open_control(session).await.unwrap(), session);
    sender.send(&json).await.unwrap();
    match soon("an answer", receiver.recv::<Reply>()).await.unwrap() {
        Some(Reply::Response { number, response }) => {
            assert_eq!(number, json["number"].as_u64().unwrap_or_default());
            response
        }
        other => panic!("no answer to {json}: {other:?}"),
    }
}

/// What this host's own operators may send where, whatever the other side would take.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_goes_only_where_the_configuration_lets_it() {
    let victim = Victim::start_with(|text| {
        text.replace("identity = 'charlie'\n", "identity = 'charlie'\nsend = ['web*']\n")
    });
    let kinds = |vm: &str, peer: &str| {
        let (said, _) = victim.vmferry(&["check", vm, "--to", peer, "--json"]);
        let report: Value = serde_json::from_str(&said).unwrap_or_else(|e| panic!("{e}: {said}"));
        let problems = report["problems"].as_array().unwrap().clone();
        problems.iter().map(|p| p["kind"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(kinds("db1", "charlie"), ["not-sent"]);
    // No QEMU is there, and neither peer can be dialed: looked at it is.
    for (vm, peer) in [("web1", "charlie"), ("db1", "bravo"), ("web1", "bravo")] {
        assert_eq!(kinds(vm, peer), ["qemu-unreachable", "peer-unreachable"], "{vm} to {peer}");
    }
    let (said, is_well) = victim.vmferry(&["migrate", "db1", "--to", "charlie"]);
    assert!(!is_well && said.contains("alpha does not send VM db1 to charlie"), "{said}");
    assert!(said.contains("add it to `send` of [peer.charlie] in the configuration of alpha"), "{said}");
    let (said, is_well) = victim.vmferry(&["drain", "--to", "charlie", "--dry-run"]);
    assert!(!is_well || !said.contains("db1 →"), "{said}");
    let journals = std::fs::read_dir(victim.folder.path().join("state/migrations")).unwrap();
    assert_eq!(journals.count(), 0, "nothing was begun");
}

/// Neither looked at nor prepared, from the agent's start on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_is_emptied_takes_no_vm() {
    let folder = tempfile::tempdir().unwrap();
    let deadlines = left_for_ever(folder.path());
    let victim = Victim::start_in(folder, |text| text + deadlines);
    let session = Attacker::new(&victim, "bravo").session(&victim).await;
    for request in [Request::Check(offer("web1")), Request::Prepare(offer("web1"))] {
        let problems = match ask(&session, request).await {
            Response::Checked(problems) => problems,
            Response::Refused(refusal) => refusal.problems,
            other => panic!("{other:?}"),
        };
        assert_eq!(
            problems.iter().map(|p| p.kind).collect::<Vec<_>>(),
            [ProblemKind::Draining],
            "{problems:?}"
        );
    }
    assert_eq!(refusals(&victim, "bravo", "draining"), 2.0);
    assert_eq!(victim.metric("vmferry_draining"), 1.0);
    // What it may not send is told nothing of it.
    match ask(&session, Request::Check(offer("db1"))).await {
        Response::Checked(problems) => assert_eq!(problems[0].kind, ProblemKind::NotPermitted),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_to_be_done_is_understood_whole_or_refused_by_name() {
    let victim = Victim::start();
    let session = Attacker::new(&victim, "bravo").session(&victim).await;
    let good = serde_json::to_value(offer("web1")).unwrap();
    let with = |path: &str, name: &str, value: Value| {
        let mut offer = good.clone();
        let place = if path.is_empty() { &mut offer } else { &mut offer[path] };
        place.as_object_mut().unwrap().insert(name.into(), value);
        offer
    };
    let bad = [
        (json!({"number": 7, "request": "tell", "sudo": true}), "sudo"),
        (json!({"number": 7, "request": {"abort": {"reason": "x", "path": "/etc/shadow"}}}), "path"),
        (json!({"number": 7, "request": {"to-run": {"running": true, "exec": "sh"}}}), "exec"),
        (json!({"number": 7, "request": {"shell": {"command": "sh"}}}), "shell"),
        (json!({"number": 7, "request": {"check": with("policy", "trust_me", json!(true))}}), "trust_me"),
        (json!({"number": 7, "request": {"check": with("policy", "accept", json!(["everything"]))}}), "kind"),
        (json!({"number": 7, "request": {"check": with("", "needs", json!(["teleport"]))}}), "teleport"),
        (json!({"number": 7, "request": {"prepare": with("", "needs", json!(["teleport"]))}}), "teleport"),
        (json!({"number": 7, "request": {"check": with("", "disks", json!({}))}}), "expected a sequence"),
        (json!({"number": 7, "request": {"check": with("", "vm", json!(["web1"]))}}), "expected a string"),
        (json!({"number": 7, "request": []}), "expected"),
        (json!({"number": "7", "request": "tell"}), "expected u64"),
        (json!({"request": "tell"}), "number"),
        (json!({"number": 7}), "request"),
        (json!([]), "expected"),
        (json!(null), "expected"),
    ];
    for (n, (json, named)) in bad.iter().enumerate() {
        let answer = format!("{:?}", ask_raw(&session, json.clone()).await);
        let refused =
            answer.contains("Refused") || answer.contains("NotPermitted") || answer.contains("Other");
        assert!(refused && answer.contains(named), "{json}: {answer}");
        assert_eq!(refusals(&victim, "bravo", "not_understood"), (n + 1) as f64, "{json}");
    }
    assert_eq!(said(&victim, "cannot be understood"), 1);
    // What is only told may be more than is known.
    let told = json!({"number": 7, "request": {"check": with("", "colour", json!("green"))}});
    let answer = ask_raw(&session, told).await;
    assert!(
        matches!(&answer, Response::Checked(found) if !format!("{found:?}").contains("green")),
        "{answer:?}"
    );
    assert_eq!(refusals(&victim, "bravo", "not_understood"), bad.len() as f64);
    assert!(session.is_live());
}

fn of_size(vm: &str, bytes: u64) -> Offer {
    let disk = |name: &str| {
        let told = json!({"name": name, "virtual_size": bytes / 2, "format": "raw", "read_only": false});
        serde_json::from_value(told).unwrap()
    };
    Offer { disks: vec![disk("a"), disk("b")], ..offer(vm) }
}

fn permits(more: &'static str) -> Victim {
    let change =
        move |text: String| text.replacen("receive = ['web*']", &format!("receive = ['web*']\n{more}"), 1);
    Victim::start_with(change)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_virtual_machine_beyond_what_the_peer_may_send_is_refused() {
    let victim = permits("receive_size = '1GiB'");
    let session = Attacker::new(&victim, "bravo").session(&victim).await;
    for bytes in [(1 << 30) + 2, u64::MAX] {
        for request in [Request::Check(of_size("web1", bytes)), Request::Prepare(of_size("web1", bytes))] {
            let answer = format!("{:?}", ask(&session, request).await);
            assert!(answer.contains("NotPermitted") && answer.contains("receive_size"), "{answer}");
        }
    }
    assert_eq!(refusals(&victim, "bravo", "quota"), 4.0);
    let answer = format!("{:?}", ask(&session, Request::Check(of_size("web1", 1 << 30))).await);
    assert!(!answer.contains("receive_size"), "{answer}");
    // Recorded as what it is: the first, and no more.
    let of_bravo = |line: &Value| line["reason"] == "quota" && line["source"] == "bravo";
    until("the record of it", || events(&victim, "refused").iter().any(of_bravo)).await;
    // What it may not send at all is another reason.
    let answer = format!("{:?}", ask(&session, Request::Prepare(offer("db1"))).await);
    assert!(answer.contains("NotPermitted"), "{answer}");
    assert_eq!(
        (refusals(&victim, "bravo", "quota"), refusals(&victim, "bravo", "not_permitted")),
        (4.0, 1.0)
    );
    let of = |reason| move |line: &Value| line["reason"] == reason && line["source"] == "bravo";
    until("the record of that", || events(&victim, "refused").iter().any(of("not-permitted"))).await;
    let recorded = events(&victim, "refused");
    let count = |reason| recorded.iter().filter(|line| of(reason)(line)).count();
    assert_eq!((count("quota"), count("not-permitted"), recorded.len()), (1, 1, 2), "{recorded:?}");
    assert_eq!(said(&victim, "a request beyond what the peer may do was refused"), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_virtual_machines_at_once_than_the_peer_may_send() {
    let victim = permits("receive_at_once = 1");
    // One that is found, and says nothing for now.
    let monitor = UnixListener::bind(victim.folder.path().join("web1.qmp")).unwrap();
    let session = Attacker::new(&victim, "bravo").session(&victim).await;
    let first = tokio::spawn({
        let session = session.clone();
        async move { ask(&session, Request::Prepare(offer("web1"))).await }
    });
    let (silent, _) = blocking(move || monitor.accept().unwrap()).await;
    let answer = format!("{:?}", ask(&session, Request::Prepare(offer("web2"))).await);
    assert!(answer.contains("Busy") && answer.contains("receive_at_once"), "{answer}");
    assert_eq!(refusals(&victim, "bravo", "quota"), 1.0);
    // The place is free again when that one has come to nothing.
    drop(silent);
    let answer = soon("the end of the first", first).await.unwrap();
    assert!(matches!(answer, Response::Refused(_)), "{answer:?}");
    let answer = format!("{:?}", ask(&session, Request::Prepare(offer("web2"))).await);
    assert!(!answer.contains("receive_at_once"), "{answer}");
    until("nothing to be left", || refusals(&victim, "bravo", "quota") == 1.0).await;
}
