//! The .deb under two real systemds, as an operator has it: installed, configured by README's words, a guest of the
//! example units moved by agents that run as their own user; upgraded in mid-migration, removed, purged.
//! `make packages` runs this.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::booted::Machine;
use crate::confined::{self, Key};
use crate::support::agent::PORT;
use crate::support::console::Console;
use crate::support::lab::Paths;
use crate::support::net::{Host, Way};
use crate::support::process::{LONG, run, run_any, wait_for};
use crate::support::vm::{KERNEL_WORDS, write_script};
use crate::support::{Credentials, Lab, Version, VmSpec, with_lab};

const VM: &str = "web1";
const DISK_MIB: u64 = 64;
/// What no copy leaves out takes a minute so, and both packages are replaced sooner.
const BALLAST_MIB: u64 = 32;
const LIMIT: &str = "512KiB/s";
const SERIAL: &str = "/var/lib/vmferry-vm/web1.serial";
const DISK: &str = "/var/lib/vmferry-vm/web1.raw";
/// Ten times what `systemd-analyze security` may say of the agent's unit: deploy/README.md.
const EXPOSURE: u32 = 14;
/// The same with vmferry.service.d/private-users.conf.
const EXPOSURE_ALONE: u32 = 12;
/// Where packages put something.
const WATCHED: [&str; 4] = ["/etc", "/usr", "/var/lib", "/run"];

/// Makes a package of the program, or of the one that `make packages` has built.
fn package(lab: &Lab, version: &str) -> Result<PathBuf> {
    let out = lab.dir().join("packages");
    let program = std::env::var_os("VMFERRY_PACKAGED").map_or(lab.paths.vmferry.clone(), PathBuf::from);
    let mut build = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/package/build.sh"));
    build.arg(program).arg(&out).arg(version).env("COMPRESSION", "none").env("FORMATS", "deb");
    run(&mut build, LONG)?;
    let made = fs::read_dir(&out)?.flatten().map(|entry| entry.path());
    let mut made = made.filter(|path| path.to_string_lossy().contains(&format!("_{version}_")));
    made.next().with_context(|| format!("no package of {version}"))
}

fn vm_of_readme() -> String {
    format!(
        "[vm.{VM}]\nqmp = \"/run/qemu/{VM}/agent.qmp\"\nstart = {{ unit = \"qemu-incoming@{VM}.service\" }}\n"
    )
}

/// Of a host that knows no VM by its name.
const BY_PATTERN: &str = r#"
[vm."web*"]
qmp = "/run/qemu/{vm}/agent.qmp"
start = { unit = "qemu-incoming@{vm}.service" }
disk_arguments = [
  "-blockdev", "driver={format},node-name={disk},discard=unmap,file.driver=file,file.filename={path},file.discard=unmap",
  "-device", "virtio-blk-pci,id={disk},drive={disk},addr={address}",
]
"#;

/// One of the two hosts.
struct Hypervisor {
    machine: Machine,
    host: Host,
}

impl Hypervisor {
    fn boot(lab: &Lab, host: &Host, qemu: &Path) -> Result<Self> {
        let lab_folder = qemu.parent().and_then(Path::parent).and_then(Path::parent).context("no lab")?;
        let packages = lab.dir().join("packages");
        let machine = Machine::boot(lab, host, &[lab_folder, &packages])?;
        // QEMU's user goes through all folders above it.
        for folder in lab_folder.ancestors().filter(|folder| folder.parent().is_some()) {
            machine.run(&["chmod", "a+rx", &folder.display().to_string()])?;
        }
        // This machine may forbid packages to start anything.
        let _ = fs::remove_file(machine.root().join("usr/sbin/policy-rc.d"));
        let program = machine.root().join("usr/bin/qemu-system-x86_64");
        let _ = fs::remove_file(&program);
        write_script(&program, &format!("#!/bin/sh\nexec {} \"$@\"\n", qemu.display()))?;
        Ok(Self { machine, host: host.clone() })
    }

    fn dpkg(&self, words: &[&str]) -> Result<String> {
        let quiet = ["env", "DEBIAN_FRONTEND=noninteractive", "dpkg", "--force-confold"];
        self.machine.run(&[&quiet, words].concat()).with_context(|| format!("dpkg {words:?}"))
    }

    fn install(&self, package: &Path) -> Result<()> {
        self.dpkg(&["-i", &package.display().to_string()]).map(drop)
    }

    fn write(&self, path: &str, text: &str) -> Result<()> {
        let path = self.machine.root().join(path.trim_start_matches('/'));
        fs::write(&path, text).with_context(|| path.display().to_string())
    }

    /// As README says it.
    fn configure(&self, peer: &Host, credentials: &Path, env: &str) -> Result<()> {
        for file in ["ca-cert.pem", "cert.pem", "key.pem"] {
            fs::copy(credentials.join(file), self.machine.root().join("etc/vmferry/tls").join(file))?;
        }
        self.machine.run(&["systemd-tmpfiles", "--create", "vmferry.conf"])?;
        let (name, address) = (&peer.name, &peer.v4);
        self.write(
            "/etc/vmferry/vmferry.toml",
            &format!(
                "[tls]\nca = \"tls/ca-cert.pem\"\ncert = \"tls/cert.pem\"\nkey = \"tls/key.pem\"\n\
                 [peer.{name}]\nidentity = \"{name}\"\naddress = \"{address}:{PORT}\"\nreceive = [\"web*\"]\nsend = [\"web*\"]\n\
                 [create]\npath = \"/var/lib/vmferry-vm/{{vm}}.raw\"\nmode = \"0660\"\n{}",
                if self.host.name == "alpha" { vm_of_readme() } else { BY_PATTERN.to_owned() }
            ),
        )?;
        if self.host.name == "alpha" {
            return self.write(&format!("/etc/vmferry/vm/{VM}.env"), env);
        }
        let is_of_disk = |line: &&str| line.contains("-blockdev") || line.contains("virtio-blk");
        let (of_disk, others): (Vec<&str>, Vec<&str>) = env.lines().partition(is_of_disk);
        ensure!(of_disk.len() == 2, "the example's disk is in other lines: {of_disk:?}");
        self.write("/etc/vmferry/vm/default.env", &(others.join("\n") + "\n"))
    }

    /// The private key stays root's.
    fn gives_the_key(&self) -> Result<()> {
        self.machine.run(&["mv", confined::KEY_FILE, confined::ROOT_KEY_FILE])?;
        self.machine.run(&["chown", "root:root", confined::ROOT_KEY_FILE])?;
        let (section, lines) = include_str!("../../deploy/vmferry.service.d/credential.conf")
            .split_once("[Service]\n")
            .context("no section")?;
        ensure!(section.contains("credential:vmferry.key"), "{section}");
        self.machine.drop_in("credential", lines)?;
        let path = "/etc/vmferry/vmferry.toml";
        let text = self.machine.run(&["cat", path])?;
        let other = text.replace("key = \"tls/key.pem\"", "key = \"credential:vmferry.key\"");
        ensure!(other != text, "no key in {text}");
        self.write(path, &other)
    }

    /// The agent is in a user namespace of its own, and a member of its group may call it all the same.
    fn hides_users(&self) -> Result<()> {
        let (_, lines) = include_str!("../../deploy/vmferry.service.d/private-users.conf")
            .split_once("[Service]\n")
            .context("no section")?;
        self.machine.drop_in("private-users", lines)?;
        self.is_exposed_at_most(EXPOSURE_ALONE)
    }

    fn is_exposed_at_most(&self, tenths: u32) -> Result<()> {
        let threshold = format!("--threshold={tenths}");
        self.machine.run(&["systemd-analyze", "security", "--no-pager", &threshold, "vmferry"]).map(drop)
    }

    fn vmferry(&self, words: &[&str]) -> Result<String> {
        self.machine.run(&[&["vmferry"], words].concat()).with_context(|| self.machine.log())
    }

    /// A migration, as this host sees it.
    fn now(&self, id: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.vmferry(&["status", id, "--json"])?)?)
    }

    fn console(&self) -> Result<Console> {
        Console::read(&self.machine.root().join(SERIAL.trim_start_matches('/')))
    }

    fn wait_more(&self, more: u64) -> Result<()> {
        let now = self.console()?.last().unwrap_or(0);
        let counts = || Ok((self.console()?.last() >= Some(now + more)).then_some(()));
        wait_for(&format!("the guest to count on {}", self.host.name), LONG, counts)
            .with_context(|| self.machine.run(&["journalctl", "-n", "60", "-o", "cat"]).unwrap_or_default())
    }

    /// Everything that lies where packages put something.
    fn files(&self) -> Result<BTreeSet<String>> {
        let found = self.machine.run(&[&["find"], &WATCHED[..], &["-xdev"]].concat())?;
        Ok(found.lines().map(str::to_owned).collect())
    }
}

/// The example guest's arguments, small and with the test's system, which writes to its console.
fn arguments(paths: &Paths) -> Result<String> {
    let raw = vec![crate::support::DiskFormat::Raw];
    let words = VmSpec { disks: raw, rate: 50, blocks: 512, ..VmSpec::new(VM, Version::V10) }.words();
    let mut text = include_str!("../../deploy/vm-example.env").trim_end().to_owned();
    for (told, wanted) in [
        ("-smp 2 -m 2048", "-smp 1 -m 128"),
        // Not on every file system that a test may have.
        ("file.cache.direct=on,", ""),
        (
            "socket,id=console,path=/run/qemu/web1/console,server=on,wait=off",
            &format!("file,id=console,path={SERIAL},append=on"),
        ),
    ] {
        ensure!(text.contains(told), "the example has no {told} any more");
        text = text.replace(told, wanted);
    }
    Ok(format!(
        "{text} \\\n -kernel {} -initrd {} -append \"{KERNEL_WORDS}\" -fw_cfg \"name=opt/vmferry/words,string={words} vf_seed=1\"\n",
        paths.kernel.display(),
        paths.initrd.display()
    ))
}

#[test]
#[ignore = "`make packages` runs it"]
fn a_package_lives_through_a_migration_and_leaves_nothing() -> Result<()> {
    with_lab("a_package_lives_through_a_migration_and_leaves_nothing", |lab| {
        let (old, new) = (package(lab, "0.1.0~1")?, package(lab, "0.1.0~2")?);
        let net = lab.two_hosts()?;
        net.only_port(PORT, &[Way::ToBravo, Way::ToAlpha])?;
        let qemu = lab.paths.qemu(Version::V10, "qemu-system-x86_64");
        let hosts = [Hypervisor::boot(lab, &net.alpha, &qemu)?, Hypervisor::boot(lab, &net.bravo, &qemu)?];
        let before = hosts[0].files()?;
        for host in &hosts {
            host.install(&old)?;
            is_quiet(host)?;
        }
        let credentials = Credentials::create(&lab.paths, lab.dir())?;
        for (host, peer) in [(&hosts[0], &net.bravo), (&hosts[1], &net.alpha)] {
            host.configure(peer, &credentials.issue(&host.host.name)?, &arguments(&lab.paths)?)?;
        }
        hosts[1].gives_the_key()?;
        hosts[1].hides_users()?;
        boot_guest(&hosts[0])?;
        for host in &hosts {
            // On alpha the first who asks starts it.
            let unit = if host.host.name == "alpha" { "vmferry.socket" } else { "vmferry.service" };
            host.machine.systemctl(&["enable", "--now", unit])?;
        }
        ensure!(hosts[0].machine.shown("ActiveState", "vmferry")? == "inactive", "it was started before");
        upgrade_in_mid_migration(&hosts, &new)?;
        for (host, key) in hosts.iter().zip([Key::File, Key::Credential]) {
            confined::is_confined(&host.machine, key)?;
            confined::reloads(&host.machine)?;
        }
        confined::is_watched(&hosts[0].machine)?;
        confined::is_confined(&hosts[0].machine, Key::File)?;
        knows_its_callers(&hosts)?;
        stops_in_order(&hosts)?;
        empties_itself_at_a_reboot(&hosts)?;
        is_removed(&hosts, &before)
    })
}

/// A package that nobody has configured runs nothing, and says what is wrong when it is started all the same.
fn is_quiet(host: &Hypervisor) -> Result<()> {
    let shown = |property| host.machine.shown(property, "vmferry");
    ensure!(shown("ActiveState")? == "inactive" && shown("UnitFileState")? == "disabled", "it was started");
    let started = run_any(&mut host.machine.command(&["systemctl", "start", "vmferry"]), LONG)?;
    ensure!(started.code != 0 && shown("ExecMainStatus")? == "2", "{started:?}");
    ensure!(shown("ActiveState")? == "failed", "it is tried again: {}", host.machine.log());
    host.machine.systemctl(&["reset-failed", "vmferry"])?;
    host.is_exposed_at_most(EXPOSURE)?;
    let documents = shown("Documentation")?;
    ensure!(!documents.is_empty(), "no documentation");
    for document in documents.split_whitespace() {
        match document.strip_prefix("file://") {
            Some(path) => ensure!(host.machine.root().join(&path[1..]).exists(), "{path} is not there"),
            None => ensure!(host.machine.root().join("usr/share/man/man1/vmferry.1.gz").exists(), "no page"),
        }
    }
    Ok(())
}

fn boot_guest(host: &Hypervisor) -> Result<()> {
    host.machine.run(&[
        "install",
        "-o",
        "vmferry-vm",
        "-g",
        "vmferry-vm",
        "-m",
        "0600",
        "/dev/null",
        DISK,
    ])?;
    host.machine.run(&["truncate", "-s", &format!("{DISK_MIB}M"), DISK])?;
    let (count, seek) = (format!("count={BALLAST_MIB}"), format!("seek={}", DISK_MIB - BALLAST_MIB));
    let image = format!("of={DISK}");
    host.machine.run(&[
        "dd",
        "if=/dev/urandom",
        &image,
        "bs=1M",
        &count,
        &seek,
        "conv=notrunc",
        "status=none",
    ])?;
    host.machine.systemctl(&["start", &format!("qemu@{VM}")])?;
    host.wait_more(20)?;
    host.write("/etc/vmferry/vm/broken.env", "QEMU_ARGS=-machine pc-q35-7.2 -device no-such-device\n")?;
    let broken = run_any(&mut host.machine.command(&["systemctl", "start", "qemu@broken"]), LONG)?;
    ensure!(broken.code != 0, "a QEMU that does not take its arguments counts as started");
    ensure!(
        run_any(&mut host.machine.command(&["test", "-e", "/run/qemu/broken"]), LONG)?.code == 1,
        "its folder"
    );
    Ok(())
}

/// A member of the agent's group may do everything, and the record has its number where the agent can know it.
fn knows_its_callers([alpha, bravo]: &[Hypervisor; 2]) -> Result<()> {
    for (host, knows) in [(alpha, true), (bravo, false)] {
        let uid = host.machine.run(&["id", "-u", "nobody"])?;
        let cancel = ["vmferry", "cancel", "drain"];
        let member = ["setpriv", "--reuid=nobody", "--regid=vmferry", "--clear-groups"];
        let asked = run_any(&mut host.machine.command(&[&member[..], &cancel].concat()), LONG)?;
        ensure!(!asked.stderr.contains("permission"), "{asked:?}");
        let record = host.vmferry(&["audit", "--json"])?;
        let mut asked = record.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let cancelled = asked.rfind(|entry| entry["action"] == "cancel-drain");
        let by = cancelled.with_context(|| format!("nobody asked: {record}"))?["by"].clone();
        let expected = if knows { serde_json::from_str(uid.trim())? } else { Value::Null };
        ensure!(by["uid"] == expected && by["pid"].is_number(), "{by} at {}", host.host.name);
    }
    Ok(())
}

/// A host that reboots sends its guest away before anything of it is stopped, comes back, and takes it in again.
fn empties_itself_at_a_reboot([alpha, bravo]: &[Hypervisor; 2]) -> Result<()> {
    bravo.write("/etc/vmferry/drain.env", "VMFERRY_DRAIN_TO=alpha\n")?;
    bravo.machine.systemctl(&["enable", "--now", "vmferry-drain"])?;
    // Stopped while the host goes on, it moves nothing.
    bravo.machine.systemctl(&["restart", "vmferry-drain"])?;
    bravo.wait_more(1)?;
    let (before, boots) = (bravo.console()?.last(), alpha.console()?.generations.len());
    bravo.machine.reboot()?;
    alpha.wait_more(20)?;
    let (left, here) = (bravo.console()?, alpha.console()?);
    ensure!(
        left.last() >= before && here.last() > left.last() && here.generations.len() == boots,
        "not moved"
    );
    let waiting = format!("qemu-incoming@{VM}");
    for (host, state) in [(alpha, "active"), (bravo, "inactive")] {
        let is = host.machine.shown("ActiveState", &waiting)?;
        ensure!(is == state, "{waiting} at {} is {is}", host.host.name);
    }
    ensure!(bravo.machine.shown("ActiveState", "vmferry")? == "active", "{}", bravo.machine.log());
    let drained = bravo.vmferry(&["drain", "--status"])?;
    ensure!(drained.contains(VM), "{drained}");
    // Its old image would be in the way of the one that [create] makes.
    bravo.machine.run(&["rm", DISK])?;
    alpha.vmferry(&["migrate", VM, "--to", "bravo"])?;
    bravo.wait_more(20)
}

/// A guest that runs is asked to shut down (the test's has no ear for it); a QEMU that waits for its guest just ends,
/// whichever of the two units is stopped.
fn stops_in_order([alpha, bravo]: &[Hypervisor; 2]) -> Result<()> {
    let waiting = format!("qemu-incoming@{VM}");
    let pid = bravo.machine.shown("MainPID", &waiting)?;
    let folder = format!("/run/qemu/{VM}");
    let powerdown = ["vmferry", "guest", "powerdown", &folder, "--pid", &pid, "--within", "1"];
    let asked = run_any(&mut bravo.machine.command(&powerdown), LONG)?;
    ensure!(asked.stderr.contains("has not shut down within 1 s"), "{asked:?}");
    alpha.machine.systemctl(&["start", &waiting])?;
    alpha.machine.systemctl(&["stop", &format!("qemu@{VM}")])?;
    let stopped = || Ok((alpha.machine.shown("ActiveState", &waiting)? == "inactive").then_some(()));
    wait_for("the unit that waits to stop with the other", LONG, stopped)?;
    let said = alpha.machine.run(&["journalctl", "-u", &format!("qemu*@{VM}.service"), "-o", "cat"])?;
    ensure!(said.contains("the guest does not run here"), "{said}");
    Ok(())
}

/// Both packages are replaced while the disk is copied: the migration goes on, and so does the guest.
fn upgrade_in_mid_migration(hosts: &[Hypervisor; 2], new: &Path) -> Result<()> {
    let [alpha, bravo] = hosts;
    let id = alpha.vmferry(&["migrate", VM, "--to", "bravo", "--limit", LIMIT, "--detach"])?;
    let id = id.trim();
    wait_for("the disk's copy", LONG, || {
        let now = alpha.now(id)?;
        ensure!(now["outcome"].is_null(), "{now}");
        Ok((now["phase"] == "mirror" && now["disks"][0]["done_bytes"].as_u64() > Some(0)).then_some(()))
    })?;
    for host in hosts {
        let pid = host.machine.shown("MainPID", "vmferry")?;
        host.install(new)?;
        ensure!(host.machine.shown("MainPID", "vmferry")? != pid, "the agent was not restarted");
        ensure!(host.machine.shown("ActiveState", "vmferry")? == "active", "{}", host.machine.log());
    }
    let now = alpha.now(id)?;
    ensure!(now["outcome"].is_null(), "it ended before both were replaced: {now}");
    alpha.vmferry(&["limit", id, "--rate", "none"])?;
    let ended = run_any(&mut alpha.machine.command(&["vmferry", "watch", id]), LONG)?;
    ensure!(ended.code == 0, "{ended:?}\nalpha: {}\nbravo: {}", alpha.machine.log(), bravo.machine.log());
    bravo.wait_more(20)?;
    let (here, there) = (alpha.console()?, bravo.console()?);
    ensure!(there.generations.is_empty() && there.first() > here.last().map(|n| n - 1), "it booted again");
    for (host, role) in [(alpha, "source"), (bravo, "destination")] {
        let mine = [&format!("MIGRATION={id}"), "VM=web1", "PHASE=device", "PRIORITY=6"];
        let found = host.machine.run(&[&["journalctl", "-o", "cat"], &mine[..]].concat())?;
        ensure!(found.contains("phase"), "the journal of the {role} knows no phase: {found}");
    }
    Ok(())
}

/// A removal keeps what the operator wrote; a purge takes all of it but the images; guests go on.
fn is_removed([alpha, bravo]: &[Hypervisor; 2], before: &BTreeSet<String>) -> Result<()> {
    for host in [alpha, bravo] {
        host.dpkg(&["-r", "vmferry"])?;
        let keys =
            ["key.pem", "root-key.pem"].map(|key| host.machine.root().join("etc/vmferry/tls").join(key));
        ensure!(keys.iter().any(|key| key.exists()), "the key is gone");
        ensure!(host.machine.root().join("etc/vmferry/vmferry.toml").exists(), "the configuration is gone");
        ensure!(!host.machine.root().join("usr/bin/vmferry").exists(), "the program is still there");
        host.dpkg(&["-P", "vmferry"])?;
    }
    bravo.wait_more(20)?;
    let after = alpha.files()?;
    let is_theirs = |path: &String| {
        let others =
            ["/var/lib/dpkg/", "/var/lib/systemd/", "/run/systemd/", "/run/udev/", "/run/dbus/", "/run/log/"];
        others.iter().any(|folder| path.starts_with(folder))
            || path.starts_with("/var/lib/vmferry-vm")
            || path.starts_with("/run/polkit")
            || path.starts_with("/etc/") && (path.ends_with('-') || path.ends_with(".pwd.lock"))
            || path == "/usr/bin/qemu-system-x86_64"
    };
    let left: Vec<_> = after.difference(before).filter(|path| !is_theirs(path)).collect();
    ensure!(left.is_empty(), "the purge leaves {left:?}");
    ensure!(after.contains(DISK), "the image is gone");
    Ok(())
}
