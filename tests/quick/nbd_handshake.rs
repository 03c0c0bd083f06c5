//! A handshake that is led for QEMU's NBD client: agreed on with a real server first, then offered to a real client,
//! and from there on the bytes of the one fit the other.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::qmp_real::machine::{Machine, binary, connect, image, nameless_listener};
use vmferry::qemu::{
    Asking, BlockExportAdd, BlockJobCancel, BlockdevAdd, BlockdevMirror, EventKind, MirrorSyncMode, NbdError,
    NbdServerStart, Replies, Terms, names,
};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 8 * MIB;
const EXPORT: &str = "disk0";
const V72: &str = "VMFERRY_QEMU72";
const V10: &str = "VMFERRY_QEMU10";

async fn machine(variable: &str, folder: &Path, name: &str, first_bytes: &[u8]) -> Machine {
    let file = image(folder, name, SIZE, first_bytes);
    let node = format!(
        "raw,node-name=n0,discard=unmap,file.driver=file,file.discard=unmap,file.filename={}",
        file.display()
    );
    Machine::start(&binary(variable), folder, name, &["-blockdev".to_owned(), node]).await
}

/// Asks the server at the other end.
fn agreed(mut server: &UnixStream, export: &str, extended: bool) -> Result<Terms, NbdError> {
    let mut asking = Asking::new(extended);
    server.write_all(&asking.questions(export)?)?;
    let mut buffer = [0; 64];
    loop {
        let length = server.read(&mut buffer)?;
        assert!(length > 0, "the server has ended the connection");
        if let Some(terms) = asking.take(&buffer[..length])? {
            return Ok(terms);
        }
    }
}

/// Carries bytes both ways until either end closes.
fn joined(one: UnixStream, other: UnixStream) {
    for (mut from, mut to) in [(one.try_clone().unwrap(), other.try_clone().unwrap()), (other, one)] {
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut from, &mut to);
            let _ = to.shutdown(std::net::Shutdown::Both);
        });
    }
}

async fn mirrors(from: &str, to: &str, replies: Replies) {
    let folder = tempfile::tempdir().unwrap();
    let pattern: Vec<u8> = (0..3 * MIB).map(|at| (at / 512 * 7 + at) as u8).collect();
    let mut source = machine(from, folder.path(), "source", &pattern).await;
    let destination = machine(to, folder.path(), "destination", &[0xee; 4 << 20]).await;
    let (listener, handle) = nameless_listener(folder.path());
    destination.qmp.getfd(names::NBD_LISTEN_FDNAME, listener).await.unwrap();
    destination.qmp.execute(NbdServerStart::on_fd(names::NBD_LISTEN_FDNAME)).await.unwrap();
    let export = BlockExportAdd {
        id: "vmferry-disk0".into(),
        node_name: "n0".into(),
        name: EXPORT.into(),
        writable: true,
        bitmaps: vec![],
        allocation_depth: false,
    };
    destination.qmp.execute(export).await.unwrap();

    let error = agreed(&connect(&handle), "nothing", true).unwrap_err().to_string();
    assert!(error.contains("export 'nothing' not present"), "{error}");

    let server = connect(&handle);
    let terms = agreed(&server, EXPORT, from == V10).unwrap();
    assert_eq!((terms.size, terms.replies), (SIZE, replies), "{terms:?}");
    assert!(terms.block_sizes.is_some() && terms.base_allocation.is_some(), "{terms:?}");

    let (ours, theirs) = UnixStream::pair().unwrap();
    source.qmp.getfd("fd0", theirs.into()).await.unwrap();
    let add = source.qmp.execute(BlockdevAdd::nbd_on_fd("target", "fd0", EXPORT));
    let (added, ours) = tokio::join!(add, terms.offer(EXPORT, ours.into()));
    added.unwrap();
    let ours = UnixStream::from(ours.unwrap());
    ours.set_nonblocking(false).unwrap();
    joined(ours, server);
    source.qmp.execute(BlockdevMirror::new("job", "n0", "target", MirrorSyncMode::Full)).await.unwrap();
    source.event(|kind| matches!(kind, EventKind::BlockJobReady { .. })).await;
    source.qmp.execute(BlockJobCancel { device: "job".into(), force: false }).await.unwrap();
    let end = source.event(|kind| matches!(kind, EventKind::BlockJobCompleted { .. })).await.kind;
    assert!(matches!(end, EventKind::BlockJobCompleted { error: None, .. }), "{end:?}");
    let read = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
    assert!(read("source") == read("destination"), "the copy differs");
}

#[tokio::test]
async fn from_7_2_to_7_2() {
    mirrors(V72, V72, Replies::Structured).await;
}

#[tokio::test]
async fn from_7_2_to_10() {
    mirrors(V72, V10, Replies::Structured).await;
}

#[tokio::test]
async fn from_10_to_7_2() {
    mirrors(V10, V72, Replies::Structured).await;
}

#[tokio::test]
async fn from_10_to_10() {
    mirrors(V10, V10, Replies::Extended).await;
}

/// A client that would not understand what was agreed on for it is told so, and its QEMU goes on.
#[tokio::test]
async fn a_client_with_other_headers_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let source = machine(V72, folder.path(), "source", b"").await;
    let (ours, theirs) = UnixStream::pair().unwrap();
    source.qmp.getfd("fd0", theirs.into()).await.unwrap();
    let replies = Replies::Extended;
    let terms = Terms { size: SIZE, flags: 1, block_sizes: None, replies, base_allocation: None };
    let add = source.qmp.execute(BlockdevAdd::nbd_on_fd("target", "fd0", EXPORT));
    let (added, offered) = tokio::join!(add, terms.offer(EXPORT, ours.into()));
    assert!(added.unwrap_err().desc().is_some());
    let error = offered.unwrap_err().to_string();
    assert!(error.contains("did not ask for the headers"), "{error}");
    assert!(!source.qmp.is_closed());
}

/// What a server may not say: QEMU's client refuses it where it hears of the blocks before the size, and else aborts
/// its process when the node is used.
#[tokio::test]
async fn a_size_that_is_no_multiple_of_the_smallest_block_is_refused_by_the_client() {
    for (variable, replies) in [(V72, Replies::Structured), (V10, Replies::Extended)] {
        let folder = tempfile::tempdir().unwrap();
        let source = machine(variable, folder.path(), "source", b"").await;
        let (ours, theirs) = UnixStream::pair().unwrap();
        source.qmp.getfd("fd0", theirs.into()).await.unwrap();
        let block_sizes = Some([0, 0, 16, 0, 0, 0, 16, 0, 2, 0, 0, 0]);
        let terms = Terms { size: SIZE + 512, flags: 0x5ed, block_sizes, replies, base_allocation: None };
        let add = source.qmp.execute(BlockdevAdd::nbd_on_fd("target", "fd0", EXPORT));
        let (added, _) = tokio::join!(add, terms.offer(EXPORT, ours.into()));
        let error = added.unwrap_err();
        assert!(error.desc().is_some_and(|said| said.contains("multiple")), "{variable}: {error:?}");
        assert!(!source.qmp.is_closed());
    }
}
