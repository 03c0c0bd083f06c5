//! `[sandbox]`: what the agent takes from itself and from what it starts.

use std::path::PathBuf;

use serde::Deserialize;

/// What is left out follows from what the configuration has the agent start.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SandboxConfig {
    /// Refuse system calls that nobody here needs.
    pub seccomp: Option<bool>,
    /// Write, execute and dial only what the configuration names.
    pub landlock: Option<bool>,
    /// Further folders that may be written to under Landlock.
    #[serde(default)]
    pub write: Vec<PathBuf>,
}
