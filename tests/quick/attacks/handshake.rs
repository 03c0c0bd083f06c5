//! A destination that lies in the NBD handshake of a disk, up to which it was honest: whatever it says there, the
//! migration fails with one clean line, and the guest is where it was with nothing left over in its QEMU. Silence is
//! waited for as long as for any other thing that does not move (`stall_s`).

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tokio::task::JoinSet;
use vmferry::mux::{Code, purpose};
use vmferry::net::session::IncomingStream;

use super::destination::{DISK_BYTES, Lies, answer, but, failed, guest, left, run, start};
use super::texts::{EVIL, is_clean};
use super::victim::Attacker;

const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;
const OPT_SET_META_CONTEXT: u32 = 10;
const OPT_EXTENDED_HEADERS: u32 = 11;
const ACK: u32 = 1;
const INFO: u32 = 3;
const UNSUP: u32 = 1 << 31 | 1;
const UNKNOWN: u32 = 1 << 31 | 6;
/// Of a server of QEMU's.
const FLAGS: u16 = 0x5ed;
const SIZES: [u32; 3] = [512, 4096, 32 << 20];

/// What becomes of the stream when everything has been said.
#[derive(Clone, Copy)]
enum Then {
    Stays,
    Ends,
    Breaks,
}

type Said = (Vec<u8>, Then);

fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let numbers = [option, kind, data.len() as u32].map(u32::to_be_bytes).concat();
    [&0x0003_e889_0455_65a9_u64.to_be_bytes()[..], &numbers, data].concat()
}

/// All up to the description of the export.
fn begun() -> Vec<u8> {
    [
        &b"NBDMAGICIHAVEOPT\0\x03"[..],
        &reply(OPT_STRUCTURED_REPLY, ACK, b""),
        &reply(OPT_EXTENDED_HEADERS, UNSUP, b""),
        &reply(OPT_SET_META_CONTEXT, ACK, b""),
    ]
    .concat()
}

fn described(size: u64, flags: u16, sizes: [u32; 3]) -> Vec<u8> {
    let export = [&[0, 0][..], &size.to_be_bytes(), &flags.to_be_bytes()].concat();
    let sizes = [&[0, 3][..], &sizes.map(u32::to_be_bytes).concat()].concat();
    let replies = [reply(OPT_GO, INFO, &sizes), reply(OPT_GO, INFO, &export), reply(OPT_GO, ACK, b"")];
    [begun(), replies.concat()].concat()
}

/// What is said, and what the operator hears.
fn lies() -> Vec<(&'static str, Said, &'static str)> {
    let stays = |said: Vec<u8>| (said, Then::Stays);
    let no_connection = "no NBD connection for disk disk0";
    let without_end = [begun(), reply(OPT_GO, INFO, &[9; 1000]).repeat(100)].concat();
    let mut long = [begun(), reply(OPT_GO, INFO, b"")].concat();
    let length = long.len() - 4;
    long[length..].copy_from_slice(&u32::MAX.to_be_bytes());
    let (whole, odd) = (DISK_BYTES, DISK_BYTES + 512);
    vec![
        ("garbage", stays(b"SSH-2.0-OpenSSH_9.2p1 and so on\r\n".to_vec()), "no newstyle greeting"),
        ("a reply of another length", stays(long), "a reply that is too long"),
        ("replies without end", stays(without_end), "a handshake that is too long"),
        ("no bytes", stays(described(0, FLAGS, SIZES)), "has 1048576 bytes, and"),
        (
            "more than there is",
            stays(described(!511, FLAGS, SIZES)),
            "exports for it has 18446744073709551104",
        ),
        ("a larger disk", stays(described(2 * whole, FLAGS, SIZES)), "exports for it has 2097152"),
        (
            "a part of a block",
            stays(described(odd, FLAGS, [4096, 4096, 32 << 20])),
            "no multiple of its smallest block",
        ),
        ("blocks of three bytes", stays(described(whole, FLAGS, [3, 4096, 32 << 20])), "no power of two"),
        ("no flags", stays(described(whole, 0, SIZES)), "an export without flags"),
        (
            "a word more",
            stays([described(whole, FLAGS, SIZES), b"x".to_vec()].concat()),
            "more than a handshake",
        ),
        (
            "a refusal that forges",
            stays([begun(), reply(OPT_GO, UNKNOWN, EVIL.as_bytes())].concat()),
            no_connection,
        ),
        ("an end at once", (Vec::new(), Then::Ends), no_connection),
        ("an end in the middle", (begun(), Then::Ends), no_connection),
        ("a break in the middle", (begun(), Then::Breaks), "the stream of disk disk0"),
        ("an end afterwards", (described(whole, FLAGS, SIZES), Then::Ends), "disk0"),
        ("a break afterwards", (described(whole, FLAGS, SIZES), Then::Breaks), "disk0"),
    ]
}

async fn say(stream: IncomingStream, (said, then): Said) {
    let Ok(mut stream) = stream.accept().await else { return };
    for piece in said.chunks(4096) {
        if stream.send.send(Bytes::copy_from_slice(piece)).await.is_err() {
            return;
        }
    }
    match then {
        Then::Stays => {}
        Then::Ends => drop(stream.send.finish()),
        Then::Breaks => return stream.send.reset(Code::IoError),
    }
    while let Ok(Some(heard)) = stream.recv.recv().await {
        stream.recv.consumed(heard.len());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_that_lies_in_a_handshake_leaves_the_guest_where_it_is() {
    let victim = start();
    let machine = guest(&victim).await;
    let mut bravo = Attacker::new(&victim, "bravo");
    let _session = bravo.session(&victim).await;
    let honest: Lies = Arc::new(Mutex::new(but(|_| None)));
    let lie = Arc::new(Mutex::new((Vec::new(), Then::Stays)));
    let said = Arc::clone(&lie);
    let answering = tokio::spawn(async move {
        let mut streams = JoinSet::new();
        while let Some(stream) = bravo.incoming.recv().await {
            match stream.open.purpose {
                purpose::CONTROL => streams.spawn(answer(stream, Arc::clone(&honest))),
                _ => streams.spawn(say(stream, said.lock().unwrap().clone())),
            };
        }
    });
    let (before, mut known) = (left(&machine).await, BTreeSet::new());
    for (name, said, expected) in lies() {
        *lie.lock().unwrap() = said;
        let (said, code) = run(&victim, &["migrate", "web1", "--to", "bravo"]);
        assert_eq!(code, Some(1), "{name}: {said}");
        let causes: Vec<_> = said.lines().filter(|line| line.starts_with("cause: ")).collect();
        let is_said = matches!(&causes[..], [cause] if cause.contains(expected));
        assert!(is_said && said.contains("the VM was not moved"), "{name}: {said}");
        assert_eq!(left(&machine).await, before, "{name}");
        let id = failed(&victim, name, &mut known);
        for words in [["watch", &id], ["status", &id]] {
            run(&victim, &words);
        }
        println!("{name}: as it should be");
    }
    answering.abort();
    let log = victim.log();
    log.iter().for_each(|line| is_clean(line));
    assert!(victim.is_alive() && !log.iter().any(|line| line.contains("panicked")), "{log:#?}");
}
