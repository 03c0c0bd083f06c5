//! Who asks without the product's help, and who stands between a host and the CA's machine.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::hmac;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, SanType};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{aws_lc_rs as provider, verify_tls13_signature};
use rustls::{ClientConfig, DigitallySignedStruct, Error, ServerConfig, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use vmferry::enrol::Ticket;

use crate::rig::soon;

const ALPN: &[u8] = b"vmferry-enrol/1";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A request of a new key, with these DNS names in it.
pub(super) fn csr_of(name: &str, names: &[&str]) -> Vec<u8> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.subject_alt_names =
        names.iter().map(|name| SanType::DnsName((*name).try_into().unwrap())).collect();
    params.serialize_request(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
}

/// A request to be a CA.
pub(super) fn ca_csr(name: &str) -> Vec<u8> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.serialize_request(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
}

/// Believes everybody.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("no TLS 1.2".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = provider::default_provider().signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

async fn connect(address: &str) -> TlsStream<TcpStream> {
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody))
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    let tcp = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("whoever.invalid").unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, tcp).await.unwrap()
}

async fn receive(stream: &mut (impl AsyncReadExt + Unpin)) -> Option<Value> {
    let length = stream.read_u32().await.ok()?;
    let mut json = vec![0; length as usize];
    stream.read_exact(&mut json).await.ok()?;
    serde_json::from_slice(&json).ok()
}

async fn send(stream: &mut (impl AsyncWriteExt + Unpin), json: &Value) {
    let json = serde_json::to_vec(json).unwrap();
    stream.write_all(&(json.len() as u32).to_be_bytes()).await.unwrap();
    stream.write_all(&json).await.unwrap();
    stream.flush().await.unwrap();
}

/// Asks with the ticket's secret for whatever it likes, changed by `spoil`; and says nothing of the answer.
pub(super) async fn ask(ticket: &Ticket, csr: &[u8], spoil: impl FnOnce(&mut Value)) -> Option<Value> {
    let mut stream = connect(&ticket.address).await;
    let exported =
        stream.get_ref().1.export_keying_material([0_u8; 32], b"EXPORTER-vmferry-enrol", None).unwrap();
    let claim = [b"vmferry enrolment request".as_slice(), &exported, digest(&SHA256, csr).as_ref()].concat();
    let proof = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &ticket.secret), &claim);
    let mut request = json!({"csr": hex(csr), "proof": hex(proof.as_ref())});
    spoil(&mut request);
    send(&mut stream, &request).await;
    soon("an answer", receive(&mut stream)).await
}

/// Announces so many bytes, and says these.
pub(super) async fn say(ticket: &Ticket, announced: u32, bytes: &[u8]) -> Option<Value> {
    let mut stream = connect(&ticket.address).await;
    stream.write_all(&announced.to_be_bytes()).await.unwrap();
    let _ = stream.write_all(bytes).await;
    let _ = stream.flush().await;
    let _ = stream.shutdown().await;
    soon("an end", receive(&mut stream)).await
}

fn read<T: PemObject>(path: &Path) -> T {
    T::from_pem_slice(&std::fs::read(path).unwrap()).unwrap()
}

pub(super) fn tls_of(chain: &[PathBuf], key: &Path) -> Arc<ServerConfig> {
    tls_of_parts((chain.iter().map(|path| read(path)).collect(), read(key)))
}

pub(super) fn tls_of_parts(
    (chain, key): (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>),
) -> Arc<ServerConfig> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    config.alpn_protocols = vec![ALPN.to_vec()];
    Arc::new(config)
}

/// Listens where a ticket leads to.
pub(super) struct Rogue {
    pub(super) address: SocketAddr,
    heard: Arc<AtomicUsize>,
    serving: tokio::task::JoinHandle<()>,
}

impl Rogue {
    /// Counts what it is told.
    pub(super) async fn listen(tls: Arc<ServerConfig>) -> Self {
        Self::with(tls, |mut stream, heard| async move {
            let mut byte = [0; 1];
            while stream.read(&mut byte).await.is_ok_and(|n| n > 0) {
                heard.fetch_add(1, Relaxed);
            }
        })
        .await
    }

    /// Says to the real machine what it is told, and back what that says.
    pub(super) async fn relay(tls: Arc<ServerConfig>, real: Ticket) -> Self {
        Self::with(tls, move |mut stream, _| async move {
            let Some(request) = receive(&mut stream).await else { return };
            let mut on = connect(&real.address).await;
            send(&mut on, &request).await;
            let Some(answer) = receive(&mut on).await else { return };
            send(&mut stream, &answer).await;
            let _ = stream.read_u8().await;
        })
        .await
    }

    /// Answers with certificates of its own.
    pub(super) async fn answer(tls: Arc<ServerConfig>, cert: String, ca: String) -> Self {
        Self::with(tls, move |mut stream, _| async move {
            let _ = receive(&mut stream).await;
            let proof = "00".repeat(32);
            send(&mut stream, &json!({"granted": {"cert": cert, "ca": ca, "crl": null, "proof": proof}}))
                .await;
            let _ = stream.read_u8().await;
        })
        .await
    }

    async fn with<F: Future<Output = ()> + Send>(
        tls: Arc<ServerConfig>,
        serve: impl FnOnce(tokio_rustls::server::TlsStream<TcpStream>, Arc<AtomicUsize>) -> F + Send + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, heard) = (listener.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
        let counted = Arc::clone(&heard);
        let serving = tokio::spawn(async move {
            let (tcp, _) = listener.accept().await.unwrap();
            if let Ok(stream) = TlsAcceptor::from(tls).accept(tcp).await {
                serve(stream, counted).await;
            }
        });
        Self { address, heard, serving }
    }

    /// How many bytes it was told, once it is left.
    pub(super) async fn heard(self) -> usize {
        soon("the end of the connection", self.serving).await.unwrap();
        self.heard.load(Relaxed)
    }
}
