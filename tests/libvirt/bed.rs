//! Two hosts with a libvirtd each, and domains on them whose guest is that of all other tests. Knows no
//! agent.

#![allow(dead_code)]

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::support::process::{LONG, Outcome, Running, SHORT, run, run_any, start, wait_for};
use crate::support::vm::{KERNEL_WORDS, node_name};
use crate::support::{Host, Lab, Net, Vm, VmSpec, Way, proof};

/// Debian's user of libvirt's QEMUs.
pub(crate) const QEMU_USER: &str = "libvirt-qemu";
/// Where a host's folder of the lab is for libvirt: the same on both.
const IMAGES: &str = "/var/lib/libvirt/images";
const SYSTEM: &str = "qemu:///system";
const BOOT_WITHIN: Duration = Duration::from_secs(120);

/// Which libvirt a host has, and with it which QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Libvirt {
    /// Debian 12's 9.0, with QEMU 7.2.
    V9,
    /// Debian 13's 11.3, with QEMU 10.0.
    V11,
    /// The newest of Debian's suites, 12 or newer, with a QEMU of 11 or newer.
    Newest,
}

impl Libvirt {
    /// Its folder in the lab.
    fn made(self) -> &'static str {
        match self {
            Self::V9 => "libvirt",
            Self::V11 => "libvirt11",
            Self::Newest => "libvirtnewest",
        }
    }

    /// What `virsh version` has of a daemon of it.
    fn version(self) -> &'static str {
        match self {
            Self::V9 => "Using library: libvirt 9.",
            Self::V11 => "Using library: libvirt 11.",
            Self::Newest => "Using library: libvirt 1",
        }
    }
}

/// The hosts, each with file systems of its own and a libvirtd that answers.
#[derive(Debug)]
pub(crate) struct Hosts {
    /// Their network.
    pub(crate) net: Net,
}

impl Hosts {
    /// Starts them; `qemu_user` runs the QEMUs.
    pub(crate) fn start(lab: &Lab, qemu_user: &str) -> Result<Self> {
        Self::start_of(lab, qemu_user, [Libvirt::V9; 2])
    }

    /// The same with these libvirts, alpha's and bravo's.
    pub(crate) fn start_of(lab: &Lab, qemu_user: &str, libvirts: [Libvirt; 2]) -> Result<Self> {
        let mut net = lab.two_hosts()?;
        net.alpha = begin(lab, &net.alpha, libvirts[0], qemu_user)?;
        net.bravo = begin(lab, &net.bravo, libvirts[1], qemu_user)?;
        for (host, libvirt) in [(&net.alpha, libvirts[0]), (&net.bravo, libvirts[1])] {
            let said = wait_for(&format!("libvirtd on {}", host.name), LONG, || {
                let said = virsh(host, &["version"])?;
                Ok((said.code == 0).then_some(said.stdout))
            })?;
            ensure!(said.contains(libvirt.version()), "{} has another libvirt: {said}", host.name);
        }
        Ok(Self { net })
    }
}

fn begin(lab: &Lab, host: &Host, libvirt: Libvirt, qemu_user: &str) -> Result<Host> {
    let made = lab.paths.libvirt(libvirt.made())?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/libvirt/host.sh");
    let log = File::create(host.dir.join("host.log"))?;
    let mut command = host.command("unshare");
    command.args(["-m", "--propagation", "private"]).arg(script).arg(&host.dir).arg(&made);
    command.arg(uuid::Uuid::new_v4().to_string()).arg(qemu_user).arg(&lab.paths.vmferry).arg(libvirt.made());
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
    // It belongs to the host's namespace, so the lab's janitor ends it.
    let child = command.spawn().context("cannot start a host")?;
    Ok(host.with_mounts_of(child.id()))
}

/// Runs virsh on a host, as root.
pub(crate) fn virsh(host: &Host, words: &[&str]) -> Result<Outcome> {
    run_any(&mut virsh_command(host, words), LONG)
}

fn virsh_command(host: &Host, words: &[&str]) -> Command {
    let mut command = host.command("virsh");
    command.args(["-q", "-c", SYSTEM]).args(words);
    command
}

/// The same, and it must succeed.
pub(crate) fn virsh_ok(host: &Host, words: &[&str]) -> Result<String> {
    run(&mut virsh_command(host, words), LONG)
}

/// The same in the background.
pub(crate) fn virsh_start(host: &Host, words: &[&str]) -> Result<Running> {
    start(&mut virsh_command(host, words))
}

/// A domain that can live on either host.
#[derive(Debug)]
pub(crate) struct Domain {
    /// Its name.
    pub(crate) name: String,
    /// Disks and console on alpha. Its QEMU is libvirt's.
    pub(crate) alpha: Vm,
    /// The same on bravo.
    pub(crate) bravo: Vm,
    hosts: [Host; 2],
}

impl Domain {
    /// Makes its disks on both hosts and starts it on alpha; returns when it writes.
    pub(crate) fn boot(lab: &Lab, hosts: &Hosts, spec: &VmSpec) -> Result<Self> {
        Self::boot_with(lab, hosts, spec, |_| Ok(()))
    }

    /// The same with disks that have been prepared, on alpha and on bravo.
    pub(crate) fn boot_with(
        lab: &Lab,
        hosts: &Hosts,
        spec: &VmSpec,
        prepare: impl FnOnce([&Vm; 2]) -> Result<()>,
    ) -> Result<Self> {
        let (alpha, bravo) = (&hosts.net.alpha, &hosts.net.bravo);
        let domain = Self {
            name: spec.name.clone(),
            alpha: Vm::define(&lab.paths, alpha, spec)?,
            bravo: Vm::define(&lab.paths, bravo, spec)?,
            hosts: [alpha.clone(), bravo.clone()],
        };
        prepare([&domain.alpha, &domain.bravo])?;
        // libvirt gives them to its QEMU's user.
        for host in [alpha, bravo] {
            fs::copy(&lab.paths.kernel, host.dir.join("vmlinuz"))?;
            fs::copy(&lab.paths.initrd, host.dir.join("initrd.img"))?;
        }
        let file = alpha.dir.join(format!("{}.xml", spec.name));
        fs::write(&file, xml(spec))?;
        virsh_ok(alpha, &["define", &file.display().to_string()])?;
        virsh_ok(alpha, &["start", &spec.name])?;
        domain.wait_count(Way::ToBravo, 50)?;
        Ok(domain)
    }

    /// The host and the guest's files where a move this way begins.
    fn here(&self, way: Way) -> (&Host, &Vm) {
        match way {
            Way::ToBravo => (&self.hosts[0], &self.alpha),
            Way::ToAlpha => (&self.hosts[1], &self.bravo),
        }
    }

    fn there(&self, way: Way) -> (&Host, &Vm) {
        match way {
            Way::ToBravo => (&self.hosts[1], &self.bravo),
            Way::ToAlpha => (&self.hosts[0], &self.alpha),
        }
    }

    /// What libvirt says of it where a move this way begins.
    pub(crate) fn state_here(&self, way: Way) -> Result<String> {
        state(self.here(way).0, &self.name)
    }

    /// What libvirt says of it where a move this way ends.
    pub(crate) fn state_there(&self, way: Way) -> Result<String> {
        state(self.there(way).0, &self.name)
    }

    /// Whether libvirt keeps its definition where a move this way ends.
    pub(crate) fn is_persistent_there(&self, way: Way) -> Result<bool> {
        let told = virsh_ok(self.there(way).0, &["dominfo", &self.name])?;
        let line = told.lines().find_map(|line| line.strip_prefix("Persistent:"));
        Ok(line.context("nothing of it")?.trim() == "yes")
    }

    /// Why it is in its state, where a move this way begins, and where it ends.
    pub(crate) fn reasons(&self, way: Way) -> Result<[String; 2]> {
        let of = |host| Ok(virsh(host, &["domstate", "--reason", &self.name])?.stdout.trim().to_owned());
        let both: [Result<String>; 2] = [of(self.here(way).0), of(self.there(way).0)];
        let [here, there] = both;
        Ok([here?, there?])
    }

    /// Begins the post-copy of a move this way, and returns when the guest counts where it goes, and much of
    /// its RAM is still here.
    pub(crate) fn turn_to_post_copy(&self, way: Way) -> Result<()> {
        let before = self.there(way).1.console()?.last();
        virsh_ok(self.here(way).0, &["migrate-postcopy", &self.name])?;
        wait_for("post-copy on both hosts", LONG, || {
            let reasons = self.reasons(way)?;
            Ok((reasons == ["paused (post-copy)", "running (post-copy)"]).then_some(()))
        })?;
        wait_for("the guest to count there", LONG, || {
            Ok(self.there(way).1.console()?.last().filter(|last| Some(*last) > before))
        })?;
        Ok(())
    }

    fn wait_count(&self, way: Way, seq: u64) -> Result<u64> {
        let (host, vm) = self.here(way);
        wait_for(&format!("{} to count to {seq} on {}", self.name, host.name), BOOT_WITHIN, || {
            Ok(vm.console()?.last().filter(|last| *last >= seq))
        })
    }

    /// Waits until the guest has completed `more` blocks more than now, where a move this way begins.
    pub(crate) fn wait_more(&self, way: Way, more: u64) -> Result<u64> {
        let now = self.here(way).1.console()?.last().unwrap_or(0);
        self.wait_count(way, now + more)
    }

    /// That it went this way: libvirt runs it there and not here, the guest counts on where it was, and
    /// on its disks nothing is missing. Ends it.
    ///
    /// # Errors
    /// Any of it is not so.
    pub(crate) fn proves_move(&self, way: Way) -> Result<()> {
        ensure!(self.state_there(way)? == "running", "it is {} there", self.state_there(way)?);
        let here = self.state_here(way)?;
        ensure!(here == "shut off" || here == "absent", "it is {here} here");
        let (source, destination) = (self.here(way).1, self.there(way).1);
        let last = source.console()?.last().context("it never counted here")?;
        self.wait_count(back(way), last + 100)?;
        let console = destination.console()?;
        ensure!(console.generations.is_empty(), "the guest booted again");
        let first = console.first().context("it never counted there")?;
        ensure!(first > last, "counted to {last} here, from {first} there");
        virsh_ok(self.there(way).0, &["destroy", &self.name])?;
        proof::disks_whole(destination)
    }

    /// That a move this way has arrived, and that the guest counts on; it lives on. On each host its count
    /// never goes back, also over several visits, or its console is an error.
    ///
    /// # Errors
    /// Any of it is not so.
    pub(crate) fn goes_on(&self, way: Way) -> Result<()> {
        ensure!(self.state_there(way)? == "running", "it is {} there", self.state_there(way)?);
        let here = self.state_here(way)?;
        ensure!(here == "shut off" || here == "absent", "it is {here} here");
        let last = self.here(way).1.console()?.last().context("it never counted here")?;
        self.wait_count(back(way), last + 100).map(drop)
    }

    /// That where moves this way have brought it nothing is missing on its disks, and that it has booted
    /// once, on alpha. Ends it.
    ///
    /// # Errors
    /// Any of it is not so.
    pub(crate) fn ends_whole(&self, way: Way) -> Result<()> {
        let boots =
            [&self.alpha, &self.bravo].map(|vm| vm.console().map(|console| console.generations.len()));
        let [on_alpha, on_bravo] = boots;
        ensure!((on_alpha?, on_bravo?) == (1, 0), "the guest booted again");
        virsh_ok(self.there(way).0, &["destroy", &self.name])?;
        proof::disks_whole(self.there(way).1)
    }

    /// That a failed move has left it as it was: it runs here and counts on, and not there.
    ///
    /// # Errors
    /// Any of it is not so.
    pub(crate) fn proves_stay(&self, way: Way) -> Result<()> {
        ensure!(self.state_here(way)? == "running", "it is {} here", self.state_here(way)?);
        wait_for("the other host to forget it", SHORT, || {
            Ok((self.state_there(way)? != "running").then_some(()))
        })?;
        self.wait_more(way, 50).map(drop)
    }

    /// Its disks' names, as libvirt and QEMU have them.
    pub(crate) fn disks(&self) -> Vec<String> {
        (0..self.alpha.spec.disks.len()).map(node_name).collect()
    }
}

fn back(way: Way) -> Way {
    match way {
        Way::ToBravo => Way::ToAlpha,
        Way::ToAlpha => Way::ToBravo,
    }
}

/// What a host's libvirt has told its QEMUs, by its log.
#[derive(Debug)]
pub(crate) struct Told {
    log: PathBuf,
    from: usize,
}

impl Told {
    /// From now on.
    pub(crate) fn from_now(host: &Host) -> Result<Self> {
        let log = host.dir.join("libvirtd.log");
        let from = fs::read(&log)?.len();
        Ok(Self { log, from })
    }

    /// That each of these words was among it.
    ///
    /// # Errors
    /// One was not.
    pub(crate) fn has(&self, words: &[&str]) -> Result<()> {
        let log = fs::read(&self.log)?;
        let since = String::from_utf8_lossy(&log[self.from..]);
        let told: Vec<&str> = since.lines().filter(|line| line.contains("QEMU_MONITOR_SEND_MSG")).collect();
        for word in words {
            ensure!(told.iter().any(|line| line.contains(word)), "no QEMU was told {word}: {told:#?}");
        }
        Ok(())
    }
}

/// What libvirt says of a domain.
pub(crate) fn state(host: &Host, name: &str) -> Result<String> {
    let said = virsh(host, &["domstate", name])?;
    let absent = said.code != 0 && said.stderr.contains("failed to get domain");
    ensure!(said.code == 0 || absent, "{said:?}");
    Ok(if absent { "absent".to_owned() } else { said.stdout.trim().to_owned() })
}

/// Sockets and folders of migrations that a host has.
pub(crate) fn left_below(host: &Host, folder: &str) -> Result<Vec<String>> {
    let found = run_any(host.command("find").args([folder, "-mindepth", "1"]), SHORT)?;
    let absent = found.code != 0 && found.stderr.contains("No such file");
    ensure!(found.code == 0 || absent, "{found:?}");
    Ok(found.stdout.lines().map(str::to_owned).collect())
}

fn xml(spec: &VmSpec) -> String {
    let dir = PathBuf::from(IMAGES).join(&spec.name);
    let disks = spec.disks.iter().enumerate().map(|(number, format)| {
        let (format, node) = (format.name(), node_name(number));
        format!(
            "<disk type='file' device='disk'><driver name='qemu' type='{format}' cache='none' discard='unmap'/>\
             <source file='{}/disk{number}.{format}'/><target dev='{node}' bus='virtio'/></disk>\n",
            dir.display()
        )
    });
    include_str!("domain.xml")
        .replace("@NAME@", &spec.name)
        .replace("@MIB@", &spec.memory_mib.to_string())
        .replace("@MACHINE@", &spec.machine)
        .replace("@IMAGES@", IMAGES)
        .replace("@DIR@", &dir.display().to_string())
        .replace("@WORDS@", &format!("{KERNEL_WORDS} {}", spec.words()))
        .replace("@DISKS@", &disks.collect::<String>())
}
