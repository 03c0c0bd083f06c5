//! A gate: a command of a host that waits at its beginning for as long as the test likes.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::support::process::{LONG, wait_for};
use crate::support::vm::{quoted, write_script};

/// A script that stands before another one.
#[derive(Debug, Clone)]
pub struct Gate {
    script: PathBuf,
    closed: PathBuf,
    reached: PathBuf,
    fails: PathBuf,
}

impl Gate {
    /// Writes a script `name` in `folder` that runs `next` once the gate is open. It is open.
    ///
    /// # Errors
    /// The script cannot be written.
    pub fn before(next: &Path, folder: &Path, name: &str) -> Result<Self> {
        let path = |suffix: &str| folder.join(format!("{name}{suffix}"));
        let gate = Self {
            script: path(""),
            closed: path(".closed"),
            reached: path(".reached"),
            fails: path(".fails"),
        };
        let word = |path: &Path| quoted(&path.display().to_string());
        write_script(
            &gate.script,
            &format!(
                "#!/bin/sh\n[ -e {0} ] && touch {1}\nwhile [ -e {0} ]; do sleep 0.05; done\n[ -e {3} ] && exit 1\n\
                 exec {2} \"$@\"\n",
                word(&gate.closed),
                word(&gate.reached),
                word(next),
                word(&gate.fails)
            ),
        )?;
        Ok(gate)
    }

    /// The command for the agent's configuration.
    pub fn script(&self) -> &Path {
        &self.script
    }

    /// Whoever comes waits.
    ///
    /// # Errors
    /// The file system is in the way.
    pub fn close(&self) -> Result<()> {
        let _ = fs::remove_file(&self.reached);
        Ok(fs::write(&self.closed, "")?)
    }

    /// Everybody passes.
    pub fn open(&self) {
        let _ = fs::remove_file(&self.closed);
    }

    /// Whoever passes from now on does nothing and fails, or does its work again.
    ///
    /// # Errors
    /// The file system is in the way.
    pub fn fail(&self, fails: bool) -> Result<()> {
        match fails {
            true => Ok(fs::write(&self.fails, "")?),
            false => Ok(fs::remove_file(&self.fails)?),
        }
    }

    /// Waits until somebody stands before the closed gate.
    ///
    /// # Errors
    /// Nobody came.
    pub fn wait_reached(&self) -> Result<()> {
        wait_for(&format!("{} to be run", self.script.display()), LONG, || {
            Ok(self.reached.exists().then_some(()))
        })
    }
}
