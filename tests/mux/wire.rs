//! The bytes of version 1, as they were when it was frozen. A change here is a new version.

use std::time::Duration;

use vmferry_mux::mux::frame::{HEADER_LEN, Header};
use vmferry_mux::mux::hello::{Hello, Mode, encode_goaway};
use vmferry_mux::mux::{Class, Code, Config};

use super::pair::{BULK, Pair, URGENT, drain, take};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// One line for each frame: the header's fields apart, then the payload.
fn frames(mut bytes: &[u8]) -> Vec<String> {
    let mut out = Vec::new();
    while let Some((header, rest)) = bytes.split_first_chunk::<HEADER_LEN>() {
        let (payload, rest) = rest.split_at(Header::decode(header).len.into());
        let fields = [&header[..1], &header[1..2], &header[2..4], &header[4..8], &header[8..], payload];
        out.push(fields.iter().map(|field| hex(field)).collect::<Vec<_>>().join(" ").trim_end().to_owned());
        bytes = rest;
    }
    assert!(bytes.is_empty());
    out
}

/// The sender's frames, which the receiver gets.
fn pass(pair: &mut Pair, from_dialer: bool) -> Vec<String> {
    let Pair { dialer, acceptor, now } = pair;
    let (sender, receiver) = if from_dialer { (dialer, acceptor) } else { (acceptor, dialer) };
    let bytes = drain(sender, *now);
    receiver.handle_input(*now, &bytes).unwrap();
    frames(&bytes)
}

#[test]
fn version_1_keeps_its_bytes() {
    let mut pair = Pair::new(Config::default());
    let first = pair.dialer.open(pair.now, URGENT).unwrap();
    let second = pair.dialer.open(pair.now, BULK).unwrap();
    pair.dialer.send(pair.now, first, b"ferry".as_slice().into()).unwrap();
    pair.dialer.finish(first);
    assert_eq!(
        pass(&mut pair, true),
        [
            // PING
            "03 00 0000 00000000 0000000000000001",
            // OPEN: purpose, class, weight, migration, channel
            "10 00 0017 00000001 0000000000010000 0001000010070707070707070707070707070707070000",
            "10 00 0017 00000003 0000000000100000 0003010010070707070707070707070707070707070000",
            // DATA, FIN
            "12 00 0005 00000001 0000000000000000 6665727279",
            "14 00 0000 00000001 0000000000000005",
        ]
    );
    pair.acceptor.accept(first).unwrap();
    pair.acceptor.refuse(second, Code::Denied);
    assert_eq!(
        pass(&mut pair, false),
        [
            // PONG, PING, ACK
            "04 00 0000 00000000 0000000000000001",
            "03 00 0000 00000000 0000000000000001",
            "02 00 0000 00000000 0000000000000004",
            // ACCEPT
            "11 00 0000 00000001 0000000000010000",
            // RESET that ends both directions: final offset, code
            "16 02 0004 00000003 0000000000000000 00000003",
        ]
    );
    assert_eq!(
        pass(&mut pair, true),
        [
            "04 00 0000 00000000 0000000000000001",
            "02 00 0000 00000000 0000000000000002",
            // The answer to it
            "16 00 0004 00000003 0000000000000000 00000001",
        ]
    );
    take(&mut pair.acceptor, pair.now, first);
    let third = pair.acceptor.open(pair.now, BULK).unwrap();
    pair.acceptor.set_priority(third, Class::Urgent, 256);
    assert_eq!(
        pass(&mut pair, false),
        [
            "02 00 0000 00000000 0000000000000005",
            "10 00 0017 00000002 0000000000100000 0003010010070707070707070707070707070707070000",
            // PRIO
            "17 00 0000 00000002 0000000000000100",
        ]
    );
    pair.dialer.accept(third).unwrap();
    pair.dialer.send(pair.now, third, vec![0; 20_000].into()).unwrap();
    pass(&mut pair, true);
    take(&mut pair.acceptor, pair.now, third);
    pair.dialer.stop(third, Code::IoError);
    assert_eq!(pass(&mut pair, true), ["15 00 0000 00000002 0000000000000006"], "STOP");
    pair.pass(Duration::from_millis(5));
    pair.acceptor.go_away(Code::Shutdown, "maintenance");
    pair.acceptor.detach();
    assert_eq!(
        pass(&mut pair, false),
        [
            "02 00 0000 00000000 0000000000000009",
            // GOAWAY: code and highest stream; text. DETACH
            "05 00 000b 00000000 0000002800000003 6d61696e74656e616e6365",
            "06 00 0000 00000000 0000000000000000",
            "16 00 0004 00000002 0000000000000000 00000006",
        ]
    );
}

#[test]
fn version_1_keeps_its_credit() {
    let mut pair = Pair::new(Config::default());
    let id = pair.open(URGENT);
    pair.settle();
    pair.dialer.send(pair.now, id, vec![0; 16_384].into()).unwrap();
    pass(&mut pair, true);
    take(&mut pair.acceptor, pair.now, id);
    assert_eq!(
        pass(&mut pair, false),
        ["02 00 0000 00000000 0000000000000003", "13 00 0000 00000001 0000000000014000"]
    );
}

#[test]
fn hello_keeps_its_bytes() {
    let begin = "01 00 009a 00000000 0000000000000000 \
        766d6665727279000001000100000000000000000000000000000000\
        05050505050505050505050505050505000004000000000000010000000000000001000000000000040000000000000010000000";
    let modes = [
        (
            Mode::New { session_id: [0xaa; 16], secret_share: [0xbb; 32] },
            "01".to_owned() + &"aa".repeat(16) + &"bb".repeat(32),
        ),
        (Mode::Accepted { secret_share: [0xbb; 32] }, "02".to_owned() + &"bb".repeat(32)),
        (
            Mode::Resume { session_id: [0xaa; 16], generation: 3, rx_seq: 0x1234, proof: [0xcc; 32] },
            "03".to_owned() + &"aa".repeat(16) + "00000000000000030000000000001234" + &"cc".repeat(32),
        ),
        (
            Mode::Resumed { rx_seq: 0x1234, proof: [0xcc; 32] },
            "04".to_owned() + "0000000000001234" + &"cc".repeat(32),
        ),
    ];
    for (mode, end) in modes {
        let encoded = Hello::new(&Config::default(), [5; 16], mode).encode();
        let len = begin.rsplit(' ').next().unwrap().len() / 2 + end.len() / 2;
        let expected = begin.replace("009a", &format!("{len:04x}")) + &end;
        assert_eq!(frames(&encoded), [expected]);
    }
    let goaway = encode_goaway(Code::NoSession, 0, "who?");
    assert_eq!(frames(&goaway), ["05 00 0004 00000000 0000002600000000 77686f3f"]);
}
