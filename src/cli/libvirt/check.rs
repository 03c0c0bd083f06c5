//! `vmferry libvirt check`: what libvirt or the destination would refuse, as far as the domain's XML, libvirt
//! and the destination's agent tell it. Nothing is made or changed.

use std::process::ExitCode;

use hyper::Method;
use serde::Serialize;

use super::domain::Domain;
use super::migrate::{refuse_print, request};
use super::options::Wanted;
use super::virsh::Virsh;
use crate::api::LibvirtLook;
use crate::cli::client::{Client, NotDone};
use crate::cli::exit_code::EXIT_FAILED;
use crate::printable::printable;

/// Something that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Finding {
    /// It will be refused.
    refused: bool,
    text: String,
    remedy: String,
}

fn finding(refused: bool, text: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { refused, text: text.into(), remedy: remedy.into() }
}

pub(super) async fn run(client: &Client, wanted: &Wanted) -> anyhow::Result<ExitCode> {
    refuse_print(wanted)?;
    let virsh = Virsh::new(wanted.connect.as_deref());
    let mut found = of_domain(&virsh, wanted).await?;
    let asked: anyhow::Result<LibvirtLook> =
        client.call(Method::POST, "/v1/libvirt/check", &request(wanted)).await;
    match asked {
        Ok(look) => found.extend(of_destination(wanted, look)),
        Err(e) => match e.downcast::<NotDone>()? {
            NotDone::Refused { error, remedy } => found.push(finding(true, error, remedy)),
            unreachable @ NotDone::Unreachable { .. } => return Err(unreachable.into()),
        },
    }
    show(wanted, &found)?;
    let refused = found.iter().any(|finding| finding.refused);
    Ok(if refused { EXIT_FAILED.into() } else { ExitCode::SUCCESS })
}

fn show(wanted: &Wanted, found: &[Finding]) -> anyhow::Result<()> {
    if wanted.json {
        return crate::cli::show::json_list("findings", &found);
    }
    let (domain, to) = (&wanted.domain, &wanted.to);
    match found.iter().any(|finding| finding.refused) {
        true => println!("{domain} cannot be moved to {to} by libvirt:"),
        false => println!("{domain} can be moved to {to}, as far as its XML and both agents tell"),
    }
    for finding in found {
        println!("  {} {}", if finding.refused { "✗" } else { "! warning:" }, finding.text);
        println!("    → {}", finding.remedy);
    }
    Ok(())
}

fn of_destination(wanted: &Wanted, look: LibvirtLook) -> Vec<Finding> {
    let lacks = look.lacks.into_iter();
    let mut found: Vec<_> = lacks
        .map(|lack| {
            finding(true, format!("{}: {lack}", wanted.to), "deploy/README.md has a libvirt host's groups")
        })
        .collect();
    if !look.rpc && wanted.dest_uri.is_none() {
        found.push(finding(
            true,
            format!("{} does not let libvirt's own connection through the tunnel", wanted.to),
            "give --dest-uri, as in qemu+ssh://HOST/system, or set `libvirt_rpc = true` there",
        ));
    }
    found
}

/// What the domain itself says.
async fn of_domain(virsh: &Virsh, wanted: &Wanted) -> anyhow::Result<Vec<Finding>> {
    let xml = virsh.ask(&["dumpxml", &wanted.domain]).await?;
    if !xml.ok {
        return Ok(vec![finding(true, xml.error(), "`virsh list --all` has the domains of this host")]);
    }
    let domain = Domain::parse(&xml.stdout);
    let hindrances = domain.hindrances.iter().map(|(text, remedy)| finding(true, *text, *remedy));
    let notes = domain.notes.iter().map(|(text, remedy)| finding(false, *text, *remedy));
    let mut found: Vec<_> = hindrances.chain(notes).collect();
    found.extend(of_disks(wanted, &domain));
    let state = virsh.ask(&["domstate", &wanted.domain]).await?;
    let is_off = state.stdout.trim() == "shut off";
    if is_off && !wanted.offline {
        found.push(finding(
            true,
            "it does not run",
            "--offline --persistent moves its definition, without disks",
        ));
    }
    for (command, what) in [("snapshot-list", "snapshot"), ("checkpoint-list", "checkpoint")] {
        let listed = virsh.ask(&[command, "--name", &wanted.domain]).await?;
        let count = listed.stdout.lines().filter(|line| !line.trim().is_empty()).count();
        if listed.ok && count > 0 {
            found.push(finding(
                true,
                format!("it has {count} {what}s, which libvirt does not migrate"),
                format!("delete their metadata first: virsh {what}-delete --metadata"),
            ));
        }
    }
    if wanted.virsh.iter().any(|word| word == "--postcopy") {
        let version = virsh.ask(&["version", "--daemon"]).await?;
        found.extend(of_post_copy(&version.stdout));
    }
    Ok(found)
}

/// From what `virsh version --daemon` prints. The destination's is not known here; it is likely to be the same.
fn of_post_copy(version: &str) -> Option<Finding> {
    let daemon = version.lines().find_map(|line| line.strip_prefix("Running against daemon: "))?;
    let crashes = daemon.starts_with("11.2.") || daemon.starts_with("11.3.");
    crashes.then(|| {
        finding(
            false,
            format!("libvirt is {} here; one of 11.2 or 11.3 at the destination crashes when a post-copy that was broken is resumed", printable(daemon.trim())),
            "libvirt 11.4 has it mended; until then a post-copy that breaks costs the guest",
        )
    })
}

fn of_disks(wanted: &Wanted, domain: &Domain) -> Vec<Finding> {
    let mut found = Vec::new();
    for name in &wanted.disks {
        match domain.disks.iter().find(|disk| disk.target == *name) {
            None => found.push(finding(
                true,
                format!("it has no disk {name}"),
                "`virsh domblklist` has their names",
            )),
            Some(disk) if !disk.is_copied => found.push(finding(
                false,
                format!("disk {name} is read-only, shared, or has no medium"),
                "libvirt copies it all the same if it is named; leave it out if the destination has it",
            )),
            Some(_) => {}
        }
    }
    let is_left_out =
        |name: &String| !wanted.copies || !(wanted.disks.is_empty() || wanted.disks.contains(name));
    for disk in domain.disks.iter().filter(|disk| disk.is_copied && is_left_out(&disk.target)) {
        found.push(finding(
            false,
            format!("disk {} is not copied: both hosts must have the same one", disk.target),
            "--copy-storage-all copies all; the destination's images must be there, with the same size",
        ));
        if disk.is_cached && !wanted.virsh.iter().any(|word| word == "--unsafe") {
            found.push(finding(
                true,
                format!("disk {} is written through the host's cache, which libvirt calls unsafe where both hosts have it", disk.target),
                "set cache='none' for it, or add --unsafe if its file system is a cluster's",
            ));
        }
    }
    found
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::cli::libvirt::domain::Disk;

    #[test]
    fn a_libvirt_that_crashes_when_it_resumes_is_said() {
        let version = |daemon| format!("Using API: QEMU 11.3.0\nRunning against daemon: {daemon}\n");
        assert!(of_post_copy(&version("11.2.0")).is_some_and(|found| found.text.contains("11.2.0 here")));
        assert!(of_post_copy(&version("11.3.0")).is_some_and(|found| !found.refused));
        for mended in ["9.0.0", "11.1.0", "11.4.0", "11.30.0", "12.8.0"] {
            assert_eq!(of_post_copy(&version(mended)), None, "{mended}");
        }
        assert_eq!(of_post_copy("Using API: QEMU 11.3.0\n"), None);
    }

    #[test]
    fn disks_that_stay_behind_are_said() {
        let disk = |target: &str, is_cached| Disk { target: target.into(), is_copied: true, is_cached };
        let domain = Domain { disks: vec![disk("vda", false), disk("vdb", true)], ..Domain::default() };
        let wanted = |copies, disks: &[&str]| Wanted {
            copies,
            disks: disks.iter().map(|d| (*d).to_owned()).collect(),
            ..Wanted::default()
        };
        assert_eq!(of_disks(&wanted(true, &[]), &domain), []);
        let of_one = of_disks(&wanted(true, &["vda"]), &domain);
        assert!(of_one.len() == 2 && of_one.iter().any(|f| f.refused), "{of_one:?}");
        assert_eq!(of_disks(&wanted(false, &[]), &domain).len(), 3);
        assert!(of_disks(&wanted(true, &["vda", "vdb", "vdx"]), &domain)[0].text.contains("vdx"));
    }
}
