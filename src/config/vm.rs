//! `[vm.NAME]`: a virtual machine, and how its QEMU is reached and started.

use std::path::PathBuf;

use serde::Deserialize;

use super::CreateConfig;

/// One virtual machine.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Unix socket of a QMP monitor that only vmferry uses (a monitor serves one client).
    pub qmp: PathBuf,
    /// QEMU's own log on this host, if it has one: its last lines are told when it ends of itself.
    /// Where QEMU's standard error is a file, or its unit has a journal, that is found without.
    pub log: Option<PathBuf>,
    /// How to start a fresh QEMU that waits for this VM (`-incoming defer -S`).
    pub start: Option<Start>,
    /// How images are made for it, instead of `[create]`.
    pub create: Option<CreateConfig>,
    /// Command run on the destination when the source has handed over and before the guest
    /// starts: move an address, switch a bridge port. Its time is downtime; its failure is
    /// reported and does not keep the guest from starting. It runs again when the agent died
    /// while it was at work, so it must not mind that. The one that was left behind is waited for
    /// first, for as long as `hook_s` at most: its standard input is a lock.
    #[serde(default)]
    pub before_start: Vec<String>,
}

/// How a destination's QEMU is started.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Start {
    /// A systemd unit, started with `systemctl start` and stopped with `systemctl stop`.
    Unit(String),
    /// A command and its arguments. It may stay in the foreground or put itself in the
    /// background; its QEMU must not end with the agent.
    Command(Vec<String>),
}

impl VmConfig {
    pub(super) fn check(&self, name: &str) -> Result<(), (String, String)> {
        let legal = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.len() > 128 || !name.chars().all(legal) {
            let problem = "a VM's name is 1–128 letters, digits, '-', '_' or '.'";
            return Err((format!("vm.{name}"), problem.into()));
        }
        match &self.start {
            Some(Start::Command(words)) if words.is_empty() => Err((
                format!("vm.{name}.start.command"),
                "is empty; write the program and its arguments".into(),
            )),
            _ => self.create.as_ref().map_or(Ok(()), |create| create.check(&format!("vm.{name}.create"))),
        }
    }
}
