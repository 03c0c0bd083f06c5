//! One boot for each kind of machine. Its state is saved where the guest waits for its words
//! (tests/guest/writer.c), and each guest of that kind starts from there: what makes it differ from
//! others of its kind it learns only then. Knows no agent.

use std::collections::hash_map::DefaultHasher;
use std::fs::{self, File};
use std::hash::{Hash, Hasher};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::process::{LONG, wait_for};
use super::vm::{DiskFormat, Vm};

/// Where a qcow2 image tells the size of its disk (QEMU's docs/interop/qcow2.rst).
const QCOW2_SIZE_AT: u64 = 24;

/// The state from which this guest starts, made now if there is none. `None`: it boots each time. The
/// contents of a further disk are its test's own, and not every device can be saved.
///
/// # Errors
/// The boot failed, or its state could not be saved.
pub(super) fn state(vm: &Vm) -> Result<Option<PathBuf>> {
    if vm.spec.extra.iter().any(|word| word == "-blockdev") {
        return Ok(None);
    }
    let file = vm.paths.states().join(format!("{:016x}", kind(vm)?));
    if !file.exists() {
        make(vm, &file).with_context(|| format!("the state of {}", vm.spec.name))?;
    }
    Ok(Some(file))
}

/// A number of everything that goes into a state.
fn kind(vm: &Vm) -> Result<u64> {
    let mut hasher = DefaultHasher::new();
    let (dir, name) = (vm.dir().display().to_string(), format!("guest={}", vm.spec.name));
    for word in vm.arguments() {
        word.replace(&dir, "").replace(&name, "").hash(&mut hasher);
    }
    for disk in 0..vm.spec.disks.len() {
        disk_bytes(&vm.disk(disk), vm.spec.disks[disk])?.hash(&mut hasher);
    }
    let qemu = vm.paths.qemu(vm.spec.version, "qemu-system-x86_64");
    for file in [&qemu, &vm.paths.kernel, &vm.paths.initrd] {
        let found = fs::metadata(file).with_context(|| format!("{}", file.display()))?;
        (found.len(), found.mtime(), found.mtime_nsec()).hash(&mut hasher);
    }
    Ok(hasher.finish())
}

fn disk_bytes(image: &Path, format: DiskFormat) -> Result<u64> {
    match format {
        DiskFormat::Raw => Ok(fs::metadata(image)?.len()),
        DiskFormat::Qcow2 => {
            let mut bytes = [0; 8];
            File::open(image)?.read_exact_at(&mut bytes, QCOW2_SIZE_AT)?;
            Ok(u64::from_be_bytes(bytes))
        }
    }
}

/// Boots the guest itself, on its own disks, to which it writes nothing before it has its words. A
/// stopped one is saved: QEMU 7.2 loses RAM that changes meanwhile.
fn make(vm: &Vm, file: &Path) -> Result<()> {
    fs::create_dir_all(vm.paths.states())?;
    let unique = format!("{}.{}", file.display(), vm.dir().display().to_string().replace('/', "-"));
    let (part, whole) = (format!("{unique}.part"), format!("{unique}.whole"));
    let said = vm.boot_until_ready()?;
    let mut qmp = vm.qmp()?;
    qmp.query("stop")?;
    qmp.execute("migrate", json!({"uri": format!("exec:cat >'{part}' && mv '{part}' '{whole}'")}))?;
    wait_for("the state to be saved", LONG, || {
        let migration = qmp.query("query-migrate")?;
        ensure!(migration["status"] != "failed", "{migration}");
        Ok((migration["status"] == "completed" && Path::new(&whole).exists()).then_some(()))
    })?;
    drop(qmp);
    vm.quit()?;
    File::options().write(true).open(vm.serial())?.set_len(said)?;
    Ok(fs::rename(whole, file)?)
}
