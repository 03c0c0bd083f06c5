//! An NBD server that says what it likes: the peer's, when a disk's changes are written or a handshake is led for
//! QEMU's client, and this host's QEMU's, when they are read. And QEMU's client, to which an export is offered.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use tokio::runtime::{Builder, Runtime};
use vmferry::qemu::{Asking, NbdReader, NbdWriter, Replies, Terms};

use super::script::{Script, pieces};

/// Of dirty parts in one answer; a reply has at most 2 MiB, 8 bytes for each.
const PARTS_MAX: usize = (2 << 20) / 8;

thread_local! {
    static RUNTIME: Runtime = Builder::new_current_thread().enable_io().build().expect("a runtime");
}

/// The server's bytes are all there from the beginning, so every answer comes before its question.
pub(crate) fn server(data: &[u8]) {
    let mut script = Script::new(data);
    let writes = script.byte() & 1 == 0;
    let said = script.bytes(64 << 10);
    asked(said);
    let (client, mut server) = UnixStream::pair().expect("a pair of sockets");
    server.set_nonblocking(true).expect("a socket that does not wait");
    // What does not fit is not said.
    let _ = server.write(said);
    server.shutdown(std::net::Shutdown::Write).expect("an end");
    RUNTIME.with(|runtime| {
        runtime
            .block_on(async { if writes { written(client, &mut server).await } else { read(client).await } });
    });
}

/// The bytes of a client that is offered an export: what comes after its handshake is left in the socket, and it
/// hears the export's description as a server says it, or has not taken it.
pub(crate) fn client(data: &[u8]) {
    let mut script = Script::new(data);
    let kind = script.byte();
    let replies = [Replies::Structured, Replies::Extended][usize::from(kind & 1)];
    let (size, flags) = (1 << 20, 0x5ed);
    let block_sizes = (kind & 2 == 0).then_some([0, 0, 2, 0, 0, 0, 16, 0, 2, 0, 0, 0]);
    let terms = Terms { size, flags, block_sizes, replies, base_allocation: (kind & 4 == 0).then_some(7) };
    let said = script.bytes(64 << 10);
    let (near, mut client) = UnixStream::pair().expect("a pair of sockets");
    client.set_nonblocking(true).expect("a socket that does not wait");
    let said = &said[..client.write(said).unwrap_or(0)];
    client.shutdown(std::net::Shutdown::Write).expect("an end");
    let offered = RUNTIME.with(|runtime| runtime.block_on(terms.clone().offer("disk0", near.into())));
    let Ok(socket) = offered else { return };
    let (mut left, mut heard) = (Vec::new(), Vec::new());
    let mut socket = UnixStream::from(socket);
    let _ = socket.read_to_end(&mut left);
    assert!(said.ends_with(&left) && said.len() >= left.len() + 4 + 16 + 9, "{} bytes left", left.len());
    drop(socket);
    let _ = client.read_to_end(&mut heard);
    let info = [&[0, 0][..], &size.to_be_bytes(), &flags.to_be_bytes()].concat();
    let ends = heard.len().checked_sub(20).map(|at| heard.split_at(at));
    let (before, ack) = ends.expect("a reply");
    assert!(before.ends_with(&info) && ack[8..] == [0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0, 0], "{heard:?}");
}

/// What is agreed on does not depend on the pieces in which a server says it.
fn asked(said: &[u8]) {
    for extended in [false, true] {
        let in_pieces = |single| {
            let mut asking = Asking::new(extended);
            for (at, piece) in pieces(said, single).enumerate() {
                match asking.take(piece) {
                    Ok(None) => {}
                    Ok(Some(terms)) => return Some((Some(terms), at)),
                    Err(_) => return Some((None, at)),
                }
            }
            None
        };
        let (single, longer) = (in_pieces(true), in_pieces(false));
        assert_eq!(single.is_some(), longer.is_some(), "a handshake ends in any pieces or in none");
    }
}

async fn written(client: UnixStream, server: &mut UnixStream) {
    let Ok(mut writer) = NbdWriter::connect(client.into(), "disk0").await else { return };
    let mut at = 0;
    for n in 0..40_u8 {
        if writer.begin_write(at, &[n % 3; 512]).is_err() {
            return;
        }
        at += 512;
        let written = writer.room().await;
        // Nobody may wait for room.
        let mut heard = [0; 4096];
        while server.read(&mut heard).is_ok_and(|n| n > 0) {}
        if written.is_err() {
            return;
        }
    }
    let _ = writer.flush().await;
}

async fn read(client: UnixStream) {
    let Ok(mut reader) = NbdReader::connect(client.into(), "disk0", "bitmap0").await else { return };
    let mut from = 0;
    while from < reader.size() {
        let Ok((dirty, next)) = reader.dirty(from).await else { return };
        assert!(next > from && next <= reader.size(), "{from} {next}");
        assert!(dirty.len() <= PARTS_MAX, "{} parts", dirty.len());
        let mut end = from;
        for part in dirty {
            assert!(part.start >= end && part.end > part.start && part.end <= next, "{part:?}");
            end = part.end;
        }
        let mut buffer = [0; 64];
        let fits = reader.size() - from >= 64;
        if fits && reader.read(from, &mut buffer).await.is_err() {
            return;
        }
        from = next;
    }
}
