//! `[vm."web*"]`: what holds for the virtual machines of these names that have no table of their own.

use std::collections::BTreeMap;

use super::forward::SOCKET_PATH_BYTES_MAX;
use super::peer::glob_matches;
use super::vm::VM;
use super::{CreateConfig, Start, VmConfig};

/// The longest name of a virtual machine that has no table: it becomes a part of paths and units.
const NAME_BYTES_MAX: usize = 64;

/// Takes the tables of patterns out of those of virtual machines.
pub(super) fn split(vms: &mut BTreeMap<String, VmConfig>) -> BTreeMap<String, VmConfig> {
    let named = std::mem::take(vms);
    let (templates, named) = named.into_iter().partition(|(name, _)| name.contains('*'));
    *vms = named;
    templates
}

/// Whether a name can be a part of a path, a unit's name and a command's argument.
fn is_tame(name: &str) -> bool {
    let legal = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    name.len() <= NAME_BYTES_MAX
        && name.chars().all(legal)
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
}

/// The pattern, and its table, of a virtual machine that has no table of its own: the longest that it matches.
pub(super) fn matching<'a>(
    templates: &'a BTreeMap<String, VmConfig>,
    name: &str,
) -> Option<(&'a str, &'a VmConfig)> {
    let matching = templates.iter().filter(|(pattern, _)| is_tame(name) && glob_matches(pattern, name));
    matching.max_by_key(|(pattern, _)| pattern.len()).map(|(pattern, vm)| (pattern.as_str(), vm))
}

impl VmConfig {
    pub(super) fn check_template(&self, pattern: &str) -> Result<(), (String, String)> {
        let problem = |key: &str, what: String| Err((format!("vm.{pattern}{key}"), what));
        if !pattern.chars().all(|c| c.is_ascii_alphanumeric() || "-_.*".contains(c)) {
            return problem("", "a pattern of VMs has letters, digits, '-', '_', '.' and '*'".into());
        }
        let monitor = self.qmp.to_string_lossy();
        if !monitor.contains(VM) {
            return problem(".qmp", format!("all VMs would have one monitor: write {VM} into it"));
        }
        if monitor.len() - VM.len() >= SOCKET_PATH_BYTES_MAX {
            return problem(".qmp", format!("a socket's path has at most {SOCKET_PATH_BYTES_MAX} bytes"));
        }
        match &self.start {
            Some(Start::Unit(unit)) if !unit.contains(VM) => {
                problem(".start.unit", format!("all VMs would have one unit: write {VM} into it"))
            }
            _ => self.check_own_path(pattern),
        }
    }

    fn check_own_path(&self, pattern: &str) -> Result<(), (String, String)> {
        let is_of_one = |create: &CreateConfig| !create.path.contains(VM);
        if self.create.as_ref().is_some_and(is_of_one) {
            let what = format!("all VMs would have one file: write {VM} into it");
            return Err((format!("vm.{pattern}.create.path"), what));
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Config;

    const TLS: &str = "[tls]\nca = \"a\"\ncert = \"b\"\nkey = \"c\"\n";

    fn parse(lines: &str) -> Result<Config, String> {
        Config::parse(&format!("{TLS}{lines}"), Path::new("/etc/x.toml")).map_err(|e| e.to_string())
    }

    #[test]
    fn the_longest_pattern_holds_for_a_name_without_a_table() {
        let config = parse(
            "[vm.\"*\"]\nqmp = \"/run/{vm}/a\"\n\
             [vm.\"web*\"]\nqmp = \"/run/web/{vm}\"\nstart = { command = [\"run\", \"{vm}\"] }\n\
             [vm.web1]\nqmp = \"/run/own\"\n",
        )
        .unwrap();
        let monitor = |name: &str| config.vm(name).map(|vm| vm.qmp.display().to_string());
        assert_eq!(config.vms.len(), 1);
        for (name, expected) in [
            ("web1", Some("/run/own")),
            ("web2", Some("/run/web/web2")),
            ("db", Some("/run/db/a")),
            ("..", None),
            (".x", None),
            ("-x", None),
            ("a/b", None),
            ("a b", None),
            ("", None),
            (&"x".repeat(65), None),
        ] {
            assert_eq!(monitor(name).as_deref(), expected, "{name:?}");
        }
        let start = config.vm("web2").unwrap().start;
        assert_eq!(start, Some(Start::Command(vec!["run".into(), "web2".into()])));
    }

    #[test]
    fn each_mistake_names_its_key() {
        let create = "[create]\npath = \"/srv/{vm}\"\n";
        for (lines, key) in [
            ("[vm.\"a*\"]\nqmp = \"/run/a\"\n", "vm.a*.qmp: all VMs would have one monitor"),
            ("[vm.\"a *\"]\nqmp = \"/run/{vm}\"\n", "vm.a *: a pattern of VMs"),
            (
                "[vm.\"a*\"]\nqmp = \"/{vm}\"\nstart = { unit = \"a.service\" }\n",
                "vm.a*.start.unit: all VMs would have one unit",
            ),
            (
                "[vm.\"a*\"]\nqmp = \"/{vm}\"\ncreate.path = \"/srv/{disk}\"\n",
                "vm.a*.create.path: all VMs would have one file",
            ),
            ("[vm.\"a*\"]\nqmp = \"/{vm}\"\ndisk_arguments = [\"x\"]\n", "no `create`"),
            (
                &format!("{create}[vm.\"a*\"]\nqmp = \"/{{vm}}\"\ndisk_arguments = [\"{{size}}\"]\n"),
                "has other braces than",
            ),
            (&format!("{create}[vm.\"a*\"]\nqmp = \"/{{vm}}\"\ndisk_arguments = [\"a b\"]\n"), "has a blank"),
        ] {
            let said = parse(lines).unwrap_err();
            assert!(said.contains(key), "{key:?} not in {said:?}");
        }
    }
}
