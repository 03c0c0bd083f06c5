//! The QMP client against a server that misbehaves on demand.

mod fake;

use fake::{PATIENCE, Served, serve};
use serde::Serialize;
use serde_json::{Value, json};
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::time::Duration;
use tokio::task::JoinSet;
use vmferry::qemu::{
    BlockJobCancel, CleanupReport, Command, EVENT_QUEUE_MAX, Empty, EventKind, Events, LINE_MAX_BYTES,
    NbdServerStop, Qmp, QmpError, QueryStatus, Remainder, RunState, SourceLeftovers, Stop, source_cleanup,
};

/// A deadline that is meant to pass.
const SOON: Duration = Duration::from_millis(30);
/// The same for a command that is surely sent before.
const SENT_BY_THEN: Duration = Duration::from_millis(300);

async fn connect<T>(server: &Served<T>) -> (Qmp, Events) {
    Qmp::connect(&server.path(), PATIENCE).await.unwrap()
}

fn running() -> Value {
    json!({"status": "running", "running": true, "singlestep": false})
}

/// A command whose size the test chooses.
#[derive(Serialize)]
struct Long {
    text: String,
}

impl Command for Long {
    const NAME: &'static str = "long";
    type Return = Empty;
}

#[tokio::test]
async fn a_reply_is_found_among_events_and_strangers() {
    let server = serve(|fake| {
        let mut fake = fake.greet();
        let command = fake.command().unwrap();
        assert_eq!(command["execute"], "query-status");
        assert_eq!(command.get("arguments"), None);
        fake.event("STOP", json!({}));
        fake.send(json!({"return": {"name": "of nobody"}, "id": 987_654}));
        fake.send(json!({"return": {}, "id": "text"}));
        fake.send(json!({"return": {}}));
        fake.send(json!({"of": "tomorrow"}));
        fake.event("TOMORROW", json!({"x": [1]}));
        fake.answer(&command, running());
        fake.event("BLOCK_JOB_READY", json!({"device": "j", "len": 1, "offset": 1, "new": 0}));
    });
    let (qmp, mut events) = connect(&server).await;
    let status = qmp.execute(QueryStatus).await.unwrap();
    assert_eq!((status.running, status.status), (true, RunState::Running));
    server.finish().await;
    assert_eq!(events.recv().await.unwrap().kind, EventKind::Stop);
    // Nobody could act on the one of tomorrow.
    let ready = events.recv().await.unwrap();
    assert_eq!(ready.kind, EventKind::BlockJobReady { device: "j".into() });
    assert_eq!((ready.data["len"].clone(), ready.timestamp.seconds), (json!(1), 5));
}

#[tokio::test]
async fn an_error_keeps_its_class_and_one_without_id_answers_the_command_under_way() {
    let server = serve(|fake| {
        let mut fake = fake.greet();
        let command = fake.command().unwrap();
        fake.refuse(&command, "DeviceNotActive", "Block job 'j' not found");
        let command = fake.command().unwrap();
        assert_eq!(command["arguments"], json!({"device": "k", "force": true}));
        let error = json!({"class": "GenericError", "desc": "JSON parse error"});
        fake.send(json!({"error": error}));
    });
    let (qmp, _events) = connect(&server).await;
    let cancel = |device: &str| BlockJobCancel { device: device.into(), force: true };
    let error = qmp.execute(cancel("j")).await.unwrap_err();
    assert!(error.is_class("DeviceNotActive") && error.is_not_found_job(), "{error}");
    let error = qmp.execute(cancel("k")).await.unwrap_err();
    assert_eq!(error.desc(), Some("JSON parse error"));
    server.finish().await;
}

/// QEMU may have executed it or not when its answer is lost; a second time it says that there is nothing to do.
#[tokio::test]
async fn a_command_that_may_be_repeated_is_given_again_until_it_is_answered() {
    let server = serve(|fake| {
        let mut fake = fake.greet();
        for _ in 0..2 {
            assert_eq!(fake.command().unwrap()["execute"], "nbd-server-stop");
            fake = fake.cut().greet();
        }
        let command = fake.command().unwrap();
        fake.refuse(&command, "GenericError", "NBD server not running");
        command
    });
    let (qmp, _events) = connect(&server).await;
    let refused = qmp.execute_until_answered_within(NbdServerStop, PATIENCE).await.unwrap_err();
    assert!(refused.is_nbd_server_not_running(), "{refused:?}");
    assert_eq!(server.finish().await["execute"], "nbd-server-stop");

    let server = serve(|fake| {
        let mut fake = fake.greet();
        assert_eq!(fake.command().unwrap()["execute"], "stop");
    });
    let (qmp, _events) = connect(&server).await;
    let late = qmp.execute_until_answered_within(Stop, SENT_BY_THEN).await.unwrap_err();
    assert!(late.is_deadline() && !late.is_not_executed(), "it may have been executed: {late:?}");
    drop(qmp);
    server.finish().await;
}

/// What comes before the next word that events are missing.
async fn missed(events: &mut Events) -> Vec<EventKind> {
    let mut before = Vec::new();
    loop {
        match tokio::time::timeout(PATIENCE, events.recv()).await.unwrap().unwrap().kind {
            EventKind::Missed => return before,
            kind => before.push(kind),
        }
    }
}

#[tokio::test]
async fn a_lost_monitor_is_reached_again_and_questions_are_repeated() {
    let server = serve(|fake| {
        let mut fake = fake.greet();
        assert_eq!(fake.command().unwrap()["execute"], "query-status");
        fake.event("STOP", json!({}));
        fake.send_text("{\"return\":");
        let mut fake = fake.cut().greet();
        assert_eq!(fake.command().unwrap()["execute"], "query-status");
        fake.send_text("} not QMP {\n");
        assert_eq!(fake.command(), None, "a monitor serves one client at a time");
        let mut fake = fake.cut().greet();
        assert_eq!(fake.command().unwrap()["execute"], "query-status");
        fake.send_text(&"[".repeat(LINE_MAX_BYTES + 1));
        assert_eq!(fake.command(), None, "a monitor serves one client at a time");
        let mut fake = fake.cut().greet();
        let command = fake.command().unwrap();
        fake.event("RESUME", json!({}));
        fake.answer(&command, running());
    });
    let (qmp, mut events) = connect(&server).await;
    assert!(qmp.execute_within(QueryStatus, PATIENCE).await.unwrap().running);
    server.finish().await;
    assert_eq!(missed(&mut events).await, [EventKind::Stop]);
    let resumed = tokio::time::timeout(PATIENCE, async {
        while events.recv().await.unwrap().kind != EventKind::Resume {}
    });
    resumed.await.unwrap();
}

#[tokio::test]
async fn a_command_that_was_under_way_fails_and_the_next_one_waits_for_the_monitor() {
    for garbage in ["", "} not QMP {\n"] {
        let server = serve(move |fake| {
            let mut fake = fake.greet();
            assert_eq!(fake.command().unwrap()["execute"], "stop");
            fake.send_text(garbage);
            let mut fake = fake.cut().greet();
            let command = fake.command().unwrap();
            fake.answer(&command, json!({}));
            command
        });
        let (qmp, _events) = connect(&server).await;
        let error = qmp.execute_within(Stop, PATIENCE).await.unwrap_err();
        assert!(error.is_interrupted() && !error.is_over() && !error.is_not_executed(), "{error:?}");
        assert_eq!(matches!(error, QmpError::Malformed { name: "stop", .. }), !garbage.is_empty());
        let cancel = BlockJobCancel { device: "j".into(), force: true };
        qmp.execute_within(cancel, PATIENCE).await.unwrap();
        assert!(!qmp.is_closed());
        assert_eq!(server.finish().await["execute"], "block-job-cancel");
    }
}

#[tokio::test]
async fn a_monitor_that_is_away_or_silent_is_seen_to_be() {
    let (go_on, wait) = mpsc::channel();
    let server = serve(move |fake| {
        let mut fake = fake.greet();
        let asked = fake.command().unwrap();
        wait.recv().unwrap();
        fake.answer(&asked, running());
        wait.recv().unwrap();
        let fake = fake.cut();
        wait.recv().unwrap();
        let mut fake = fake.greet();
        let asked = fake.command().unwrap();
        fake.answer(&asked, running());
        assert_eq!(fake.command(), None);
    });
    let (qmp, _events) = connect(&server).await;
    assert!(qmp.silence().is_none());
    let asking = qmp.clone();
    let asked = tokio::spawn(async move { asking.execute_within(QueryStatus, PATIENCE).await });
    until(|| qmp.silence().is_some_and(|s| s.lost.is_none())).await;
    go_on.send(()).unwrap();
    asked.await.unwrap().unwrap();
    assert!(qmp.silence().is_none());
    go_on.send(()).unwrap();
    until(|| qmp.silence().is_some_and(|s| s.lost.is_some())).await;
    go_on.send(()).unwrap();
    assert!(qmp.execute_within(QueryStatus, PATIENCE).await.unwrap().running);
    assert!(qmp.silence().is_none());
    drop(qmp);
    server.finish().await;
}

async fn until(is_so: impl Fn() -> bool) {
    let waited = tokio::time::timeout(PATIENCE, async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    waited.await.unwrap();
}

#[tokio::test]
async fn a_reply_of_the_wrong_shape_harms_only_its_command() {
    let server = serve(|fake| {
        let mut fake = fake.greet();
        let command = fake.command().unwrap();
        fake.answer(&command, json!({"running": "yes"}));
        let command = fake.command().unwrap();
        fake.answer(&command, running());
    });
    let (qmp, _events) = connect(&server).await;
    let error = qmp.execute(QueryStatus).await.unwrap_err();
    assert!(matches!(error, QmpError::Reply { .. }), "{error:?}");
    assert!(qmp.execute(QueryStatus).await.unwrap().running);
    server.finish().await;
}

#[tokio::test]
async fn a_monitor_that_nobody_holds_any_more_fails_everything_pending_and_proves_nothing() {
    let server = serve(|fake| {
        let mut fake = fake.greet();
        let command = fake.command().unwrap();
        fake.event("SHUTDOWN", json!({"guest": false, "reason": "host-signal"}));
        fake.send_text(&format!("{{\"return\": {{}}, \"id\": {}", command["id"]));
    });
    let (qmp, mut events) = connect(&server).await;
    let mut callers = JoinSet::new();
    for _ in 0..100 {
        let qmp = qmp.clone();
        callers.spawn(async move { qmp.execute_within(QueryStatus, PATIENCE).await });
    }
    while let Some(result) = callers.join_next().await {
        let error = result.unwrap().unwrap_err();
        assert!(matches!(error, QmpError::Vanished { .. }), "{error:?}");
    }
    qmp.closed().await;
    let last = events.recv().await.unwrap();
    let reason = "host-signal".to_owned();
    assert_eq!(last.kind, EventKind::Shutdown { guest: false, reason });
    assert_eq!(events.recv().await, None);
    server.finish().await;
}

#[tokio::test]
async fn a_monitor_that_does_not_greet_is_told_apart() {
    let (release, wait) = mpsc::channel::<()>();
    let silent = serve(move |_fake| wait.recv().unwrap_err());
    let error = Qmp::connect(&silent.path(), SOON).await.unwrap_err();
    assert!(matches!(error, QmpError::Busy { .. }), "{error:?}");
    assert!(error.to_string().contains("another client holds this monitor"), "{error}");
    drop(release);
    silent.finish().await;

    let closes = serve(drop);
    let error = Qmp::connect(&closes.path(), PATIENCE).await.unwrap_err();
    assert!(matches!(error, QmpError::Greeting { .. }), "{error:?}");
    closes.finish().await;

    let other = serve(|mut fake| fake.send_text("220 mail.example ESMTP\n"));
    let error = Qmp::connect(&other.path(), PATIENCE).await.unwrap_err();
    assert!(matches!(error, QmpError::Greeting { .. }), "{error:?}");
    other.finish().await;

    let folder = tempfile::tempdir().unwrap();
    let nobody = folder.path().join("qmp.sock");
    let error = Qmp::connect(&nobody, PATIENCE).await.unwrap_err();
    assert!(error.is_not_listening(), "{error:?}");
    drop(std::os::unix::net::UnixListener::bind(&nobody).unwrap());
    let error = Qmp::connect(&nobody, PATIENCE).await.unwrap_err();
    assert!(error.is_not_listening(), "{error:?}");
}

#[tokio::test]
async fn a_late_reply_is_dropped_and_what_waited_behind_it_is_never_sent() {
    let (release, wait) = mpsc::channel();
    let server = serve(move |fake| {
        let mut fake = fake.greet();
        let late = fake.command().unwrap();
        wait.recv().unwrap();
        fake.answer(&late, json!({"status": "paused", "running": false}));
        let next = fake.command().unwrap();
        fake.answer(&next, running());
        (late, next)
    });
    let (qmp, _events) = connect(&server).await;
    let error = qmp.execute_within(QueryStatus, SENT_BY_THEN).await.unwrap_err();
    assert!(matches!(error, QmpError::Deadline { sent: true, .. }), "{error:?}");
    assert!(!error.is_not_executed());
    let error = qmp.execute_within(Stop, SOON).await.unwrap_err();
    assert!(matches!(error, QmpError::Deadline { sent: false, .. }), "{error:?}");
    assert!(error.is_not_executed());
    let cancelled = tokio::time::timeout(SOON, qmp.execute_within(Stop, PATIENCE)).await;
    cancelled.unwrap_err();
    release.send(()).unwrap();
    let status = qmp.execute_within(QueryStatus, PATIENCE).await.unwrap();
    assert!(status.running);
    let (late, next) = server.finish().await;
    assert_eq!((&late["execute"], &next["execute"]), (&"query-status".into(), &"query-status".into()));
}

#[tokio::test]
async fn a_descriptor_whose_command_was_given_up_is_closed_at_once() {
    let (release, wait) = mpsc::channel::<()>();
    let server = serve(move |fake| {
        let mut fake = fake.greet();
        fake.command().unwrap();
        wait.recv().unwrap_err();
        assert!(fake.fds.is_empty());
    });
    let (qmp, _events) = connect(&server).await;
    qmp.execute_within(QueryStatus, SENT_BY_THEN).await.unwrap_err();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let handing = qmp.getfd("vmferry-x", theirs.into());
    tokio::time::timeout(SOON, handing).await.unwrap_err();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(ours.read(&mut [0]).unwrap(), 0, "the other end should be closed");
    drop(release);
    server.finish().await;
}

#[tokio::test]
async fn a_flood_of_events_is_harmless() {
    let server = serve(|fake| {
        let mut fake = fake.greet();
        let command = fake.command().unwrap();
        for number in 0..10_000 {
            fake.event("JOB_STATUS_CHANGE", json!({"id": "j", "status": "ready"}));
            fake.event("OF_TOMORROW", json!({"number": number}));
            fake.event("BLOCK_JOB_READY", json!({"device": format!("j{number}")}));
        }
        fake.answer(&command, running());
    });
    let (qmp, mut events) = connect(&server).await;
    assert!(qmp.execute_within(QueryStatus, PATIENCE).await.unwrap().running);
    let before = missed(&mut events).await;
    assert_eq!(before.len(), EVENT_QUEUE_MAX);
    let ready = |number| EventKind::BlockJobReady { device: format!("j{number}") };
    assert!(before.iter().enumerate().all(|(number, kind)| *kind == ready(number)));
    server.finish().await;
}

#[tokio::test]
async fn events_that_are_taken_or_not_wanted_are_never_too_many() {
    let (go_on, wait) = mpsc::channel();
    let rounds = 4_u64;
    let each = EVENT_QUEUE_MAX as u64;
    let server = serve(move |fake| {
        let mut fake = fake.greet();
        for round in 0..rounds {
            for pass in 0..each {
                fake.event("BLOCK_EXPORT_DELETED", json!({"id": (round * each + pass).to_string()}));
            }
            wait.recv().unwrap();
        }
        for _ in 0..2 * each {
            fake.event("STOP", json!({}));
        }
        let command = fake.command().unwrap();
        fake.answer(&command, running());
    });
    let (qmp, mut events) = connect(&server).await;
    for pass in 0..rounds * each {
        let kind = EventKind::BlockExportDeleted { id: pass.to_string() };
        assert_eq!(events.recv().await.unwrap().kind, kind);
        if (pass + 1) % each == 0 {
            if pass + 1 == rounds * each {
                break;
            }
            go_on.send(()).unwrap();
        }
    }
    drop(events);
    go_on.send(()).unwrap();
    assert!(qmp.execute_within(QueryStatus, PATIENCE).await.unwrap().running);
    server.finish().await;
}

/// An open file that says its own name.
fn file_saying(name: &str) -> OwnedFd {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(name.as_bytes()).unwrap();
    file.rewind().unwrap();
    file.into()
}

/// What the file behind a received descriptor says; closes it.
fn said_by(raw: i32) -> String {
    let text = std::fs::read_to_string(format!("/proc/self/fd/{raw}")).unwrap();
    nix::unistd::close(raw).unwrap();
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_descriptor_arrives_with_its_own_command() {
    let callers = 50;
    let server = serve(move |fake| {
        let mut fake = fake.greet();
        let mut seen = 0;
        while let Some(command) = fake.command() {
            let fd = fake.fds.pop_front();
            assert!(fake.fds.is_empty(), "a second descriptor is here with {command}");
            if command["execute"] == "getfd" {
                let said = fd.map(said_by).unwrap();
                assert_eq!(command["arguments"]["fdname"], said.as_str());
                seen += 1;
                fake.answer(&command, json!({}));
            } else {
                assert_eq!(fd, None, "{command}");
                fake.answer(&command, running());
            }
        }
        seen
    });
    let (qmp, _events) = connect(&server).await;
    let mut tasks = JoinSet::new();
    for number in 0..callers {
        let one = qmp.clone();
        tasks.spawn(async move {
            let name = format!("vmferry-fd-{number}");
            one.getfd(&name, file_saying(&name)).await.map(drop)
        });
        let other = qmp.clone();
        tasks.spawn(async move { other.execute(QueryStatus).await.map(drop) });
    }
    while let Some(result) = tasks.join_next().await {
        result.unwrap().unwrap();
    }
    drop(qmp);
    assert_eq!(server.finish().await, callers);
}

#[tokio::test]
async fn impossible_descriptor_names_are_not_sent() {
    let server = serve(|fake| fake.greet().command());
    let (qmp, _events) = connect(&server).await;
    for name in ["", "1", "9vmferry"] {
        let error = qmp.getfd(name, file_saying("x")).await.unwrap_err();
        assert!(matches!(&error, QmpError::FdName { fdname } if fdname == name), "{error:?}");
    }
    drop(qmp);
    assert_eq!(server.finish().await, None);
}

#[tokio::test]
async fn events_are_read_while_a_command_can_not_be_written() {
    let (release, wait) = mpsc::channel();
    let server = serve(move |fake| {
        let mut fake = fake.greet();
        for pass in 0..1000 {
            fake.event("BLOCK_EXPORT_DELETED", json!({"id": pass.to_string()}));
        }
        wait.recv().unwrap();
        let command = fake.command().unwrap();
        fake.answer(&command, json!({}));
        command["arguments"]["text"].as_str().unwrap().len()
    });
    let (qmp, mut events) = connect(&server).await;
    let size = 4 << 20;
    let long = Long { text: "x".repeat(size) };
    let writer = qmp.clone();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move { writer.execute_within(long, PATIENCE).await });
    for pass in 0..1000 {
        let kind = EventKind::BlockExportDeleted { id: pass.to_string() };
        assert_eq!(events.recv().await.unwrap().kind, kind);
    }
    release.send(()).unwrap();
    tasks.join_next().await.unwrap().unwrap().unwrap();
    assert_eq!(server.finish().await, size);
}

#[tokio::test]
async fn what_qemu_said_before_it_left_is_heard_although_writing_fails() {
    let (tell, left) = tokio::sync::oneshot::channel();
    let server = serve(move |fake| {
        let mut fake = fake.greet();
        fake.event("SHUTDOWN", json!({"guest": true, "reason": "guest-shutdown"}));
        drop(fake);
        tell.send(()).unwrap();
    });
    let (qmp, mut events) = connect(&server).await;
    left.await.unwrap();
    let error = qmp.execute(Stop).await.unwrap_err();
    assert!(error.is_interrupted() || error.is_over(), "{error:?}");
    let last = events.recv().await.unwrap();
    assert!(matches!(last.kind, EventKind::Shutdown { guest: true, .. }), "{last:?}");
    server.finish().await;
}

#[tokio::test]
async fn the_last_handle_to_go_closes_the_connection() {
    let server = serve(|fake| fake.greet().command());
    let (qmp, mut events) = connect(&server).await;
    let clone = qmp.clone();
    drop(qmp);
    assert!(!clone.is_closed());
    drop(clone);
    assert_eq!(events.recv().await, None);
    assert_eq!(server.finish().await, None);
}

fn what_to_clean() -> SourceLeftovers {
    SourceLeftovers {
        migration: true,
        jobs: vec!["vmferry-a".into(), "vmferry-b".into()],
        nodes: vec!["vmferry-a".into()],
        fdnames: vec!["vmferry-ram".into()],
        ..SourceLeftovers::default()
    }
}

fn left(report: &CleanupReport) -> Vec<Remainder> {
    report.left.iter().map(|entry| entry.what.clone()).collect()
}

#[tokio::test]
async fn a_clean_up_tries_every_step_and_lists_what_is_left() {
    let server = serve(|fake| {
        let mut fake = fake.greet();
        let mut heard = Vec::new();
        while let Some(command) = fake.command() {
            let name = command["execute"].as_str().unwrap().to_owned();
            match name.as_str() {
                "query-jobs" => {
                    let job = json!({"id": "vmferry-b", "type": "mirror", "status": "concluded",
                                     "current-progress": 1, "total-progress": 1});
                    fake.answer(&command, json!([job]));
                }
                "closefd" => {
                    let desc = "File descriptor named 'vmferry-ram' not found";
                    fake.refuse(&command, "GenericError", desc);
                }
                _ => fake.refuse(&command, "GenericError", "no"),
            }
            heard.push(name);
        }
        heard
    });
    let (qmp, _events) = connect(&server).await;
    let report = source_cleanup(&qmp, &what_to_clean()).await;
    let expected =
        [Remainder::Migration, Remainder::Job("vmferry-b".into()), Remainder::Node("vmferry-a".into())];
    assert_eq!(left(&report), expected);
    assert!(!report.is_clean() && !report.is_connection_lost());
    drop(qmp);
    let heard = server.finish().await;
    let asked = [
        "query-migrate",
        "query-jobs",
        "query-jobs",
        "query-jobs",
        "job-dismiss",
        "blockdev-del",
        "closefd",
        "query-status",
    ];
    assert_eq!(heard, asked);
}

#[tokio::test]
async fn a_clean_up_that_loses_qemu_says_so() {
    let server = serve(|fake| {
        let mut fake = fake.greet();
        let command = fake.command().unwrap();
        fake.answer(&command, json!({"status": "active"}));
        let cancel = fake.command().unwrap();
        assert_eq!(cancel["execute"], "migrate_cancel");
    });
    let (qmp, _events) = connect(&server).await;
    let report = source_cleanup(&qmp, &what_to_clean()).await;
    assert!(report.is_connection_lost());
    assert_eq!(left(&report).len(), 5, "{report:?}");
    server.finish().await;
}

#[tokio::test]
async fn a_clean_up_whose_monitor_is_cut_goes_on() {
    let server = serve(|fake| {
        let mut fake = fake.greet();
        let command = fake.command().unwrap();
        fake.answer(&command, json!({"status": "pre-switchover"}));
        assert_eq!(fake.command().unwrap()["execute"], "migrate_cancel");
        let mut fake = fake.cut().greet();
        let mut heard = Vec::new();
        while let Some(command) = fake.command() {
            let name = command["execute"].as_str().unwrap().to_owned();
            match name.as_str() {
                "query-jobs" => fake.answer(&command, json!([])),
                "query-migrate" => fake.answer(&command, json!({"status": "cancelled"})),
                "query-status" => fake.answer(&command, running()),
                _ => fake.answer(&command, json!({})),
            }
            heard.push(name);
        }
        heard
    });
    let (qmp, _events) = connect(&server).await;
    let report = source_cleanup(&qmp, &what_to_clean()).await;
    assert!(report.is_clean(), "{report:?}");
    drop(qmp);
    assert_eq!(server.finish().await[..2], ["migrate_cancel", "query-migrate"]);
}
