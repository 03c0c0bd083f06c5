//! The last words of a QEMU: what it has written to its log since a migration began, how its process
//! ended, what systemd says of its unit. Where these are is found out while it lives.
//!
//! What is read here was written by QEMU and may hold anything: it is bounded, and made printable.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

use crate::config::{Start, VmConfig};
use crate::qemu::Process;

/// How much of a log's end is read, how many of its lines are told, and in how many characters.
const READ_BYTES_MAX: u64 = 16 << 10;
const LINES_MAX: usize = 6;
const CHARS_MAX: usize = 600;
/// How long systemd's programs may take to answer.
const ASK_DEADLINE: Duration = Duration::from_secs(2);

/// Where a QEMU's last words will be.
#[derive(Debug)]
pub(crate) struct LastWords {
    logs: Vec<Log>,
    unit: Option<String>,
    since: time::OffsetDateTime,
}

/// A file that QEMU writes to.
#[derive(Debug)]
struct Log {
    file: File,
    from: u64,
}

impl LastWords {
    /// Of a QEMU that lives. What it has written before now is not of interest, but for what a start
    /// command has written to `start_log` for this very migration.
    pub(crate) fn of(vm: &VmConfig, process: &Process, start_log: Option<&Path>) -> Self {
        let mut logs: Vec<Log> = Vec::new();
        let stderr = process.pid().map(|pid| PathBuf::from(format!("/proc/{pid}/fd/2")));
        let files = [(start_log.map(Path::to_owned), true), (vm.log.clone(), false), (stderr, false)];
        for (path, whole) in files {
            let log = path.and_then(|path| Log::open(&path, whole));
            logs.extend(log.filter(|log| !logs.iter().any(|other| other.is_same(log))));
        }
        let unit = match &vm.start {
            Some(Start::Unit(unit)) if start_log.is_some() => Some(unit.clone()),
            _ => process.pid().and_then(unit_of),
        };
        Self { logs, unit, since: time::OffsetDateTime::now_utc() }
    }

    /// Of a unit that is about to be started.
    pub(crate) fn of_unit(unit: &str) -> Self {
        Self { logs: Vec::new(), unit: Some(unit.to_owned()), since: time::OffsetDateTime::now_utc() }
    }

    /// What is to be told of its end. `status` is known of a process that we started ourselves.
    pub(crate) async fn heard(&self, status: Option<ExitStatus>) -> String {
        let (how, journal) = match &self.unit {
            Some(unit) => tokio::join!(result_of(unit), self.journal_of(unit)),
            None => (None, None),
        };
        let how = status.map(|status| status.to_string()).or(how);
        let written = self.logs.iter().find_map(Log::written).or(journal);
        let how = how.map_or_else(String::new, |how| format!(" ({how})"));
        let words = written.map_or_else(String::new, |words| format!("; it said: {words}"));
        format!("{how}{words}")
    }

    /// What its unit has logged since.
    async fn journal_of(&self, unit: &str) -> Option<String> {
        let since = format!("@{}", self.since.unix_timestamp());
        let lines = LINES_MAX.to_string();
        let words = ["-u", unit, "--since", &since, "-n", &lines, "-o", "cat", "--no-pager", "-q"];
        last_lines(&output("journalctl", &words).await?)
    }
}

impl Log {
    fn open(path: &Path, whole: bool) -> Option<Self> {
        // A terminal or a pipe is not ours to read, and must not be waited for.
        if !std::fs::metadata(path).ok()?.is_file() {
            return None;
        }
        let file = File::open(path).ok()?;
        let from = if whole { 0 } else { file.metadata().ok()?.len() };
        Some(Self { file, from })
    }

    fn is_same(&self, other: &Self) -> bool {
        let id = |log: &Self| log.file.metadata().ok().map(|m| (m.dev(), m.ino()));
        id(self) == id(other)
    }

    /// Its last lines that are new.
    fn written(&self) -> Option<String> {
        let mut file = &self.file;
        let end = file.metadata().ok()?.len();
        // One that was cut short has been begun anew.
        let from = if end < self.from { 0 } else { self.from };
        file.seek(SeekFrom::Start(from.max(end.saturating_sub(READ_BYTES_MAX)))).ok()?;
        let mut text = Vec::new();
        file.take(READ_BYTES_MAX).read_to_end(&mut text).ok()?;
        last_lines(&text)
    }
}

/// The last lines of a text, printable and short; nothing of an empty one.
fn last_lines(text: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(text);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let last = lines[lines.len().saturating_sub(LINES_MAX)..].join(" | ");
    let shown: Vec<char> = last.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let from = shown.len().saturating_sub(CHARS_MAX);
    let cut = if from > 0 { "…" } else { "" };
    (!shown.is_empty()).then(|| format!("{cut}{}", shown[from..].iter().collect::<String>()))
}

/// The unit that a process runs in, if it is not the agent's own.
fn unit_of(pid: i32) -> Option<String> {
    let unit = |path: &str| {
        let text = std::fs::read_to_string(path).ok()?;
        let path = text.lines().find_map(|line| {
            line.strip_prefix("0::").or_else(|| line.split_once(":name=systemd:").map(|(_, path)| path))
        })?;
        path.rsplit('/').find(|part| part.ends_with(".service")).map(str::to_owned)
    };
    let theirs = unit(&format!("/proc/{pid}/cgroup"))?;
    (unit("/proc/self/cgroup").as_ref() != Some(&theirs)).then_some(theirs)
}

/// How a unit's main process ended, if it has.
async fn result_of(unit: &str) -> Option<String> {
    let words = ["show", unit, "-p", "Result,ExecMainCode,ExecMainStatus"];
    let text = output("systemctl", &words).await?;
    let text = String::from_utf8_lossy(&text).into_owned();
    let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    let (result, status) = (value("Result")?, value("ExecMainStatus")?);
    // `ExecMainCode` is the kernel's: 1 exited, 2 killed, 3 dumped; 0 while it runs.
    let how = match value("ExecMainCode")? {
        "1" => "exit status",
        "2" | "3" => "signal",
        _ => return None,
    };
    Some(format!("unit {unit}: {result}, {how} {status}"))
}

async fn output(program: &str, words: &[&str]) -> Option<Vec<u8>> {
    let mut command = Command::new(program);
    command.args(words).stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    let output = timeout(ASK_DEADLINE, command.output()).await.ok()?.ok()?;
    output.status.success().then_some(output.stdout)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn only_what_is_new_is_told_and_it_is_printable_and_short() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qemu.log");
        let mut file = File::create(&path).unwrap();
        file.write_all(b"of yesterday\n").unwrap();
        let log = Log::open(&path, false).unwrap();
        assert_eq!(log.written(), None);
        file.write_all(b"a\x1b[31mb\r\n\n  load of migration failed\n").unwrap();
        assert_eq!(log.written().unwrap(), "a [31mb | load of migration failed");
        file.write_all(&[b'x'; 100_000]).unwrap();
        assert_eq!(log.written().unwrap().chars().count(), CHARS_MAX + 1);
        assert!(Log::open(&path, true).unwrap().is_same(&log));
        file.set_len(0).unwrap();
        std::fs::write(&path, "anew\n").unwrap();
        assert_eq!(log.written().unwrap(), "anew");
    }

    #[test]
    fn what_is_no_file_is_not_read() {
        assert!(Log::open(Path::new("/dev/null"), true).is_none());
        assert!(Log::open(Path::new("/nowhere"), true).is_none());
    }
}
