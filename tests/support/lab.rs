//! One lab: what the set-up made, a folder of its own, a prefix for its network namespaces, and
//! the janitor that takes it all away, also when the test is killed. Knows no agent and no guest.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail, ensure};

use super::net::Net;
use super::process::{SHORT, wait_for};

const JANITOR: &str = include_str!("janitor.sh");
/// Short, on a disk, and not the checkout: a unix socket's path ends at 107 bytes.
const LABS: &str = "/var/tmp";
const FOLDER_PREFIX: &str = "vmferry-lab-";
const NAMESPACE_PREFIX: &str = "vmf";
/// How much of each log is shown when a test fails, in bytes.
const LOG_TAIL: usize = 4000;
/// A guest's console is only interesting at its very end.
const CONSOLE_TAIL: usize = 200;

/// Which QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// Debian 12's 7.2.
    V72,
    /// Debian 12 backports' 10.0.
    V10,
    /// The newest of Debian's suites; only for tests that `make versions` runs.
    V11,
}

impl Version {
    /// Of its programs.
    fn folder(self) -> &'static str {
        match self {
            Self::V72 => "qemu72",
            Self::V10 => "qemu10",
            Self::V11 => "qemu11",
        }
    }
}

/// What `tests/setup` made.
#[derive(Debug, Clone)]
pub struct Paths {
    lab: PathBuf,
    /// The guest's kernel, an ELF file.
    pub kernel: PathBuf,
    /// The guest's initrd.
    pub initrd: PathBuf,
    /// The program that judges a disk.
    pub verify: PathBuf,
    /// The binary under test.
    pub vmferry: PathBuf,
}

impl Paths {
    /// Finds everything.
    ///
    /// # Errors
    /// Something is missing, or we are not root: the error says how to get it.
    pub fn find() -> Result<Self> {
        let lab = match std::env::var_os("VMFERRY_LAB") {
            Some(dir) => PathBuf::from(dir),
            None => Path::new(env!("CARGO_MANIFEST_DIR")).join(".lab"),
        };
        let guest = lab.join("guest");
        let paths = Self {
            kernel: guest.join("vmlinuz"),
            initrd: guest.join("initrd.img"),
            verify: guest.join("verify"),
            vmferry: vmferry_binary()?,
            lab,
        };
        paths.check()?;
        Ok(paths)
    }

    fn check(&self) -> Result<()> {
        ensure!(nix::unistd::geteuid().is_root(), "network namespaces need root: run this as root");
        let qemus = [Version::V72, Version::V10].map(|v| self.qemu(v, "qemu-system-x86_64"));
        for path in qemus.iter().chain([&self.kernel, &self.initrd, &self.verify]) {
            ensure!(
                path.exists(),
                "{} is missing: run `make setup` (tests/setup/packages.sh, qemu.sh, guest.sh) or `make test`",
                path.display()
            );
        }
        Ok(())
    }

    /// Made by tests/setup/arm.sh.
    pub fn qemu_of_arm(&self, version: Version) -> PathBuf {
        self.lab.join(format!("{}arm/bin/qemu-system-aarch64", version.folder()))
    }

    /// One of QEMU's programs (`qemu-system-x86_64`, `qemu-img`, ...).
    pub fn qemu(&self, version: Version, program: &str) -> PathBuf {
        self.lab.join(version.folder()).join("bin").join(program)
    }

    /// Where guests' states are kept; gone when the guest is built anew.
    pub fn states(&self) -> PathBuf {
        self.lab.join("guest/states")
    }

    /// Where a libvirt of this name and the QEMU that it runs are: the lab's folder.
    ///
    /// # Errors
    /// They are not there.
    pub fn libvirt(&self, name: &str) -> Result<PathBuf> {
        let virsh = self.lab.join(name).join("usr/bin/virsh");
        ensure!(virsh.exists(), "{} is missing: run `make libvirt`", virsh.display());
        Ok(self.lab.clone())
    }

    /// Where etcd and etcdctl are.
    ///
    /// # Errors
    /// They are not there.
    pub fn etcd(&self) -> Result<PathBuf> {
        let folder = self.lab.join("etcd/bin");
        ensure!(folder.join("etcd").exists(), "{} is missing: run `make setup`", folder.display());
        Ok(folder)
    }

    /// `qemu-img` of the newer QEMU, for disks of either.
    pub fn qemu_img(&self) -> Command {
        Command::new(self.qemu(Version::V10, "qemu-img"))
    }
}

/// Cargo tells tests where the binary is; an example finds it one folder above its own.
fn vmferry_binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("VMFERRY_BIN") {
        return Ok(PathBuf::from(path));
    }
    if let Some(path) = option_env!("CARGO_BIN_EXE_vmferry") {
        return Ok(PathBuf::from(path));
    }
    let own = std::env::current_exe()?;
    let profile = own.parent().and_then(Path::parent).context("this program lies in no folder of cargo's")?;
    Ok(profile.join("vmferry"))
}

/// A folder, a namespace prefix and the janitor of both. Dropping it removes everything.
#[derive(Debug)]
pub struct Lab {
    /// What the set-up made.
    pub paths: Paths,
    name: String,
    dir: PathBuf,
    prefix: String,
    janitor: Option<(Child, ChildStdin)>,
    /// Set when everything went well: then nobody wants to read logs.
    passed: bool,
}

impl Lab {
    /// Opens a lab; first takes away what dead tests left.
    ///
    /// # Errors
    /// The set-up is missing, or we are not root.
    pub fn open(name: &str) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let paths = Paths::find()?;
        sweep()?;
        let own = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let dir = Path::new(LABS).join(format!("{FOLDER_PREFIX}{own}"));
        fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let prefix = format!("{NAMESPACE_PREFIX}{own}-");
        let janitor = Some(hire_janitor(&dir, &prefix)?);
        Ok(Self { paths, name: name.to_owned(), dir, prefix, janitor, passed: false })
    }

    /// The lab's own folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Two hosts, "alpha" (the source's by custom) and "bravo", joined by a link.
    pub fn two_hosts(&self) -> Result<Net> {
        Net::join(&self.dir, &self.prefix)
    }

    /// Says that all went well: logs are not shown when the lab ends.
    pub fn pass(&mut self) {
        self.passed = true;
    }

    /// Leaves hosts, guests and agents running when this program ends.
    pub fn keep(&self) -> Result<()> {
        Ok(fs::write(self.dir.join("keep"), format!("{}\n", self.prefix))?)
    }

    /// The ends of all logs of this lab.
    pub fn logs(&self) -> String {
        let mut text = format!("lab {:?} in {}\n", self.name, self.dir.display());
        for path in logs_below(&self.dir) {
            let bytes = fs::read(&path).unwrap_or_default();
            let tail =
                String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(tail_of(&path))..]).into_owned();
            if !tail.trim().is_empty() {
                text.push_str(&format!("--- {}\n{}\n", path.display(), tail.trim_end()));
            }
        }
        text
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.passed {
            eprintln!("{}", self.logs());
        }
        if let Some((mut child, stdin)) = self.janitor.take() {
            drop(stdin);
            let gone = wait_for("the janitor", SHORT, || {
                let ended = child.try_wait()?.is_some();
                let gone = !self.dir.exists();
                ensure!(gone || !ended, "it has ended");
                Ok(gone.then_some(()))
            });
            if let Err(error) = gone {
                eprintln!("lab {:?} may have left something in {}: {error:#}", self.name, self.dir.display());
            }
        }
    }
}

/// Runs a test in a lab. When it fails, by an error or a panic, the lab's logs are shown first.
///
/// # Errors
/// Those of the test.
pub fn with_lab<T>(name: &str, test: impl FnOnce(&Lab) -> Result<T>) -> Result<T> {
    let mut lab = Lab::open(name)?;
    let passed = test(&lab)?;
    lab.pass();
    Ok(passed)
}

fn tail_of(log: &Path) -> usize {
    if log.extension().is_some_and(|e| e == "serial") { CONSOLE_TAIL } else { LOG_TAIL }
}

fn logs_below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            match path.extension().and_then(|e| e.to_str()) {
                _ if path.is_dir() => folders.push(path),
                Some("log" | "serial") => found.push(path),
                _ => {}
            }
        }
    }
    found.sort();
    found
}

fn janitor_command(dir: &Path, prefix: &str) -> Command {
    // A session of its own: a Ctrl-C on the terminal is for the test, not for its janitor.
    let mut command = Command::new("setsid");
    command.args(["sh", "-c", JANITOR, "janitor"]).arg(dir).arg(prefix);
    command
}

fn hire_janitor(dir: &Path, prefix: &str) -> Result<(Child, ChildStdin)> {
    let mut child =
        janitor_command(dir, prefix).stdin(Stdio::piped()).spawn().context("cannot start the janitor")?;
    let stdin = child.stdin.take().context("the janitor has no standard input")?;
    Ok((child, stdin))
}

/// Ends a lab by hand: `dir` as printed by a demo that was kept.
///
/// # Errors
/// It is no lab, or its janitor failed.
pub fn end_lab(dir: &Path) -> Result<()> {
    let name = dir.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let Some(own) = name.strip_prefix(FOLDER_PREFIX) else { bail!("{} is no lab", dir.display()) };
    let _ = fs::remove_file(dir.join("keep"));
    let status = janitor_command(dir, &format!("{NAMESPACE_PREFIX}{own}-")).stdin(Stdio::null()).status()?;
    ensure!(status.success(), "the janitor of {} failed", dir.display());
    Ok(())
}

/// The labs that are there: all, or only those that were kept on purpose.
pub fn labs(kept: bool) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(LABS)? {
        let path = entry?.path();
        let is_lab = path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with(FOLDER_PREFIX));
        if is_lab && path.join("keep").exists() == kept {
            found.push(path);
        }
    }
    Ok(found)
}

/// Ends the labs whose test is dead; those that were kept on purpose stay.
fn sweep() -> Result<()> {
    for dir in labs(false)? {
        let owner =
            dir.file_name().and_then(|n| n.to_str()).and_then(|n| n[FOLDER_PREFIX.len()..].split('-').next());
        let alive = owner.is_some_and(|pid| Path::new("/proc").join(pid).exists());
        if !alive {
            end_lab(&dir)?;
        }
    }
    Ok(())
}
