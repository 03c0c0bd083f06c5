//! An NBD server that says what it likes: the peer's, when a disk's changes are written or a handshake is led for
//! QEMU's client, and this host's QEMU's, when they are read.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use tokio::runtime::{Builder, Runtime};
use vmferry::qemu::{Asking, NbdReader, NbdWriter};

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
