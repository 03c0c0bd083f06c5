//! The agent's log: lines on standard error, for people, or entries of systemd's journal where that is behind it.
//!
//! Whatever an event repeats of others, each is one line, and nothing in it is obeyed by a terminal. No place
//! in the code can fill a disk: each may write so many lines, then a few a second; what was left out is counted
//! in front of the next one.

mod journal;
mod line;

use std::collections::HashMap;
use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::callsite::Identifier;
use tracing::{Event, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, fmt};

use journal::Journal;
use line::line;

/// Lines that one place in the code may write at once: hundreds of migrations may end together.
const LINES_AT_ONCE: u32 = 500;
/// … and how soon it may write one more after that.
const LINE_EVERY: Duration = Duration::from_millis(500);

/// What is written unless somebody says otherwise. The TLS library warns of what strangers do, each time; what
/// becomes of them is told by the agent, once.
const FILTER: &str = "info,rustls=error";

/// Starts the log; `VMFERRY_LOG` filters as `RUST_LOG` does.
pub(crate) fn start() {
    let filter = EnvFilter::try_from_env("VMFERRY_LOG").unwrap_or_else(|_| EnvFilter::new(FILTER));
    // Colours are sequences that a terminal obeys.
    let lines = fmt::layer().with_writer(|| Lines(io::stderr())).with_ansi(false).with_target(false);
    // The journal stamps its lines itself.
    let lines = match (Journal::behind_stderr(), std::env::var_os("JOURNAL_STREAM")) {
        (Some(journal), _) => journal.boxed(),
        (None, Some(_)) => lines.without_time().boxed(),
        (None, None) => lines.boxed(),
    };
    let started =
        tracing_subscriber::registry().with(filter).with(Throttle::default()).with(lines).try_init();
    if let Err(e) = started {
        eprintln!("vmferry: no log: {e}");
    }
}

/// Writes each event that it gets as one line.
struct Lines<W>(W);

impl<W: Write> Write for Lines<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = event.strip_suffix(b"\n").unwrap_or(event);
        let line = line(&String::from_utf8_lossy(text)) + "\n";
        self.0.write_all(line.as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// What one place may still write.
#[derive(Debug)]
struct Allowance {
    lines: u32,
    since: Instant,
    left_out: u64,
}

impl Allowance {
    fn new(now: Instant) -> Self {
        Self { lines: LINES_AT_ONCE, since: now, left_out: 0 }
    }

    /// Whether a line may be written at `now`, and how many were left out before it.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let earned = now.saturating_duration_since(self.since).as_millis() / LINE_EVERY.as_millis();
        if earned > 0 {
            self.lines =
                self.lines.saturating_add(u32::try_from(earned).unwrap_or(u32::MAX)).min(LINES_AT_ONCE);
            self.since = now;
        }
        if self.lines == 0 {
            self.left_out += 1;
            return None;
        }
        self.lines -= 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

/// Bounds what each place in the code writes.
#[derive(Default)]
struct Throttle(Mutex<HashMap<Identifier, Allowance>>);

/// Of the line that says how many were left out.
const LEFT_OUT: &str = "left_out";

impl<S: Subscriber> Layer<S> for Throttle {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        if event.metadata().target() == LEFT_OUT {
            return true;
        }
        let now = Instant::now();
        let taken = {
            let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let place = places.entry(event.metadata().callsite());
            place.or_insert_with(|| Allowance::new(now)).take(now)
        };
        if let Some(left_out) = taken.filter(|left_out| *left_out > 0) {
            tracing::warn!(target: LEFT_OUT, "{left_out} lines like the next one were left out");
        }
        taken.is_some()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::line::LINE_BYTES_MAX;
    use super::*;

    fn written(event: &str) -> String {
        let mut lines = Lines(Vec::new());
        lines.write_all(event.as_bytes()).unwrap();
        String::from_utf8(lines.0).unwrap()
    }

    #[test]
    fn an_event_is_one_line_that_no_terminal_obeys() {
        let forged = "WARN why=\"x\n2026-11-29T10:00:00Z ERROR all is lost\r\n\x1b[2Jgone\u{85}\u{2028}\"\n";
        let line = written(forged);
        assert_eq!(line.matches('\n').count(), 1, "{line:?}");
        assert!(line.ends_with('\n') && !line.trim_end().chars().any(char::is_control), "{line:?}");
        assert_eq!(written("INFO a plain one\n"), "INFO a plain one\n");
        let long = written(&"ü".repeat(LINE_BYTES_MAX));
        assert!(long.len() < LINE_BYTES_MAX + 16 && long.ends_with("…\n"), "{}", long.len());
    }

    #[test]
    fn a_place_writes_a_burst_then_a_few_and_what_is_left_out_is_counted() {
        let begin = Instant::now();
        let mut place = Allowance::new(begin);
        let written = (0..10_000).filter(|_| place.take(begin).is_some()).count();
        assert_eq!(written, LINES_AT_ONCE as usize);
        assert_eq!(place.take(begin + LINE_EVERY), Some(9_500));
        assert_eq!(place.take(begin + LINE_EVERY), None);
        let later = begin + Duration::from_secs(24 * 3600);
        assert_eq!(place.take(later), Some(1));
        assert_eq!((0..10_000).filter(|_| place.take(later).is_some()).count(), LINES_AT_ONCE as usize - 1);
    }
}
