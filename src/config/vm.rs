//! `[vm.NAME]`: a virtual machine, and how its QEMU is reached and started.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::CreateConfig;

/// What stands for a virtual machine's name.
pub(super) const VM: &str = "{vm}";
/// What the words for one disk may hold in braces.
const DISK_BRACES: [&str; 7] = [VM, "{disk}", "{path}", "{format}", "{bytes}", "{number}", "{address}"];

/// One virtual machine. `{vm}` is its name in `qmp`, `log`, `start` and `before_start`.
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
    /// What QEMU's command line has for each disk: added to a start command's arguments, and in
    /// `VMFERRY_DISK_ARGUMENTS` of a unit's environment. `{disk}`, `{path}`, `{format}`, `{bytes}`, `{number}` are
    /// the disk's, as `[create]` has them; `{address}` is the slot and function at the source, on the first PCI bus.
    #[serde(default)]
    pub disk_arguments: Vec<String>,
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
        Ok(())
    }

    /// What holds for a table of one, and of many.
    pub(super) fn check_values(&self, name: &str) -> Result<(), (String, String)> {
        match &self.start {
            Some(Start::Command(words)) if words.is_empty() => Err((
                format!("vm.{name}.start.command"),
                "is empty; write the program and its arguments".into(),
            )),
            _ => self.create.as_ref().map_or(Ok(()), |create| create.check(&format!("vm.{name}.create"))),
        }?;
        self.check_disk_arguments(name)
    }

    fn check_disk_arguments(&self, name: &str) -> Result<(), (String, String)> {
        let problem =
            |word: &str, what: &str| Err((format!("vm.{name}.disk_arguments"), format!("{word:?} {what}")));
        for word in &self.disk_arguments {
            let known = DISK_BRACES.iter().fold(word.clone(), |word, name| word.replace(name, ""));
            if known.contains(['{', '}']) {
                return problem(word, &format!("has other braces than {}", DISK_BRACES.join(", ")));
            }
            if word.is_empty() || word.contains(|c: char| c.is_whitespace() || "\"'\\$".contains(c)) {
                return problem(
                    word,
                    "is empty, or has a blank, a quote, `\\` or `$`, which systemd takes for its own",
                );
            }
        }
        Ok(())
    }

    /// With the name of a virtual machine in the place of `{vm}`.
    pub(super) fn filled(&self, vm: &str) -> Self {
        let text = |text: &String| text.replace(VM, vm);
        let path = |path: &PathBuf| PathBuf::from(path.to_string_lossy().replace(VM, vm));
        let start = self.start.as_ref().map(|start| match start {
            Start::Unit(unit) => Start::Unit(text(unit)),
            Start::Command(words) => Start::Command(words.iter().map(text).collect()),
        });
        Self {
            qmp: path(&self.qmp),
            log: self.log.as_ref().map(path),
            start,
            disk_arguments: self.disk_arguments.clone(),
            create: self.create.clone(),
            before_start: self.before_start.iter().map(text).collect(),
        }
    }

    pub(super) fn resolve(&mut self, base: &Path) {
        self.qmp = base.join(&self.qmp);
        self.log = self.log.take().map(|log| base.join(log));
        if let Some(create) = &mut self.create {
            create.resolve(base);
        }
    }
}
