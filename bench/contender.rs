//! Who takes part: a program with the faces `near` and `far` (see `tls_copy.rs`). Starts a
//! pair, and tells what processor time it has used. Must not know what is measured.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use nix::sys::resource::{Usage, UsageWho, getrusage};

/// The value that the systemd unit sets, so that everybody copies memory alike.
const GLIBC_TUNABLES: &str = "glibc.cpu.x86_rep_movsb_threshold=100000000";

/// One contender: a name, a program, and arguments before and after the word for the face.
#[derive(Clone, Debug)]
pub(crate) struct Contender {
    pub(crate) name: String,
    pub(crate) program: PathBuf,
    /// All load goes through one connection, whatever the number of streams.
    pub(crate) one_connection: bool,
    before: Vec<String>,
    after: Vec<String>,
    /// Arguments of the near face only.
    near: Vec<String>,
}

impl Contender {
    pub(crate) fn new(name: &str, program: &Path, args: &[&str]) -> Self {
        Self {
            name: name.to_owned(),
            program: program.to_owned(),
            one_connection: false,
            before: Vec::new(),
            after: args.iter().map(ToString::to_string).collect(),
            near: Vec::new(),
        }
    }

    pub(crate) fn with(mut self, args: &[&str]) -> Self {
        self.after.extend(args.iter().map(ToString::to_string));
        self
    }

    pub(crate) fn with_near(mut self, args: &[&str]) -> Self {
        self.near.extend(args.iter().map(ToString::to_string));
        self
    }

    pub(crate) fn with_one_connection(self) -> Self {
        Self { one_connection: true, ..self }
    }

    /// From the command line: `NAME=PROGRAM ARG…`, split at blanks; the face comes last.
    pub(crate) fn parse(text: &str) -> anyhow::Result<Self> {
        let (name, command) = text.split_once('=').context("write NAME=PROGRAM ARG…")?;
        let mut words = command.split_whitespace();
        let program = words.next().context("write NAME=PROGRAM ARG…")?;
        Ok(Self {
            name: name.to_owned(),
            program: program.into(),
            one_connection: false,
            before: words.map(str::to_owned).collect(),
            after: Vec::new(),
            near: Vec::new(),
        })
    }

    fn face(&self, face: &str, place: &Place, more: &[(&str, &str)]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.before).arg(face);
        command.arg("--tls").arg(place.dir.join(face));
        for (option, value) in more {
            command.args([option, value]);
        }
        command.args(&self.after);
        if face == "near" {
            command.args(&self.near);
        }
        command.env("GLIBC_TUNABLES", GLIBC_TUNABLES);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        command
    }
}

/// Where a pair works: `DIR/near` and `DIR/far` hold certificates, the sockets lie beside.
pub(crate) struct Place {
    pub(crate) dir: PathBuf,
}

impl Place {
    pub(crate) fn local(&self) -> PathBuf {
        self.dir.join("local.sock")
    }

    pub(crate) fn remote(&self) -> PathBuf {
        self.dir.join("remote.sock")
    }
}

/// A running pair. Ends with its owner.
pub(crate) struct Pair {
    near: Child,
    far: Child,
}

/// Processor seconds of one process, all its threads, from start to end.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cpu {
    pub(crate) user: f64,
    pub(crate) system: f64,
}

impl Cpu {
    pub(crate) fn total(self) -> f64 {
        self.user + self.system
    }
}

impl Pair {
    /// Starts both; the sink must listen on `place.remote()` already.
    pub(crate) fn start(contender: &Contender, place: &Place) -> anyhow::Result<Self> {
        let remote = place.remote();
        let local = place.local();
        if local.exists() {
            std::fs::remove_file(&local)?;
        }
        let name = &contender.name;
        let remote = remote.to_str().context("the path is not UTF-8")?;
        let far = contender.face("far", place, &[("--remote", remote)]).spawn();
        let far = Guard(Some(far.with_context(|| format!("can't start {name}"))?));
        let (far, address) = far.ready()?;
        let local = local.to_str().context("the path is not UTF-8")?;
        let options = [("--local", local), ("--peer", address.as_str())];
        let near = contender.face("near", place, &options).spawn();
        let near = Guard(Some(near.with_context(|| format!("can't start {name}"))?));
        let (near, _) = near.ready()?;
        Ok(Self { near: near.keep()?, far: far.keep()? })
    }

    /// Ends both and tells what they have used: (near, far).
    pub(crate) fn end(mut self) -> anyhow::Result<(Cpu, Cpu)> {
        let near = reap(&mut self.near)?;
        let far = reap(&mut self.far)?;
        Ok((near, far))
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        for child in [&mut self.near, &mut self.far] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A child that is killed unless kept.
struct Guard(Option<Child>);

impl Guard {
    /// Waits for the line "ready …" and returns what follows the word.
    fn ready(mut self) -> anyhow::Result<(Self, String)> {
        let stdout = self.0.as_mut().and_then(|c| c.stdout.take());
        let stdout = stdout.context("no stdout")?;
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut line = String::new();
            let read = BufReader::new(stdout).read_line(&mut line);
            let _ = tell.send(read.map(|_| line));
        });
        let line =
            told.recv_timeout(Duration::from_secs(20)).context("a contender did not get ready in 20 s")??;
        match line.trim_end().strip_prefix("ready") {
            Some(rest) => Ok((self, rest.trim().to_owned())),
            None => bail!("a contender said `{}` instead of `ready`", line.trim_end()),
        }
    }

    fn keep(mut self) -> anyhow::Result<Child> {
        self.0.take().context("no child")
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The kernel adds a child's usage to ours when it is waited for: the difference is the child.
fn reap(child: &mut Child) -> anyhow::Result<Cpu> {
    let before = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    child.kill()?;
    child.wait()?;
    let after = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    Ok(Cpu {
        user: seconds(&after, Usage::user_time) - seconds(&before, Usage::user_time),
        system: seconds(&after, Usage::system_time) - seconds(&before, Usage::system_time),
    })
}

fn seconds(usage: &Usage, of: fn(&Usage) -> nix::sys::time::TimeVal) -> f64 {
    let time = of(usage);
    #[allow(clippy::cast_precision_loss)]
    let seconds = time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    seconds
}
