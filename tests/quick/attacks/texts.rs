//! Texts of a hostile peer: no line on an operator's terminal or in the log is anybody's but this host's.

use std::time::Duration;

use uuid::Uuid;
use vmferry::migrate::journal::{FORMAT, Header, Journal, Record, Role};
use vmferry::migrate::message::{Asked, Refusal, Reply, Response};
use vmferry::migrate::phase::Phase;
use vmferry::net::message;

use super::victim::{Attacker, Victim};
use crate::rig::soon;

/// A forged line of the log, one of a command's answer, and sequences that a terminal obeys.
pub(super) const EVIL: &str = "no\n2026-11-29T10:00:00.000000Z  WARN vmferry: FORGED by bravo\r\n  the VM is  FORGED host's\n\
                    \u{1b}[2J\u{1b}]0;FORGED\u{7}\u{202e}\u{85}\u{2028}FORGED";

/// A migration that was handed over to bravo, of which bravo is asked again and again.
fn handed_over() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let header = Header {
        format: FORMAT,
        migration: Uuid::from_u128(1),
        role: Role::Source,
        vm: "web1".into(),
        host: "alpha".into(),
        peer: "bravo".into(),
        began_at: time::OffsetDateTime::now_utc().unix_timestamp() - 60,
        began_ns: None,
        running: true,
        keep_source: false,
        retry: None,
        accepted: Default::default(),
    };
    let journals = folder.path().join("state/migrations");
    std::fs::create_dir_all(&journals).unwrap();
    let mut journal = Journal::create(&journals, header).unwrap();
    for record in [Record::Phase(Phase::Precopy), Record::HandedOver] {
        journal.record(record).unwrap();
    }
    folder
}

/// Answers whatever is asked with the text, until it is dropped.
fn answer_all(mut bravo: Attacker, text: &'static str) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        while let Some(stream) = bravo.incoming.recv().await {
            let session = stream.session().clone();
            let (mut sender, mut receiver) = message::split(stream.accept().await.unwrap(), &session);
            if let Ok(Some(asked)) = receiver.recv::<Asked>().await {
                let refusal = Refusal { problems: Vec::new(), text: text.into() };
                let (number, response) = (asked.number, Response::Refused(refusal));
                let _ = sender.send(&Reply::Response { number, response }).await;
                sender.finish();
            }
        }
    })
}

/// What `recover`, `status` and the log say when bravo answers so.
async fn said(text: &'static str) -> (Vec<String>, Vec<String>) {
    let victim = Victim::start_in(handed_over(), |text| text + "[deadlines]\nundecided_s = 1\n");
    let bravo = Attacker::new(&victim, "bravo");
    let _session = bravo.session(&victim).await;
    let answering = answer_all(bravo, text);
    // What is said before it counts as undecided is less.
    let (shown, status) = soon("bravo's words", async {
        loop {
            let ask = |words: &[&str]| tokio::task::block_in_place(|| victim.vmferry(words).0);
            let (status, shown) = (ask(&["status", "web1"]), ask(&["recover", "--look"]));
            if status.contains("undecided") && shown.contains("the destination refused: ") {
                return (shown, status);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    answering.abort();
    let lines = |text: String| text.split('\n').map(str::to_owned).collect::<Vec<_>>();
    (lines(shown + &status), victim.log())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hostile_destination_writes_no_line_on_a_terminal_or_in_the_log() {
    let ((honest, _), (shown, log)) = (said("no").await, said(EVIL).await);
    assert_eq!(shown.len(), honest.len(), "{shown:#?}");
    assert!(shown.iter().any(|line| line.contains("FORGED")), "it does answer: {shown:#?}");
    shown.iter().chain(&log).for_each(|line| is_clean(line));
}

/// It is this host's own, and no terminal obeys anything in it.
pub(super) fn is_clean(line: &str) {
    assert!(!line.trim_start().starts_with("2026-11-29T10:00:00"), "{line:?}");
    assert!(!line.trim_start().starts_with("the VM is  FORGED"), "{line:?}");
    let obeyed = |c: char| c.is_control() || ('\u{202a}'..='\u{202e}').contains(&c);
    assert!(!line.chars().any(obeyed), "{line:?}");
}

/// Names in requests of this host's own users reach the log as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_to_the_local_api_forges_a_line_of_the_log() {
    let victim = Victim::start();
    let vm = "x\n2026-11-29T10:00:00.000000Z  WARN FORGED\u{1b}[2J";
    tokio::task::block_in_place(|| victim.vmferry(&["migrate", vm, "--to", vm, "--detach"]));
    victim.logs(|line| line.contains("migrate asked for")).await;
    let log = victim.log();
    assert!(log.iter().any(|line| line.contains("FORGED")), "{log:#?}");
    for line in log {
        assert!(!line.starts_with("2026-11-29T10:00:00.000000Z"), "{line:?}");
        assert!(!line.chars().any(char::is_control), "{line:?}");
    }
}
