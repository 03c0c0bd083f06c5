//! Guests whose disks and RAM lie in memory, defined on both hosts. They are paused, so that nothing
//! but what is measured takes a core; the guest of the downtime runs and writes.

use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::memory::{self, Memory};
use crate::support::process::{SHORT, run, wait_for};
use crate::support::vm::node_name;
use crate::support::{DiskFormat, Lab, Net, Version, Vm, VmSpec};

/// RAM of a guest whose RAM does not matter.
const LITTLE_MIB: u32 = 128;

/// What lies in memory.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) name: &'static str,
    pub(crate) disks: usize,
    /// MiB of each disk.
    pub(crate) disk_mib: u64,
    /// MiB of RAM, if that lies in a file as well.
    pub(crate) ram_mib: Option<u64>,
}

/// A paused guest.
pub(crate) struct Guest {
    pub(crate) name: &'static str,
    pub(crate) source: Vm,
    pub(crate) destination: Vm,
    /// File names of disks, then of RAM, with their MiB.
    files: Vec<(String, u64)>,
}

impl Guest {
    /// Defines it on both hosts; it takes no memory yet.
    pub(crate) fn define(lab: &Lab, net: &Net, memory: &Memory, shape: Shape) -> Result<Self> {
        let Shape { name, disks, disk_mib, ram_mib } = shape;
        let mut files: Vec<_> = (0..disks).map(|disk| (disk_file(name, disk), disk_mib)).collect();
        files.extend(ram_mib.map(|mib| (ram_file(name), mib)));
        let source = Vm::define(&lab.paths, &net.alpha, &spec(memory, &net.alpha.name, shape)?)?;
        let destination = Vm::define(&lab.paths, &net.bravo, &spec(memory, &net.bravo.name, shape)?)?;
        Ok(Self { name, source, destination, files })
    }

    /// Fills what the source has, once.
    ///
    /// # Errors
    /// Not enough memory is free.
    pub(crate) fn stock(&self, net: &Net, memory: &Memory) -> Result<()> {
        memory::has_room(self.files.iter().map(|(_, mib)| 2 * mib).sum())?;
        self.files.iter().try_for_each(|(name, mib)| memory::fill(&memory.path(&net.alpha.name, name), *mib))
    }

    /// Ends its QEMUs, empties the destination's files, and has it paused at the source.
    pub(crate) fn fresh(&self, net: &Net, memory: &Memory) -> Result<()> {
        self.end()?;
        for (name, mib) in &self.files {
            memory::empty(&memory.path(&net.bravo.name, name), *mib)?;
        }
        run(net.alpha.command(self.source.start_script()).args(["boot", "-S"]), SHORT)?;
        let mut qmp = self.source.qmp()?;
        // A QEMU that never ran is not paused but waits to begin.
        qmp.query("cont")?;
        qmp.query("stop")?;
        ensure!(qmp.status()? == "paused", "the guest is not paused");
        Ok(())
    }

    /// That the destination's files hold what the source's hold.
    pub(crate) fn is_copied(&self, net: &Net, memory: &Memory) -> Result<()> {
        self.files.iter().try_for_each(|(name, _)| {
            memory::same(&memory.path(&net.alpha.name, name), &memory.path(&net.bravo.name, name))
        })
    }

    /// Process ids of both QEMUs.
    pub(crate) fn pids(&self) -> Result<Vec<u32>> {
        [&self.source, &self.destination]
            .into_iter()
            .map(|vm| vm.pid().with_context(|| format!("no QEMU on {}", vm.host_name())))
            .collect()
    }

    /// Ends its QEMUs.
    pub(crate) fn end(&self) -> Result<()> {
        end(&self.source)?;
        end(&self.destination)
    }

    /// Ends it and gives its memory back.
    pub(crate) fn clear(&self, net: &Net, memory: &Memory) -> Result<()> {
        self.end()?;
        for (name, _) in &self.files {
            for host in [&net.alpha, &net.bravo] {
                let _ = std::fs::remove_file(memory.path(&host.name, name));
            }
        }
        Ok(())
    }
}

/// Ends a QEMU. One that dies gives its memory back first and takes connections until the end of that:
/// whoever came then would not know that nobody is there.
fn end(vm: &Vm) -> Result<()> {
    vm.kill()?;
    wait_for("the end of a QEMU", SHORT, || {
        Ok(UnixStream::connect(vm.agent_monitor()).is_err().then_some(()))
    })
}

fn disk_file(guest: &str, disk: usize) -> String {
    format!("{guest}-disk{disk}.raw")
}

fn ram_file(guest: &str) -> String {
    format!("{guest}-ram")
}

/// Without `cache.direct`, unlike the test bed's own disks: an old tmpfs has none.
fn spec(memory: &Memory, host: &str, shape: Shape) -> Result<VmSpec> {
    let mut spec =
        VmSpec { disks: Vec::new(), memory_mib: LITTLE_MIB, ..VmSpec::new(shape.name, Version::V10) };
    for disk in 0..shape.disks {
        let file = json!({"driver": "file", "filename": memory.path(host, &disk_file(shape.name, disk)), "discard": "unmap"});
        let node = node_name(disk);
        let blockdev = json!({"driver": "raw", "node-name": node, "discard": "unmap", "file": file});
        let device = format!("virtio-blk-pci,id=disk{disk},drive={node}");
        spec.extra.extend(["-blockdev".to_owned(), blockdev.to_string(), "-device".to_owned(), device]);
    }
    if let Some(ram_mib) = shape.ram_mib {
        spec.memory_mib = u32::try_from(ram_mib)?;
        spec.machine.push_str(",memory-backend=ram");
        let path = memory.path(host, &ram_file(shape.name));
        let object =
            format!("memory-backend-file,id=ram,size={ram_mib}M,mem-path={},share=on", path.display());
        spec.extra.extend(["-object".to_owned(), object]);
    }
    Ok(spec)
}

/// A guest that runs, writes to one small disk, and goes to and fro.
pub(crate) struct Writer {
    pub(crate) alpha: Vm,
    pub(crate) bravo: Vm,
    /// Whether its disk lies in memory.
    pub(crate) in_memory: bool,
}

impl Writer {
    pub(crate) const NAME: &str = "writer";
    pub(crate) const DISK_MIB: u32 = 64;
    /// Blocks of 4 KiB per second.
    pub(crate) const RATE: u64 = 200;

    /// Defines it on both hosts.
    pub(crate) fn define(lab: &Lab, net: &Net, memory: &Memory) -> Result<Self> {
        let spec = VmSpec {
            disks: vec![DiskFormat::Raw],
            disk_mib: Self::DISK_MIB,
            rate: Self::RATE,
            ..VmSpec::new(Self::NAME, Version::V10)
        };
        let in_memory = memory.takes_direct_io();
        let define = |host: &crate::support::Host| -> Result<Vm> {
            let vm = Vm::define(&lab.paths, host, &spec)?;
            if in_memory {
                let path = memory.path(&host.name, "writer.raw");
                memory::empty(&path, Self::DISK_MIB.into())?;
                std::fs::remove_file(vm.disk(0))?;
                std::os::unix::fs::symlink(path, vm.disk(0))?;
            }
            Ok(vm)
        };
        Ok(Self { alpha: define(&net.alpha)?, bravo: define(&net.bravo)?, in_memory })
    }

    /// Sees to it that it runs on one host and that no QEMU is left on the other; whether it is alpha.
    pub(crate) fn settle(&self) -> Result<bool> {
        let runs =
            |vm: &Vm| vm.is_running() && vm.qmp().and_then(|mut q| q.status()).is_ok_and(|s| s == "running");
        let is_on = [runs(&self.alpha), runs(&self.bravo)];
        if is_on == [false, false] {
            self.end()?;
            self.alpha.boot()?;
            return Ok(true);
        }
        end(self.way(is_on[0]).1)?;
        Ok(is_on[0])
    }

    /// Ends its QEMUs.
    pub(crate) fn end(&self) -> Result<()> {
        end(&self.alpha)?;
        end(&self.bravo)
    }

    /// Where it runs, and where it does not.
    pub(crate) fn way(&self, is_on_alpha: bool) -> (&Vm, &Vm) {
        if is_on_alpha { (&self.alpha, &self.bravo) } else { (&self.bravo, &self.alpha) }
    }

    /// That it goes on writing here, and complains of nothing.
    pub(crate) fn goes_on(&self, vm: &Vm) -> Result<()> {
        let begun = wait_for("the guest to go on", SHORT, || Ok(vm.console()?.last()))?;
        vm.wait_count(begun + 2 * Self::RATE / 10).map(drop)
    }
}
