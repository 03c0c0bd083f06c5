//! virsh's words: what any virsh of Debian's suites has as an option of `migrate` is known here, with or without a
//! value as there, and what the help offers is known to the newest.

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::{Result, ensure};

use crate::support::process::{SHORT, run, run_any};
use crate::support::{Lab, with_lab};

/// The options of a virsh's `migrate`, and whether each has a value.
fn options(lab: &Lab, made: &str) -> Result<BTreeMap<String, bool>> {
    let root = lab.paths.libvirt(made)?.join(made);
    // The oldest is no root file system of its own.
    let mut command = match made {
        "libvirt" => {
            let mut virsh = Command::new(root.join("usr/bin/virsh"));
            virsh.env("LD_LIBRARY_PATH", root.join("usr/lib/x86_64-linux-gnu"));
            virsh
        }
        _ => {
            let mut virsh = Command::new("chroot");
            virsh.arg(&root).arg("/usr/bin/virsh");
            virsh
        }
    };
    let said = run(command.args(["help", "migrate"]).env("LC_ALL", "C"), SHORT)?;
    let (_, list) = said.split_once("OPTIONS").unwrap_or_default();
    let lines =
        list.lines().map(|line| line.trim().trim_start_matches('[')).filter(|line| line.starts_with("--"));
    Ok(lines
        .filter_map(|line| {
            let name = line.split([' ', ']']).next()?.trim_start_matches("--").to_owned();
            let rest = line.trim_start_matches('-').trim_start_matches(&name).trim_start_matches(']');
            Some((name, rest.trim_start().starts_with('<')))
        })
        .collect())
}

#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn every_option_of_virsh_is_known() -> Result<()> {
    with_lab("every_option_of_virsh_is_known", |lab| {
        let mut newest = BTreeMap::new();
        for made in ["libvirt", "libvirt11", "libvirtnewest"] {
            newest = options(lab, made)?;
            ensure!(newest.len() > 45 && newest["bandwidth"] && !newest["live"], "{made}: {newest:?}");
            for (name, has_value) in &newest {
                let mut command = Command::new(&lab.paths.vmferry);
                command.args(["libvirt", "migrate"]);
                if name != "domain" {
                    command.arg("web1");
                }
                command.args(["--to", "bravo"]).arg(format!("--{name}"));
                command.args(has_value.then_some("1")).arg("--help");
                let said = run_any(&mut command, SHORT)?;
                // What needs another option is known as well.
                let is_known = said.code == 0
                    || [" cannot be used: ", " needs --"].iter().any(|words| said.stderr.contains(words));
                ensure!(is_known, "{made}: --{name}: {said:?}");
            }
        }
        let mut help = Command::new(&lab.paths.vmferry);
        let help = run(help.args(["libvirt", "migrate", "--help"]), SHORT)?;
        let (_, of_virsh) = help.split_once("(virsh's):").unwrap_or_default();
        let offered = of_virsh.lines().filter_map(|line| line.trim().strip_prefix("--"));
        let offered: Vec<&str> = offered.filter_map(|line| line.split(' ').next()).collect();
        ensure!(offered.len() > 45, "{help}");
        let unknown: Vec<_> = offered.iter().filter(|name| !newest.contains_key(**name)).collect();
        ensure!(unknown.is_empty(), "the newest virsh has no {unknown:?}");
        Ok(())
    })
}
