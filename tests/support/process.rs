//! Running programs with a deadline, and waiting for a condition with one. Knows nothing of
//! hosts, guests or agents.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How often a condition is looked at again.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// For a program that only asks or sets something.
pub const SHORT: Duration = Duration::from_secs(30);
/// For a program that copies or compares whole disks.
pub const LONG: Duration = Duration::from_secs(180);

/// A wait that was longer than this is told, for whoever looks for what a test spends its time on.
const TOLD_AFTER: Duration = Duration::from_secs(1);

/// Tells of a wait that was long, in a test; who watches a demo does not ask.
pub fn tell_wait(what: &str, since: Instant) {
    let waited = since.elapsed();
    if cfg!(test) && waited >= TOLD_AFTER {
        eprintln!("    waited {:.1} s for {what}", waited.as_secs_f64());
    }
}

/// Calls `look` until it gives a value. An error of `look` ends the waiting at once.
///
/// # Errors
/// The deadline passed: the error names `what`.
pub fn wait_for<T>(what: &str, within: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let since = Instant::now();
    loop {
        if let Some(found) = look().with_context(|| format!("waiting for {what}"))? {
            tell_wait(what, since);
            return Ok(found);
        }
        if since.elapsed() >= within {
            bail!("waited {} s in vain for {what}", within.as_secs());
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// What a finished program left.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Its exit code, or 128 + the signal that ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// A program that runs in the background, killed when dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    name: String,
    stdout: File,
    stderr: File,
}

/// Starts a program; what it prints goes to unnamed temporary files, so it never blocks on us.
pub fn start(command: &mut Command) -> Result<Running> {
    let name = format!("{command:?}");
    let (stdout, stderr) = (tempfile::tempfile()?, tempfile::tempfile()?);
    let child = command
        .stdin(Stdio::null())
        .stdout(stdout.try_clone()?)
        .stderr(stderr.try_clone()?)
        .spawn()
        .with_context(|| format!("cannot start {name}"))?;
    Ok(Running { child, name, stdout, stderr })
}

/// Runs a program to its end.
///
/// # Errors
/// It cannot be started, or is not done after `within` (it is killed then).
pub fn run_any(command: &mut Command, within: Duration) -> Result<Outcome> {
    start(command)?.wait(within)
}

/// Runs a program that must succeed, and gives its standard output.
///
/// # Errors
/// Also any exit code but 0; the error holds what it printed.
pub fn run(command: &mut Command, within: Duration) -> Result<String> {
    let outcome = run_any(command, within)?;
    if outcome.code != 0 {
        bail!("{command:?} gave {}: {}{}", outcome.code, outcome.stdout, outcome.stderr);
    }
    Ok(outcome.stdout)
}

impl Running {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended, and how.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// What it has printed on standard error so far.
    pub fn stderr(&mut self) -> Result<String> {
        read_all(&mut self.stderr)
    }

    /// What it has printed on standard output so far.
    pub fn stdout(&mut self) -> Result<String> {
        read_all(&mut self.stdout)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// Not done after `within`: it is killed, and the error holds what it had printed.
    pub fn wait(mut self, within: Duration) -> Result<Outcome> {
        let name = self.name.clone();
        let status = match wait_for(&format!("the end of {name}"), within, || self.ended()) {
            Ok(status) => status,
            Err(late) => {
                return Err(late.context(format!("it had printed: {}{}", self.stdout()?, self.stderr()?)));
            }
        };
        Ok(Outcome { code: exit_code(status), stdout: self.stdout()?, stderr: self.stderr()? })
    }

    /// Sends a signal; that it has already ended is no error.
    pub fn signal(&self, signal: nix::sys::signal::Signal) -> Result<()> {
        signal_pid(self.child.id(), signal)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Sends a signal to a process; that it is gone is no error.
pub fn signal_pid(pid: u32, signal: nix::sys::signal::Signal) -> Result<()> {
    let target = nix::unistd::Pid::from_raw(i32::try_from(pid)?);
    match nix::sys::signal::kill(target, signal) {
        Ok(()) | Err(nix::errno::Errno::ESRCH) => Ok(()),
        Err(errno) => Err(errno).with_context(|| format!("cannot signal process {pid}")),
    }
}

fn exit_code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// Both ends share one file offset, so reading leaves it at the end, where the program writes on.
fn read_all(file: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
