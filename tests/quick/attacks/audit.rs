//! What an agent records: who asked what of it, who was refused, what came of it.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use vmferry::audit::{judge, paths};
use vmferry::migrate::message::{Request, Response};
use vmferry::mux::{Code, Open, purpose};

use super::outside_grant::{granted, waiting_qemu};
use super::victim::{Attacker, Victim, answer, ask, control, offer};
use crate::rig::{soon, until};

/// All lines of a victim's record of one kind.
pub(super) fn events(victim: &Victim, event: &str) -> Vec<Value> {
    let mut found = Vec::new();
    let folder = victim.folder.path().join("state/audit");
    judge(&folder, &[], |line| found.extend((line.event() == event).then(|| line.whole.clone()))).unwrap();
    found
}

/// A request, as the record has it, the answer to it, and what the command line said. The agent waits 2 s for the disk
/// and then does not know the request's line: on a slow disk another one is made.
async fn recorded_request(victim: &Victim) -> (Value, Value, String) {
    let folder = victim.folder.path().join("state/audit");
    until("the record", || paths(&folder).is_ok_and(|files| !files.is_empty())).await;
    until("its first line", || !events(victim, "agent-starts").is_empty()).await;
    soon("an answer that names its request", async {
        for tries in 1.. {
            let (said, _) = victim.vmferry(&["migrate", "web1", "--to", "nowhere"]);
            until("an answer", || events(victim, "answered").len() == tries).await;
            let answered = events(victim, "answered").remove(tries - 1);
            let mut asked = events(victim, "asked").into_iter();
            if let Some(asked) = asked.find(|asked| asked["n"] == answered["asked"]) {
                return (asked, answered, said);
            }
            assert!(answered["asked"].is_null(), "{answered}");
        }
        unreachable!()
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_records_who_asked_what_and_who_was_refused() {
    let victim = Victim::start();
    let (asked, answered, said) = recorded_request(&victim).await;
    assert_eq!(
        (&asked["action"], &asked["request"]["to"]),
        (&Value::from("migrate"), &Value::from("nowhere"))
    );
    assert_eq!(asked["by"]["uid"], u32::from(nix::unistd::getuid()), "{said}");
    let bravo = Attacker::new(&victim, "bravo");
    let session = bravo.session(&victim).await;
    for _ in 0..20 {
        let answer = ask(&session, Request::Prepare(offer("db1"))).await;
        assert!(matches!(answer, Response::Refused(_)), "{answer:?}");
    }
    let of_db1 = |line: &Value| line["reason"] == "not-permitted" && line["source"] == "bravo";
    until("a refusal", || events(&victim, "refused").iter().any(of_db1)).await;
    let refused = events(&victim, "refused").into_iter().filter(of_db1).count();
    assert_eq!(refused, 1, "once, however often");
    let shown = victim.pki().join("hosts/bravo/cert.pem");
    let (shown, _) = victim.vmferry(&["certs", "show", shown.to_str().unwrap(), "--json"]);
    let shown: Value = serde_json::from_str(&shown).unwrap();
    until("a session", || !events(&victim, "session-begins").is_empty()).await;
    let begun = &events(&victim, "session-begins")[0];
    assert_eq!((&begun["peer"], &begun["certificate"]), (&"bravo".into(), &shown[0]["fingerprint_sha256"]));
    assert_eq!((&answered["asked"], &answered["status"]), (&asked["n"], &Value::from(201)));
    let id = answered["migration"].as_str().unwrap();
    let of_id = |line: &Value| line["migration"] == id && line["result"] == "failed";
    until("its end", || events(&victim, "migration").iter().any(of_id)).await;
    // Read again by the command line, and what an attacker cuts off is seen while the agent runs.
    let folder = victim.folder.path().join("state/audit");
    let folder = folder.to_str().unwrap();
    let (said, _) = victim.vmferry(&["audit", "--since", "1h", "--migration", id, "--dir", folder]);
    assert!(said.lines().count() >= 3 && said.contains("result=failed"), "{said}");
    let (said, is_whole) = victim.vmferry(&["audit", "verify", "--dir", folder]);
    assert!(is_whole && said.contains("the running agent's word"), "{said}");
    let file = &paths(Path::new(folder)).unwrap()[0];
    let text = std::fs::read_to_string(file).unwrap();
    let end = text.trim_end().rfind('\n').unwrap() + 1;
    std::fs::write(file, &text[..end]).unwrap();
    let (said, is_whole) = victim.vmferry(&["audit", "verify", "--dir", folder]);
    assert!(!is_whole && said.contains("the anchor knows line"), "{said}");
}

/// A known peer that may nothing does not roll away who did what here.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_of_one_peer_in_a_row_are_so_many_lines_and_a_number() {
    const TIMES: usize = 60;
    let victim = Victim::start();
    let charlie = Attacker::new(&victim, "charlie");
    for _ in 0..TIMES {
        let session = loop {
            match charlie.dial(&victim).await {
                Ok(session) => break session,
                // Those before have not ended there.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        };
        session.close(Code::Shutdown, "again");
        soon("its end", session.ended()).await;
    }
    let ended = || victim.log().iter().filter(|line| line.contains("session ends")).count();
    until("all to have ended", || ended() == TIMES).await;
    let pid = nix::unistd::Pid::from_raw(victim.pid());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    until("the sum", || !events(&victim, "further-sessions").is_empty()).await;
    let of_charlie = |event| events(&victim, event).iter().filter(|line| line["peer"] == "charlie").count();
    let recorded = of_charlie("session-begins") + of_charlie("session-ends");
    assert!((60..70).contains(&recorded), "{recorded} lines");
    let further = &events(&victim, "further-sessions")[0];
    assert_eq!((&further["peer"], &further["events"]), (&"charlie".into(), &(2 * TIMES - recorded).into()));
}

/// A peer that may send a VM does not roll it away either: it is granted again and again, and gives up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn migrations_that_a_peer_begins_and_gives_up_are_so_many_lines_and_a_number() {
    const AT_ONCE: usize = 60;
    const BEYOND: usize = 10;
    let victim = Victim::start();
    let _qemu = waiting_qemu(&victim).await;
    let session = Attacker::new(&victim, "bravo").session(&victim).await;
    // One more is recorded every ten seconds, so a slow machine begins more of them.
    let since = Instant::now();
    let recorded_at_most = || AT_ONCE + 1 + since.elapsed().as_secs() as usize / 10;
    let mut begun = 0;
    while begun < recorded_at_most() + BEYOND {
        begun += 1;
        let (migration, prepared, mut sender, mut receiver) = granted(&session).await;
        // From here on each has data: which of them are recorded is not known.
        if begun > AT_ONCE {
            let channel = prepared.exports[0].channel;
            let disk = Open { purpose: purpose::NBD, channel, ..control(migration) };
            soon("the disk's stream", session.open(disk)).await.unwrap().accepted().await.unwrap();
        }
        let given_up = answer(&mut sender, &mut receiver, Request::Abort { reason: "over".into() }).await;
        assert!(matches!(given_up, Response::Fate(_)), "{given_up:?}");
    }
    let recorded_at_most = recorded_at_most();
    let pid = nix::unistd::Pid::from_raw(victim.pid());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    until("the sum", || !events(&victim, "further-migrations").is_empty()).await;
    let granted = events(&victim, "granted").len();
    assert!((AT_ONCE..=recorded_at_most).contains(&granted), "{granted} grants of {begun}");
    let ended = events(&victim, "migration").iter().filter(|line| line["result"] == "failed").count();
    assert_eq!(ended, granted, "each of these has its end");
    let further = &events(&victim, "further-migrations")[0];
    assert_eq!((&further["peer"], &further["migrations"]), (&"bravo".into(), &(begun - granted).into()));
    assert_eq!(further["data_of"], serde_json::json!(["web1"]), "whose image it could read and write");
}
