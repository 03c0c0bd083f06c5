//! Files that the state's folder has for each virtual machine by name: what its start printed, locks. A peer that
//! may send many names, for which one table of the configuration stands, does not fill it.

use std::collections::HashMap;
use std::fs;
use std::time::SystemTime;

use nix::fcntl::{Flock, FlockArg};

use crate::config::Config;

/// For how many VMs without a table they are kept, the latest.
const KEPT: usize = 256;
const ENDINGS: [&str; 4] = [".start.log", ".create.log", ".create", ".before_start"];

/// Before a VM is started: removes those of the VMs without a table that were not started for longest. A lock that
/// somebody has stays.
pub(super) fn sweep(config: &Config, vm: &str) {
    if config.template(vm).is_none() {
        return;
    }
    let mut of: HashMap<String, (SystemTime, Vec<std::path::PathBuf>)> = HashMap::new();
    for entry in fs::read_dir(&config.state_dir).into_iter().flatten().flatten() {
        let Ok(file) = entry.file_name().into_string() else { continue };
        let Some(name) = ENDINGS.iter().find_map(|ending| file.strip_suffix(ending)) else { continue };
        let Ok(changed) = entry.metadata().and_then(|file| file.modified()) else { continue };
        if config.template(name).is_some() {
            let (latest, files) = of.entry(name.to_owned()).or_insert((changed, Vec::new()));
            *latest = changed.max(*latest);
            files.push(entry.path());
        }
    }
    let mut all: Vec<_> = of.into_values().collect();
    all.sort_by_key(|(latest, _)| std::cmp::Reverse(*latest));
    for path in all.into_iter().skip(KEPT).flat_map(|(_, files)| files) {
        let is_free = fs::File::open(&path)
            .is_ok_and(|file| Flock::lock(file, FlockArg::LockExclusiveNonblock).is_ok());
        if is_free {
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use super::*;

    #[test]
    fn many_names_leave_few_files_and_no_lock_that_is_held_goes() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path();
        let text = format!(
            "state_dir = '{}'\n[tls]\nca = 'a'\ncert = 'b'\nkey = 'c'\n[vm.own]\nqmp = '/x'\n[vm.\"web*\"]\nqmp = '/{{vm}}'\n",
            state.display()
        );
        let config = Config::parse(&text, state).unwrap();
        let old = SystemTime::UNIX_EPOCH;
        for name in ["own.start.log", "web-held.create", "web-old.start.log", "web-old.create", "other"] {
            fs::File::create(state.join(name)).unwrap().set_modified(old).unwrap();
        }
        let held = fs::File::open(state.join("web-held.create")).unwrap();
        let held = Flock::lock(held, FlockArg::LockExclusive).unwrap();
        (0..KEPT).for_each(|n| fs::write(state.join(format!("web{n}.start.log")), "").unwrap());
        let count = || fs::read_dir(state).unwrap().count();
        sweep(&config, "own");
        assert_eq!(count(), KEPT + 5);
        sweep(&config, "web1");
        assert_eq!(count(), KEPT + 3);
        assert!(["own.start.log", "web-held.create", "other"].iter().all(|name| state.join(name).exists()));
        drop(held);
        sweep(&config, "web1");
        assert!(!state.join("web-held.create").exists());
    }
}
