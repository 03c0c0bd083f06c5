//! QEMU's NBD server at the end of a stream: what its client sends arrives in any parts, and the export is
//! drained at any moment.

use std::io::{Read, Write};

use crate::qmp_real::machine::{Machine, binary, connect, image, nameless_listener};
use crate::rig::{PATIENCE, Pair, soon};
use vmferry::mux::Config;
use vmferry::net::compress::{Coding, Undelivered};
use vmferry::net::pump::PumpState;
use vmferry::qemu::{BlockExportAdd, NbdServerStart, NbdWriter, Stop, names};

const MIB: u64 = 1 << 20;
const WRITES: u64 = 48;
const WRITE_BYTES: u64 = 512;
/// No request's header is a multiple of it.
const PIECE_BYTES: usize = 9;
const PIECES_BETWEEN_DRAINS: usize = 5;

/// Every write is of zeroes, and so a header and nothing else: for data on its way a drain waits.
///
/// A drain while a part of a request's header is there makes QEMU's server forget that part. Without
/// `to_nbd_server` the writer waits for ever, or is told of requests that it never made.
async fn a_server_is_drained_while_headers_arrive(variable: &str) {
    for compressed in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let file = image(folder.path(), "to.raw", MIB, &[0xff; (WRITES * WRITE_BYTES) as usize]);
        let arguments =
            format!("-blockdev raw,node-name=n0,file.driver=file,file.filename={}", file.display());
        let arguments: Vec<String> = arguments.split_whitespace().map(str::to_owned).collect();
        let machine = Machine::start(&binary(variable), folder.path(), "vm", &arguments).await;
        let (listener, handle) = nameless_listener(folder.path());
        machine.qmp.getfd(names::NBD_LISTEN_FDNAME, listener).await.unwrap();
        machine.qmp.execute(NbdServerStart::on_fd(names::NBD_LISTEN_FDNAME)).await.unwrap();
        let export = BlockExportAdd {
            id: "vmferry-to".into(),
            node_name: "n0".into(),
            name: "to".into(),
            writable: true,
            bitmaps: vec![],
            allocation_depth: false,
        };
        machine.qmp.execute(export).await.unwrap();

        let (near, far) = match compressed {
            false => (Coding::Plain, Coding::Plain),
            true => (Coding::Compress, Coding::Decompress(Undelivered::default())),
        };
        let mut pair = Pair::new(Config::default(), PATIENCE).await;
        let server = connect(&handle);
        let kept = server.try_clone().unwrap();
        let far = PumpState::new(far).to_nbd_server();
        let pumped = pair.pumped_into(1, PumpState::new(near), far, kept, server).await;

        let (client, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let (mut replies, mut to_client) = (pumped.near.try_clone().unwrap(), theirs.try_clone().unwrap());
        let answering =
            tokio::task::spawn_blocking(move || drop(std::io::copy(&mut replies, &mut to_client)));
        let (pieces, mut next_piece) = tokio::sync::mpsc::channel::<Vec<u8>>(1);
        let cutting = tokio::task::spawn_blocking(move || {
            let (mut theirs, mut buffer) = (theirs, [0; 64 << 10]);
            while let Ok(n @ 1..) = theirs.read(&mut buffer) {
                for piece in buffer[..n].chunks(PIECE_BYTES) {
                    if pieces.blocking_send(piece.to_vec()).is_err() {
                        return;
                    }
                }
            }
        });
        let draining = async {
            let (mut near, mut number) = (&pumped.near, 0);
            while let Some(piece) = next_piece.recv().await {
                near.write_all(&piece).unwrap();
                number += 1;
                if number % PIECES_BETWEEN_DRAINS == 0 {
                    machine.qmp.execute(Stop).await.unwrap();
                }
            }
        };
        let writing = async {
            let mut writer = NbdWriter::connect(client.into(), "to").await.unwrap();
            for number in 0..WRITES {
                writer.write(number * WRITE_BYTES, &[0; WRITE_BYTES as usize]).await.unwrap();
            }
            writer.flush().await.unwrap();
        };
        soon("all writes", async { tokio::join!(writing, draining) }).await;
        cutting.await.unwrap();
        pumped.near.shutdown(std::net::Shutdown::Both).unwrap();
        answering.await.unwrap();
        assert!(std::fs::read(&file).unwrap().iter().all(|byte| *byte == 0), "not all has been written");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu72() {
    a_server_is_drained_while_headers_arrive("VMFERRY_QEMU72").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu10() {
    a_server_is_drained_while_headers_arrive("VMFERRY_QEMU10").await;
}
