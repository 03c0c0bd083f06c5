//! A peer without the product's own network side: TLS by hand, then whatever bytes it likes.

#![allow(dead_code)]

use std::sync::Arc;
use std::time::Instant;

use aws_lc_rs::hmac;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use vmferry::mux::Config;
use vmferry::mux::hello::{FirstFrame, HEADER_LEN, Hello, Mode, peek};
use vmferry::net::handshake;

use super::victim::{Victim, tls};
use crate::rig::{LATE, PATIENCE, soon};
use crate::tls::pki::{Ca, classical_client};

/// Where attackers come from: no honest peer does.
pub(super) const ATTACKER: [u8; 4] = [127, 0, 0, 7];

/// A connection that has done its TLS handshake.
pub(super) struct Raw {
    pub(super) stream: TlsStream<TcpStream>,
    exported: [u8; 32],
}

/// A session as both sides know it, and everything that proves it.
#[derive(Clone)]
pub(super) struct Known {
    id: [u8; 16],
    secret: [u8; 32],
    instance: [u8; 16],
}

async fn dial(victim: &Victim) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((ATTACKER, 0).into()).unwrap();
    socket.connect(victim.address).await.unwrap()
}

impl Raw {
    /// With the certificate of `name`; begun again where this machine was too slow for it.
    pub(super) async fn connect(victim: &Victim, name: &str) -> Self {
        let own = tls(&victim.pki(), name);
        let alpha = "alpha".parse().unwrap();
        soon("a handshake", async {
            loop {
                let begun = Instant::now();
                match handshake::connect(&own, dial(victim).await, &alpha, PATIENCE).await {
                    Ok(stream) => return Self::over(stream),
                    Err(error) => assert!(begun.elapsed() > LATE, "{error:?}"),
                }
            }
        })
        .await
    }

    /// The same by a key exchange without a post-quantum part.
    pub(super) async fn connect_classically(victim: &Victim, name: &str) -> Self {
        let ca = Ca::read(&victim.pki());
        let own = Arc::new(classical_client(&ca, &ca.host(name), &[b"vmferry/1"]));
        let alpha = ServerName::try_from("alpha").unwrap();
        soon("a handshake", async {
            loop {
                let begun = Instant::now();
                let connector = TlsConnector::from(Arc::clone(&own));
                match connector.connect(alpha.clone(), dial(victim).await).await {
                    Ok(stream) => return Self::over(stream),
                    Err(error) => assert!(begun.elapsed() > LATE, "{error:?}"),
                }
            }
        })
        .await
    }

    fn over(stream: TlsStream<TcpStream>) -> Self {
        let label = b"EXPORTER-vmferry-resume";
        let exported = stream.get_ref().1.export_keying_material([0; 32], label, None).unwrap();
        Self { stream, exported }
    }

    pub(super) async fn say(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes).await?;
        self.stream.flush().await
    }

    /// The first frame that it answers with.
    pub(super) async fn first_frame(&mut self) -> Option<FirstFrame> {
        let mut said = Vec::new();
        soon("an answer", async {
            loop {
                if let Ok(Some(frame)) = peek(&said) {
                    return Some(frame);
                }
                let mut some = [0; 1024];
                match self.stream.read(&mut some).await {
                    Ok(n) if n > 0 => said.extend_from_slice(&some[..n]),
                    _ => return None,
                }
            }
        })
        .await
    }

    /// Begins a session.
    pub(super) async fn greet(&mut self, id: u8) -> Known {
        let (instance, share) = ([id; 16], [7; 32]);
        let mode = Mode::New { session_id: [id; 16], secret_share: share };
        self.say(&Hello::new(&Config::default(), instance, mode).encode()).await.unwrap();
        let Some(FirstFrame::Hello { hello, consumed }) = self.first_frame().await else {
            panic!("no HELLO is answered");
        };
        assert!(consumed > HEADER_LEN);
        let Mode::Accepted { secret_share } = hello.mode else { panic!("{hello:?}") };
        let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, &share));
        context.update(b"vmferry session secret");
        context.update(&secret_share);
        context.update(&[id; 16]);
        Known { id: [id; 16], secret: context.sign().as_ref().try_into().unwrap(), instance }
    }

    /// A resumption that is right on this connection.
    pub(super) fn resumption(&self, known: &Known, generation: u64) -> Vec<u8> {
        let claim = [&self.exported[..], &known.id, &generation.to_be_bytes(), b"d"].concat();
        let proof = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &known.secret), &claim);
        let proof = proof.as_ref().try_into().unwrap();
        let mode = Mode::Resume { session_id: known.id, generation, rx_seq: 0, proof };
        Hello::new(&Config::default(), known.instance, mode).encode().to_vec()
    }

    /// Whether the other side ends the connection, reading whatever it says before.
    pub(super) async fn is_ended(&mut self) -> bool {
        let mut some = vec![0; 1 << 16];
        let reading = async { while self.stream.read(&mut some).await.is_ok_and(|n| n > 0) {} };
        tokio::time::timeout(PATIENCE, reading).await.is_ok()
    }
}
