//! What the guest says on its serial line (tests/guest/writer.c), read from the file that QEMU
//! writes. Knows no QEMU.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

/// What was read so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Console {
    /// The boot's own number, from each `START` line: one, unless the guest booted again.
    pub generations: Vec<String>,
    /// All completed block numbers that were reported, in the order they came, with the guest's
    /// own clock in milliseconds.
    pub counts: Vec<(u64, u64)>,
}

impl Console {
    /// Reads the file; one that is not there yet is an empty one.
    ///
    /// # Errors
    /// The guest complained (`BAD`), its kernel panicked, or its count went backwards.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(e) => return Err(e).with_context(|| format!("{}", path.display())),
        };
        Self::parse(&String::from_utf8_lossy(&bytes)).with_context(|| format!("{}", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let mut console = Self::default();
        // The last line may still be on its way.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        for line in whole.lines() {
            console.take(line.trim_end_matches('\r'))?;
        }
        Ok(console)
    }

    fn take(&mut self, line: &str) -> Result<()> {
        if line.contains("BAD") || line.contains("Kernel panic") || line.contains("BUG:") {
            bail!("the guest complains: {line}");
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["START", ..] => {
                let drawn = words.iter().find_map(|w| w.strip_prefix("generation="));
                self.generations.push(drawn.unwrap_or_default().to_owned());
            }
            // A third word names the host, in guests that were told: tests/support/watcher.rs judges it.
            ["C", seq, ms] | ["C", seq, ms, _] => self.count(seq.parse()?, ms.parse()?)?,
            _ => {}
        }
        Ok(())
    }

    fn count(&mut self, seq: u64, ms: u64) -> Result<()> {
        if let Some((before, _)) = self.counts.last() {
            ensure!(seq > *before, "the guest counted {seq} after {before}");
        }
        self.counts.push((seq, ms));
        Ok(())
    }

    /// The first completed block number reported here.
    pub fn first(&self) -> Option<u64> {
        self.counts.first().map(|(seq, _)| *seq)
    }

    /// The last completed block number reported here.
    pub fn last(&self) -> Option<u64> {
        self.counts.last().map(|(seq, _)| *seq)
    }
}
