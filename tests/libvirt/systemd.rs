//! deploy/'s unit with its drop-in for libvirt's hosts, under a real systemd and beside a real libvirtd, on two
//! machines: groups, folders, owners, and a guest with two disks that moves.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::bed::{Domain, Hosts};
use crate::booted::Machine;
use crate::moves::{proves_wire, spec};
use crate::support::agent::PORT;
use crate::support::process::{LONG, Outcome, SHORT, run_any, wait_for};
use crate::support::{Capture, Credentials, Host, Lab, Way, with_lab};

const DROP_IN: &str = "etc/systemd/system/vmferry.service.d/libvirt.conf";
/// What packages do: users, folders, a libvirtd. Debian's own unit for it is not in the lab.
const SETUP: &str = r#"set -e
made=$1 uuid=$2 host=$3
mount -t overlay -o "lowerdir=$made/libvirt/usr:$made/qemu72/usr:/usr" vmferry-lab /usr
for group in kvm libvirt libvirt-qemu; do getent group $group >/dev/null || groupadd --system $group; done
getent passwd libvirt-qemu >/dev/null || useradd --system -g libvirt-qemu -d /nonexistent libvirt-qemu
mkdir -p /etc/libvirt /var/lib/libvirt/{images,qemu} /var/log/libvirt/qemu /var/cache/libvirt/qemu/capabilities
mount --bind "$host" /var/lib/libvirt/images
mount --bind "$made/libvirt/capabilities" /var/cache/libvirt/qemu/capabilities
mount --bind /dev/null /usr/bin/qemu-system-i386
basename "$host" | cut -c1 | tr -d '\n' >/var/lib/libvirt/letter
printf '%s\n' "host_uuid = \"$uuid\"" 'unix_sock_group = "libvirt"' 'unix_sock_rw_perms = "0770"' 'auth_unix_ro = "none"' \
  'auth_unix_rw = "none"' >/etc/libvirt/libvirtd.conf
printf '%s\n' 'user = "libvirt-qemu"' 'group = "libvirt-qemu"' 'stdio_handler = "file"' 'cgroup_controllers = []' 'namespaces = []' 'security_driver = "none"' >/etc/libvirt/qemu.conf
systemd-sysusers /etc/sysusers.d/vmferry.conf
chgrp -R vmferry /etc/vmferry
chmod -R g+rX /etc/vmferry
systemd-tmpfiles --create /etc/tmpfiles.d/vmferry.conf
systemctl daemon-reload
systemd-run --quiet --unit=libvirtd libvirtd
"#;
fn boot(lab: &Lab, host: &Host, peer: &Host, credentials: &Credentials) -> Result<Machine> {
    let made = lab.paths.libvirt("libvirt")?;
    fs::create_dir_all(made.join("libvirt/capabilities"))?;
    let machine = Machine::boot(lab, host, &[&made, &host.dir])?;
    let root = machine.root();
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy");
    let tls = "etc/vmferry/tls";
    for folder in [tls, "etc/systemd/system/vmferry.service.d", "etc/sysusers.d", "etc/tmpfiles.d"] {
        fs::create_dir_all(root.join(folder))?;
    }
    fs::copy(&lab.paths.vmferry, root.join("usr/bin/vmferry"))?;
    for (from, to) in [
        ("vmferry.service", "etc/systemd/system/vmferry.service"),
        ("vmferry.slice", "etc/systemd/system/vmferry.slice"),
        ("sysusers.d/vmferry.conf", "etc/sysusers.d/vmferry.conf"),
        ("tmpfiles.d/vmferry.conf", "etc/tmpfiles.d/vmferry.conf"),
        ("vmferry.service.d/libvirt.conf", DROP_IN),
    ] {
        fs::copy(deploy.join(from), root.join(to))?;
    }
    let issued = credentials.issue(&host.name)?;
    for file in ["ca-cert.pem", "cert.pem", "key.pem"] {
        fs::copy(issued.join(file), root.join(tls).join(file))?;
    }
    let (name, address) = (&peer.name, &peer.v4);
    let config = format!(
        "[tls]\nca = \"tls/ca-cert.pem\"\ncert = \"tls/cert.pem\"\nkey = \"tls/key.pem\"\n\
         [peer.{name}]\nidentity = \"{name}\"\naddress = \"{address}:{PORT}\"\n\
         send = [\"web*\"]\nlibvirt = [\"web*\"]\nlibvirt_rpc = true\n"
    );
    fs::write(root.join("etc/vmferry/vmferry.toml"), config)?;
    let uuid = uuid::Uuid::new_v4().to_string();
    let (lab_dir, host_dir) = (made.display().to_string(), host.dir.display().to_string());
    machine.run(&["bash", "-c", SETUP, "setup", &lab_dir, &uuid, &host_dir])?;
    machine.systemctl(&["start", "vmferry"])?;
    wait_for("libvirtd", LONG, || {
        let said = any(&machine, &["virsh", "-q", "-c", "qemu:///system", "version"])?;
        Ok((said.code == 0).then_some(()))
    })?;
    Ok(machine)
}

/// A host with the file systems of its machine.
fn seen_as(machine: &Machine, host: &Host) -> Result<Host> {
    let root = machine.root();
    let leader = fs::read_to_string(root.parent().context("a machine without a folder")?.join("leader"))?;
    Ok(host.with_mounts_of(leader.trim().parse()?))
}

fn any(machine: &Machine, words: &[&str]) -> Result<Outcome> {
    run_any(&mut machine.command(words), LONG)
}

/// Mode, owner and group.
fn is(machine: &Machine, path: &str, wanted: &str) -> Result<()> {
    let said = machine.run(&["stat", "-c", "%a %U:%G", path])?;
    ensure!(said.trim() == wanted, "{path} is {} instead of {wanted}", said.trim());
    Ok(())
}

/// The agent's own process is a user of its own with libvirt's groups, by the kernel's word.
fn has_groups(machine: &Machine) -> Result<()> {
    let pid = machine.shown("MainPID", "vmferry")?;
    let status = machine.run(&["cat", &format!("/proc/{pid}/status")])?;
    let groups = status.lines().find_map(|line| line.strip_prefix("Groups:")).context("no groups")?;
    let own = machine.run(&["id", "-u", "vmferry"])?;
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:")).context("no user")?;
    ensure!(uids.split_whitespace().all(|uid| uid == own.trim()), "it runs as {uids}, not as vmferry");
    for group in ["libvirt", "libvirt-qemu"] {
        let entry = machine.run(&["getent", "group", group])?;
        let id = entry.split(':').nth(2).context("no number")?;
        ensure!(groups.split_whitespace().any(|has| has == id), "not in {group}: {groups}");
    }
    is(machine, "/run/vmferry", "751 vmferry:vmferry")
}

const CHECK: [&str; 7] = ["vmferry", "libvirt", "check", "web1", "--to", "bravo", "--copy-storage-all"];

#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn the_drop_in_gives_the_agent_what_libvirt_needs() -> Result<()> {
    with_lab("the_drop_in_gives_the_agent_what_libvirt_needs", |lab| {
        let mut net = lab.two_hosts()?;
        let credentials = Credentials::create(&lab.paths, lab.dir())?;
        let alpha = boot(lab, &net.alpha, &net.bravo, &credentials)?;
        let bravo = boot(lab, &net.bravo, &net.alpha, &credentials)?;
        has_groups(&alpha)?;
        has_groups(&bravo)?;
        net.only_port(PORT, &[Way::ToBravo, Way::ToAlpha])?;
        net.alpha = seen_as(&alpha, &net.alpha)?;
        net.bravo = seen_as(&bravo, &net.bravo)?;
        let hosts = Hosts { net };
        let domain = Domain::boot(lab, &hosts, &spec())?;
        let capture = Capture::start(&hosts.net, "wire")?;
        let checked = any(&alpha, &CHECK)?;
        ensure!(checked.code == 0, "{checked:?}\n{}", bravo.log());

        let print = [
            "vmferry", "libvirt", "migrate", "web1", "--to", "bravo", "--live", "--p2p", "--print", "--json",
        ];
        let printed: serde_json::Value = serde_json::from_str(&alpha.run(&print)?)?;
        let migration = &printed["migration"];
        let folder = migration["folder"].as_str().context("no folder")?;
        ensure!(folder.starts_with("/run/vmferry/libvirt/"), "{folder}");
        is(&alpha, folder, "711 vmferry:vmferry")?;
        is(&alpha, &format!("{folder}/ram.sock"), "660 vmferry:libvirt-qemu")?;
        is(&bravo, folder, "770 vmferry:libvirt-qemu")?;
        alpha.run(&["vmferry", "libvirt", "end", migration["id"].as_str().context("no id")?])?;

        let words = [
            "vmferry",
            "libvirt",
            "migrate",
            "web1",
            "--to",
            "bravo",
            "--live",
            "--p2p",
            "--copy-storage-all",
            "--persistent",
        ];
        let moved = any(&alpha, &words)?;
        ensure!(moved.code == 0, "{moved:?}\n{}\n{}", alpha.log(), bravo.log());
        ensure!(proves_wire(capture, &hosts)? == 1, "more than one connection");
        domain.proves_move(Way::ToBravo)?;

        // Without it the destination says what it lacks.
        fs::remove_file(bravo.root().join(DROP_IN))?;
        bravo.systemctl(&["daemon-reload"])?;
        bravo.systemctl(&["restart", "vmferry"])?;
        let said = wait_for("the agent to say what it lacks", SHORT, || {
            let checked = any(&alpha, &CHECK)?;
            Ok(checked.stdout.contains("is not in the group libvirt-qemu").then_some(checked))
        })?;
        ensure!(said.code == 1 && said.stdout.contains("cannot connect to"), "{said:?}");
        Ok(())
    })
}
