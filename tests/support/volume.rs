//! A small file system of its own for a folder of a host: a disk that is full. It is a file with
//! ext4 in it, of small blocks, so that even a journal's next line may find no room.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::process::{SHORT, run};

/// Small, so that a few bytes more are already too many.
const BLOCK_BYTES: i64 = 1024;
const LARGE_PIECE: i64 = 64 << 20;
const FILLER: &str = "filler";

/// A mounted volume; unmounted when dropped. (The lab's janitor does the same for a killed test.)
#[derive(Debug)]
pub struct Volume {
    folder: PathBuf,
}

impl Volume {
    /// Mounts an empty volume of `mib` MiB on `folder`.
    ///
    /// # Errors
    /// The kernel has no loop device, or we are not root.
    pub fn mount(folder: &Path, mib: u64) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let image = folder.with_extension("volume");
        File::create(&image)?.set_len(mib << 20)?;
        let options = ["-q", "-b", "1024", "-m", "0", "-O", "^has_journal"];
        run(Command::new("mkfs.ext4").args(options).arg(&image), SHORT)?;
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(folder), SHORT)?;
        Ok(Self { folder: folder.to_owned() })
    }

    /// Mounts an empty volume of `mib` MiB on `folder`, whose files are encrypted by their file system (fscrypt), with the
    /// key that the kernel has for its own tests. None where the kernel cannot.
    ///
    /// # Errors
    /// The kernel has no loop device, or we are not root.
    pub fn encrypting(folder: &Path, mib: u64) -> Result<Option<Self>> {
        if !Path::new("/sys/fs/ext4/features/test_dummy_encryption_v2").exists() {
            return Ok(None);
        }
        fs::create_dir_all(folder)?;
        let image = folder.with_extension("volume");
        File::create(&image)?.set_len(mib << 20)?;
        run(Command::new("mkfs.ext4").args(["-q", "-b", "4096", "-O", "encrypt"]).arg(&image), SHORT)?;
        let options = ["-o", "loop,test_dummy_encryption"];
        run(Command::new("mount").args(options).arg(&image).arg(folder), SHORT)?;
        Ok(Some(Self { folder: folder.to_owned() }))
    }

    /// Mounts memory on `folder`, which nobody encrypts, whatever this machine's own file systems are.
    ///
    /// # Errors
    /// We are not root.
    pub fn memory(folder: &Path, mib: u64) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let size = format!("size={mib}m,mode=755");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(folder), SHORT)?;
        Ok(Self { folder: folder.to_owned() })
    }

    /// Mounts an overlay on `folder`: its files do not tell on what they lie. Its layers are in memory, for it takes none
    /// that are an overlay's own.
    ///
    /// # Errors
    /// The kernel has no overlays, or we are not root.
    pub fn overlay(folder: &Path, mib: u64) -> Result<[Self; 2]> {
        let layers = folder.with_extension("layers");
        let memory = Self::memory(&layers, mib)?;
        for layer in [folder.to_owned(), layers.join("lower"), layers.join("upper"), layers.join("work")] {
            fs::create_dir_all(layer)?;
        }
        let options =
            ["lower", "upper", "work"].map(|name| format!("{name}dir={}", layers.join(name).display()));
        let mut mount = Command::new("mount");
        mount.args(["-t", "overlay", "-o", &options.join(","), "overlay"]);
        run(mount.arg(folder), SHORT)?;
        Ok([Self { folder: folder.to_owned() }, memory])
    }

    /// Takes room until nothing more fits.
    ///
    /// # Errors
    /// Anything but the expected "no space left".
    pub fn fill(&self) -> Result<()> {
        let path = self.folder.join(FILLER);
        let filler = File::options().create(true).append(true).open(&path)?;
        // Given room, not written: a disk is to be full at a moment, not some seconds later.
        let (mut piece, mut end) = (LARGE_PIECE, i64::try_from(filler.metadata()?.len())?);
        while piece >= BLOCK_BYTES {
            match fallocate(&filler, FallocateFlags::empty(), end, piece) {
                Ok(()) => end += piece,
                Err(Errno::ENOSPC) => piece /= 2,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).with_context(|| format!("filling {}", path.display())),
            }
        }
        Ok(())
    }

    /// Makes room again.
    ///
    /// # Errors
    /// The file that took the room cannot be removed.
    pub fn empty(&self) -> Result<()> {
        Ok(fs::remove_file(self.folder.join(FILLER))?)
    }
}

/// A loop device on a file; detached when dropped. What is written to it is in its own memory first.
#[derive(Debug)]
pub struct Loop {
    /// Its node.
    pub device: PathBuf,
}

impl Loop {
    /// Attaches a free one.
    ///
    /// # Errors
    /// The kernel has no loop device, or we are not root.
    pub fn attach(file: &Path) -> Result<Self> {
        let device = run(Command::new("losetup").args(["--find", "--show"]).arg(file), SHORT)?;
        Ok(Self { device: device.trim().into() })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = run(Command::new("losetup").arg("--detach").arg(&self.device), SHORT);
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        // Lazily: a program of the test may still stand in it.
        let _ = run(Command::new("umount").arg("-l").arg(&self.folder), SHORT);
    }
}
