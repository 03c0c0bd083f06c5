//! A destination that lies. It is a real peer in a real session, to which the agent's operators may move VMs: whatever
//! it answers before anything is copied, the command ends with the right code and clean lines, the migration has
//! failed, the guest is where it was with nothing left over in its QEMU, and the agent goes on.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tokio::task::JoinSet;
use vmferry::migrate::message::{Asked, Offer, Request};
use vmferry::mux::{Open, purpose};
use vmferry::net::message;
use vmferry::net::session::{IncomingStream, OpenStreamError};
use vmferry::qemu::{
    Cont, QueryJobs, QueryMigrate, QueryMigrateCapabilities, QueryNamedBlockNodes, QueryStatus, Stop,
    leftovers,
};

use super::texts::{EVIL, is_clean};
use super::victim::{Attacker, Victim};
use crate::qmp_real::machine::{Machine, binary, image};
use crate::rig::soon;

pub(super) const DISK_BYTES: u64 = 1 << 20;
const MIB: u64 = 1 << 20;

/// What is done when something is asked.
pub(super) enum Act {
    Say(Value),
    /// So many streams of this purpose are opened to the asking agent, for its migration.
    Open(u16, u16),
    /// Nothing more is said, and the stream stays.
    Silence,
}

pub(super) type Liar = Arc<dyn Fn(&Asked) -> Vec<Act> + Send + Sync>;
pub(super) type Lies = Arc<Mutex<Liar>>;

/// The answer to a request.
fn response(number: u64, response: impl Into<Value>) -> Act {
    let response: Value = response.into();
    Act::Say(json!({"response": {"number": number, "response": response}}))
}

fn notice(notice: impl Into<Value>) -> Act {
    let notice: Value = notice.into();
    Act::Say(json!({"notice": notice}))
}

/// A grant as it should be, but for these fields.
fn granted(offer: &Offer, with: Value) -> Value {
    let copied = offer.disks.iter().filter(|disk| !disk.read_only);
    let export = |(n, name): (usize, &String)| json!({"disk": name, "export": name, "channel": n + 1});
    let exports: Vec<_> = copied.map(|disk| &disk.name).enumerate().map(export).collect();
    let mut grant = json!({
        "exports": exports, "qemu": "QEMU 10.0.2", "restartable": false, "bitmaps": {}, "tells_zeroes": true,
    });
    let Value::Object(with) = with else { panic!("fields") };
    grant.as_object_mut().unwrap().extend(with);
    json!({"prepared": grant})
}

/// What an honest destination answers up to the copy.
fn honest(request: &Request) -> Value {
    match request {
        Request::Check(_) => json!({"checked": []}),
        Request::Prepare(offer) => granted(offer, json!({})),
        Request::Hash(asked) => json!({"hashes": vec!["0".repeat(64); asked.pieces.len()]}),
        Request::Zeroes(asked) => json!({"are-zeroes": vec![false; asked.parts.len()]}),
        Request::Abort { .. } | Request::Settle => json!({"fate": "never-ran"}),
        Request::Tell => json!({"told": null}),
        _ => json!("done"),
    }
}

/// Honest, but for what the lie has to say.
pub(super) fn but(lie: impl Fn(&Asked) -> Option<Vec<Act>> + Send + Sync + 'static) -> Liar {
    Arc::new(move |asked| lie(asked).unwrap_or_else(|| vec![response(asked.number, honest(&asked.request))]))
}

/// Another answer to `prepare`.
fn prepared(lie: impl Fn(&Offer) -> Value + Send + Sync + 'static) -> Liar {
    but(move |asked| match &asked.request {
        Request::Prepare(offer) => Some(vec![response(asked.number, lie(offer))]),
        _ => None,
    })
}

/// A grant with these fields.
fn grants(with: Value) -> Liar {
    prepared(move |offer| granted(offer, with.clone()))
}

/// These exports.
fn exports(exports: Vec<(&'static str, u64)>) -> Liar {
    let export = |(disk, channel): &(&str, u64)| json!({"disk": disk, "export": "x", "channel": channel});
    grants(json!({"exports": exports.iter().map(export).collect::<Vec<_>>()}))
}

/// Before the answer to `prepare`, which is right.
fn before(acts: impl Fn(u64) -> Vec<Act> + Send + Sync + 'static) -> Liar {
    but(move |asked| match &asked.request {
        request @ Request::Prepare(_) => {
            Some(acts(asked.number).into_iter().chain([response(asked.number, honest(request))]).collect())
        }
        _ => None,
    })
}

/// Another answer to a request of this name.
fn answers(name: &'static str, answer: Value) -> Liar {
    but(move |asked| (asked.request.name() == name).then(|| vec![response(asked.number, answer.clone())]))
}

fn problem(severity: &str) -> Value {
    json!({"kind": "other", "severity": severity, "text": EVIL, "remedy": EVIL})
}

fn refusal(text: &str) -> Value {
    json!({"refused": {"problems": [], "text": text}})
}

/// One lie, and what the operator hears of it.
struct Lie {
    name: &'static str,
    more: &'static [&'static str],
    liar: Liar,
    expected: &'static str,
}

fn lie(name: &'static str, expected: &'static str, liar: Liar) -> Lie {
    Lie { name, more: &[], liar, expected }
}

const NOT_FIT: &str = "gave an answer that does not fit `prepare`";
const NOT_UNDERSTOOD: &str = "a message could not be understood";
/// What is said when the grant was believed: the copy fails, whose stream the liar does not take.
const NO_STREAM: &str = "did not come about";

/// Grants that do not fit what was asked for.
fn lies_in_the_grant() -> Vec<Lie> {
    let many = || (0..5_000u64).map(|n| ("disk0", n % 60_000)).collect::<Vec<_>>();
    vec![
        lie("a channel twice", NOT_FIT, exports(vec![("disk0", 1), ("disk1", 1)])),
        lie("a disk twice", NOT_FIT, exports(vec![("disk0", 1), ("disk1", 2), ("disk0", 3)])),
        lie("thousands of exports", NOT_FIT, exports([vec![("disk0", 1), ("disk1", 2)], many()].concat())),
        lie("a disk that nobody has", NOT_FIT, exports(vec![("disk0", 1), ("disk1", 2), ("disk9", 3)])),
        lie("a read-only disk", NOT_FIT, exports(vec![("disk0", 1), ("disk1", 2), ("disk2", 3)])),
        lie("a disk missing", NOT_FIT, exports(vec![("disk0", 1)])),
        lie("no exports", NOT_FIT, exports(vec![])),
        lie("a name that forges", NOT_FIT, exports(vec![("disk0", 1), (EVIL, 2)])),
        lie("a channel too high", NOT_UNDERSTOOD, exports(vec![("disk0", 65_536), ("disk1", 2)])),
        lie("a time below zero", NOT_UNDERSTOOD, grants(json!({"hook_s": -1}))),
        lie("a time without end", NOT_UNDERSTOOD, grants(json!({"hook_s": 1e300}))),
        lie("exports of another type", NOT_UNDERSTOOD, grants(json!({"exports": {}}))),
        lie("the longest time", NO_STREAM, grants(json!({"hook_s": u64::MAX}))),
        lie("the highest channels", NO_STREAM, exports(vec![("disk0", 65_534), ("disk1", 65_535)])),
        lie(
            "changes since a try that never was",
            NO_STREAM,
            grants(json!({"since": [{"disk": "disk0", "doubt": null}, {"disk": EVIL, "doubt": EVIL}]})),
        ),
        lie(
            "bitmaps that were not offered",
            NO_STREAM,
            grants(json!({"bitmaps": {"disk0": [EVIL, "b0"], EVIL: ["b1"], "disk2": []}})),
        ),
        lie("texts that forge", NO_STREAM, grants(json!({"qemu": EVIL, "audit_head": EVIL}))),
        lie(
            "findings that forge",
            NO_STREAM,
            grants(json!({"findings": [problem("note"), problem("warning"), problem("problem")]})),
        ),
        lie(
            "fresh images, and no disks left out",
            NO_STREAM,
            grants(json!({"leaves_out": true, "compress": true})),
        ),
    ]
}

/// Answers that are no grant, or none to this request.
fn lies_of_the_wrong_kind() -> Vec<Lie> {
    let started = json!({"started": {"hook_ms": u64::MAX, "warnings": [EVIL, EVIL], "stands": EVIL}});
    let kinds = [
        ("a start before the time", started.clone()),
        ("a check's answer", json!({"checked": [problem("problem")]})),
        ("done", json!("done")),
        ("hashes", json!({"hashes": [EVIL]})),
        ("zeroes", json!({"are-zeroes": [true]})),
        ("a fate", json!({"fate": "runs"})),
        ("nothing to tell", json!({"told": null})),
        ("the end of a replica", json!({"replica-ended": {"was_kept": true, "left": [EVIL]}})),
    ];
    let mut lies: Vec<_> =
        kinds.into_iter().map(|(name, answer)| lie(name, NOT_FIT, answers("prepare", answer))).collect();
    let refused = json!({"refused": {"problems": [problem("problem"), problem("note")], "text": EVIL}});
    lies.extend([
        lie("a refusal that forges", "FORGED", answers("prepare", refused)),
        lie("an error that forges", "the destination refused: ", answers("prepare", refusal(EVIL))),
        lie("a kind that nobody knows", NOT_UNDERSTOOD, answers("prepare", json!({EVIL: EVIL}))),
        lie(
            "no answer at all",
            NOT_UNDERSTOOD,
            but(|asked| {
                matches!(asked.request, Request::Prepare(_)).then(|| vec![Act::Say(json!({"reply": EVIL}))])
            }),
        ),
        lie(
            "the stream's end",
            "ended the migration's control stream",
            but(|asked| matches!(asked.request, Request::Prepare(_)).then(Vec::new)),
        ),
        lie("a guest that runs there already", NO_STREAM, answers("abort", json!({"fate": "runs"}))),
        lie("a fate that forges", NO_STREAM, answers("abort", refusal(EVIL))),
    ]);
    lies
}

/// More than was asked for.
fn lies_beside_the_answer() -> Vec<Lie> {
    let others = |number| vec![response(0, "done"), response(u64::MAX, "done"), response(number + 1, "done")];
    let loaded = |_| vec![notice("loaded"), notice("loaded"), notice("loaded")];
    let busy =
        |_| (0..500).map(|_| Act::Say(json!({"busy": {"agent": u64::MAX, "qemu": u64::MAX}}))).collect();
    vec![
        lie("answers to other questions", NO_STREAM, before(others)),
        lie(
            "an answer before the question",
            NO_STREAM,
            before(|number| {
                vec![response(number + 1, json!({"started": {"hook_ms": 0, "warnings": [EVIL]}}))]
            }),
        ),
        lie("the answer twice", NOT_FIT, before(|number| vec![response(number, "done")])),
        lie("a guest that is there before it has left", "", before(loaded)),
        lie("notices without end", NOT_FIT, before(|_| (0..40).map(|_| notice("loaded")).collect())),
        lie("a failure that forges", "", before(|_| vec![notice(json!({"failed": {"text": EVIL}}))])),
        lie("more than busy", NO_STREAM, before(busy)),
        lie(
            "streams of RAM and disks in the other direction",
            NO_STREAM,
            before(|_| {
                vec![Act::Open(purpose::RAM, 20), Act::Open(purpose::NBD, 20), Act::Open(purpose::CONTROL, 2)]
            }),
        ),
    ]
}

/// Of disks that are compared before the copy, as `--compare-read-only` asks for.
fn lies_of_hashes() -> Vec<Lie> {
    let not_fit = "gave an answer that does not fit `hash`";
    let lies = [
        ("no hashes", not_fit, answers("hash", json!({"hashes": []}))),
        ("too many hashes", not_fit, answers("hash", json!({"hashes": vec!["0".repeat(64); 2_000]}))),
        ("zeroes for hashes", not_fit, answers("hash", json!({"are-zeroes": [true]}))),
        ("a start for hashes", not_fit, answers("hash", json!({"started": {"hook_ms": 1, "warnings": []}}))),
        ("hashes that forge", "has other contents", answers("hash", json!({"hashes": [EVIL]}))),
        ("other hashes", "has other contents", but(|_| None)),
        ("a refusal of hashes", "the destination refused: ", answers("hash", refusal(EVIL))),
    ];
    let lie = |(name, expected, liar)| Lie { name, more: &["--compare-read-only"], liar, expected };
    lies.into_iter().map(lie).collect()
}

/// What the attacker does with all that is opened to it, until it is dropped.
fn answer_all(mut bravo: Attacker, lies: &Lies) -> tokio::task::JoinHandle<()> {
    let lies = Arc::clone(lies);
    tokio::spawn(async move {
        let mut streams = JoinSet::new();
        while let Some(stream) = bravo.incoming.recv().await {
            // Streams of disks are refused as they are dropped.
            if stream.open.purpose == purpose::CONTROL {
                streams.spawn(answer(stream, Arc::clone(&lies)));
            }
        }
    })
}

pub(super) async fn answer(stream: IncomingStream, lies: Lies) {
    let (session, open) = (stream.session().clone(), stream.open);
    let Ok(accepted) = stream.accept().await else { return };
    let (mut sender, mut receiver) = message::split(accepted, &session);
    while let Ok(Some(asked)) = receiver.recv::<Asked>().await {
        let liar = Arc::clone(&lies.lock().unwrap());
        let acts = liar(&asked);
        let is_end = acts.is_empty();
        for act in acts {
            match act {
                Act::Say(words) => drop(sender.send(&words).await),
                Act::Silence => {}
                Act::Open(purpose, streams) => {
                    for channel in 0..streams {
                        let open = Open { purpose, channel, ..open };
                        let refused = soon("an answer to a stream", session.open(open)).await;
                        let is_control = purpose == self::purpose::CONTROL;
                        assert!(
                            is_control || matches!(refused, Err(OpenStreamError::Refused { .. })),
                            "{refused:?}"
                        );
                    }
                }
            }
        }
        if is_end {
            break;
        }
    }
    sender.finish();
}

/// A paused guest with two disks that it can write to and one that it cannot, at web1's monitor.
pub(super) async fn guest(victim: &Victim) -> Machine {
    let folder = victim.folder.path();
    let monitor = format!("socket,id=agent,path={},server=on,wait=off", folder.join("web1.qmp").display());
    let mut more = vec!["-chardev".to_owned(), monitor, "-mon".into(), "chardev=agent,mode=control".into()];
    for (n, read_only) in [(0, "off"), (1, "off"), (2, "on")] {
        let disk = image(folder, &format!("disk{n}"), DISK_BYTES, b"the guest's");
        let file = disk.display();
        more.extend([
            "-blockdev".into(),
            format!("driver=raw,node-name=vd{n},read-only={read_only},file.driver=file,file.filename={file}"),
            "-device".into(),
            format!("virtio-blk-pci,id=disk{n},drive=vd{n}"),
        ]);
    }
    let machine = Machine::start(&binary("VMFERRY_QEMU10"), folder, "test", &more).await;
    machine.qmp.execute(Cont).await.unwrap();
    machine.qmp.execute(Stop).await.unwrap();
    machine
}

/// All that a migration could leave in a QEMU.
pub(super) async fn left(machine: &Machine) -> String {
    let qmp = &machine.qmp;
    let nodes = qmp.execute(QueryNamedBlockNodes { flat: true }).await.unwrap();
    let nodes: Vec<_> = nodes.iter().map(|node| (&node.node_name, node.dirty_bitmaps.len())).collect();
    let status = qmp.execute(QueryStatus).await.unwrap().status;
    let jobs = qmp.execute(QueryJobs).await.unwrap().len();
    let is_live = qmp.execute(QueryMigrate).await.unwrap().status.is_live();
    let capabilities = qmp.execute(QueryMigrateCapabilities).await.unwrap();
    let found = leftovers(qmp).await.unwrap();
    format!("{status} {nodes:?} {jobs} {is_live} {found:?} {capabilities:?}")
}

/// A command of the operator's, whose lines are clean.
pub(super) fn run(victim: &Victim, words: &[&str]) -> (String, Option<i32>) {
    let (said, code) = tokio::task::block_in_place(|| victim.vmferry_ends(words));
    said.trim_end_matches('\n').split('\n').for_each(is_clean);
    (said, code)
}

/// The migration that was not known before, which has failed by the agent's word.
pub(super) fn failed(victim: &Victim, lie: &str, known: &mut BTreeSet<String>) -> String {
    let migrations = victim.get("/v1/migrations");
    let id = |migration: &Value| migration["id"].as_str().unwrap().to_owned();
    let last = migrations.as_array().unwrap().iter().find(|migration| known.insert(id(migration))).unwrap();
    assert_eq!(last["outcome"]["result"], "failed", "{lie}: {last}");
    id(last)
}

fn journals(folder: &Path) -> Vec<String> {
    let files = std::fs::read_dir(folder.join("state/migrations")).unwrap();
    files.map(|file| std::fs::read_to_string(file.unwrap().path()).unwrap()).collect()
}

pub(super) fn start() -> Victim {
    Victim::start_with(|text| text + "[deadlines]\nmake_s = 1\nqemu_start_s = 1\n")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_that_lies_before_the_copy_leaves_the_guest_where_it_is() {
    let victim = start();
    let machine = guest(&victim).await;
    let bravo = Attacker::new(&victim, "bravo");
    let _session = bravo.session(&victim).await;
    let lies: Lies = Arc::new(Mutex::new(but(|_| None)));
    let answering = answer_all(bravo, &lies);
    let (before, memory, mut known) = (left(&machine).await, victim.resident_bytes(), BTreeSet::new());
    let table = [lies_in_the_grant(), lies_of_the_wrong_kind(), lies_beside_the_answer(), lies_of_hashes()];
    for Lie { name, more, liar, expected } in table.into_iter().flatten() {
        *lies.lock().unwrap() = liar;
        let (said, code) = run(&victim, &[&["migrate", "web1", "--to", "bravo"][..], more].concat());
        assert_eq!(code, Some(1), "{name}: {said}");
        assert!(said.contains(expected) && said.contains("the VM was not moved"), "{name}: {said}");
        assert_eq!(left(&machine).await, before, "{name}");
        let id = failed(&victim, name, &mut known);
        println!("{name}: as it should be");
        // The others have nothing else to say.
        let commands = [&["watch", &id[..]][..], &["status", &id[..]], &["list"]];
        for words in commands.into_iter().filter(|_| name.contains("forge")) {
            let (said, code) = run(&victim, words);
            assert_eq!(code, Some(i32::from(words[0] == "watch")), "{name}: {said}");
        }
    }
    let more = victim.resident_bytes().saturating_sub(memory) / MIB;
    assert!(more < 48, "{more} MiB more");
    println!("{more} MiB more");
    answering.abort();
    for journal in journals(victim.folder.path()) {
        assert!(!journal.contains("handed-over") && journal.contains("failed"), "{journal}");
    }
    let folder = victim.folder.path().join("state/audit");
    let (audit, at) = ("audit", folder.to_str().unwrap());
    let commands =
        [&[audit, "--dir", at][..], &[audit, "verify", "--dir", at], &["recover"], &["status", "web1"]];
    for words in commands {
        let (said, code) = run(&victim, words);
        assert_eq!(code, Some(0), "{words:?}: {said}");
    }
    let log = victim.log();
    log.iter().for_each(|line| is_clean(line));
    assert!(victim.is_alive() && !log.iter().any(|line| line.contains("panicked")), "{log:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_that_lies_to_a_check_is_one_clean_problem() {
    let victim = start();
    let machine = guest(&victim).await;
    let bravo = Attacker::new(&victim, "bravo");
    let _session = bravo.session(&victim).await;
    let lies: Lies = Arc::new(Mutex::new(but(|_| None)));
    let answering = answer_all(bravo, &lies);
    let before = left(&machine).await;
    let not_fit = "gave an answer that does not fit `check`";
    let problems = |severity| json!({"checked": vec![problem(severity); 20]});
    let refused = json!({"refused": {"problems": [problem("problem")], "text": EVIL}});
    let started = json!({"started": {"hook_ms": 0, "warnings": [EVIL]}});
    let table = [
        ("problems that forge", 1, "cannot be moved", answers("check", problems("problem"))),
        ("warnings that forge", 0, "can be moved", answers("check", problems("warning"))),
        ("notes that forge", 0, "can be moved", answers("check", problems("note"))),
        ("a refusal that forges", 1, "FORGED", answers("check", refused)),
        ("an error that forges", 1, "the destination refused: ", answers("check", refusal(EVIL))),
        (
            "a grant",
            1,
            not_fit,
            answers("check", json!({"prepared": {"exports": [], "qemu": EVIL, "restartable": true}})),
        ),
        ("a start", 1, not_fit, answers("check", started)),
        ("a severity of tomorrow", 1, NOT_UNDERSTOOD, answers("check", problems(EVIL))),
        ("the stream's end", 1, "ended the migration's control stream", Arc::new(|_| Vec::new())),
    ];
    for (name, code, expected, liar) in table {
        *lies.lock().unwrap() = liar;
        let (said, ended) = run(&victim, &["check", "web1", "--to", "bravo"]);
        assert_eq!(ended, Some(code), "{name}: {said}");
        assert!(said.contains(expected), "{name}: {said}");
        assert_eq!(left(&machine).await, before, "{name}");
    }
    // Nobody waits for it longer than the configuration says.
    *lies.lock().unwrap() = Arc::new(|_| vec![Act::Silence]);
    let (said, ended) = run(&victim, &["check", "web1", "--to", "bravo"]);
    assert!(ended == Some(1) && said.contains("did not answer `check` within 32 s"), "{said}");
    assert_eq!(left(&machine).await, before);
    answering.abort();
    assert!(victim.is_alive());
    victim.log().iter().for_each(|line| is_clean(line));
}

/// A destination that says nothing does not keep the operator from taking it back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_to_a_silent_destination_is_cancelled() {
    let victim = start();
    let machine = guest(&victim).await;
    let bravo = Attacker::new(&victim, "bravo");
    let _session = bravo.session(&victim).await;
    let silent = |asked: &Asked| matches!(asked.request, Request::Prepare(_)).then(|| vec![Act::Silence]);
    let lies: Lies = Arc::new(Mutex::new(but(silent)));
    let answering = answer_all(bravo, &lies);
    let before = left(&machine).await;
    let (id, code) = run(&victim, &["migrate", "web1", "--to", "bravo", "--detach"]);
    assert_eq!(code, Some(0), "{id}");
    let path = format!("/v1/migrations/{}", id.trim());
    soon("the question to the destination", async {
        while victim.get(&path)["phase"] != "prepare" {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await;
    assert_eq!(run(&victim, &["cancel", "web1"]).1, Some(0));
    let (said, code) = run(&victim, &["watch", id.trim()]);
    assert!(code == Some(1) && said.contains("was cancelled in phase prepare"), "{said}");
    assert_eq!(left(&machine).await, before);
    answering.abort();
}
