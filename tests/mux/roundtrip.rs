//! HELLO, headers and payloads: what is encoded is decoded, anything else is parsed or refused.

use proptest::prelude::*;
use vmferry_mux::mux::frame::{self, HEADER_LEN, Header};
use vmferry_mux::mux::hello::{self, FirstFrame, Hello, HelloError, Mode, PeerLimits};
use vmferry_mux::mux::{Class, Code, Config, NAME_BYTES_MAX, Name, Open, PerClass};

fn any_limits() -> impl Strategy<Value = PeerLimits> {
    any::<(u32, u64, u64, u64, u64)>().prop_map(|(max_streams, urgent, bulk, replay_cap, budget)| {
        PeerLimits { max_streams, initial_credit: PerClass { urgent, bulk }, replay_cap, budget }
    })
}

fn any_mode() -> impl Strategy<Value = Mode> {
    prop_oneof![
        any::<([u8; 16], [u8; 32])>()
            .prop_map(|(session_id, secret_share)| Mode::New { session_id, secret_share }),
        any::<[u8; 32]>().prop_map(|secret_share| Mode::Accepted { secret_share }),
        any::<([u8; 16], u64, u64, [u8; 32])>().prop_map(|(session_id, generation, rx_seq, proof)| {
            Mode::Resume { session_id, generation, rx_seq, proof }
        }),
        any::<(u64, [u8; 32])>().prop_map(|(rx_seq, proof)| Mode::Resumed { rx_seq, proof }),
    ]
}

fn any_hello() -> impl Strategy<Value = Hello> {
    (any::<(u16, u16, u64, u64, [u8; 16])>(), any_limits(), any_mode()).prop_map(|(fields, limits, mode)| {
        Hello {
            version_min: fields.0.min(fields.1),
            version_max: fields.0.max(fields.1),
            features_offered: fields.2,
            features_required: fields.3,
            agent_instance: fields.4,
            limits,
            mode,
        }
    })
}

proptest! {
    #[test]
    fn a_hello_survives_the_wire(hello in any_hello(), later in prop::collection::vec(any::<u8>(), 0..50)) {
        let whole = hello.encode();
        prop_assert_eq!(hello::first_frame_len(&whole), Ok(whole.len()));
        for len in 0..whole.len() {
            prop_assert_eq!(hello::peek(&whole[..len]), Ok(None));
            if len >= HEADER_LEN {
                prop_assert_eq!(Hello::decode(&whole[HEADER_LEN..len]), Err(HelloError::Truncated));
            }
        }
        let followed = [&whole[..], &later].concat();
        let expected = FirstFrame::Hello { hello: Box::new(hello.clone()), consumed: whole.len() };
        prop_assert_eq!(hello::peek(&followed), Ok(Some(expected)));
        let grown = [&whole[HEADER_LEN..], &later].concat();
        prop_assert_eq!(Hello::decode(&grown), Ok(hello), "a later version may add fields");
    }

    #[test]
    fn a_header_survives_the_wire(bytes in any::<[u8; HEADER_LEN]>()) {
        let header = Header::decode(&bytes);
        prop_assert_eq!(header.encode(), bytes);
        let _ = header.content();
    }

    #[test]
    fn an_open_survives_the_wire(
        purpose: u16, urgent: bool, weight: u16, migration: [u8; 16], channel: u16,
        name in prop::collection::vec(any::<u8>(), 0..=NAME_BYTES_MAX),
    ) {
        let class = if urgent { Class::Urgent } else { Class::Bulk };
        let name = Name::new(&name).unwrap();
        let open = Open { purpose, class, weight, migration, channel, name };
        prop_assert_eq!(frame::decode_open(&frame::encode_open(&open)), Ok(Some(open)));
        let prio = frame::decode_prio(frame::encode_prio(class, weight));
        prop_assert_eq!(prio, Some((class, weight)));
    }

    #[test]
    fn a_code_survives_the_wire(number: u32) {
        prop_assert_eq!(Code::from_wire(number).to_wire(), number);
    }

    #[test]
    fn payloads_of_any_bytes_are_parsed_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..1100)) {
        let _ = frame::decode_open(&bytes);
        let _ = frame::decode_reset(&bytes);
        let _ = Hello::decode(&bytes);
        let _ = hello::peek(&bytes);
        prop_assert!(!frame::clean_text(&bytes).chars().any(char::is_control));
    }
}

#[test]
fn the_first_frame_is_a_hello_or_a_refusal_or_nothing() {
    let text = "no\u{7}";
    let goaway = hello::encode_goaway(Code::Auth, 0, text);
    let expected =
        FirstFrame::GoAway { code: Code::Auth, text: "no\u{fffd}".to_owned(), consumed: goaway.len() };
    assert_eq!(hello::peek(&goaway), Ok(Some(expected)));
    assert_eq!(hello::encode_goaway(Code::Auth, 0, &"ä".repeat(200)).len(), HEADER_LEN + 256);
    for first in [b'G', 0x16, 0, 2, 0x10, 0xff] {
        assert_eq!(hello::peek(&[first]), Err(HelloError::NotHello), "{first:#x} is seen at once");
    }
    let long = Header { kind: 1, flags: 0, len: 4081, stream: 0, value: 0 }.encode();
    assert!(hello::first_frame_len(&long).is_err() && hello::peek(&long).is_err());
    let longest = Header { kind: 1, flags: 0, len: 4080, stream: 0, value: 0 }.encode();
    assert_eq!(hello::first_frame_len(&longest), Ok(hello::HELLO_LEN_MAX));
    assert_eq!(hello::first_frame_len(&longest[..15]), Err(HelloError::Truncated));
}

#[test]
fn versions_and_features_are_agreed_or_refused() {
    let base = Hello::new(&Config::default(), [0; 16], Mode::Accepted { secret_share: [0; 32] });
    let versions = |min, max| Hello { version_min: min, version_max: max, ..base.clone() };
    let agreed = |a: &Hello, b: &Hello| hello::negotiate(a, b).map(|n| n.version);
    assert_eq!(agreed(&versions(1, 3), &versions(2, 9)), Ok(3));
    assert_eq!(agreed(&versions(1, 3), &versions(3, 3)), Ok(3));
    assert_eq!(agreed(&versions(1, 3), &versions(4, 9)), Err(Code::Version));
    assert_eq!(agreed(&versions(4, 9), &versions(1, 3)), Err(Code::Version));
    let features =
        |features_offered, features_required| Hello { features_offered, features_required, ..base.clone() };
    let used = |a: &Hello, b: &Hello| hello::negotiate(a, b).map(|n| n.features);
    assert_eq!(used(&features(0b110, 0b010), &features(0b011, 0)), Ok(0b010));
    assert_eq!(used(&features(0b110, 0b100), &features(0b011, 0)), Err(Code::Feature));
    assert_eq!(used(&features(0b110, 0), &features(0b011, 0b001)), Err(Code::Feature));
}
