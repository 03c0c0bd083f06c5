//! A queue of descriptors: a package on its way inside one pair of connected sockets.
//!
//! systemd's descriptor store refuses `O_PATH` descriptors, takes no more than
//! `FileDescriptorStoreMax=`, and drops every socket whose other end is closed. Descriptors in flight
//! between two sockets know none of these rules, and the kernel keeps them for as long as the pair is
//! kept. So the store gets the pair, and the rest waits inside it.
//!
//! ```text
//! sender ══ [state, 250 descriptors] [250 descriptors] … ══► receiver
//! ```
//!
//! Both ends are kept: the store would drop the receiver of a sender that is closed.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Seek, SeekFrom, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use anyhow::{Context, ensure};
use nix::sys::memfd::{MFdFlags, memfd_create};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use super::transport::{FDS_MAX, Package, STATE_BYTES_MAX};

/// Descriptors in one message; the kernel allows 253.
const FDS_PER_MESSAGE: usize = 250;

/// Both ends, with everything between them.
#[derive(Debug)]
pub(super) struct FdQueue {
    pub(super) sender: OwnedFd,
    pub(super) receiver: OwnedFd,
}

/// Queues copies of everything.
/// Errors: the kernel does not take it, for want of room or descriptors.
pub(super) fn fill(package: &Package) -> anyhow::Result<FdQueue> {
    let state =
        memfd_create("vmferry-state", MFdFlags::MFD_CLOEXEC).context("no memory file for what is left")?;
    let mut state = File::from(state);
    state.write_all(&package.state).context("what is left cannot be written")?;
    let (sender, receiver) = UnixStream::pair().context("no sockets for what is left")?;
    // A full socket is an error and no wait.
    sender.set_nonblocking(true)?;
    // Their numbers are their places.
    ensure!(package.fds.iter().all(Option::is_some), "of what is left descriptors are missing");
    let mut all = vec![state.as_fd()];
    all.extend(package.fds.iter().flatten().map(AsFd::as_fd));
    let mut rest = all.len();
    for part in all.chunks(FDS_PER_MESSAGE) {
        rest -= part.len();
        send(&sender, rest, part).context("what is left does not fit into a socket")?;
    }
    Ok(FdQueue { sender: sender.into(), receiver: receiver.into() })
}

/// Each message says how many descriptors follow it.
fn send(sender: &UnixStream, rest: usize, fds: &[BorrowedFd<'_>]) -> anyhow::Result<()> {
    let head = u32::try_from(rest)?.to_be_bytes();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_PER_MESSAGE))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    ensure!(control.push(SendAncillaryMessage::ScmRights(fds)), "no room for descriptors");
    sendmsg(sender, &[IoSlice::new(&head)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Takes everything out of a receiver.
pub(super) fn drain(receiver: OwnedFd) -> anyhow::Result<Package> {
    let receiver = UnixStream::from(receiver);
    receiver.set_nonblocking(true)?;
    let mut all = Vec::new();
    loop {
        let (rest, fds) = receive(&receiver).context("what the process before left is incomplete")?;
        all.extend(fds);
        ensure!(all.len() <= FDS_MAX as usize, "the process before left too many descriptors");
        if rest == 0 {
            break;
        }
    }
    let mut all = all.into_iter();
    let mut state = File::from(all.next().context("the process before left no state")?);
    state.seek(SeekFrom::Start(0))?;
    let mut bytes = Vec::new();
    state.take(STATE_BYTES_MAX).read_to_end(&mut bytes).context("what the process before left")?;
    Ok(Package { state: bytes, fds: all.map(Some).collect() })
}

fn receive(receiver: &UnixStream) -> anyhow::Result<(u32, Vec<OwnedFd>)> {
    let mut head = [0; 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_PER_MESSAGE))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message =
        recvmsg(receiver, &mut [IoSliceMut::new(&mut head)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    ensure!(message.bytes == head.len(), "a message of {} bytes", message.bytes);
    let fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    Ok((u32::from_be_bytes(head), fds.flatten().collect()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::OpenOptionsExt;
    use std::os::unix::net::UnixListener;

    use super::*;

    /// What systemd's store refuses, and more than one message holds.
    #[test]
    fn what_is_queued_outlives_its_originals() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let o_path = nix::fcntl::OFlag::O_PATH.bits();
        let name = std::fs::OpenOptions::new().read(true).custom_flags(o_path).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let mut fds = vec![Some(OwnedFd::from(name)), Some(theirs.into())];
        fds.extend((0..2 * FDS_PER_MESSAGE).map(|_| Some(File::open("/dev/null").unwrap().into())));
        let count = fds.len();
        let FdQueue { sender, receiver } = fill(&Package { state: vec![7; 100_000], fds }).unwrap();
        let package = drain(receiver).unwrap();
        drop(sender);
        assert_eq!(package.state, vec![7; 100_000]);
        assert_eq!(package.fds.len(), count);
        let mut fds = package.fds.into_iter().flatten();
        let name = fds.next().unwrap();
        let connected = UnixStream::connect(format!("/proc/self/fd/{}", name.as_raw_fd()));
        assert!(connected.is_ok(), "the listener cannot be reached: {connected:?}");
        drop(listener);
        ours.write_all(b"still there").unwrap();
        let mut theirs = UnixStream::from(fds.next().unwrap());
        let mut text = [0; 11];
        theirs.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"still there");
    }

    #[test]
    fn what_is_incomplete_is_refused() {
        let package = Package { state: vec![1], fds: Vec::new() };
        let FdQueue { sender, receiver } = fill(&package).unwrap();
        let again = receiver.try_clone().unwrap();
        drain(receiver).unwrap();
        assert!(drain(again).is_err(), "it was drained already");
        drop(sender);
    }
}
