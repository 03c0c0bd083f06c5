//! What a record shows of itself: lines that were changed, removed, doubled, moved or cut off, and what an anchor
//! says beside that. Changes nothing.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;
use std::str::FromStr;

use super::files::paths;
use super::line::{Head, Kept, LINE_BYTES_MAX};

/// Problems that are told one by one.
const PROBLEMS_MAX: usize = 100;

/// A line that is known from elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Anchor(pub Head);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an anchor is a line's number and its hash, as in 17:5f3a…, with 64 digits")]
pub struct AnchorError;

impl FromStr for Anchor {
    type Err = AnchorError;

    fn from_str(text: &str) -> Result<Self, AnchorError> {
        let (number, hash) = text.split_once(':').ok_or(AnchorError)?;
        let is_hash = hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_hexdigit());
        let number = number.parse().ok().filter(|_| is_hash).ok_or(AnchorError)?;
        Ok(Self(Head { number, hash: hash.to_ascii_lowercase() }))
    }
}

/// A record's head as a peer says it: nothing else is kept of what it says there.
pub fn head_of_peer(said: Option<&str>) -> Option<String> {
    said?.parse::<Anchor>().ok().map(|Anchor(head)| head.to_string())
}

/// What a record shows.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Report {
    pub files: usize,
    pub lines: u64,
    /// The first line that is there.
    pub first: Option<u64>,
    /// The last one, as an anchor.
    pub head: Option<String>,
    /// Nothing when the record is whole, as far as a record alone can show.
    pub problems: Vec<String>,
    /// Problems beyond those.
    pub further_problems: usize,
}

/// Reads the whole record in `folder`, and gives each line that can be read to `each`.
/// Errors: a file cannot be read.
pub fn judge(folder: &Path, anchors: &[Anchor], mut each: impl FnMut(&Kept)) -> io::Result<Report> {
    let mut judge = Judge { anchors, ..Judge::default() };
    let all = paths(folder)?;
    judge.report.files = all.len();
    for (at, path) in all.iter().enumerate() {
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        judge.file(name, at + 1 == all.len(), BufReader::new(File::open(path)?), &mut each)?;
    }
    Ok(judge.end())
}

#[derive(Default)]
struct Judge<'a> {
    anchors: &'a [Anchor],
    report: Report,
    /// The line before, if there was one.
    head: Option<Head>,
    /// What the first line was written after.
    began_after: Option<Head>,
    /// Last lines of files that were removed, by their own word.
    removed: BTreeMap<u64, String>,
    /// Whether the number that comes next is known.
    is_lost: bool,
}

impl Judge<'_> {
    fn problem(&mut self, problem: String) {
        if self.report.problems.len() < PROBLEMS_MAX {
            self.report.problems.push(problem);
        } else {
            self.report.further_problems += 1;
        }
    }

    fn file(
        &mut self,
        name: &str,
        is_newest: bool,
        mut text: impl BufRead,
        each: &mut impl FnMut(&Kept),
    ) -> io::Result<()> {
        for number in 1.. {
            let mut line = Vec::new();
            let max = LINE_BYTES_MAX as u64 + 1;
            if io::Read::take(&mut text, max).read_until(b'\n', &mut line)? == 0 {
                break;
            }
            let place = format!("{name}, line {number}");
            if line.pop_if(|b| *b == b'\n').is_none() {
                let goes_on = skip_line(&mut text)?;
                self.cut_off(&place, is_newest && !goes_on);
                continue;
            }
            self.line(&place, number == 1, &line, each);
        }
        Ok(())
    }

    fn cut_off(&mut self, place: &str, is_end: bool) {
        let next = self.head.as_ref().map_or(1, |head| head.number + 1);
        self.is_lost = true;
        self.problem(match is_end {
            true => format!(
                "{place}: line {next} is cut off; an agent that was killed while it wrote leaves that, and \
                 the next one removes it and says so"
            ),
            false => format!("{place}: line {next} is cut off, or longer than any line"),
        });
    }

    fn line(&mut self, place: &str, begins_file: bool, text: &[u8], each: &mut impl FnMut(&Kept)) {
        self.report.lines += 1;
        let Some(kept) = Kept::read(text) else {
            self.problem(format!("{place}: this is no line of a record"));
            let number = self.head.as_ref().map_or(1, |head| head.number + 1);
            self.head = Some(Head::of(number, text));
            self.is_lost = true;
            return;
        };
        self.order(place, &kept);
        if begins_file != (kept.event() == "file-begins") {
            self.problem(format!("{place}: a file's first line says that it begins, and no other does"));
        }
        if kept.event() == "file-removed" {
            let last = kept.field("last").and_then(serde_json::Value::as_u64);
            let hash = kept.field("hash").and_then(serde_json::Value::as_str);
            self.removed.extend(last.zip(hash.map(str::to_owned)));
        }
        let head = Head::of(kept.n, text);
        for Anchor(known) in self.anchors {
            if known.number == head.number && known.hash != head.hash {
                let problem = format!("{place}: line {} is not the one that the anchor knows", head.number);
                self.report.problems.push(problem);
            }
        }
        self.report.first.get_or_insert(kept.n);
        self.head = Some(head);
        self.is_lost = false;
        each(&kept);
    }

    /// Whether this line was written after the one before it.
    fn order(&mut self, place: &str, kept: &Kept) {
        let Some(before) = self.head.clone() else {
            let after = kept.n.saturating_sub(1);
            self.began_after = Some(Head { number: after, hash: kept.before.clone() });
            if self.is_lost && after > 0 {
                self.problem(format!("{place}: line {} comes first", kept.n));
            }
            return;
        };
        let expected = before.number + 1;
        match kept.n {
            n if n > expected => {
                let missing = if n - 1 == expected { String::new() } else { format!(" to {}", n - 1) };
                self.problem(format!("{place}: before line {n}, line {expected}{missing} is missing"));
            }
            n if n < expected => {
                self.problem(format!("{place}: line {n} comes after line {}", before.number));
            }
            n if kept.before != before.hash && !self.is_lost => {
                let last = before.number;
                self.problem(format!(
                    "{place}: line {n} was written after another line {last} than this one"
                ));
            }
            _ => {}
        }
    }

    fn end(mut self) -> Report {
        if let Some(after) = self.began_after.take() {
            let is_said = match after.number {
                0 => after == Head::none(),
                number => self.removed.get(&number) == Some(&after.hash),
            };
            match (is_said, after.number) {
                (true, _) => {}
                (false, 0) => self.problem("line 1 was not written first".into()),
                (false, last) => {
                    self.problem(format!(
                        "lines 1 to {last} are missing, and the record does not say that they were removed"
                    ));
                }
            }
        }
        let head = self.head.clone().unwrap_or_else(Head::none);
        for Anchor(known) in self.anchors {
            if known.number > head.number {
                let (last, number) = (head.number, known.number);
                let problem = format!("the record ends at line {last}, and the anchor knows line {number}");
                self.report.problems.push(problem);
            }
        }
        self.report.head = self.head.map(|head| head.to_string());
        self.report
    }
}

/// Reads to the end of a line that is too long; whether anything was left of it.
fn skip_line(text: &mut impl BufRead) -> io::Result<bool> {
    let mut is_skipped = false;
    loop {
        let piece = text.fill_buf()?;
        if piece.is_empty() {
            return Ok(is_skipped);
        }
        let end = piece.iter().position(|b| *b == b'\n');
        let used = end.map_or(piece.len(), |at| at + 1);
        text.consume(used);
        is_skipped = true;
        if end.is_some() {
            return Ok(true);
        }
    }
}
