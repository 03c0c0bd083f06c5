//! The CA's machine: listens for one host, for as long as its ticket is good, and gives it a certificate once.
//!
//! Whoever has not proved that it has the secret costs a place of few, a handshake, and a second for each wrong
//! proof; nothing is read of a certificate's request before.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::ServerConfig;
use time::OffsetDateTime;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsAcceptor;

use super::message::{self, Answer, Exported, Granted, REQUEST_BYTES_MAX, Request, STORED};
use super::ticket::Ticket;
use super::tls;
use crate::error_chain::chain;
use crate::pki::enrolment::{invitable, server, sign_request};
use crate::pki::{HostRequest, PkiError};

/// Connections at once; the oldest makes room.
const PLACES: usize = 64;
/// From the first byte to the answer, and again until the host says that it has stored it.
const DEADLINE: Duration = Duration::from_secs(10);
/// What a wrong proof costs.
const WRONG_PROOF_PAUSE: Duration = Duration::from_secs(1);
/// After an accept that failed, as for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Longest that a ticket is good for.
const LIFETIME_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// Why nobody joined.
#[derive(Debug, thiserror::Error)]
pub enum InviteError {
    #[error(transparent)]
    Pki(#[from] PkiError),
    #[error("a ticket is good for a week at most, and for more than no time")]
    Lifetime,
    #[error("cannot listen on {address}")]
    Listen {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("the system gives no random numbers")]
    Random(#[source] io::Error),
    #[error("the TLS library refused our settings")]
    Tls(#[from] rustls::Error),
    #[error("nobody has joined with the ticket in time{refused}; make another one")]
    Expired {
        /// What was refused meanwhile.
        refused: String,
    },
}

/// A ticket, and the place where it is taken.
pub struct Invitation {
    ticket: Ticket,
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    desk: Arc<Desk>,
    until: Instant,
}

/// Who judges what is asked.
struct Desk {
    dir: PathBuf,
    request: HostRequest,
    secret: [u8; 32],
    /// The first that came with a proof: its request, and what it got.
    first: Mutex<Option<(Vec<u8>, Granted)>>,
    refused: Mutex<Refused>,
}

/// What was refused, by its kind.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Refused {
    /// Nothing that could be understood, or nothing in time.
    pub unproved: u64,
    pub wrong_secret: u64,
    /// With the secret: another name, a bad request, or a second key.
    pub bad_request: u64,
}

impl Invitation {
    /// Listens, and makes the ticket. In `address`, where the new host finds this machine, port 0 stands for the one
    /// that is listened on.
    pub async fn open(
        dir: PathBuf,
        request: HostRequest,
        (listen, address): (SocketAddr, &str),
        lifetime: Duration,
    ) -> Result<Self, InviteError> {
        if lifetime.is_zero() || lifetime > LIFETIME_MAX {
            return Err(InviteError::Lifetime);
        }
        let ca = invitable(&dir, &request)?;
        let (chain, key) = server(&dir, lifetime)?;
        let listening = |source| InviteError::Listen { address: listen, source };
        let listener = TcpListener::bind(listen).await.map_err(listening)?;
        let port = listener.local_addr().map_err(listening)?.port();
        let address = match address.strip_suffix(":0") {
            Some(host) => format!("{host}:{port}"),
            None => address.to_owned(),
        };
        let mut secret = [0; 32];
        getrandom::fill(&mut secret).map_err(|e| InviteError::Random(io::Error::other(e)))?;
        let (name, expires) = (request.name.clone(), OffsetDateTime::now_utc() + lifetime);
        Ok(Self {
            ticket: Ticket { name, address, expires, ca, secret },
            listener,
            tls: tls::server(chain, key)?,
            desk: Arc::new(Desk { dir, request, secret, first: Mutex::default(), refused: Mutex::default() }),
            until: Instant::now() + lifetime,
        })
    }

    pub fn ticket(&self) -> &Ticket {
        &self.ticket
    }

    /// Serves until the host has its certificate, or the ticket is over. What was refused meanwhile.
    pub async fn serve(self) -> Result<Refused, InviteError> {
        let (mut tasks, mut open) = (JoinSet::new(), VecDeque::<AbortHandle>::new());
        loop {
            tokio::select! {
                Some(ended) = tasks.join_next(), if !tasks.is_empty() => {
                    open.retain(|task| !task.is_finished());
                    if ended.is_ok_and(|joined: bool| joined) {
                        return Ok(self.desk.refused());
                    }
                }
                accepted = self.listener.accept() => match accepted {
                    Ok((tcp, _)) => {
                        if open.len() >= PLACES && let Some(oldest) = open.pop_front() {
                            oldest.abort();
                        }
                        let (desk, tls) = (Arc::clone(&self.desk), Arc::clone(&self.tls));
                        open.push_back(tasks.spawn(async move { desk.meet(tcp, tls).await }));
                    }
                    Err(_) => sleep(ACCEPT_PAUSE).await,
                },
                () = tokio::time::sleep_until(self.until) => {
                    return Err(InviteError::Expired { refused: self.desk.refused().in_words() });
                }
            }
        }
    }
}

impl Refused {
    /// What was refused, for people; empty if nothing was.
    pub fn in_words(self) -> String {
        let all = [
            (self.unproved, "without a request"),
            (self.wrong_secret, "without the secret"),
            (self.bad_request, "with the secret and a bad request"),
        ];
        let words = all.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}"));
        let words: Vec<_> = words.collect();
        if words.is_empty() { String::new() } else { format!(" (refused: {})", words.join(", ")) }
    }
}

impl Desk {
    /// Whether the host that came has joined.
    async fn meet(&self, tcp: TcpStream, tls: Arc<ServerConfig>) -> bool {
        let met = async {
            let mut stream = TlsAcceptor::from(tls).accept(tcp).await?;
            let state = stream.get_ref().1;
            if !tls::is_agreed(state.alpn_protocol()) {
                return Err(io::Error::from(io::ErrorKind::InvalidData));
            }
            let exported = message::export(state)?;
            let request: Request = message::receive(&mut stream, REQUEST_BYTES_MAX).await?;
            Ok((stream, request, exported))
        };
        let Ok(Ok((mut stream, request, exported))) = timeout(DEADLINE, met).await else {
            self.count(|refused| refused.unproved += 1);
            return false;
        };
        let answer = match request.proved(&self.secret, &exported) {
            Some(csr) => self.judge(&csr, &exported),
            None => {
                self.count(|refused| refused.wrong_secret += 1);
                sleep(WRONG_PROOF_PAUSE).await;
                Answer::Refused { text: "that is not the ticket's secret".into() }
            }
        };
        let said = async {
            message::send(&mut stream, &answer).await?;
            stream.read_u8().await
        };
        let stored = matches!(timeout(DEADLINE, said).await, Ok(Ok(STORED)));
        stored && matches!(answer, Answer::Granted(_))
    }

    /// What somebody gets who has the secret. One key gets a certificate, and gets it again.
    fn judge(&self, csr: &[u8], exported: &Exported) -> Answer {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        let granted = match &*first {
            Some((asked, granted)) if asked == csr => Ok(granted.clone()),
            Some(_) => Err("the ticket was used already, by another key".to_owned()),
            None => self.sign(csr),
        };
        match granted {
            Ok(granted) => {
                *first = Some((csr.to_vec(), granted.clone()));
                Answer::Granted(granted.prove(&self.secret, exported))
            }
            Err(text) => {
                self.count(|refused| refused.bad_request += 1);
                Answer::Refused { text }
            }
        }
    }

    fn sign(&self, csr: &[u8]) -> Result<Granted, String> {
        let signed = sign_request(&self.dir, &self.request, csr).map_err(|e| chain(&e))?;
        let (cert, ca, crl) = (signed.cert_pem, signed.ca_pem, signed.crl_pem);
        Ok(Granted { cert, ca, crl, proof: String::new() })
    }

    fn count(&self, change: impl FnOnce(&mut Refused)) {
        change(&mut self.refused.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn refused(&self) -> Refused {
        *self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
