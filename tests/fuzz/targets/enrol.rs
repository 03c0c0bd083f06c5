//! What a new host and the CA's machine say to each other before either knows the other: a ticket, a request and an
//! answer, and the request for a certificate in it.

use std::pin::pin;
use std::task::{Context, Poll, Waker};

use rustls_pki_types::CertificateDer;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::AsyncReadExt;
use vmferry::enrol::Ticket;
use vmferry::enrol::message::{ANSWER_BYTES_MAX, Answer, REQUEST_BYTES_MAX, Request, receive};
use vmferry::net::identity::Identity;
use vmferry::pki::enrolment::{self, is_for, judged};

use super::shape::same_shape;

/// Those of the corpus.
const SECRET: [u8; 32] = [7; 32];
const EXPORTED: [u8; 32] = [9; 32];

/// A message, a ticket, or a request for a certificate.
pub(crate) fn enrolment(data: &[u8]) {
    if let Some(request) = received::<Request>(data, REQUEST_BYTES_MAX) {
        asked(&request);
    }
    if let Some(Answer::Granted(granted)) = received::<Answer>(data, ANSWER_BYTES_MAX) {
        assert!(!granted.is_proved(&SECRET, &[8; 32]) && !granted.is_proved(&[8; 32], &EXPORTED));
        assert!(granted.prove(&SECRET, &EXPORTED).is_proved(&SECRET, &EXPORTED));
    }
    certificate(data);
    if let Ok(text) = std::str::from_utf8(data) {
        ticket(text);
        ticket(&format!("{text}/{:08x}", crc32fast::hash(text.as_bytes())));
    }
}

/// All of it is there, so that nothing is waited for.
fn at_once<T>(work: impl Future<Output = T>) -> T {
    match pin!(work).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(done) => done,
        Poll::Pending => panic!("bytes that are there are waited for"),
    }
}

/// A message, the same in pieces, and the same when it is said again.
fn received<T: Serialize + DeserializeOwned>(data: &[u8], most: u32) -> Option<T> {
    let said = |message: &T| serde_json::to_value(message).expect("a message can be written");
    let message = at_once(receive::<T>(&mut &data[..], most));
    let (first, rest) = data.split_at(data.len() / 2);
    let in_pieces = at_once(receive::<T>(&mut first.chain(rest), most));
    match (message, in_pieces) {
        (Ok(message), Ok(again)) => {
            let (json, said) = (&data[4..], said(&message));
            let length = u32::from_be_bytes(data[..4].try_into().expect("four bytes"));
            assert!(length <= most && json.len() >= length as usize);
            assert_eq!(serde_json::to_value(&again).expect("a message can be written"), said);
            let json = &json[..length as usize];
            same_shape(&serde_json::from_slice(json).expect("what was understood is JSON"), &said);
            Some(message)
        }
        (Err(error), Err(again)) => {
            let text = error.to_string();
            assert_eq!(text, again.to_string());
            assert!(!text.chars().any(char::is_control), "{text:?}");
            None
        }
        (one, other) => panic!("{} at once, {} in pieces", one.is_ok(), other.is_ok()),
    }
}

/// Nobody has proved what he did not know.
fn asked(request: &Request) {
    assert!(request.proved(&SECRET, &[8; 32]).is_none() && request.proved(&[8; 32], &EXPORTED).is_none());
    let Some(csr) = request.proved(&SECRET, &EXPORTED) else { return };
    let again = Request::new(&csr, &SECRET, &EXPORTED);
    assert!(again.csr.eq_ignore_ascii_case(&request.csr) && again.proof.eq_ignore_ascii_case(&request.proof));
    certificate(&csr);
}

/// A request is for one name, of one key, and signed by it.
fn certificate(der: &[u8]) {
    let judge = |name: &str, der: &[u8]| judged(&name.parse::<Identity>().expect("a name"), der);
    match judge("bravo", der) {
        Ok(_) => {
            assert!(der.len() <= enrolment::REQUEST_BYTES_MAX);
            assert!(judge("charlie", der).is_err(), "for two names");
            assert!(!is_for(&CertificateDer::from(der), der), "a request is no certificate");
        }
        Err(error) => assert!(!error.to_string().chars().any(char::is_control), "{error}"),
    }
}

/// What is read is printed as what was read, and nothing in it moves a terminal.
fn ticket(text: &str) {
    let Ok(ticket) = text.parse::<Ticket>() else { return };
    let said = ticket.to_string();
    assert_eq!(said.parse().as_ref(), Ok(&ticket));
    assert!(!said.chars().any(char::is_control), "{said:?}");
    let secret: String = ticket.secret.iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(!format!("{ticket:?}").contains(&secret) || ticket.address.contains(&secret));
    // A character that is mistyped.
    let last = said.len() - 1;
    let other = if said.ends_with('0') { '1' } else { '0' };
    assert!(format!("{}{other}", &said[..last]).parse::<Ticket>().is_err());
}
