//! A drain without guests: what an agent makes of one that an earlier life left under way, and of VMs that cannot
//! be moved. What it does with guests is shown by `tests/real`.

use serde_json::{Value, json};
use uuid::Uuid;
use vmferry::migrate::journal::{Ending, Record, Role};
use vmferry::migrate::phase::Phase;
use vmferry::migrate::progress::Outcome;

use super::schema::Description;
use super::settled::{journal, wait_for};
use super::{Agent, monitor};

fn shown(agent: &Agent) -> Value {
    let answer = agent.ask("GET", "/v1/drain", None);
    Description::load().accepts("get", "/v1/drain", &answer);
    serde_json::from_str(&answer.2).unwrap()
}

fn ended(agent: &Agent) -> Value {
    wait_for("the end of the drain", || Some(shown(agent)).filter(|drain| drain["stage"] == "ended"))
}

/// State and cause of a VM of the drain.
fn vm(drain: &Value, name: &str) -> (String, String) {
    let vms = drain["vms"].as_array().unwrap();
    let vm = vms.iter().find(|vm| vm["vm"] == name).unwrap_or_else(|| panic!("{name} in {drain}"));
    let text = |key: &str| vm[key].as_str().unwrap_or_default().to_owned();
    (text("state"), text("cause"))
}

/// As an earlier process has written it.
fn left_under_way(folder: &std::path::Path, guests: &[Value]) {
    let state = folder.join("state");
    std::fs::create_dir_all(&state).unwrap();
    let drain = json!({
        "id": Uuid::from_u128(77), "request": {"to": ["bravo"]}, "limits": {"at_once": 4, "per_peer": 4},
        "began_at": 1, "ended_at": null, "cancelled": false, "guests": guests,
        "peers": [{"name": "bravo", "takes": null, "set_aside": null}], "here_at_end": [],
    });
    std::fs::write(state.join("drain.json"), json!({"format": 1, "drain": drain}).to_string()).unwrap();
}

/// A drain that goes on as long as the agent: nobody answers its hand-over. The VM is `web2`.
pub(crate) fn left_for_ever(folder: &std::path::Path) -> &'static str {
    journal(folder, "web2", 2, Role::Source, vec![Record::HandedOver]);
    left_under_way(folder, &[moving("web2", 2)]);
    "[deadlines]\nundecided_s = 3600\n"
}

fn moving(vm: &str, migration: u128) -> Value {
    json!({"vm": vm, "disk_bytes": null, "ran": true, "state": "moving", "peer": "bravo",
           "migration": Uuid::from_u128(migration), "tries": []})
}

/// Each VM's truth is its migration's journal; what was handed over is not begun again, nor what is not here.
#[test]
fn a_drain_that_an_earlier_life_left_goes_on_by_the_journals() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    let ending = Ending::from(Outcome::Moved { leftovers: Vec::new() });
    let moved = vec![Record::HandedOver, Record::Runs, Record::Ended(ending)];
    journal(folder, "gone", 1, Role::Source, moved);
    journal(folder, "open", 2, Role::Source, vec![Record::Phase(Phase::Precopy), Record::HandedOver]);
    let waiting = json!({"vm": "waits", "disk_bytes": 5, "ran": true, "state": "waiting", "tries": []});
    left_under_way(folder, &[moving("gone", 1), moving("open", 2), moving("never", 3), waiting]);
    let names = ["gone", "open", "never", "waits"];
    let vms: String = names.iter().map(|name| format!("[vm.{name}]\nqmp = '{name}.qmp'\n")).collect();
    let agent = Agent::start_in(temporary, &format!("[deadlines]\nundecided_s = 1\n{vms}"));
    let drain = ended(&agent);
    assert_eq!(vm(&drain, "gone").0, "moved", "{drain}");
    assert_eq!(vm(&drain, "open").0, "undecided", "{drain}");
    for name in ["never", "waits"] {
        let (state, cause) = vm(&drain, name);
        assert_eq!(state, "stays", "{drain}");
        assert!(cause.contains("the guest is not as it was before"), "{drain}");
    }
    assert_eq!(drain["result"], "undecided");
    let mut status = std::process::Command::new(super::VMFERRY);
    let status = status.arg("--socket").arg(&agent.socket).args(["drain", "--status"]).output().unwrap();
    assert_eq!(status.status.code(), Some(4), "{status:?}");
    // One migration was begun: that of the VM that waited.
    let (_, _, all) = agent.ask("GET", "/v1/migrations", None);
    let all: Value = serde_json::from_str(&all).unwrap();
    let begun: Vec<_> = all.as_array().unwrap().iter().map(|one| one["vm"].as_str().unwrap()).collect();
    assert_eq!(begun, ["gone", "open", "waits"]);
}

/// A hand-over that nobody answers holds a drain up until it is shown as undecided: so long no other begins, and a
/// cancel is taken.
#[test]
fn one_drain_at_a_time_and_the_same_request_is_the_same_drain() {
    let temporary = tempfile::tempdir().unwrap();
    let deadlines = left_for_ever(temporary.path());
    let agent = Agent::start_in(temporary, &format!("{deadlines}[vm.web2]\nqmp = 'web2.qmp'\n"));
    let ask = |body: &str| agent.ask("POST", "/v1/drain", Some(body));
    assert_eq!(shown(&agent)["stage"], "under-way");
    let (status, _, body) = ask(r#"{"to":["bravo"],"vms":["web1"]}"#);
    assert_eq!(status, 409, "{body}");
    let same = ask(r#"{"to":["bravo"]}"#);
    Description::load().accepts("post", "/v1/drain", &same);
    assert_eq!((same.0, same.2.contains(&Uuid::from_u128(77).to_string())), (200, true), "{}", same.2);
    assert_eq!(agent.ask("POST", "/v1/drain/cancel", None).0, 202);
    wait_for("the cancel", || Some(shown(&agent)).filter(|drain| drain["stage"] == "cancelling"));
    let written = std::fs::read_to_string(agent.folder.path().join("state/drain.json")).unwrap();
    assert!(written.contains(r#""cancelled":true"#), "{written}");
}

/// A VM that cannot be moved is said with the reason, and the others have their turn.
#[test]
fn what_cannot_be_moved_does_not_stop_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let _kept = ["one", "two", "spared"]
        .map(|name| monitor(&folder.path().join(format!("{name}.qmp")), "running", "none"));
    let table = |name: &str| format!("[vm.{name}]\nqmp = '{name}.qmp'\n");
    let agent = Agent::start_in(folder, &["one", "two", "spared"].map(table).concat());
    let mut command = std::process::Command::new(super::VMFERRY);
    command.arg("--socket").arg(&agent.socket).args(["drain", "--to", "bravo", "--except", "sp*"]);
    let run = command.output().unwrap();
    let said = String::from_utf8_lossy(&run.stdout).into_owned() + &String::from_utf8_lossy(&run.stderr);
    assert_eq!(run.status.code(), Some(1), "{said}");
    for words in ["order: ", "one stays: ", "two stays: ", "0 of 2 VMs moved", "not empty: one, spared, two"]
    {
        assert!(said.contains(words), "{words:?} in {said}");
    }
    let drain = shown(&agent);
    assert_eq!((&drain["result"], &drain["stage"]), (&"incomplete".into(), &"ended".into()));
    let status = agent.ask("GET", "/v1/drain/events", None);
    assert_eq!(status.2.lines().count(), 1, "its end: {}", status.2);
}

/// What cannot be understood is said and left as it is.
#[test]
fn a_damaged_record_is_refused_and_left() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state/drain.json");
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, "{").unwrap();
    let agent = Agent::start_in(folder, "");
    let answer = agent.ask("POST", "/v1/drain", Some(r#"{"to":["bravo"]}"#));
    Description::load().accepts("post", "/v1/drain", &answer);
    assert!(answer.0 == 500 && answer.2.contains("damaged"), "{answer:?}");
    assert_eq!(std::fs::read_to_string(path).unwrap(), "{");
}
