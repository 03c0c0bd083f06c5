//! The first frame of a connection, from whoever has a certificate.

use vmferry::mux::hello::{FirstFrame, HEADER_LEN, HELLO_LEN_MAX, Hello, encode_goaway, negotiate, peek};
use vmferry::mux::{Code, Config, frame};

/// What is certain stays so whatever follows, and what was read is written as it was.
pub(crate) fn first_frame(data: &[u8]) {
    let whole = peek(data);
    for len in 0..data.len().min(HELLO_LEN_MAX + 1) {
        match peek(&data[..len]) {
            Ok(None) => {}
            certain => assert_eq!(certain, whole, "after {len} bytes"),
        }
    }
    match whole {
        Ok(None) => assert!(data.len() < HELLO_LEN_MAX, "a first frame that is never whole"),
        Ok(Some(FirstFrame::Hello { hello, consumed })) => greeted(&hello, &data[HEADER_LEN..consumed]),
        Ok(Some(FirstFrame::GoAway { code, text, consumed })) => {
            assert!(consumed <= HEADER_LEN + frame::TEXT_MAX);
            assert!(!text.chars().any(char::is_control), "{text:?}");
            said(code, &text);
        }
        Err(_) => {}
    }
}

fn greeted(hello: &Hello, payload: &[u8]) {
    let written = hello.encode();
    // It grows at its end only: what a later version adds is not read.
    assert!(payload.starts_with(&written[HEADER_LEN..]), "{hello:?}");
    assert_eq!(Hello::decode(&written[HEADER_LEN..]).as_ref(), Ok(hello));
    let ours = Hello::new(&Config::default(), [1; 16], hello.mode);
    match (negotiate(&ours, hello), negotiate(hello, &ours)) {
        (Ok(here), Ok(there)) => {
            assert_eq!((here.version, here.features), (there.version, there.features));
            assert_eq!(here.peer, hello.limits);
        }
        (here, there) => assert_eq!(here.err(), there.err()),
    }
}

/// What a GOAWAY says is said again as it is.
fn said(code: Code, text: &str) {
    let again = encode_goaway(code, 7, text);
    let Ok(Some(FirstFrame::GoAway { code: read, text: words, consumed })) = peek(&again) else {
        panic!("{again:?} is no GOAWAY");
    };
    assert_eq!((read, consumed), (code, again.len()));
    assert_eq!(words, frame::cut_text(text));
}
