//! The new host: makes its key, asks the CA's machine of its ticket, and writes what it gets, once all of it fits
//! together.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use rustls_pki_types::ServerName;
use time::OffsetDateTime;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::message::{self, ANSWER_BYTES_MAX, Answer, Granted, Request, STORED};
use super::ticket::Ticket;
use super::tls;
use crate::error_chain::chain;
use crate::net::credentials::{TlsError, read_certificates};
use crate::net::naming::any_identity;
use crate::pki::PkiError;
use crate::pki::enrolment::{NewKey, is_for};
use crate::pki::host_files::{HostFiles, Staged};
use crate::printable::bounded;

/// For everything that the CA's machine has to do.
const DEADLINE: Duration = Duration::from_secs(30);
/// Of a connection that the ticket's machine does not take.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// Why this host has not joined. Nothing was written then.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    #[error(
        "the ticket was good until {0}, and this host's clock says that this is over; make another one, or set the clock right"
    )]
    Expired(OffsetDateTime),
    #[error(transparent)]
    Pki(#[from] PkiError),
    #[error(
        "{address} cannot be reached; is `vmferry certs invite` still running there, and does a firewall let TCP to that port through?"
    )]
    Unreachable {
        address: String,
        #[source]
        source: io::Error,
    },
    #[error("what answers at {address} is not the CA of the ticket; nothing was told to it")]
    NotTheCa {
        address: String,
        #[source]
        source: io::Error,
    },
    #[error(
        "the connection to the CA's machine was lost; try again, the ticket is still good if it was not used"
    )]
    Lost(#[source] io::Error),
    #[error("the CA's machine refuses: {0}")]
    Refused(String),
    #[error("the answer comes from somebody who has not the ticket's secret; nothing was written")]
    NotProved,
    #[error("the certificate that came does not fit: {0}; nothing was written")]
    DoesNotFit(String),
    #[error("the TLS library refused our settings")]
    Tls(#[from] rustls::Error),
}

/// What this host has now.
#[derive(Debug)]
pub struct Joined {
    pub files: Vec<PathBuf>,
    pub not_after: OffsetDateTime,
    /// `crl.pem` is among the files.
    pub has_list: bool,
}

/// Joins: `dir` holds ca-cert.pem, cert.pem, key.pem and, if something is revoked, crl.pem afterwards.
/// Errors: [`JoinError`]; `Exists` in it without `force` if there are some already.
pub async fn join(ticket: &Ticket, dir: &Path, force: bool) -> Result<Joined, JoinError> {
    if OffsetDateTime::now_utc() > ticket.expires {
        return Err(JoinError::Expired(ticket.expires));
    }
    let files = HostFiles::in_folder(dir, force)?;
    let key = NewKey::make(&ticket.name)?;
    let asked = timeout(DEADLINE, ask(ticket, &key, files));
    asked.await.map_err(|elapsed| JoinError::Lost(elapsed.into()))?
}

async fn ask(ticket: &Ticket, key: &NewKey, files: HostFiles) -> Result<Joined, JoinError> {
    let address = || ticket.address.clone();
    let unreachable = |source| JoinError::Unreachable { address: address(), source };
    let tcp = timeout(CONNECT_DEADLINE, TcpStream::connect(&ticket.address)).await;
    let tcp = tcp.map_err(io::Error::from).and_then(|connected| connected).map_err(unreachable)?;
    // It is not sent, and the certificate names nobody.
    let name = ServerName::try_from("enrolment.invalid").map_err(|e| unreachable(io::Error::other(e)))?;
    let connecting = TlsConnector::from(tls::client(ticket.ca)?).connect(name, tcp);
    let not_the_ca = |source| JoinError::NotTheCa { address: address(), source };
    let mut stream = connecting.await.map_err(not_the_ca)?;
    let state = stream.get_ref().1;
    if !tls::is_agreed(state.alpn_protocol()) {
        return Err(not_the_ca(io::Error::other("it speaks another protocol")));
    }
    let exported = message::export(state).map_err(JoinError::Lost)?;
    let request = Request::new(&key.request, &ticket.secret, &exported);
    message::send(&mut stream, &request).await.map_err(JoinError::Lost)?;
    let granted = match message::receive(&mut stream, ANSWER_BYTES_MAX).await.map_err(JoinError::Lost)? {
        Answer::Granted(granted) => granted,
        Answer::Refused { text } => return Err(JoinError::Refused(bounded(&text))),
    };
    if !granted.is_proved(&ticket.secret, &exported) {
        return Err(JoinError::NotProved);
    }
    let staged = files.stage(&[
        ("ca-cert.pem", &granted.ca),
        ("cert.pem", &granted.cert),
        ("key.pem", &key.key_pem),
        ("crl.pem", granted.crl.as_deref().unwrap_or_default()),
    ])?;
    fits(ticket, key, &granted, &staged)?;
    let joined =
        Joined { files: staged.publish()?, not_after: staged.not_after()?, has_list: granted.crl.is_some() };
    // If it does not hear it, it says it again to whoever asks with this key, and that is nobody.
    let said = async {
        stream.write_u8(STORED).await?;
        stream.shutdown().await
    };
    let _ = said.await;
    Ok(joined)
}

/// Whether what came is a certificate of the ticket's CA, for the ticket's host, and for our key; and an agent would
/// start with it.
fn fits(ticket: &Ticket, key: &NewKey, granted: &Granted, staged: &Staged) -> Result<(), JoinError> {
    let bad = |why: &str| JoinError::DoesNotFit(why.to_owned());
    let unreadable = |e: TlsError| JoinError::DoesNotFit(chain(&e));
    let trusted = read_certificates("CA certificate", &staged.path("ca-cert.pem")).map_err(unreadable)?;
    if !trusted.iter().any(|ca| digest(&SHA256, ca).as_ref() == ticket.ca) {
        return Err(bad("the CA of the ticket is not among those that are to be trusted"));
    }
    let chain = read_certificates("certificate", &staged.path("cert.pem")).map_err(unreadable)?;
    if any_identity(&chain).as_ref() != Some(&ticket.name) {
        return Err(bad("it is for another host"));
    }
    if !chain.first().is_some_and(|cert| is_for(cert, &key.request)) {
        return Err(bad("it is for another key"));
    }
    staged.load(granted.crl.is_some()).map_err(unreadable)
}
