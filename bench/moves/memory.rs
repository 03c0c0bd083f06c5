//! A tmpfs for images and RAM, so that no disk is measured. Unmounted when dropped; the lab's janitor
//! does the same for a killed run.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::support::process::{SHORT, run};

/// What the machine needs besides.
const SPARE_MIB: u64 = 2048;
const MIB: usize = 1 << 20;
/// A file that the guest's disk is opened with must take this; tmpfs does since Linux 6.6.
const DIRECT: i32 = nix::libc::O_DIRECT;

pub(crate) struct Memory {
    dir: PathBuf,
}

impl Memory {
    /// Mounts it in `dir`, which is made.
    pub(crate) fn mount(dir: &Path) -> Result<Self> {
        fs::create_dir(dir)?;
        let mount = ["-t", "tmpfs", "-o", "size=90%", "vmferry-bench"];
        run(Command::new("mount").args(mount).arg(dir), SHORT)?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// Where a file of a host lies.
    pub(crate) fn path(&self, host: &str, name: &str) -> PathBuf {
        self.dir.join(format!("{host}-{name}"))
    }

    /// Whether the kernel lets such a file be opened around its cache.
    pub(crate) fn takes_direct_io(&self) -> bool {
        use std::os::unix::fs::OpenOptionsExt;
        let path = self.dir.join("direct");
        let open = File::options().create(true).write(true).truncate(true).custom_flags(DIRECT).open(&path);
        let _ = fs::remove_file(&path);
        open.is_ok()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _ = run(Command::new("umount").arg("-l").arg(&self.dir), SHORT);
    }
}

/// That so much memory is free for files.
///
/// # Errors
/// It is not: what to do about it.
pub(crate) fn has_room(mib: u64) -> Result<()> {
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:")).context("no MemAvailable")?;
    let available = line.trim().trim_end_matches(" kB").parse::<u64>()? / 1024;
    let needed = mib + SPARE_MIB;
    ensure!(
        available >= needed,
        "the files of this table need {needed} MiB of free memory, {available} MiB are free: see --disk-mib and --ram-mib"
    );
    Ok(())
}

/// Makes a file of bytes that nobody can shorten and of which none of 4 KiB is all zeroes.
pub(crate) fn fill(path: &Path, mib: u64) -> Result<()> {
    let mut file = File::create(path)?;
    let mut state = 0x9e37_79b9_7f4a_7c15 ^ mib;
    let mut piece = vec![0; MIB];
    for _ in 0..mib {
        for word in piece.chunks_exact_mut(8) {
            // xorshift64: its period is longer than any disk.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&u64::to_le_bytes(state));
        }
        file.write_all(&piece).with_context(|| format!("filling {}", path.display()))?;
    }
    Ok(())
}

/// Makes a file that holds nothing yet.
pub(crate) fn empty(path: &Path, mib: u64) -> Result<()> {
    let _ = fs::remove_file(path);
    Ok(File::create(path)?.set_len(mib << 20)?)
}

/// That two files hold the same at some places: a copy that was not made would look fast.
pub(crate) fn same(one: &Path, other: &Path) -> Result<()> {
    let (one_file, other_file) = (File::open(one)?, File::open(other)?);
    let bytes = one_file.metadata()?.len();
    ensure!(bytes == other_file.metadata()?.len(), "{} has another size", other.display());
    let (mut a, mut b) = (vec![0; MIB], vec![0; MIB]);
    for part in 0..32 {
        let at = (bytes - MIB as u64) / 31 * part;
        one_file.read_exact_at(&mut a, at)?;
        other_file.read_exact_at(&mut b, at)?;
        ensure!(a == b, "{} is no copy of {}: they differ near byte {at}", other.display(), one.display());
    }
    Ok(())
}
