//! Requests with every part of the wrong type, missing, too much or with a hostile text, on control streams and at
//! the local API: each is refused or answered as ever, nothing is left behind, and no line of the log is forged.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;
use vmferry::api::{
    CheckRequest, DrainRequest, EndReplicaRequest, Expected, ForceRequest, ForwardRequest, InBand,
    Incremental, LibvirtRequest, MigrateRequest, Options, OtherPath, PeerLimitRequest, PingRequest,
    ProbeBytes, QemuCommandRequest, ShareRequest, Side, Told,
};
use vmferry::libvirt::message::Ask;
use vmferry::migrate::message::{
    Asked, DiskPlace, DiskSpec, EndReplica, Offer, Parts, Piece, Pieces, Request, Storage, Summary,
};
use vmferry::migrate::progress::Downtime;
use vmferry::mux::{Config, Open, RateLimit, purpose};
use vmferry::net::message::{self, MESSAGE_BYTES_MAX};
use vmferry::net::session::OpenStreamError;

use super::moving::Moving;
use super::victim::{Attacker, PATIENT, Victim, control, offer, open_control, patient};
use crate::api::schema::Description;
use crate::rig::{PATIENCE, soon, until};

/// What no name and no text should be.
const TEXTS: [&str; 8] = [
    "",
    "../../../etc/passwd",
    "/etc/passwd",
    "web1/../db1",
    "web1\0",
    "a\n2026-11-29T10:00:00.000000Z  WARN FORGED\u{1b}[2J\r",
    "\u{202e}1bew",
    "%n%s$(reboot)`reboot`",
];

/// One of each type.
fn of_every_type() -> [Value; 9] {
    let deep = (0..100).fold(json!(1), |inner, _| json!([inner]));
    [json!(null), json!(true), json!(-1), json!(1.5), json!(u64::MAX), json!("x"), json!([]), json!({}), deep]
}

/// Every request that differs from `good` in one place, and what that is.
fn spoiled(good: &Value) -> Vec<(String, Value)> {
    let mut all = Vec::new();
    for place in places(good, "") {
        let mut with = |what: String, value: Value| {
            let mut bad = good.clone();
            *bad.pointer_mut(&place).unwrap() = value;
            all.push((format!("{place}: {what}"), bad));
        };
        of_every_type().into_iter().for_each(|value| with(value.to_string(), value));
        with("long".into(), json!("x".repeat(20_000)));
        if good.pointer(&place).unwrap().is_string() {
            TEXTS.iter().for_each(|text| with(format!("{text:?}"), json!(text)));
        }
        let mut bad = good.clone();
        let (parent, name) = place.rsplit_once('/').unwrap_or(("", ""));
        if let Some(Value::Object(fields)) = bad.pointer_mut(parent) {
            fields.remove(name);
            fields.insert("of_tomorrow".into(), json!(1));
            all.push((format!("{place}: missing"), bad));
        }
    }
    all
}

/// Pointers to all that is in a value, itself too.
fn places(value: &Value, at: &str) -> Vec<String> {
    let inner: Vec<String> = match value {
        Value::Array(items) => {
            items.iter().enumerate().flat_map(|(n, v)| places(v, &format!("{at}/{n}"))).collect()
        }
        Value::Object(fields) => {
            fields.iter().flat_map(|(name, v)| places(v, &format!("{at}/{name}"))).collect()
        }
        _ => Vec::new(),
    };
    [vec![at.to_owned()], inner].concat()
}

pub(super) fn whole_offer() -> Offer {
    let storages = vec![Storage { key: "wwid:1".into(), written: true }];
    let (id, address) = (Some("root".into()), Some("0000:00:05.0".into()));
    let place = Some(DiskPlace {
        id,
        address,
        allocated: Some(5),
        storages,
        drive: Some("d0".into()),
        ..DiskPlace::default()
    });
    let disk = DiskSpec {
        name: "virtio0".into(),
        virtual_size: 1 << 30,
        format: "qcow2".into(),
        read_only: false,
        left_out: false,
        incremental: false,
        bitmaps: None,
        place,
    };
    Offer { disks: vec![disk], after: Some(Uuid::nil()), ..offer("web1") }
}

/// All files below a folder that are not sockets.
fn files(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut found: Vec<_> =
        entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect();
    found.sort();
    found
}

/// No line that begins as one of our own and is not, nothing that a terminal obeys.
fn assert_clean(log: &[String]) {
    for line in log {
        assert!(!line.starts_with("2026-11-29T10:00:00.000000Z"), "{line:?}");
        let obeyed = |c: char| c.is_control() || ('\u{202a}'..='\u{202e}').contains(&c);
        assert!(!line.chars().any(obeyed), "{line:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn control_messages_of_every_wrong_type_leave_nothing_and_end_nothing_else() {
    let victim = Victim::start_with(|text| text + PATIENT);
    let many = RateLimit { per_second: 100_000, burst: 100_000 };
    let bravo = Attacker::with(&victim, "bravo", Config { opens: many, ..patient() });
    let session = bravo.session(&victim).await;
    let before = files(&victim.folder.path().join("state"));
    let requests = [
        Request::Check(whole_offer()),
        Request::Prepare(whole_offer()),
        Request::ToRun { running: true },
        Request::Abort { reason: "x".into() },
        Request::Start,
        Request::Settle,
    ];
    let (mut streams, mut misunderstood, mut ended) = (0, 0, 0);
    let mut channel = None;
    for request in requests {
        let good = serde_json::to_value(Asked { number: 1, request, summary: None }).unwrap();
        for (what, bad) in spoiled(&good) {
            let (mut sender, mut receiver) = match channel.take() {
                Some(open) => open,
                None => {
                    streams += 1;
                    message::split(open_control(&session).await.unwrap(), &session)
                }
            };
            if sender.send(&bad).await.is_err() {
                continue;
            }
            // It is answered, or it ends its own stream.
            let heard = soon(&what, receiver.recv::<Value>()).await;
            if let Ok(Some(answer)) = heard {
                let said = answer.to_string();
                assert!(!said.contains("prepared") && !said.contains("started"), "{what}: {said}");
                channel = (!said.contains("does not understand")).then_some((sender, receiver));
                misunderstood += u32::from(channel.is_none());
            } else {
                // Not the first on its stream.
                ended += 1;
            }
        }
    }
    println!("{misunderstood} of {streams} streams were not understood");
    // Longer than any message may be.
    let mut stream = open_control(&session).await.unwrap();
    let length = MESSAGE_BYTES_MAX as u32 + 1;
    stream.send.send(bytes::Bytes::copy_from_slice(&length.to_be_bytes())).await.unwrap();
    let (_sender, mut receiver) = message::split(stream, &session);
    let answer = soon("its end", receiver.recv::<Value>()).await.unwrap();
    assert!(answer.is_some_and(|answer| answer.to_string().contains("exceeds the limit")));
    let counted = "vmferry_peer_refusals_total{peer=\"bravo\",reason=\"not_understood\"}";
    // Of those that ended a stream some were understood, and came at the wrong moment.
    let counted = victim.metric(counted);
    let (least, most) = (misunderstood + 1, misunderstood + ended + 1);
    assert!(counted >= f64::from(least) && counted <= f64::from(most), "{least} <= {counted} <= {most}");

    assert!(session.is_live() && session.stats().await.reconnects == 0);
    assert_eq!(files(&victim.folder.path().join("state")), before, "something was left");
    assert_clean(&victim.log());
    let told = victim.log().iter().filter(|line| line.contains("cannot be understood was refused")).count();
    assert!((1..5).contains(&told), "{told} told of {misunderstood}");
}

/// What a destination is asked while it copies, and what is asked of libvirt's migrations.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_of_every_wrong_type_beside_a_copy_end_nothing() {
    let victim = Victim::start_with(|text| text + PATIENT);
    let moving = Moving::begin(&victim).await;
    let disk = || "disk0".to_owned();
    let summary = Summary { downtime: Some(Downtime::default()), ..Summary::default() };
    let of_migrations = [
        (Request::Hash(Pieces { disk: disk(), pieces: vec![Piece { at: 0, bytes: 4096 }] }), None),
        (Request::Zeroes(Parts { disk: disk(), parts: vec![(0, 4096)] }), None),
        (Request::Incoming, None),
        (Request::Switchover, None),
        (Request::Confirmed, Some(summary)),
        (Request::EndReplica(EndReplica { vm: "web1".into(), images: true }), None),
    ];
    let of_libvirt = [
        Ask::Look { domain: "web1".into(), folder: "/run/vmferry/libvirt".into() },
        Ask::Prepare { domain: "web1".into(), folder: "/run/vmferry/libvirt".into(), rpc: true },
        Ask::Renew,
    ];
    let mut all = Vec::new();
    for (request, summary) in of_migrations {
        let good = serde_json::to_value(Asked { number: 1, request, summary }).unwrap();
        // What is right all the same is no attack.
        let wrong = spoiled(&good).into_iter().filter(|(_, bad)| Asked::deserialize(bad).is_err());
        all.extend(wrong.map(|(what, bad)| (purpose::CONTROL, what, bad)));
    }
    for ask in of_libvirt {
        let good = serde_json::to_value(ask).unwrap();
        let wrong = spoiled(&good).into_iter().filter(|(_, bad)| Ask::deserialize(bad).is_err());
        all.extend(wrong.map(|(what, bad)| (purpose::LIBVIRT, what, bad)));
    }
    let (of, session) = (all.len(), moving.session.clone());
    for (purpose, what, bad) in all {
        let open = Open { purpose, ..control(moving.migration) };
        let stream = loop {
            match soon("a stream", session.open(open)).await {
                Ok(stream) => break stream,
                // So many in a second.
                Err(OpenStreamError::Limit { .. }) => tokio::time::sleep(Duration::from_millis(20)).await,
                Err(other) => panic!("{what}: {other:?}"),
            }
        };
        let (mut sender, mut receiver) = message::split(stream, &session);
        sender.send(&bad).await.unwrap();
        let heard = soon(&what, receiver.recv::<Value>()).await;
        let said = heard.ok().flatten().map(|answer| answer.to_string()).unwrap_or_default();
        assert!(said.is_empty() || said.contains("does not understand"), "{what}: {said}");
    }
    println!("{of} messages");
    let counted = "vmferry_peer_refusals_total{peer=\"bravo\",reason=\"not_understood\"}";
    until("each to be counted", || victim.metric(counted) == of as f64).await;
    moving.goes_on("beside what nobody understands").await;
    moving.ends_whole(&victim).await;
    assert_clean(&victim.log());
}

/// Status, content type and body.
pub(super) fn ask(
    victim: &Victim,
    method: &str,
    path: &str,
    body: impl AsRef<[u8]>,
) -> (u16, String, String) {
    let mut stream = UnixStream::connect(victim.socket()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let head = format!("{method} {path} HTTP/1.0\r\nhost: vmferry\r\ncontent-type: application/json\r\n");
    let (bytes, body) = (body.as_ref(), String::from_utf8_lossy(body.as_ref()));
    let head = format!("{head}content-length: {}\r\n\r\n", bytes.len());
    let sent = stream.write_all(&[head.as_bytes(), bytes].concat());
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap_or_else(|e| panic!("{path} {body}: {e} ({sent:?})"));
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{path} {body}: {answer}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let kind = head.lines().find_map(|l| l.to_lowercase().strip_prefix("content-type: ").map(str::to_owned));
    (status, kind.unwrap_or_default(), body.to_owned())
}

/// A request that is as described: the operation's path, the one that is asked, and the body.
pub(super) type Body = (&'static str, String, String);

/// One of each operation that takes a body.
pub(super) fn bodies(victim: &Victim) -> Vec<Body> {
    let (vm, to) = ("web1".to_owned(), "bravo".to_owned());
    let rate = Some("1M".parse().unwrap());
    let options = Options { limit_bytes_per_s: rate, ..Options::default() };
    let listen = victim.folder.path().join("near.sock").display().to_string();
    let forward = ForwardRequest {
        listen: listen.parse().unwrap(),
        to: to.clone(),
        target: "vnc".parse().unwrap(),
        weight: 300.try_into().unwrap(),
        limit_bytes_per_s: rate,
        urgent: true,
        owner: None,
        group: None,
        mode: "0600".to_owned().try_into().unwrap(),
    };
    let share = ShareRequest { limit_bytes_per_s: Some(rate), weight: Some(300.try_into().unwrap()) };
    let check = CheckRequest {
        compare_read_only: false,
        vm: vm.clone(),
        to: to.clone(),
        strict: true,
        accept: Default::default(),
        disks: Default::default(),
        verify: true,
        incremental: Some(Incremental::All),
        in_band: Some(InBand::Blk),
        never_in_band: false,
    };
    let expected = Expected { ram: 1, nbd: 1 };
    let libvirt = LibvirtRequest {
        domain: vm.clone(),
        renamed: None,
        to: to.clone(),
        rpc: true,
        hold_s: None,
        expected: Some(expected),
    };
    let replica = EndReplicaRequest { vm: vm.clone(), to: to.clone(), images: true };
    let other = OtherPath { from: "/a".into(), to: "/b".into() };
    let command = QemuCommandRequest { program: Some("/q".into()), images: None, paths: vec![other] };
    // It is asked of a peer that is not there.
    let ping = PingRequest { bytes: ProbeBytes::new(1) };
    let drain = json!({"to": ["bravo"], "vms": ["web*"], "except": ["db*"], "at_once": 1});
    let drain = text(&serde_json::from_value::<DrainRequest>(drain).unwrap());
    let migrate = text(&MigrateRequest { vm, to, options });
    let all = [
        ("/v1/check", text(&check)),
        ("/v1/drain", drain.clone()),
        ("/v1/drain/plan", drain),
        ("/v1/forwards", text(&forward)),
        ("/v1/forwards/{id}/limit", text(&share)),
        ("/v1/libvirt", text(&libvirt)),
        ("/v1/libvirt/check", text(&libvirt)),
        ("/v1/libvirt/{id}/end", text(&Told::Moved(expected))),
        ("/v1/migrations", migrate.clone()),
        ("/v1/migrations/plan", migrate),
        ("/v1/migrations/{id}/limit", text(&share)),
        ("/v1/peers/{name}/limit", text(&PeerLimitRequest { limit_bytes_per_s: rate })),
        ("/v1/peers/{name}/ping", text(&ping)),
        ("/v1/recover/{id}", text(&ForceRequest { force: Side::There, until: Some(1) })),
        ("/v1/replicas/end", text(&replica)),
        ("/v1/vms/{vm}/qemu-command", text(&command)),
    ];
    let of = |path: &str| {
        let path = path.replace("{id}", &Uuid::nil().to_string());
        path.replace("{name}", "bravo").replace("{vm}", "web1")
    };
    all.into_iter().map(|(described, body)| (described, of(described), body)).collect()
}

/// With its fields in the order in which they are declared.
fn text(body: &impl Serialize) -> String {
    serde_json::to_string(body).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn api_requests_of_every_wrong_type_are_answered_as_described() {
    let victim = Victim::start();
    let mut asked = 0;
    // Each request has its own time: it is on the disk, in the audit record, before it is answered.
    tokio::task::block_in_place(|| {
        let description = Description::load();
        for (described, path, good) in bodies(&victim) {
            for (what, bad) in spoiled(&serde_json::from_str(&good).unwrap()) {
                let answer = ask(&victim, "POST", &path, bad.to_string());
                assert!(answer.0 < 500 || answer.0 == 503, "{path} {what}: {answer:?}");
                description.accepts("post", described, &answer);
                asked += 1;
            }
        }
        for text in TEXTS.map(|text| text.replace(['\0', '\n', '\r', ' ', '\u{1b}', '\u{202e}'], "%0a")) {
            for path in ["/v1/migrations/", "/v1/peers/", "/v1/forwards/", "/v1/libvirt/", "/v1/"] {
                let (status, ..) = ask(&victim, "GET", &format!("{path}{text}"), "");
                assert!((400..500).contains(&status) || text.is_empty(), "{path}{text}: {status}");
            }
        }
    });
    println!("{asked} requests");
    assert!(victim.is_alive() && asked > 500);
    assert_clean(&victim.log());
}
