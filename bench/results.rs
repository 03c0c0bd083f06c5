//! `bench/RESULTS.md` has two halves, each written by a program of its own; neither touches the
//! other's.

use std::fs;
use std::path::Path;

use anyhow::Context;

/// Stands between the halves.
const MARK: &str = "<!-- Above: bench/main.rs. Below: bench/moves. Each writes its own half. -->\n";

/// Whose half.
#[derive(Clone, Copy)]
// Each program names one.
#[allow(dead_code)]
pub(crate) enum Half {
    /// Relays beside relays.
    Relays,
    /// Migrations of real QEMUs.
    Moves,
}

/// Writes one half and keeps the other.
///
/// # Errors
/// The operating system's answer.
pub(crate) fn write(path: &Path, half: Half, text: &str) -> anyhow::Result<()> {
    let before = if path.exists() { fs::read_to_string(path)? } else { String::new() };
    let (relays, moves) = before.split_once(MARK).unwrap_or((&before, ""));
    let whole = match half {
        Half::Relays => format!("{}\n\n{MARK}{moves}", text.trim_end()),
        Half::Moves => format!("{}\n\n{MARK}\n{}\n", relays.trim_end(), text.trim()),
    };
    fs::write(path, whole).with_context(|| format!("can't write {}", path.display()))
}
