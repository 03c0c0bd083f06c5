//! What an agent makes of journals that an earlier life left open, with a peer that cannot be
//! reached: each is settled by what it says itself, also where a later one of the same VM is open.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use uuid::Uuid;
use vmferry::migrate::journal::{Ending, FORMAT, Header, Journal, Past, Record, Role, Undo};
use vmferry::migrate::phase::Phase;
use vmferry::qemu::ProcessId;

use super::{ANSWER_WITHIN, Agent, VMFERRY};
use crate::forward::agents::{Agent as Dialled, Ground};

pub(super) fn journal(folder: &Path, vm: &str, number: u128, role: Role, records: Vec<Record>) {
    let now = time::OffsetDateTime::now_utc().unix_timestamp();
    let header = Header {
        format: FORMAT,
        migration: Uuid::from_u128(number),
        role,
        vm: vm.into(),
        host: "alpha".into(),
        peer: "bravo".into(),
        began_at: now - 1000 + number as i64,
        began_ns: None,
        running: true,
        keep_source: false,
        retry: None,
        accepted: Default::default(),
    };
    let folder = folder.join("state/migrations");
    std::fs::create_dir_all(&folder).unwrap();
    let mut journal = Journal::create(&folder, header).unwrap();
    records.into_iter().for_each(|record| journal.record(record).unwrap());
}

fn past(agent: &Agent, number: u128, role: Role) -> Past {
    let folder = agent.folder.path().join("state/migrations");
    Journal::peek(&Journal::path(&folder, Uuid::from_u128(number), role), "alpha").unwrap()
}

pub(super) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let since = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(since.elapsed() < ANSWER_WITHIN, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn ended(agent: &Agent, number: u128, role: Role) -> Ending {
    wait_for(&format!("the end of {number}"), || past(agent, number, role).ended)
}

fn case(agent: &Agent, number: u128) -> Option<Value> {
    let (_, _, body) = agent.ask("GET", "/v1/recover?peers=false", None);
    let body: Value = serde_json::from_str(&body).unwrap();
    let id = Uuid::from_u128(number).to_string();
    body["cases"].as_array().unwrap().iter().find(|case| case["id"] == id.as_str()).cloned()
}

fn undecided(agent: &Agent, number: u128) -> Value {
    wait_for(&format!("{number} to be undecided"), || {
        case(agent, number).filter(|case| case["kind"] == "undecided")
    })
}

/// `vmferry recover --force` of that migration: how it ends, and what it says.
fn decides(agent: &Agent, number: u128, side: &str, words: &[&str]) -> (Option<i32>, String) {
    let id = Uuid::from_u128(number).to_string();
    let mut command = Command::new(VMFERRY);
    command.arg("--socket").arg(&agent.socket).args(["recover", &id, "--force", side]).args(words);
    let ended = command.stdin(std::process::Stdio::null()).output().unwrap();
    let said = [ended.stdout, ended.stderr].concat();
    (ended.status.code(), String::from_utf8_lossy(&said).into_owned())
}

/// The QEMU of a migration: a process that has ended, since another has its number.
fn ended_qemu() -> Record {
    let pid = std::process::id().try_into().unwrap();
    let pid_namespace = std::fs::read_link("/proc/self/ns/pid").unwrap().display().to_string();
    Record::Qemu(ProcessId { pid, started_ticks: 1, pid_namespace })
}

/// In the last moments of a migration an operator may have decided at the other host: whoever has no QEMU any more
/// asks there, and invites nobody to start the VM until it knows.
#[test]
fn a_guest_without_a_qemu_is_nobodys_before_the_other_host_is_asked() {
    let vms = "[deadlines]\nundecided_s = 1\n[vm.claims]\nqmp = 'claims.qmp'\n[vm.missing]\nqmp = 'missing.qmp'\n\
               [vm.early]\nqmp = 'early.qmp'\n";
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    journal(folder, "claims", 1, Role::Destination, vec![ended_qemu(), Record::Starting]);
    journal(folder, "missing", 2, Role::Source, vec![ended_qemu(), Record::Phase(Phase::Device)]);
    // The destination cannot have had the whole guest, so that nobody can have decided there.
    journal(folder, "early", 3, Role::Source, vec![ended_qemu(), Record::Phase(Phase::Switchover)]);
    let agent = Agent::start_in(temporary, vms);
    for (number, role) in [(1, Role::Destination), (2, Role::Source)] {
        let case = undecided(&agent, number);
        let plan = case["plan"].as_str().unwrap();
        assert!(plan.contains("nowhere until then") && case["may_force"] == true, "{case}");
        assert!(case["owner"] == "unknown" && past(&agent, number, role).ended.is_none(), "{case}");
    }
    let Ending::Failed { leftovers, .. } = ended(&agent, 3, Role::Source) else { panic!("it has moved") };
    assert!(leftovers.concat().contains("runs nowhere"), "{leftovers:?}");
    let (_, said) = decides(&agent, 1, "here", &["--yes"]);
    assert!(said.contains("decided: claims is this host's"), "{said}");
    let Ending::Moved { leftovers, .. } = ended(&agent, 1, Role::Destination) else {
        panic!("it was given up")
    };
    assert!(leftovers.concat().contains("start the VM here"), "{leftovers:?}");
    let (_, said) = decides(&agent, 2, "there", &["--yes"]);
    assert!(said.contains("decided: missing is the other host's"), "{said}");
    // Nothing of it says that the guest is here.
    let Ending::Moved { leftovers, .. } = ended(&agent, 2, Role::Source) else { panic!("it stayed") };
    assert!(leftovers.is_empty(), "{leftovers:?}");
}

#[test]
fn open_journals_are_settled_by_what_they_say() {
    let vms = "[deadlines]\nundecided_s = 1\n[vm.two]\nqmp = 'two.qmp'\n[vm.back]\nqmp = 'back.qmp'\n\
               [vm.mute]\nqmp = 'mute.qmp'\n";
    let temporary = tempfile::tempdir().unwrap();
    let (folder, source, destination) = (temporary.path(), Role::Source, Role::Destination);
    // Handed over, and a later migration of the VM was begun.
    let handed = vec![Record::Phase(Phase::Precopy), Record::HandedOver];
    journal(folder, "two", 1, source, handed);
    journal(folder, "two", 2, source, vec![Record::Phase(Phase::Mirror)]);
    // Begun to be started here, and a later migration brings the VM anew.
    journal(folder, "back", 3, destination, vec![Record::Starting]);
    journal(folder, "back", 4, destination, Vec::new());
    // Begun to be started here, in a QEMU that does not answer.
    journal(folder, "mute", 5, destination, vec![Record::Starting]);
    let _silent = UnixListener::bind(folder.join("mute.qmp")).unwrap();
    let agent = Agent::start_in(temporary, vms);
    a_later_migration_does_not_decide(&agent);
    let later = ended(&agent, 4, Role::Destination);
    assert!(matches!(later, Ending::Failed { .. }), "{later:?}");
    let earlier = ended(&agent, 3, Role::Destination);
    assert!(matches!(earlier, Ending::Moved { .. }), "the guest may have run here: {earlier:?}");
    // It lives, for all that is known.
    let mute = undecided(&agent, 5);
    assert!(mute["plan"].as_str().unwrap().contains("cannot be asked"), "{mute}");
    assert_eq!(mute["may_force"], false, "{mute}");
    // What was not taken has failed, what was not asked rightly is of another sort.
    for (words, code, says) in
        [(&["--yes"][..], 1, "is not undecided on this host"), (&["--nobody"], 2, "--nobody")]
    {
        let (ended, said) = decides(&agent, 5, "there", words);
        assert!(ended == Some(code) && said.contains(says), "{words:?}: {ended:?}: {said}");
    }
    assert!(past(&agent, 5, Role::Destination).ended.is_none(), "a QEMU that is silent was given up");
}

/// Somebody has taken the VMs out of the configuration before the agent was started again.
#[test]
fn what_was_made_for_a_vm_that_is_configured_no_more_is_said_to_be_left() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    let node = Record::Undo(Undo::Node("vmferry-disk0".into()));
    journal(folder, "gone", 1, Role::Source, vec![node, Record::Phase(Phase::Switchover)]);
    journal(folder, "lost", 2, Role::Destination, vec![Record::Undo(Undo::NbdServer)]);
    let agent = Agent::start_in(temporary, "");
    for (number, role) in [(1, Role::Source), (2, Role::Destination)] {
        let Ending::Failed { cause, leftovers, .. } = ended(&agent, number, role) else {
            panic!("it has moved")
        };
        let left = leftovers.concat();
        assert!(left.contains("is not undone") && left.contains("to the configuration"), "{leftovers:?}");
        assert!(!cause.contains("it was rolled back"), "{cause}");
    }
}

fn a_later_migration_does_not_decide(agent: &Agent) {
    let later = ended(agent, 2, Role::Source);
    assert!(matches!(later, Ending::Failed { .. }), "{later:?}");
    let case = undecided(agent, 1);
    assert_eq!((&case["owner"], &case["phase"]), (&"unknown".into(), &"hand-over".into()), "{case}");
    assert!(past(agent, 1, Role::Source).ended.is_none(), "it was ended without asking");
    let id = Uuid::from_u128(1);
    let (_, _, body) = agent.ask("GET", &format!("/v1/migrations/{id}"), None);
    let shown: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(shown["phase"], "undecided", "{shown}");
    let (code, said) = decides(agent, 1, "there", &[]);
    assert!(code == Some(2) && said.contains("needs --yes"), "without a word of assent: {code:?}: {said}");
    let (status, _, body) = agent.ask("POST", &format!("/v1/recover/{id}"), Some(r#"{"force":"there"}"#));
    assert_eq!(status, 202, "{body}");
    let outcome = ended(agent, 1, Role::Source);
    assert!(matches!(outcome, Ending::Moved { .. }), "{outcome:?}");
    let records = past(agent, 1, Role::Source);
    assert!(records.forced.is_some() && records.runs, "{records:?}");
}

/// It cannot tell a folder that was lost from a migration that never was: nothing is decided, and an operator hears
/// what that means and what is safe.
#[test]
fn a_destination_that_has_lost_its_state_folder_decides_nothing() {
    let ground = Ground::new();
    journal(&ground.path("alpha"), "web1", 1, Role::Source, vec![Record::HandedOver]);
    let vms = "[vm.web1]\nqmp = 'web1.qmp'\n";
    let bravo = ground.bravo(vms);
    let alpha = ground.alpha(&format!("{vms}[deadlines]\nundecided_s = 1\n"));
    let case = wait_for("the case of a destination without a record", || {
        let case = alpha.api("/v1/recover?peers=true")["cases"][0].clone();
        case["plan"].as_str().is_some_and(|plan| plan.contains("no record")).then_some(case)
    });
    assert!(case["kind"] == "undecided" && case["owner"] == "unknown" && case["may_force"] == true, "{case}");
    assert!(case["peer_says"].as_str().unwrap().contains("no record"), "{case}");
    for words in ["may run the guest all the same", "decide `there`", "only if it surely has not"] {
        assert!(case["plan"].as_str().unwrap().contains(words), "{words}: {case}");
    }
    alpha.says("no record");
    assert!(!bravo.log().contains("ERROR"), "{}", bravo.log());
}

/// Waits without end for whoever had dialled it, by these tests' clock.
const WAITS: &str = "[deadlines]\nresume_s = 600\nresume_paused_s = 600\n";

/// Bravo, whose only session alpha has dialled, and alpha.
fn connected(ground: &Ground, more: &str) -> (Dialled, Dialled) {
    let bravo = ground.bravo(WAITS);
    let alpha = ground.alpha(more);
    let (is_reached, said) = alpha.run(&["ping", "bravo"]);
    assert!(is_reached, "{said}");
    let sessions = bravo.api("/v1/status")["sessions"].clone();
    assert!(sessions.as_array().unwrap().len() == 1 && sessions[0]["dialed"] == false, "{sessions}");
    (alpha, bravo)
}

/// The one that had accepted the session waits for its dialler; only a new session tells it that this is in vain.
#[test]
fn a_new_process_with_something_open_makes_itself_known() {
    let open = [(1, Role::Destination, Vec::new()), (2, Role::Source, vec![Record::Phase(Phase::Mirror)])];
    for (number, role, records) in open {
        let ground = Ground::new();
        let (mut alpha, bravo) = connected(&ground, "[vm.web1]\nqmp = 'web1.qmp'\n");
        alpha.kill();
        bravo.says("connection lost; the session waits for another");
        journal(&ground.path("alpha"), "web1", number, role, records);
        alpha.start();
        bravo.says("the peer's agent is a new one");
        bravo.says("was started anew, without what it had before");
        let sessions = wait_for("the new session alone", || {
            let sessions = bravo.api("/v1/status")["sessions"].as_array().unwrap().clone();
            (sessions.len() == 1).then_some(sessions)
        });
        assert!(sessions[0].get("reconnecting").is_none_or(Value::is_null), "{role:?}: {sessions:?}");
        alpha.says("the peer knows that this is a new process");
    }
}

/// It is the same agent to its peers, and has all that the process before had.
#[test]
fn who_takes_over_ends_no_session() {
    let ground = Ground::new();
    let vms = "[deadlines]\nundecided_s = 1\n[vm.web1]\nqmp = 'web1.qmp'\n";
    journal(&ground.path("alpha"), "web1", 1, Role::Source, vec![Record::HandedOver]);
    let (mut alpha, bravo) = connected(&ground, vms);
    alpha.says("the peer knows that this is a new process");
    alpha.take_over();
    let (is_reached, said) = alpha.run(&["ping", "bravo"]);
    assert!(is_reached, "{said}");
    wait_for("the migration to be open still", || {
        (alpha.api("/v1/recover?peers=false")["cases"][0]["kind"] == "undecided").then_some(())
    });
    let (alphas, bravos) = (alpha.log(), bravo.log());
    assert_eq!(alphas.matches("the peer knows that this is a new process").count(), 1, "{alphas}");
    assert!(
        !bravos.contains("the peer's agent is a new one") && !bravos.contains("session ends"),
        "{bravos}"
    );
}

/// Nobody is asked without end, and it is said once.
#[test]
fn a_peer_that_cannot_be_told_is_named_once() {
    let ground = Ground::new();
    journal(&ground.path("alpha"), "web1", 1, Role::Destination, Vec::new());
    journal(&ground.path("alpha"), "web2", 2, Role::Source, vec![Record::HandedOver]);
    let mut alpha =
        ground.alpha("[deadlines]\nresume_s = 4\n[vm.web1]\nqmp = 'web1.qmp'\n[vm.web2]\nqmp = 'web2.qmp'\n");
    alpha.says("the peer could not be told that this is a new process");
    alpha.stop();
    let log = alpha.log();
    assert_eq!(log.matches("could not be told that this is a new process").count(), 1, "{log}");
}
