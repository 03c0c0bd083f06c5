//! Runs virsh. What it prints is libvirt's word, and shown as such.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::printable::printable;

/// For a question.
const ASK_DEADLINE: Duration = Duration::from_secs(20);
/// Longest output that is kept.
const OUTPUT_BYTES_MAX: u64 = 1024 * 1024;
const SYSTEM: &str = "qemu:///system";

/// virsh, at one libvirt.
#[derive(Debug)]
pub(super) struct Virsh {
    connect: String,
}

/// What it has said at its end.
#[derive(Debug)]
pub(super) struct Said {
    pub(super) ok: bool,
    pub(super) stdout: String,
    pub(super) stderr: String,
}

impl Said {
    /// Its error on one line.
    pub(super) fn error(&self) -> String {
        let lines = self.stderr.lines().map(str::trim).filter(|line| !line.is_empty());
        printable(&lines.collect::<Vec<_>>().join("; "))
    }
}

/// virsh at work.
#[derive(Debug)]
pub(super) struct Running {
    child: Child,
    stdout: JoinHandle<String>,
    stderr: JoinHandle<String>,
}

impl Virsh {
    pub(super) fn new(connect: Option<&str>) -> Self {
        Self { connect: connect.unwrap_or(SYSTEM).to_owned() }
    }

    /// What is typed for the same.
    pub(super) fn line(&self, words: &[String]) -> String {
        let all = ["virsh", "-c", &self.connect].into_iter().chain(words.iter().map(String::as_str));
        all.map(quoted).collect::<Vec<_>>().join(" ")
    }

    fn command(&self, words: &[String]) -> Command {
        let mut command = Command::new("virsh");
        command.args(["-q", "-c", &self.connect]).args(words);
        // Its figures are read, in whatever language its user has.
        command.env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Ctrl-C is for us: virsh is told by libvirt.
        command.process_group(0);
        command
    }

    /// Begins a command.
    pub(super) fn start(&self, words: &[String]) -> anyhow::Result<Running> {
        let mut child = self.command(words).spawn().context("cannot run virsh (package libvirt-clients)")?;
        let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
            bail!("virsh has no output");
        };
        Ok(Running { child, stdout: tokio::spawn(read(stdout)), stderr: tokio::spawn(read(stderr)) })
    }

    /// Asks something that is answered at once.
    pub(super) async fn ask(&self, words: &[&str]) -> anyhow::Result<Said> {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        let mut running = self.start(&words)?;
        match timeout(ASK_DEADLINE, running.wait()).await {
            Ok(said) => said,
            Err(_) => {
                running.kill().await;
                bail!("virsh {} has not answered for {} s", words.join(" "), ASK_DEADLINE.as_secs())
            }
        }
    }
}

impl Running {
    /// Its end. Cancelling loses nothing.
    pub(super) async fn wait(&mut self) -> anyhow::Result<Said> {
        let status = self.child.wait().await.context("virsh cannot be waited for")?;
        // A child of its own that still holds them is not waited for.
        let stdout = timeout(Duration::from_secs(1), &mut self.stdout).await;
        let stderr = timeout(Duration::from_secs(1), &mut self.stderr).await;
        let text = |read: Result<Result<String, _>, _>| read.ok().and_then(Result::ok).unwrap_or_default();
        Ok(Said { ok: status.success(), stdout: text(stdout), stderr: text(stderr) })
    }

    pub(super) async fn kill(&mut self) {
        let _ = self.child.kill().await;
    }
}

async fn read(from: impl AsyncRead + Unpin) -> String {
    let mut bytes = Vec::new();
    let _ = from.take(OUTPUT_BYTES_MAX).read_to_end(&mut bytes).await;
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A word as a shell reads it back.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@+%".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_can_be_typed_as_it_is_printed() {
        let virsh = Virsh::new(None);
        let words =
            ["migrate", "--domain=it's", "--desturi=qemu+unix:///system?socket=/run/x"].map(str::to_owned);
        let line = virsh.line(&words);
        assert_eq!(
            line,
            r"virsh -c qemu:///system migrate '--domain=it'\''s' '--desturi=qemu+unix:///system?socket=/run/x'"
        );
    }
}
