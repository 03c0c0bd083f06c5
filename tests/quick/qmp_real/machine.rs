//! Real QEMU processes for tests: no guest, paused, a monitor and disks. The binaries come from
//! the environment; a test without them fails, so that nobody takes it for passed.
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};
use vmferry::qemu::{Event, EventKind, Events, Qmp, QmpError};

/// Nothing in these tests takes as long, so this is only for a test that hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// The QEMU that this variable names.
pub(crate) fn binary(variable: &str) -> PathBuf {
    match std::env::var_os(variable) {
        Some(path) => PathBuf::from(path),
        None => {
            panic!("{variable} must name a qemu-system-x86_64 for this test (`make test` sets it)")
        }
    }
}

/// Makes a sparse file of this size that begins with a pattern.
pub(crate) fn image(folder: &Path, name: &str, size: u64, pattern: &[u8]) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, pattern).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(size).unwrap();
    path
}

/// A QEMU that ends with this value.
pub(crate) struct Machine {
    pub(crate) qmp: Qmp,
    pub(crate) events: Events,
    pub(crate) monitor: PathBuf,
    stderr: PathBuf,
    child: Child,
}

impl Machine {
    /// Starts a paused QEMU with these further arguments.
    pub(crate) async fn start(binary: &Path, folder: &Path, name: &str, more: &[String]) -> Self {
        let monitor = folder.join(format!("{name}.qmp"));
        let stderr = folder.join(format!("{name}.stderr"));
        let fixed = "-nodefaults -no-user-config -display none -S -machine q35 -accel tcg -m 64";
        let chardev = format!("socket,id=qmp,path={},server=on,wait=off", monitor.display());
        let mut child = Command::new(binary)
            .args(fixed.split(' '))
            .args(["-name", name, "-chardev", &chardev, "-mon", "chardev=qmp,mode=control"])
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&stderr).unwrap())
            .kill_on_drop(true)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {}: {error}", binary.display()));
        let until = Instant::now() + PATIENCE;
        let (qmp, events) = loop {
            match Qmp::connect(&monitor, PATIENCE).await {
                Ok(connected) => break connected,
                Err(error) if error.is_not_listening() && Instant::now() < until => {
                    sleep(Duration::from_millis(10)).await;
                }
                Err(error) => panic!("{error}; {}", std::fs::read_to_string(&stderr).unwrap()),
            }
            if child.try_wait().unwrap().is_some() {
                panic!("{}", std::fs::read_to_string(&stderr).unwrap());
            }
        };
        Self { qmp, events, monitor, stderr, child }
    }

    /// The next event that the test is interested in.
    pub(crate) async fn event(&mut self, wanted: impl Fn(&EventKind) -> bool) -> Event {
        let mut seen = Vec::new();
        let search = async {
            while let Some(event) = self.events.recv().await {
                if wanted(&event.kind) {
                    return Some(event);
                }
                seen.push(event.kind);
            }
            None
        };
        match timeout(PATIENCE, search).await {
            Ok(Some(event)) => event,
            end => panic!("no such event ({end:?}) after {seen:#?}; {}", self.complaints()),
        }
    }

    /// What QEMU wrote to its standard error.
    pub(crate) fn complaints(&self) -> String {
        std::fs::read_to_string(&self.stderr).unwrap()
    }

    pub(crate) async fn kill(&mut self) {
        self.child.kill().await.unwrap();
    }

    pub(crate) async fn ended(&mut self) -> std::process::ExitStatus {
        timeout(PATIENCE, self.child.wait()).await.unwrap().unwrap()
    }
}

/// A listening socket without a name, and a descriptor to connect by.
pub(crate) fn nameless_listener(folder: &Path) -> (OwnedFd, File) {
    use std::os::unix::fs::OpenOptionsExt;
    let path = folder.join("nbd.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let o_path = nix::fcntl::OFlag::O_PATH.bits();
    let handle = File::options().read(true).custom_flags(o_path).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    (listener.into(), handle)
}

/// Connects to a listener that only this descriptor can reach.
pub(crate) fn connect(handle: &File) -> UnixStream {
    UnixStream::connect(format!("/proc/self/fd/{}", handle.as_raw_fd())).unwrap()
}

/// The error that a command must have ended with.
pub(crate) fn refused<T: std::fmt::Debug>(result: Result<T, QmpError>) -> QmpError {
    let error = result.unwrap_err();
    assert!(matches!(error, QmpError::Command { .. }), "{error:?}");
    error
}
