//! The audit record: what an attacker may do to its files is found, what a crash or a full disk does to it is
//! mended and said. `attacks/audit.rs` has what an agent records.

use std::path::{Path, PathBuf};

use serde_json::Value;
use uuid::Uuid;
use vmferry::audit::{Anchor, Audit, Event, Limits, MigrationLines, Report, Step, Subject, judge, paths};

use crate::rig::{soon, until};

const SMALL: Limits = Limits { file_bytes: 1500, files: 4 };

fn step(number: u128) -> Event {
    let subject = Subject {
        migration: Uuid::from_u128(number),
        first: None,
        role: "source",
        vm: format!("web{number}"),
        peer: "bravo".into(),
    };
    Event::Migration(Step { subject, phase: "done", result: Some("moved"), cause: None })
}

/// A record with so many events, in files of a few lines.
async fn record(folder: &Path, limits: Limits, events: u128) -> Vec<PathBuf> {
    let audit = Audit::start(folder, "alpha", limits).unwrap();
    for n in 0..events {
        audit.record(step(n));
    }
    audit.close(Event::AgentEnds { left_to_another: false }).await;
    assert_eq!(audit.figures().failing, None);
    paths(folder).unwrap()
}

fn judged(folder: &Path, anchors: &[Anchor]) -> Report {
    judge(folder, anchors, |_| {}).unwrap()
}

/// All lines with their ends, as (file, line).
fn lines(files: &[PathBuf]) -> Vec<(PathBuf, String)> {
    let of = |path: &PathBuf| {
        let text = std::fs::read_to_string(path).unwrap();
        text.split_inclusive('\n').map(|line| (path.clone(), line.to_owned())).collect::<Vec<_>>()
    };
    files.iter().flat_map(of).collect()
}

fn write(lines: &[(PathBuf, String)]) {
    let mut texts = std::collections::BTreeMap::<&PathBuf, String>::new();
    for (path, line) in lines {
        texts.entry(path).or_default().push_str(line);
    }
    texts.into_iter().for_each(|(path, text)| std::fs::write(path, text).unwrap());
}

#[tokio::test]
async fn whatever_is_done_to_a_line_but_the_last_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let files = record(folder.path(), Limits { files: 100, ..SMALL }, 20).await;
    assert!(files.len() > 3, "{files:?}");
    let whole = lines(&files);
    let report = judged(folder.path(), &[]);
    assert_eq!((report.problems.len(), report.lines, report.first), (0, whole.len() as u64, Some(1)));
    type Tamper = fn(&mut Vec<(PathBuf, String)>, usize);
    let kinds: [(&str, Tamper); 6] = [
        ("changed", |all, at| all[at].1 = all[at].1.replace("\"at\":\"2", "\"at\":\"3")),
        ("changed, and not to be read", |all, at| all[at].1 = "gone\n".into()),
        ("removed", |all, at| drop(all.remove(at))),
        ("doubled", |all, at| all.insert(at, all[at].clone())),
        ("moved", |all, at| {
            let (this, next) = (all[at].1.clone(), all[at + 1].1.clone());
            (all[at].1, all[at + 1].1) = (next, this);
        }),
        ("without its end", |all, at| all[at].1 = all[at].1.trim_end().to_owned()),
    ];
    for (kind, tamper) in kinds {
        for at in 0..whole.len() - 1 {
            let mut all = whole.clone();
            tamper(&mut all, at);
            assert_ne!(all, whole, "{kind} {at}");
            // A file that is left without a line is not there.
            files.iter().for_each(|path| drop(std::fs::remove_file(path)));
            write(&all);
            let found = judged(folder.path(), &[]).problems;
            assert!(!found.is_empty(), "line {} {kind}: nothing was found", at + 1);
        }
    }
    for gone in &files[..files.len() - 1] {
        write(&whole);
        std::fs::remove_file(gone).unwrap();
        assert!(!judged(folder.path(), &[]).problems.is_empty(), "{} removed", gone.display());
    }
    write(&whole);
    assert_eq!(judged(folder.path(), &[]), report);
}

/// What a chain cannot show, and what an anchor shows.
#[tokio::test]
async fn a_lost_end_and_a_record_written_anew_are_found_by_an_anchor() {
    let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let files = record(folder.path(), Limits { files: 100, ..SMALL }, 20).await;
    let head: Anchor = judged(folder.path(), &[]).head.unwrap().parse().unwrap();
    assert_eq!(judged(folder.path(), std::slice::from_ref(&head)).problems, [""; 0]);
    let whole = lines(&files);
    let mut cut = whole.clone();
    cut.truncate(whole.len() - 1);
    write(&cut);
    assert_eq!(judged(folder.path(), &[]).problems, [""; 0], "a chain alone cannot know");
    let found = judged(folder.path(), std::slice::from_ref(&head)).problems;
    assert!(found[0].contains("ends at line") && found[0].contains("the anchor knows"), "{found:?}");
    record(other.path(), Limits { files: 100, ..SMALL }, 20).await;
    assert_eq!(judged(other.path(), &[]).problems, [""; 0]);
    let found = judged(other.path(), &[head]).problems;
    assert!(found[0].contains("is not the one that the anchor knows"), "{found:?}");
    for wrong in ["", "7", "7:", "x:00", &format!("7:{}", "g".repeat(64))] {
        assert!(wrong.parse::<Anchor>().is_err(), "{wrong}");
    }
}

#[tokio::test]
async fn old_files_go_and_the_record_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let files = record(folder.path(), SMALL, 60).await;
    assert_eq!(files.len(), SMALL.files);
    let report = judged(folder.path(), &[]);
    assert!(report.problems.is_empty() && report.first > Some(1), "{report:?}");
    // Whoever removes one more is found.
    std::fs::remove_file(&files[0]).unwrap();
    let found = judged(folder.path(), &[]).problems;
    assert!(found.iter().any(|p| p.contains("does not say that they were removed")), "{found:?}");
}

#[tokio::test]
async fn what_a_killed_agent_leaves_is_mended_and_said() {
    let folder = tempfile::tempdir().unwrap();
    let files = record(folder.path(), Limits::default(), 3).await;
    let whole = std::fs::read_to_string(&files[0]).unwrap();
    for torn in [1, 40, whole.lines().last().unwrap().len()] {
        std::fs::write(&files[0], &whole[..whole.len() - torn]).unwrap();
        let found = judged(folder.path(), &[]).problems;
        assert!(found.len() == 1 && found[0].contains("is cut off"), "{found:?}");
        record(folder.path(), Limits::default(), 1).await;
        assert_eq!(judged(folder.path(), &[]).problems, [""; 0]);
        let said = std::fs::read_to_string(&files[0]).unwrap();
        assert!(said.contains("\"event\":\"torn-line\""), "{said}");
    }
    // A file of which not even the first line was written is begun again.
    std::fs::write(&files[0], &whole).unwrap();
    let next = folder.path().join(format!("{:020}.jsonl", whole.lines().count() + 1));
    std::fs::write(&next, "{\"at\":").unwrap();
    record(folder.path(), Limits::default(), 1).await;
    assert_eq!(judged(folder.path(), &[]).problems, [""; 0]);
}

/// Nothing can be written in a folder that is a file.
#[tokio::test]
async fn a_disk_that_takes_nothing_is_said_and_nothing_is_lost_when_it_does_again() {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().join("audit");
    std::fs::write(&folder, "").unwrap();
    let audit = Audit::start(&folder, "alpha", Limits::default()).unwrap();
    (0..10).for_each(|n| audit.record(step(n)));
    until("a failure", || audit.figures().failing.is_some()).await;
    assert_eq!(soon("an answer", audit.record_durably(step(10))).await, None);
    // What waits is still there after further failures.
    let before = audit.figures().failures;
    until("further failures", || audit.figures().failures >= before + 2).await;
    let failing = audit.figures();
    assert!(failing.failures > 0 && failing.failing.unwrap().contains("audit"));
    std::fs::remove_file(&folder).unwrap();
    until("a disk", || audit.figures().failing.is_none()).await;
    assert!(soon("an answer", audit.record_durably(step(11))).await.is_some());
    audit.close(Event::AgentEnds { left_to_another: false }).await;
    let mut vms = Vec::new();
    let report = judge(&folder, &[], |line| vms.extend(line.field("vm").cloned())).unwrap();
    assert_eq!((report.problems.len(), audit.figures().lost), (0, 0));
    assert_eq!(vms, (0..12).map(|n| Value::from(format!("web{n}"))).collect::<Vec<_>>());
}

/// Of a peer that begins one migration after the other and gives it up so many are recorded; of what comes to something
/// nothing is missing, however many that peer has begun before.
#[tokio::test]
async fn what_a_peer_begins_and_gives_up_is_so_many_lines_and_a_number_and_a_hand_over_is_whole() {
    let folder = tempfile::tempdir().unwrap();
    let audit = Audit::start(folder.path(), "alpha", Limits { file_bytes: 1 << 20, files: 4 }).unwrap();
    for n in 0..100 {
        let lines = MigrationLines::of_peer(&audit, "bravo");
        lines.record(step(n));
        lines.record(step(n));
    }
    let handed_over = MigrationLines::of_peer(&audit, "bravo");
    handed_over.record(step(1000));
    handed_over.record(step(1001));
    handed_over.release();
    handed_over.record(step(1002));
    MigrationLines::of_peer(&audit, "charlie").record(step(2000));
    MigrationLines::all(&audit).record(step(3000));
    drop(handed_over);
    audit.close(Event::AgentEnds { left_to_another: false }).await;
    let (mut vms, mut further) = (Vec::new(), Vec::new());
    judge(folder.path(), &[], |line| match line.event() {
        "migration" => vms.push(line.whole["vm"].as_str().unwrap().to_owned()),
        "further-migrations" => further.push(line.whole.clone()),
        _ => {}
    })
    .unwrap();
    let numbered = |numbers: &[u128]| numbers.iter().map(|n| format!("web{n}")).collect::<Vec<_>>();
    assert_eq!(vms[vms.len() - 5..], numbered(&[1000, 1001, 1002, 2000, 3000]));
    assert_eq!(vms.len(), 2 * 60 + 5);
    assert_eq!(further.len(), 1, "{further:?}");
    assert_eq!((&further[0]["peer"], &further[0]["migrations"]), (&"bravo".into(), &40.into()));
}
