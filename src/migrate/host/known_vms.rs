//! The virtual machines that are known on this host by name: those of the configuration, and those that one of
//! its patterns stands for and whose monitor is there. A peer that names others makes none of them known.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Component, Path};

use crate::config::Config;

/// Most VMs that patterns may stand for at once.
const FOUND_MAX: usize = 4096;
/// What stands for a VM's name in the path of its monitor.
const VM: &str = "{vm}";

/// All of them, in order.
#[must_use]
pub fn names(config: &Config) -> Vec<String> {
    let mut names: BTreeSet<String> = config.vms.keys().cloned().collect();
    for (pattern, vm) in &config.templates {
        let found = candidates(&vm.qmp).into_iter();
        names.extend(found.filter(|name| is_of(config, pattern, name)).take(FOUND_MAX));
    }
    names.into_iter().collect()
}

/// Whether a VM is one of them.
#[must_use]
pub fn is_here(config: &Config, name: &str) -> bool {
    config.vms.contains_key(name)
        || config.template(name).is_some_and(|(pattern, _)| is_of(config, pattern, name))
}

fn is_of(config: &Config, pattern: &str, name: &str) -> bool {
    let is_its_own = config.template(name).is_some_and(|(own, _)| own == pattern);
    is_its_own && config.vm(name).is_some_and(|vm| vm.qmp.exists())
}

/// What the folder has where the first part of the monitor's path that holds a name is.
fn candidates(monitor: &Path) -> Vec<String> {
    let holds = |part: &Component<'_>| part.as_os_str().to_str().is_some_and(|part| part.contains(VM));
    let folder: std::path::PathBuf = monitor.components().take_while(|part| !holds(part)).collect();
    let part = monitor.components().find(holds).and_then(|part| part.as_os_str().to_str().map(str::to_owned));
    let Some((before, after)) = part.as_deref().and_then(|part| part.split_once(VM)) else {
        return Vec::new();
    };
    let name = |entry: OsString| {
        let entry = entry.into_string().ok()?;
        Some(entry.strip_prefix(before)?.strip_suffix(after)?.to_owned())
    };
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.file_name());
    entries.filter_map(name).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_stands_for_those_whose_monitor_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        for name in ["web1", "web2", "db1", "web*"] {
            std::fs::create_dir(dir.join(name)).unwrap();
        }
        for name in ["web1", "db1", "web*"] {
            std::fs::write(dir.join(name).join("agent.qmp"), "").unwrap();
        }
        let text = format!(
            "[tls]\nca = 'a'\ncert = 'b'\nkey = 'c'\n[vm.own]\nqmp = '/x'\n[vm.\"web*\"]\nqmp = '{}/{{vm}}/agent.qmp'\n",
            dir.display()
        );
        let config = Config::parse(&text, dir).unwrap();
        assert_eq!(names(&config), ["own", "web1"]);
        let here = ["own", "web1", "web2", "web3", "db1", "../web1"].map(|name| is_here(&config, name));
        assert_eq!(here, [true, true, false, false, false, false]);
    }
}
