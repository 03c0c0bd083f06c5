//! Journals that were torn, doubled, reordered, spliced, flipped, renamed, brought from elsewhere or
//! from the future: refused or repaired with a clear word, never half-believed, never deleted.

use std::error::Error;
use std::path::{Path, PathBuf};

use uuid::Uuid;
use vmferry::migrate::handover::Side;
use vmferry::migrate::journal::{
    self, Ending, FORMAT, Header, Journal, JournalError, Past, Record, Role, UNCONFIRMED_DAYS_MAX, Undo,
};
use vmferry::migrate::phase::Phase;

const BEGAN: i64 = 1_700_000_000;

fn header(number: u128, role: Role) -> Header {
    Header {
        format: FORMAT,
        migration: Uuid::from_u128(number),
        role,
        vm: "web1".into(),
        host: "alpha".into(),
        peer: "bravo".into(),
        began_at: BEGAN,
        began_ns: None,
        running: true,
        keep_source: false,
        retry: None,
        accepted: Default::default(),
    }
}

fn write(folder: &Path, header: Header, records: Vec<Record>) -> PathBuf {
    let path = Journal::path(folder, header.migration, header.role);
    let mut journal = Journal::create(folder, header).unwrap();
    records.into_iter().for_each(|record| journal.record(record).unwrap());
    path
}

/// Every kind of record that a source writes.
fn sample(folder: &Path) -> PathBuf {
    let records = vec![
        Record::Undo(Undo::Fd("vmferry-ram".into())),
        Record::Undo(Undo::Node("vmferry-disk0".into())),
        Record::Phase(Phase::Device),
        Record::ToRun { running: false },
        Record::HandedOver,
        Record::Forced { side: Side::Here, uid: Some(0), at: BEGAN + 9 },
        Record::NeverRan,
    ];
    write(folder, header(7, Role::Source), records)
}

fn lines(path: &Path) -> Vec<String> {
    std::fs::read_to_string(path).unwrap().lines().map(|l| l.to_owned() + "\n").collect()
}

#[test]
fn the_last_word_on_whether_the_guest_is_to_run_counts() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path(), header(8, Role::Source), Vec::new());
    let running = || Journal::peek(&path, "alpha").unwrap().running();
    assert!(running(), "as it was at its beginning");
    for word in [false, true, false] {
        Journal::open(&path, "alpha").unwrap().record(Record::ToRun { running: word }).unwrap();
        assert_eq!(running(), word);
    }
}

/// What it is refused with, in full; the file must be as it was.
fn refused(path: &Path, text: &[u8]) -> String {
    std::fs::write(path, text).unwrap();
    let error = Journal::open(path, "alpha").expect_err("it was believed");
    assert_eq!(std::fs::read(path).unwrap(), text, "it was changed");
    let mut words = error.to_string();
    let mut source = error.source();
    while let Some(next) = source {
        words += &format!(": {next}");
        source = next.source();
    }
    words
}

fn believed(path: &Path, text: &[u8]) -> Past {
    std::fs::write(path, text).unwrap();
    Journal::open(path, "alpha").unwrap().past().clone()
}

#[test]
fn a_flipped_byte_is_refused_or_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = sample(folder.path());
    let good = std::fs::read(&path).unwrap();
    let past = believed(&path, &good);
    let (mut refused, mut same) = (0, 0);
    for at in 0..good.len() {
        for flip in [0x01, 0x02, 0x20, 0x80, good[at] ^ b'\n', good[at]] {
            let mut bad = good.clone();
            bad[at] ^= flip;
            std::fs::write(&path, &bad).unwrap();
            match Journal::peek(&path, "alpha") {
                Ok(read) => {
                    assert_eq!(read, past, "byte {at} ^ {flip:#x}");
                    same += 1;
                }
                Err(_) => refused += 1,
            }
        }
    }
    assert!(refused > good.len() * 5, "{refused} refused, {same} the same");
    println!("{refused} journals with a flipped byte refused, {same} read as before");
}

#[test]
fn every_cut_leaves_the_whole_lines() {
    let folder = tempfile::tempdir().unwrap();
    let path = sample(folder.path());
    let good = std::fs::read(&path).unwrap();
    let first = lines(&path)[0].len();
    for cut in 0..good.len() {
        if cut < first {
            assert!(refused(&path, &good[..cut]).contains("never begun"), "cut at {cut}");
            continue;
        }
        let past = believed(&path, &good[..cut]);
        // A line that lacks nothing but its end is whole.
        assert_eq!(past.never_ran, cut == good.len() - 1, "cut at {cut}");
        let left = std::fs::read(&path).unwrap();
        assert!(left.ends_with(b"\n") && good.starts_with(&left), "cut at {cut}");
    }
    assert!(refused(&path, b"").contains("never begun"));
    // With a second record the first was whole once.
    let glued = String::from_utf8(good).unwrap().replace('\n', " ");
    assert!(refused(&path, glued.as_bytes()).contains("no header"));
}

#[test]
fn only_what_was_never_begun_is_removed() {
    let folder = tempfile::tempdir().unwrap();
    let path = sample(folder.path());
    let good = std::fs::read(&path).unwrap();
    let gone = |text: &[u8]| {
        std::fs::write(&path, text).unwrap();
        let removed = journal::remove_unbegun(&path, "alpha").unwrap();
        assert_eq!(removed, !path.exists());
        removed
    };
    assert!(gone(b"") && gone(&good[..40]));
    assert!(!gone(&good) && !gone(b"words\n") && !gone(&good[..good.len() - 9]));
    std::fs::write(&path, b"").unwrap();
    assert_eq!(journal::migration_of(&path), Some(Uuid::from_u128(7)));
    let all = journal::peek_all(folder.path(), "alpha").unwrap();
    assert!(matches!(all[..], [(_, Err(JournalError::NotBegun { .. }))]), "{all:?}");
}

#[test]
fn zeroes_at_the_end_are_a_torn_line_and_words_are_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = sample(folder.path());
    let good = std::fs::read(&path).unwrap();
    let past = believed(&path, &[&good[..], &[0; 100]].concat());
    assert!(past.never_ran);
    let words = refused(&path, &[&good[..good.len() - 1], b" and more"].concat());
    assert!(words.contains("something follows"), "{words}");
}

#[test]
fn doubled_moved_removed_and_spliced_lines_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = sample(folder.path());
    let good = lines(&path);
    let other = write(folder.path(), header(8, Role::Source), vec![Record::Undo(Undo::Qemu)]);
    let foreign = lines(&other);
    let longer = write(
        folder.path(),
        header(9, Role::Source),
        vec![Record::Undo(Undo::Qemu), Record::Undo(Undo::NbdServer), Record::NeverRan],
    );
    let edit = |change: &dyn Fn(&mut Vec<String>)| {
        let mut lines = good.clone();
        change(&mut lines);
        refused(&path, lines.concat().as_bytes())
    };
    let doubled = edit(&|l| l.insert(3, l[2].clone()));
    assert!(doubled.contains("line 4") && doubled.contains("number 2 where 3 follows"), "{doubled}");
    let moved = edit(&|l| l.swap(2, 3));
    assert!(moved.contains("line 3") && moved.contains("number 3 where 2 follows"), "{moved}");
    let removed = edit(&|l| drop(l.remove(4)));
    assert!(removed.contains("line 5") && removed.contains("number 5 where 4 follows"), "{removed}");
    // The same number, from another journal: what is before it is not what was before it there.
    let spliced = edit(&|l| l[1] = foreign[1].clone());
    assert!(spliced.contains("line 2") && spliced.contains("checksum"), "{spliced}");
    let spliced = edit(&|l| l[3] = lines(&longer)[3].clone());
    assert!(spliced.contains("line 4") && spliced.contains("checksum"), "{spliced}");
    let twice = edit(&|l| l.extend(l.clone()));
    assert!(twice.contains("line 9"), "{twice}");
    let headless = edit(&|l| drop(l.remove(0)));
    assert!(headless.contains("no header"), "{headless}");
    let blank = edit(&|l| l.insert(2, "\n".into()));
    assert!(blank.contains("line 3"), "{blank}");
}

#[test]
fn what_is_of_another_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = sample(folder.path());
    let text = std::fs::read(&path).unwrap();
    assert!(matches!(Journal::open(&path, "bravo"), Err(JournalError::OtherHost { .. })));
    for name in [
        Journal::path(folder.path(), Uuid::from_u128(7), Role::Destination),
        Journal::path(folder.path(), Uuid::from_u128(8), Role::Source),
    ] {
        let words = refused(&name, &text);
        assert!(words.contains("migration 00000000") && words.contains("role source"), "{words}");
        assert_eq!(journal::vm_of(&name).as_deref(), Some("web1"));
    }
    let newer = String::from_utf8(text).unwrap().replace("\"format\":2", "\"format\":4");
    assert!(refused(&path, newer.as_bytes()).contains("format 4, this version reads up to 3"));
    assert_eq!(journal::vm_of(&path).as_deref(), Some("web1"), "whose it is can still be read");
}

/// As the version before this one wrote it.
const FORMAT_1: &str = r#"{"begun":{"format":1,"migration":"00000000-0000-0000-0000-000000000007","role":"source","vm":"web1","host":"alpha","peer":"bravo","began_at":1700000000,"running":true}}
{"undo":{"node":"vmferry-disk0"}}
{"phase":"device"}
"handed-over"
"#;

#[test]
fn format_1_is_read_and_continued() {
    let folder = tempfile::tempdir().unwrap();
    let path = Journal::path(folder.path(), Uuid::from_u128(7), Role::Source);
    let past = believed(&path, FORMAT_1.as_bytes());
    assert!(past.handed_over && past.phase == Phase::Device && !past.header.keep_source);
    let mut journal = Journal::open(&path, "alpha").unwrap();
    journal.record(Record::NeverRan).unwrap();
    drop(journal);
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text, format!("{FORMAT_1}\"never-ran\"\n"));
    assert!(Journal::open(&path, "alpha").unwrap().past().never_ran);
    let torn = believed(&path, &FORMAT_1.as_bytes()[..FORMAT_1.len() - 3]);
    assert!(!torn.handed_over && torn.phase == Phase::Device);
    // One format within a file.
    let mixed = format!("{FORMAT_1}{}", lines(&sample(tempfile::tempdir().unwrap().path()))[1]);
    assert!(refused(&path, mixed.as_bytes()).contains("line 5"));
}

fn ended(number: u128, role: Role, confirmed: bool, age_days: i64, left: &[&str]) -> (Header, Vec<Record>) {
    let header = Header { began_at: BEGAN - age_days * 24 * 3600, ..header(number, role) };
    let leftovers = left.iter().map(|l| (*l).to_owned()).collect();
    let mut records = vec![Record::NeverRan, Record::Ended(Ending::Moved { leftovers, guest_stands: None })];
    records.extend(confirmed.then_some(Record::Confirmed));
    (header, records)
}

#[test]
fn a_journal_is_kept_until_its_source_knows() {
    let folder = tempfile::tempdir().unwrap();
    let count = journal::HISTORY_MAX as u128;
    for number in 0..count + 3 {
        let (header, records) = ended(number, Role::Source, false, 1, &[]);
        write(folder.path(), header, records);
    }
    let kept = |number, role, confirmed, age, left: &[&str]| {
        let (header, records) = ended(number, role, confirmed, age, left);
        write(folder.path(), header, records)
    };
    let asked_for = kept(1_000, Role::Destination, false, 300, &[]);
    let known = kept(1_001, Role::Destination, true, 300, &[]);
    let forgotten = kept(1_002, Role::Destination, false, UNCONFIRMED_DAYS_MAX + 1, &[]);
    let unclean = kept(1_003, Role::Source, false, 300, &["a node"]);
    let open = write(folder.path(), header(1_004, Role::Source), vec![]);
    journal::prune(folder.path(), "alpha", BEGAN).unwrap();
    assert!(asked_for.exists(), "its source may still come and ask");
    assert!(unclean.exists(), "something is left to clean up");
    assert!(open.exists());
    assert!(!known.exists() && !forgotten.exists());
    let left = journal::peek_all(folder.path(), "alpha").unwrap().len();
    assert_eq!(left, journal::HISTORY_MAX + 3);
}

/// A peer whose migrations are many does not make those of another go.
#[test]
fn one_peers_journals_take_no_place_of_anothers() {
    let folder = tempfile::tempdir().unwrap();
    let (header, records) = ended(1, Role::Source, false, 300, &[]);
    let quiet = write(folder.path(), Header { peer: "quiet".into(), ..header }, records);
    for number in 0..journal::HISTORY_MAX as u128 + 5 {
        let (header, records) = ended(1_000 + number, Role::Source, false, 1, &[]);
        write(folder.path(), Header { peer: "busy".into(), ..header }, records);
    }
    journal::prune(folder.path(), "alpha", BEGAN).unwrap();
    assert!(quiet.exists());
    assert_eq!(journal::peek_all(folder.path(), "alpha").unwrap().len(), journal::HISTORY_MAX + 1);
}

/// The source's word comes on two control streams at once, or twice.
#[test]
fn two_confirmations_at_once_leave_a_journal_that_is_believed() {
    let folder = tempfile::tempdir().unwrap();
    for number in 0..20 {
        let (header, records) = ended(number, Role::Destination, false, 1, &[]);
        let path = write(folder.path(), header, records);
        let barrier = std::sync::Barrier::new(2);
        let confirm = || {
            barrier.wait();
            Journal::open(&path, "alpha").and_then(|mut journal| journal.record(Record::Confirmed))
        };
        let written = std::thread::scope(|scope| {
            [scope.spawn(confirm), scope.spawn(confirm)].map(|one| one.join().unwrap())
        });
        assert!(written.iter().any(Result::is_ok), "{written:?}");
        let refused = written.iter().filter_map(|one| one.as_ref().err());
        refused.for_each(|e| assert!(matches!(e, JournalError::InUse { .. }), "{e:?}"));
        assert!(Journal::peek(&path, "alpha").unwrap().confirmed);
    }
}
