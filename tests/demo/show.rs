//! How the demo looks: aligned lines, a mark in front of each, colours on a terminal only. Knows
//! nothing of what is shown.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

const LABEL_COLUMNS: usize = 26;
const GREEN: &str = "32";
const RED: &str = "31";
const DIM: &str = "2";
const BOLD: &str = "1";

/// Prints, and remembers whether everything held.
#[derive(Debug)]
pub(crate) struct Show {
    colours: bool,
    /// Set when the last line still waits for its mark.
    pending: bool,
    proved: usize,
    failed: Vec<String>,
    began: Instant,
}

impl Show {
    pub(crate) fn new() -> Self {
        let colours = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self { colours, pending: false, proved: 0, failed: Vec::new(), began: Instant::now() }
    }

    fn paint(&self, text: &str, colour: &str) -> String {
        if self.colours { format!("\x1b[{colour}m{text}\x1b[0m") } else { text.to_owned() }
    }

    pub(crate) fn title(&self, text: &str) {
        println!("\n {}", self.paint(text, BOLD));
    }

    /// A line of its own that is neither right nor wrong.
    pub(crate) fn note(&self, label: &str, text: &str) {
        println!("   {label:<LABEL_COLUMNS$}{}", self.paint(text, DIM));
    }

    pub(crate) fn plain(&self, text: &str) {
        println!("   {text}");
    }

    /// Says on a terminal what is being done, until its result takes the line's place.
    pub(crate) fn doing(&mut self, label: &str) {
        if self.colours {
            print!(" {} {label:<LABEL_COLUMNS$}{}", self.paint("·", DIM), self.paint("...", DIM));
            let _ = std::io::stdout().flush();
            self.pending = true;
        }
    }

    fn result(&mut self, good: bool, label: &str, text: &str) {
        let clear = if std::mem::take(&mut self.pending) { "\r\x1b[2K" } else { "" };
        let mark = if good { self.paint("✓", GREEN) } else { self.paint("✗", RED) };
        println!("{clear} {mark} {label:<LABEL_COLUMNS$}{text}");
    }

    /// Does a step of the set-up: if it fails, nothing after it makes sense.
    pub(crate) fn step<T>(
        &mut self,
        label: &str,
        run: impl FnOnce() -> anyhow::Result<(T, String)>,
    ) -> anyhow::Result<T> {
        self.doing(label);
        match run() {
            Ok((made, text)) => {
                self.result(true, label, &text);
                Ok(made)
            }
            Err(error) => {
                self.result(false, label, &format!("{error:#}"));
                self.failed.push(label.to_owned());
                Err(error)
            }
        }
    }

    /// Proves something; the others are proved all the same.
    pub(crate) fn prove(&mut self, label: &str, run: impl FnOnce() -> anyhow::Result<String>) {
        self.doing(label);
        match run() {
            Ok(text) => {
                self.proved += 1;
                self.result(true, label, &text);
            }
            Err(error) => {
                self.result(false, label, &format!("{error:#}"));
                self.failed.push(label.to_owned());
            }
        }
    }

    /// Whether nothing has failed so far.
    pub(crate) fn all_held(&self) -> bool {
        self.failed.is_empty()
    }

    /// The last line.
    pub(crate) fn finish(&self) {
        let took = seconds(self.began.elapsed());
        let line = if self.failed.is_empty() {
            self.paint(&format!("All {} proofs hold.", self.proved), GREEN)
        } else {
            self.paint(&format!("Failed: {}.", self.failed.join(", ")), RED)
        };
        println!("\n {line} {}\n", self.paint(&format!("The demo took {took}."), DIM));
    }
}

pub(crate) fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

/// 1234567 as "1.2 MB".
pub(crate) fn bytes(number: u64) -> String {
    let mut value = number as f64;
    for unit in ["B", "kB", "MB"] {
        if value < 1000.0 {
            return if unit == "B" { format!("{number} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1000.0;
    }
    format!("{value:.2} GB")
}

/// 1234567 as "1 234 567".
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}
