//! Who gets no session hears why, however much it has said that nobody reads: the kernel would answer unread bytes with
//! a reset, which overtakes the last words.

use std::io::Write;
use std::net::TcpStream;
use std::sync::Arc;

use rustls::pki_types::ServerName;
use rustls::{AlertDescription, ClientConnection, Error as TlsError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vmferry::mux::hello::{FirstFrame, Hello, Mode};
use vmferry::mux::{Code, Config};

use super::raw::Raw;
use super::victim::{Victim, tls};
use crate::rig::{PATIENCE, blocking, soon};

/// What nobody reads: less than a refused connection is read to its end.
static MORE: [u8; 40_000] = [0x12; 40_000];
/// Chance has a part in which of two packets is first.
const TIMES: usize = 20;

/// What the TLS library has made of the end of a connection.
fn tls_error(error: &std::io::Error) -> Option<&TlsError> {
    error.get_ref()?.downcast_ref()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_says_no_hello_hears_the_end_of_the_connection() {
    let victim = Victim::start();
    for _ in 0..TIMES {
        let mut raw = Raw::connect(&victim, "bravo").await;
        let _ = raw.say(&MORE).await;
        let heard = soon("the end", raw.stream.read(&mut [0; 64])).await;
        assert!(matches!(heard, Ok(0)), "a connection that is not ended in order: {heard:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_refused_hears_why() {
    let victim = Victim::start();
    for _ in 0..TIMES {
        let mut raw = Raw::connect(&victim, "mallory").await;
        let new = Mode::New { session_id: [9; 16], secret_share: [1; 32] };
        let hello = Hello::new(&Config::default(), [9; 16], new).encode();
        let _ = raw.say(&[&hello[..], &MORE].concat()).await;
        let heard = raw.first_frame().await;
        assert!(matches!(&heard, Some(FirstFrame::GoAway { code: Code::Auth, .. })), "{heard:?}");
        assert!(matches!(soon("the end", raw.stream.read(&mut [0; 64])).await, Ok(0)));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_breaks_the_record_layer_hears_the_alert() {
    let victim = Victim::start();
    for _ in 0..TIMES {
        let mut raw = Raw::connect(&victim, "bravo").await;
        let forged = [&[23, 3, 3, 0, 64][..], &[0; 64]].concat();
        let tcp = raw.stream.get_mut().0;
        let _ = tcp.write_all(&[&forged[..], &MORE].concat()).await;
        let heard = soon("the alert", raw.stream.read(&mut [0; 64])).await;
        let alert = heard.as_ref().err().and_then(tls_error);
        assert_eq!(alert, Some(&TlsError::AlertReceived(AlertDescription::BadRecordMac)), "{heard:?}");
    }
}

/// A ClientHello, and in the same packet a record that no handshake has: one of two ChangeCipherSpecs (RFC 8446 §5).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_right_behind_the_hello_is_looked_at_without_waiting_for_more() {
    let victim = Victim::start();
    blocking(move || {
        let config = Arc::clone(&tls(&victim.pki(), "bravo").client);
        let mut client = ClientConnection::new(config, ServerName::try_from("alpha").unwrap()).unwrap();
        let mut said = Vec::new();
        client.write_tls(&mut said).unwrap();
        said.extend_from_slice(&[20, 3, 3, 0, 2, 1, 1]);
        let mut tcp = TcpStream::connect(victim.address).unwrap();
        tcp.set_read_timeout(Some(PATIENCE)).unwrap();
        tcp.write_all(&said).unwrap();
        let heard = loop {
            if client.read_tls(&mut tcp).unwrap() == 0 {
                break None;
            }
            if let Err(error) = client.process_new_packets() {
                break Some(error);
            }
        };
        assert_eq!(heard, Some(TlsError::AlertReceived(AlertDescription::UnexpectedMessage)));
    })
    .await;
}
