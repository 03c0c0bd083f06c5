//! Who takes part: a program with the faces `near` and `far` (see `tls_copy.rs`). Starts a
//! pair, one at each end of a road. Must not know what is measured.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};

use crate::road::{End, Road};
use crate::usage::{self, Cpu, Used};

/// The value that the systemd unit sets, so that everybody copies memory alike.
const GLIBC_TUNABLES: &str = "glibc.cpu.x86_rep_movsb_threshold=100000000";
/// Starting takes as long as a handshake, or the making of a key.
const READY_DEADLINE: Duration = Duration::from_secs(20);

/// One contender: a name, a program, and arguments before and after the word for the face.
#[derive(Clone, Debug)]
pub(crate) struct Contender {
    pub(crate) name: String,
    pub(crate) program: PathBuf,
    /// Local connections at the same time; the measurement's number if `None`.
    pub(crate) streams: Option<u32>,
    /// What is done to its connections while it is measured.
    pub(crate) with_resets: bool,
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
            streams: None,
            with_resets: false,
            before: Vec::new(),
            after: args.iter().map(ToString::to_string).collect(),
            near: Vec::new(),
        }
    }

    pub(crate) fn with_near(mut self, args: &[&str]) -> Self {
        self.near.extend(args.iter().map(ToString::to_string));
        self
    }

    pub(crate) fn with_streams(self, streams: u32) -> Self {
        Self { streams: Some(streams), ..self }
    }

    pub(crate) fn with_resets(self) -> Self {
        Self { with_resets: true, ..self }
    }

    /// From the command line: `NAME=PROGRAM ARG…`, split at blanks; the face comes last.
    pub(crate) fn parse(text: &str) -> anyhow::Result<Self> {
        let (name, command) = text.split_once('=').context("write NAME=PROGRAM ARG…")?;
        let mut words = command.split_whitespace();
        let program = words.next().context("write NAME=PROGRAM ARG…")?;
        Ok(Self { before: words.map(str::to_owned).collect(), ..Self::new(name, Path::new(program), &[]) })
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
    near: Relay,
    far: Relay,
}

impl Pair {
    /// Starts both; the sink must listen on `place.remote()` already.
    pub(crate) fn start(contender: &Contender, place: &Place, road: &Road) -> anyhow::Result<Self> {
        let (remote, local) = (place.remote(), place.local());
        if local.exists() {
            std::fs::remove_file(&local)?;
        }
        let remote = remote.to_str().context("the path is not UTF-8")?;
        let options = [("--remote", remote), ("--listen", road.listen())];
        let mut far = Relay::spawn(road, End::Far, &mut contender.face("far", place, &options))?;
        let address = far.ready().context("the far relay")?;
        let local = local.to_str().context("the path is not UTF-8")?;
        let options = [("--local", local), ("--peer", address.as_str())];
        let mut near = Relay::spawn(road, End::Near, &mut contender.face("near", place, &options))?;
        near.ready().context("the near relay")?;
        Ok(Self { near, far })
    }

    /// From now on usage counts.
    pub(crate) fn begin(&mut self) {
        self.far.begin();
        self.near.begin();
    }

    /// Ends both and tells what they have used: (near, far).
    pub(crate) fn end(mut self) -> anyhow::Result<(Used, Used)> {
        Ok((self.near.end()?, self.far.end()?))
    }
}

/// One of the two, and what it has started. Ended when dropped.
struct Relay {
    child: Option<Child>,
    /// What it had used when the measurement began.
    before: Cpu,
}

impl Relay {
    fn spawn(road: &Road, end: End, command: &mut Command) -> anyhow::Result<Self> {
        let child = road.spawn(end, command);
        let child = child.with_context(|| format!("can't start {}", command.get_program().display()))?;
        Ok(Self { child: Some(child), before: Cpu::default() })
    }

    /// Waits for the line "ready …" and returns what follows the word.
    fn ready(&mut self) -> anyhow::Result<String> {
        let stdout = self.child.as_mut().and_then(|c| c.stdout.take());
        let stdout = stdout.context("no stdout")?;
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut line = String::new();
            let read = BufReader::new(stdout).read_line(&mut line);
            let _ = tell.send(read.map(|_| line));
        });
        let line = told.recv_timeout(READY_DEADLINE).context("did not get ready in 20 s")??;
        match line.trim_end().strip_prefix("ready") {
            Some(rest) => Ok(rest.trim().to_owned()),
            None => bail!("said `{}` instead of `ready`", line.trim_end()),
        }
    }

    fn begin(&mut self) {
        self.before = self.child.as_ref().map(|child| usage::so_far(child.id())).unwrap_or_default();
    }

    fn end(&mut self) -> anyhow::Result<Used> {
        usage::end(&mut self.child.take().context("ended before")?, self.before)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = usage::end(child, self.before);
        }
    }
}
