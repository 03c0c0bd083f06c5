//! `vmferry libvirt check`: what libvirt or the destination would refuse, as far as the domain's XML, libvirt
//! and the destination's agent tell it. Nothing is made or changed.

use std::path::Path;
use std::process::ExitCode;

use hyper::Method;
use nix::sys::statfs::{
    BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, FsType, OVERLAYFS_SUPER_MAGIC, TMPFS_MAGIC, XFS_SUPER_MAGIC, statfs,
};

use super::devices;
use super::domain::{Disk, Domain};
use super::finding::{Finding, refused, warning};
use super::migrate::{refuse_print, request};
use super::options::Wanted;
use super::virsh::Virsh;
use crate::api::LibvirtLook;
use crate::cli::client::{Client, NotDone};
use crate::cli::exit_code::EXIT_FAILED;
use crate::printable::printable;

pub(super) async fn run(client: &Client, wanted: &Wanted) -> anyhow::Result<ExitCode> {
    refuse_print(wanted)?;
    let virsh = Virsh::new(wanted.connect.as_deref());
    let mut found = of_domain(&virsh, wanted).await?;
    let asked: anyhow::Result<LibvirtLook> =
        client.call(Method::POST, "/v1/libvirt/check", &request(wanted)).await;
    match asked {
        Ok(look) => found.extend(of_destination(wanted, look)),
        Err(e) => match e.downcast::<NotDone>()? {
            NotDone::Refused { error, remedy } => found.push(refused(error, remedy)),
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
        .map(|lack| refused(format!("{}: {lack}", wanted.to), "deploy/README.md has a libvirt host's groups"))
        .collect();
    if !look.rpc && wanted.dest_uri.is_none() {
        found.push(refused(
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
        return Ok(vec![refused(xml.error(), "`virsh list --all` has the domains of this host")]);
    }
    let version = virsh.ask(&["version", "--daemon"]).await?.stdout;
    let domain = Domain::parse(&xml.stdout);
    let mut found = of_options(wanted);
    // Of one that does not run only the definition moves.
    if !wanted.offline {
        found.extend(devices::findings(&xml.stdout, qemu(&version)));
        found.extend(of_disks(wanted, &domain, is_local));
    }
    let state = virsh.ask(&["domstate", &wanted.domain]).await?;
    let is_off = state.stdout.trim() == "shut off";
    if is_off && !wanted.offline {
        found.push(refused("it does not run", "--offline --persistent moves its definition, without disks"));
    }
    for (command, what) in [("snapshot-list", "snapshot"), ("checkpoint-list", "checkpoint")] {
        let listed = virsh.ask(&[command, "--name", &wanted.domain]).await?;
        let count = listed.stdout.lines().filter(|line| !line.trim().is_empty()).count();
        if listed.ok && count > 0 {
            found.push(of_points(what, count));
        }
    }
    if wanted.postcopy {
        found.extend(of_post_copy(&version));
    }
    Ok(found)
}

/// Snapshots, which libvirt refuses, or checkpoints, whose metadata it leaves behind.
fn of_points(what: &str, count: usize) -> Finding {
    let remedy = format!("delete their metadata first: virsh {what}-delete --metadata");
    match what {
        "snapshot" => {
            refused(format!("it has {count} {what}s, with which libvirt does not migrate it"), remedy)
        }
        _ => warning(format!("it has {count} {what}s, which stay behind"), remedy),
    }
}

/// What is permitted, and perhaps not meant.
fn of_options(wanted: &Wanted) -> Vec<Finding> {
    let mut found = Vec::new();
    if !wanted.offline && !wanted.has("live") {
        found.push(warning(
            "without --live the guest stands still until all of it is there",
            "add --live, unless that is meant",
        ));
    }
    if wanted.has("undefinesource") && !wanted.has("persistent") {
        found.push(warning(
            "with --undefinesource and without --persistent no host keeps its definition",
            "add --persistent: else it is forgotten when it is shut down",
        ));
    }
    found
}

/// The QEMU that runs it, from what `virsh version` prints.
fn qemu(version: &str) -> Option<(u32, u32)> {
    let line = version.lines().find_map(|line| line.strip_prefix("Running hypervisor: QEMU "))?;
    let mut numbers = line.split('.').map(|number| number.trim().parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

/// From what `virsh version --daemon` prints. The destination's is not known here; it is likely to be the same.
fn of_post_copy(version: &str) -> Option<Finding> {
    let daemon = version.lines().find_map(|line| line.strip_prefix("Running against daemon: "))?;
    let crashes = daemon.starts_with("11.2.") || daemon.starts_with("11.3.");
    crashes.then(|| {
        warning(
            format!("libvirt is {} here; one of 11.2 or 11.3 at the destination crashes when a post-copy that was broken is resumed", printable(daemon.trim())),
            "libvirt 11.4 has it mended; until then a post-copy that breaks costs the guest",
        )
    })
}

/// Whether a file is on a file system of this host alone. None where that is not known.
fn is_local(file: &Path) -> Option<bool> {
    /// Not among nix's.
    const ZFS: FsType = FsType(0x2fc1_2fc1);
    const OF_ONE_HOST: [FsType; 6] =
        [EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC, TMPFS_MAGIC, OVERLAYFS_SUPER_MAGIC, ZFS];
    let kind = statfs(file).ok()?.filesystem_type();
    OF_ONE_HOST.contains(&kind).then_some(true)
}

/// By libvirt's `qemuMigrationSrcIsSafe`.
fn of_disks(wanted: &Wanted, domain: &Domain, is_local: impl Fn(&Path) -> Option<bool>) -> Vec<Finding> {
    let mut found = of_named_disks(wanted, domain);
    for disk in &domain.disks {
        let name = &disk.target;
        if let Some(medium) = &disk.medium {
            found.push(warning(
                format!("there is a medium in {name}: {medium}"),
                format!("the destination must have it under the same path; else eject it: virsh change-media --eject {} {name}", wanted.domain),
            ));
        }
        let is_copied = match wanted.copies {
            false => false,
            true if wanted.disks.is_empty() => disk.is_copied,
            true => wanted.disks.contains(name),
        };
        let Some(source) = disk.source.as_deref().filter(|_| !is_copied && !disk.is_drive) else { continue };
        let is_unsafe = disk.is_file
            && !disk.is_read_only
            && !wanted.has("unsafe")
            && is_local(Path::new(source)) == Some(true);
        found.push(match is_unsafe {
            true => refused(
                format!("disk {name} is not copied, and {source} is on a file system of this host alone, which libvirt calls unsafe"),
                what_copies(disk),
            ),
            false => warning(
                format!("disk {name} is not copied: both hosts must have the same one"),
                what_copies(disk),
            ),
        });
    }
    found
}

/// What has a disk copied that is not.
fn what_copies(disk: &Disk) -> String {
    let why = match disk {
        Disk { is_read_only: true, .. } => "read-only",
        Disk { is_shared: true, .. } => "shared (<shareable/>)",
        _ => {
            return "--copy-storage-all copies all; the destination's images must be there, with the same size; \
                    --unsafe where both hosts have the same file"
                .to_owned();
        }
    };
    format!(
        "it is {why}, and such a disk is copied only if --migrate-disks names it; leave it so where the destination has it"
    )
}

fn of_named_disks(wanted: &Wanted, domain: &Domain) -> Vec<Finding> {
    let mut found = Vec::new();
    for name in &wanted.disks {
        match domain.disks.iter().find(|disk| disk.target == *name) {
            None => {
                found.push(refused(format!("it has no disk {name}"), "`virsh domblklist` has their names"))
            }
            Some(disk) if !disk.is_copied => found.push(warning(
                format!("disk {name} is read-only, shared, or has no medium"),
                "libvirt copies it all the same if it is named; leave it out if the destination has it",
            )),
            Some(_) => {}
        }
    }
    found
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_virsh() {
        assert_eq!(qemu("Using library: libvirt 9.0.0\nRunning hypervisor: QEMU 7.2.22\n"), Some((7, 2)));
        assert_eq!(qemu("Running hypervisor: QEMU 10.0.2\n"), Some((10, 0)));
        assert_eq!(qemu("Running hypervisor: QEMU\n"), None);
    }

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

    fn wanted(options: &str) -> Wanted {
        let words: Vec<String> =
            format!("web1 --to bravo --live {options}").split_whitespace().map(str::to_owned).collect();
        crate::cli::libvirt::options::parse(&words).unwrap()
    }

    #[test]
    fn disks_that_stay_behind_are_said() {
        let disk = |target: &str| Disk {
            target: target.into(),
            is_copied: true,
            source: Some(format!("/{target}")),
            is_file: true,
            ..Disk::default()
        };
        let domain = Domain { disks: vec![disk("vda"), disk("vdb")] };
        let refusals = |options: &str, local: Option<bool>| {
            let found = of_disks(&wanted(options), &domain, |_| local);
            (found.len(), found.iter().filter(|f| f.refused).count())
        };
        assert_eq!(refusals("--copy-storage-all", Some(true)), (0, 0));
        assert_eq!(refusals("--copy-storage-all --migrate-disks vda", Some(true)), (1, 1));
        assert_eq!(refusals("--copy-storage-all --migrate-disks vda", None), (1, 0));
        assert_eq!(refusals("--copy-storage-all --migrate-disks vda --unsafe", Some(true)), (1, 0));
        assert_eq!(refusals("", Some(true)), (2, 2));
        assert_eq!(refusals("--copy-storage-all --migrate-disks vda,vdb,vdx", Some(true)), (1, 1));
    }

    #[test]
    fn what_libvirt_does_not_copy_by_itself_is_said() {
        let found = |disk: Disk| {
            let disk = Disk { target: "sda".into(), source: Some("/x".into()), is_file: true, ..disk };
            of_disks(&wanted("--copy-storage-all"), &Domain { disks: vec![disk] }, |_| Some(true))
        };
        let shared = found(Disk { is_shared: true, ..Disk::default() });
        assert!(shared[0].refused && shared[0].remedy.contains("shareable"), "{shared:?}");
        let read_only = found(Disk { is_read_only: true, ..Disk::default() });
        assert!(!read_only[0].refused && read_only[0].remedy.contains("read-only"), "{read_only:?}");
        let medium = Some("/d.iso".to_owned());
        let drive = found(Disk { is_drive: true, is_read_only: true, medium, ..Disk::default() });
        assert!(drive.len() == 1 && drive[0].text.contains("/d.iso"), "{drive:?}");
    }

    #[test]
    fn what_is_perhaps_not_meant_is_said() {
        assert_eq!(of_options(&wanted("--persistent --undefinesource")), []);
        assert!(of_options(&wanted("--undefinesource"))[0].text.contains("no host keeps its definition"));
        let words = ["web1", "--to", "bravo"].map(str::to_owned);
        let still = of_options(&crate::cli::libvirt::options::parse(&words).unwrap());
        assert!(still[0].text.contains("stands still"), "{still:?}");
    }
}
