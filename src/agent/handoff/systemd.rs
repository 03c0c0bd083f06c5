//! The service manager's descriptor store, in which everything waits for the process that
//! `systemctl restart` starts next.
//!
//! A notification has no answer: systemd logs what it does not take and says nothing. So it is
//! asked afterwards what it has, while this process still has everything.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{PipeReader, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, ensure};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sd_notify::NotifyState;

use super::fd_queue::{self, FdQueue};
use super::transport::{FDS_MAX, Offer, Package, STATE_BYTES_MAX};
use crate::migrate::Host;

/// The name of sockets that the service manager listens on for us: their unit's.
const SOCKET_UNIT: &str = "vmferry.socket";
/// The store's names of the two ends of the queue.
const RECEIVER_NAME: &str = "vmferry-parcel";
const SENDER_NAME: &str = "vmferry-parcel-sender";
/// What the store has of a queue.
const STORED_FDS: usize = 2;
/// How earlier versions left their state and their descriptors: each by itself, `vmferry-0`,
/// `vmferry-1`, …
const STATE_NAME: &str = "vmferry-state";
const FD_PREFIX: &str = "vmferry-";
/// How long asking another program may take.
const ASK_DEADLINE: Duration = Duration::from_secs(10);
/// How long the service manager may take to have handled what it was told.
const BARRIER_DEADLINE: Duration = Duration::from_secs(10);

/// Everything that the service manager has passed: what it has kept for us, if anything, and sockets that it listens on
/// for us. It keeps nothing afterwards: a descriptor that it still held would hide our end of a socket from QEMU.
/// Errors: the descriptors cannot be told apart; within: what it kept is incomplete.
pub(super) fn passed() -> anyhow::Result<(anyhow::Result<Option<Package>>, Vec<OwnedFd>)> {
    let passed = sd_listen_fds::get().context("descriptors from the service manager")?;
    let passed = passed.into_iter().map(|(name, fd)| (name.unwrap_or_default(), fd.into_std()));
    let (sockets, kept): (Vec<_>, Vec<_>) = passed.partition(|(name, _)| name == SOCKET_UNIT);
    Ok((from_store(kept), sockets.into_iter().map(|(_, fd)| fd).collect()))
}

fn from_store(kept: Vec<(String, OwnedFd)>) -> anyhow::Result<Option<Package>> {
    let (mut receiver, mut old) = (None, Vec::new());
    for (name, fd) in kept {
        forget(&name);
        match name.as_str() {
            RECEIVER_NAME => receiver = Some(fd),
            SENDER_NAME => {}
            _ => old.push((name, fd)),
        }
    }
    match receiver {
        Some(receiver) => fd_queue::drain(receiver).map(Some),
        None => one_by_one(old),
    }
}

/// As earlier versions left it. systemd did not take every descriptor: what lacks one is settled by
/// its journal, and the rest goes on.
fn one_by_one(kept: Vec<(String, OwnedFd)>) -> anyhow::Result<Option<Package>> {
    let (mut state, mut fds) = (None, Vec::new());
    for (name, fd) in kept {
        if name == STATE_NAME {
            state = Some(fd);
        } else if let Some(number) = name.strip_prefix(FD_PREFIX).and_then(|n| n.parse::<usize>().ok()) {
            ensure!(number < FDS_MAX as usize, "the service manager kept too many descriptors");
            // Children must not hold QEMU's sockets.
            fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).context("an inherited descriptor")?;
            fds.resize_with(fds.len().max(number + 1), || None);
            fds[number] = Some(fd);
        }
    }
    let Some(state) = state else {
        ensure!(fds.is_empty(), "the service manager kept descriptors but not what they are for");
        return Ok(None);
    };
    let mut file = File::from(state);
    file.seek(SeekFrom::Start(0))?;
    let mut bytes = Vec::new();
    file.take(STATE_BYTES_MAX).read_to_end(&mut bytes).context("what the process before left")?;
    Ok(Some(Package { state: bytes, fds }))
}

/// Leaves everything to the service manager's descriptor store, and makes sure that it has it.
/// Errors: it has not taken everything (`FileDescriptorStoreMax=`): then it keeps nothing.
pub(super) async fn to_store(package: &Package) -> anyhow::Result<()> {
    let unit = own_unit().context("this process belongs to no unit")?;
    let FdQueue { sender, receiver } = fd_queue::fill(package)?;
    let stored = async {
        tokio::task::block_in_place(|| {
            store(SENDER_NAME, sender.as_fd())?;
            store(RECEIVER_NAME, receiver.as_fd())?;
            barrier()
        })?;
        let show = ["show", "--property=NFileDescriptorStore", "--value", &unit];
        let count = ask("systemctl", show).await?;
        ensure!(
            count.trim().parse() == Ok(STORED_FDS),
            "the service manager's store has {} of {STORED_FDS} descriptors (`FileDescriptorStoreMax=` of {unit})",
            count.trim()
        );
        Ok(())
    };
    let stored = stored.await;
    if stored.is_err() {
        forget(SENDER_NAME);
        forget(RECEIVER_NAME);
    }
    stored
}

fn store(name: &str, fd: BorrowedFd<'_>) -> anyhow::Result<()> {
    let state = [NotifyState::FdStore, NotifyState::FdName(name)];
    sd_notify::notify_with_fds(&state, &[fd]).context("the service manager keeps no descriptors")
}

fn forget(name: &str) {
    let _ = sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]);
}

/// Waits until the service manager has handled all that it was told: it closes the descriptor that
/// comes with the barrier then (sd_notify(3)).
fn barrier() -> anyhow::Result<()> {
    let (ours, theirs) = std::io::pipe().context("no pipe for the service manager")?;
    sd_notify::notify_with_fds(&[NotifyState::Custom("BARRIER=1")], &[theirs.as_fd()])
        .context("the service manager does not listen")?;
    drop(theirs);
    ensure!(is_closed(&ours)?, "the service manager did not answer within {} s", BARRIER_DEADLINE.as_secs());
    Ok(())
}

fn is_closed(pipe: &PipeReader) -> anyhow::Result<bool> {
    let deadline = PollTimeout::try_from(BARRIER_DEADLINE)?;
    // A pipe without a writer hangs up, which is always asked for.
    Ok(poll(&mut [PollFd::new(pipe.as_fd(), PollFlags::empty())], deadline)? == 1)
}

/// Whether the service manager is about to start us again, as in `systemctl restart`, rather than
/// to stop us for good.
pub(super) async fn is_restarted() -> anyhow::Result<bool> {
    let unit = own_unit().context("this process belongs to no unit")?;
    let jobs = ["list-jobs", "--no-legend", "--plain", "--full", &unit];
    let text = ask("systemctl", jobs).await?;
    let words = |line: &str| line.split_whitespace().nth(2).map(str::to_owned);
    Ok(text.lines().filter_map(words).any(|kind| kind == "restart"))
}

/// The unit of the service manager that this process belongs to (cgroups(7)).
fn own_unit() -> Option<String> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let last = groups.lines().filter_map(|line| line.rsplit('/').next()).find(|n| n.ends_with(".service"));
    last.map(str::to_owned)
}

/// That the program which is installed now could take over from this one, the agent of `host`, with the configuration
/// as it is now.
/// Errors: it could not, and why.
pub(super) async fn can_succeed(host: &Host, config: &Path) -> anyhow::Result<()> {
    let own = std::env::current_exe().context("this program's own file")?;
    // What has replaced us has our name without this.
    let path = PathBuf::from(own.to_string_lossy().trim_end_matches(" (deleted)"));
    let program = path.display();
    let words = ["agent", "--succession-formats", "--config"].map(OsStr::new);
    let text = ask(&path, words.into_iter().chain([config.as_os_str()]))
        .await
        .with_context(|| format!("{program} cannot say what it can take over"))?;
    let offer: Offer =
        serde_json::from_str(&text).with_context(|| format!("{program} knows nothing of taking over"))?;
    let checked = offer.check_store(host.has_a_witness());
    let checked = checked.and_then(|()| offer.check_start(host.identity.as_str(), &host.config.state_dir));
    checked.with_context(|| format!("{program}"))
}

async fn ask(
    program: impl AsRef<OsStr>,
    words: impl IntoIterator<Item = impl AsRef<OsStr>>,
) -> anyhow::Result<String> {
    let words: Vec<_> = words.into_iter().map(|word| word.as_ref().to_owned()).collect();
    let mut command = tokio::process::Command::new(&program);
    command.args(&words).stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    let name = program.as_ref().to_string_lossy().into_owned();
    let output = tokio::time::timeout(ASK_DEADLINE, command.output())
        .await
        .with_context(|| format!("{name} did not answer within {} s", ASK_DEADLINE.as_secs()))?
        .with_context(|| format!("cannot run {name}"))?;
    ensure!(
        output.status.success(),
        "{name} {} failed with {}",
        words.join(OsStr::new(" ")).to_string_lossy(),
        output.status
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
