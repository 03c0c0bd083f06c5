//! The test's own QMP client, over a monitor of its own. Independent of vmferry's, on purpose: the
//! judge must not be the accused. Events are kept, not acted on.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// For a command: QEMU's main loop may be busy loading a guest.
const REPLY_WITHIN: Duration = Duration::from_secs(30);

/// A connection to one monitor.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    path: PathBuf,
    last_id: u64,
    events: Vec<Value>,
    line: Vec<u8>,
}

impl Qmp {
    /// Connects and negotiates.
    ///
    /// # Errors
    /// Nobody listens there, or no greeting within 30 s (a monitor serves one client at a time).
    pub fn connect(path: &Path) -> Result<Self> {
        let stream =
            UnixStream::connect(path).with_context(|| format!("cannot connect to {}", path.display()))?;
        stream.set_write_timeout(Some(REPLY_WITHIN))?;
        let mut qmp = Self {
            stream: BufReader::new(stream),
            path: path.to_owned(),
            last_id: 0,
            events: Vec::new(),
            line: Vec::new(),
        };
        qmp.receive(Instant::now() + REPLY_WITHIN)?
            .with_context(|| format!("{}: no greeting", path.display()))?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and gives what it returned.
    ///
    /// # Errors
    /// QEMU's error, or no answer within 30 s.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.last_id += 1;
        let mut line = json!({"execute": command, "id": self.last_id, "arguments": arguments}).to_string();
        line.push('\n');
        self.stream
            .get_mut()
            .write_all(line.as_bytes())
            .with_context(|| format!("{}: {command}", self.path.display()))?;
        let end = Instant::now() + REPLY_WITHIN;
        loop {
            let Some(mut message) = self.receive(end)? else {
                bail!("{}: no reply to {command}", self.path.display())
            };
            if message["id"] != json!(self.last_id) {
                self.events.push(message);
            } else if message["error"].is_object() {
                bail!("{}: {command}: {}", self.path.display(), message["error"]["desc"]);
            } else {
                return Ok(message["return"].take());
            }
        }
    }

    /// Runs a query without arguments.
    pub fn query(&mut self, command: &str) -> Result<Value> {
        self.execute(command, json!({}))
    }

    /// The run state, as `query-status` names it.
    pub fn status(&mut self) -> Result<String> {
        Ok(self.query("query-status")?["status"].as_str().unwrap_or_default().to_owned())
    }

    /// The events so far, oldest first; they are forgotten here.
    pub fn take_events(&mut self) -> Vec<Value> {
        std::mem::take(&mut self.events)
    }

    /// Waits for an event of this name and gives it; other events are kept.
    ///
    /// # Errors
    /// None within `within`.
    pub fn wait_event(&mut self, name: &str, within: Duration) -> Result<Value> {
        let end = Instant::now() + within;
        loop {
            if let Some(at) = self.events.iter().position(|e| e["event"] == name) {
                return Ok(self.events.remove(at));
            }
            let Some(message) = self.receive(end)? else { bail!("{}: no event {name}", self.path.display()) };
            self.events.push(message);
        }
    }

    /// One message, or `None` when the deadline has passed.
    fn receive(&mut self, end: Instant) -> Result<Option<Value>> {
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.stream.get_ref().set_read_timeout(Some(left))?;
            match self.stream.read_until(b'\n', &mut self.line) {
                Ok(0) => bail!("{}: QEMU closed the monitor", self.path.display()),
                Ok(_) if self.line.ends_with(b"\n") => {
                    let message = serde_json::from_slice(&self.line)?;
                    self.line.clear();
                    return Ok(Some(message));
                }
                Ok(_) => {}
                Err(e)
                    if matches!(
                        e.kind(),
                        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                    ) => {}
                Err(e) => return Err(e).with_context(|| format!("{}", self.path.display())),
            }
        }
    }
}
