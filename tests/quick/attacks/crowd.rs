//! Ten thousand connections that are begun and not gone on with, all held at once; and as many as have a place, each
//! with as much of a message as a stranger may have.

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustls::client::ResolvesClientCert;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ClientConnection, SignatureScheme};
use socket2::{Domain, Socket, Type};
use tokio::task::block_in_place;
use tokio::time::sleep;
use vmferry::mux::Code;

use super::victim::{Attacker, Victim, tls};
use crate::rig::{PATIENCE, blocking, until};

const CROWD: usize = 10_000;
/// The agent's places for those who have proved nothing, and a few for what else goes on.
const DESCRIPTORS_MORE: usize = 512 + 256 + 100;
const MIB: u64 = 1 << 20;

/// As many descriptors, and what else runs beside.
fn may_open(descriptors: usize) {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    assert!(
        hard as usize > descriptors + 2000,
        "this test needs {descriptors} descriptors, {hard} are allowed"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_half_open_connections_keep_nobody_out_and_hold_little() {
    may_open(CROWD);
    let victim = Victim::start();
    let honest = Attacker::new(&victim, "bravo");
    let (memory, descriptors) = (victim.resident_bytes(), victim.descriptors());
    let to = victim.address;
    let crowd = block_in_place(|| {
        let begin = |n: usize| {
            let mut stream = TcpStream::connect(to).unwrap();
            // Half of a record's head, or nothing.
            let _ = stream.write_all(if n.is_multiple_of(2) { b"\x16\x03\x01" } else { b"" });
            stream
        };
        (0..CROWD).map(begin).collect::<Vec<_>>()
    });
    // The agent has let go of who made room once its tasks had a processor. A little later everybody's time is over, and
    // that there are few proves nothing.
    let since = Instant::now();
    let (held, more) = loop {
        let (held, resident) = (victim.descriptors(), victim.resident_bytes());
        let more = resident.saturating_sub(memory) / MIB;
        let is_little = held < descriptors + DESCRIPTORS_MORE && more < 48;
        if is_little || since.elapsed() > Duration::from_secs(1) {
            break (held, more);
        }
        sleep(Duration::from_millis(20)).await;
    };
    assert!(held < descriptors + DESCRIPTORS_MORE, "{held} descriptors, {descriptors} before");
    assert!(more < 48, "{more} MiB more");
    let session = honest.session(&victim).await;
    session.close(Code::Shutdown, "it came about");
    let reason = |reason| {
        victim.metric(&format!("vmferry_connect_failures_total{{direction=\"in\",reason=\"{reason}\"}}"))
    };
    // Those who made room, and those whose time was over.
    until("all of them to be counted", || {
        reason("too_many") + reason("timeout") >= (CROWD - DESCRIPTORS_MORE) as f64
    })
    .await;
    println!("{} made room, {held} descriptors, {more} MiB more", reason("too_many"));
    drop(crowd);
    let told = victim.log().iter().filter(|line| line.contains("was refused")).count();
    assert!(told <= 4 * victim.told_at_most(), "{told} refusals told");
    drop(honest.session(&victim).await);
}

/// Of a handshake message that may have 64 KiB.
const SAID_BYTES: usize = 60 * 1024;
/// More than have a place among those who are silent, or speak, together.
const TALKERS: usize = 2_000;
/// All places have 48 MiB of messages. Half as much again is what the allocator has not given back.
const TALKERS_MIB_MAX: u64 = 96;
/// Their handshakes take the agent a while; those who speak have 16 MiB of messages.
const CHAINS: usize = 1_000;
const CHAINS_MIB_MAX: u64 = 48;

/// A connection from one of four addresses, so that no network's part of the places is too small for the crowd.
fn connect(to: SocketAddr, n: usize) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let from = SocketAddr::from((Ipv4Addr::new(127, 0, 7, 1 + (n % 4) as u8), 0));
    socket.bind(&from.into()).unwrap();
    socket.connect_timeout(&to.into(), PATIENCE).unwrap();
    let stream = TcpStream::from(socket);
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// The beginning of a ClientHello (RFC 8446 §4, §5.1) that would be one of 64 KiB.
fn unfinished_hello() -> Vec<u8> {
    let mut message = vec![0; SAID_BYTES];
    message[..4].copy_from_slice(&[1, 0, 0xff, 0xf0]);
    let record = |part: &[u8]| [&[22, 3, 1][..], &(part.len() as u16).to_be_bytes(), part].concat();
    message.chunks(16 * 1024).flat_map(record).collect()
}

/// The agent's memory with a crowd beside it, in MiB beyond what it was; then it serves its peer as ever.
async fn costs(victim: &Victim, crowd: impl FnOnce() -> Vec<TcpStream>) -> u64 {
    may_open(TALKERS);
    let honest = Attacker::new(victim, "bravo");
    honest.session(victim).await.close(Code::Shutdown, "so that all that is needed is there");
    let before = victim.resident_bytes();
    victim.forget_peak();
    let held = block_in_place(crowd);
    let more = victim.peak_bytes().saturating_sub(before) / MIB;
    drop(honest.session(victim).await);
    drop(held);
    assert!(victim.is_alive());
    more
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_messages_of_strangers_hold_no_more_than_their_places() {
    let victim = Victim::start();
    let (to, hello) = (victim.address, unfinished_hello());
    let crowd = move || {
        let talk = |n| {
            let mut stream = connect(to, n);
            // It may have lost its place meanwhile.
            let _ = stream.write_all(&hello);
            stream
        };
        (0..TALKERS).map(talk).collect::<Vec<_>>()
    };
    let more = costs(&victim, crowd).await;
    println!("{more} MiB more for {TALKERS} unfinished ClientHellos of {SAID_BYTES} bytes");
    assert!((1..TALKERS_MIB_MAX).contains(&more), "{more} MiB more");
}

/// More certificates than any host has, each of them real.
#[derive(Debug)]
struct LongChain(Arc<CertifiedKey>);

impl ResolvesClientCert for LongChain {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

fn with_long_chain(victim: &Victim) -> ClientConfig {
    let mut config = (*tls(&victim.pki(), "mallory").client).clone();
    let host = victim.pki().join("hosts/mallory");
    let certificate = |file| CertificateDer::from_pem_file(host.join(file)).unwrap();
    let (own, ca) = (certificate("cert.pem"), certificate("ca-cert.pem"));
    let copies = (SAID_BYTES - own.len()) / (ca.len() + 5);
    let chain = std::iter::once(own).chain(std::iter::repeat_n(ca, copies)).collect();
    let key = PrivateKeyDer::from_pem_file(host.join("key.pem")).unwrap();
    let key = config.crypto_provider().key_provider.load_private_key(key).unwrap();
    config.client_auth_cert_resolver = Arc::new(LongChain(Arc::new(CertifiedKey::new(chain, key))));
    config
}

/// A handshake up to the client's last flight, of which so many bytes are not said.
fn shake(to: SocketAddr, n: usize, config: &Arc<ClientConfig>, unsaid: usize) -> std::io::Result<TcpStream> {
    let mut stream = connect(to, n);
    let name = ServerName::try_from("alpha").unwrap();
    let mut client = ClientConnection::new(Arc::clone(config), name).unwrap();
    client.write_tls(&mut stream)?;
    while client.is_handshaking() {
        if client.read_tls(&mut stream)? == 0 {
            return Ok(stream);
        }
        client.process_new_packets().map_err(std::io::Error::other)?;
    }
    let mut flight = Vec::new();
    while client.wants_write() {
        client.write_tls(&mut flight)?;
    }
    assert!(flight.len() > SAID_BYTES - 4096, "{} bytes", flight.len());
    stream.write_all(&flight[..flight.len() - unsaid])?;
    Ok(stream)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_chains_of_strangers_hold_no_more_than_their_places() {
    let victim = Victim::start();
    let (to, config) = (victim.address, Arc::new(with_long_chain(&victim)));
    let chains = Arc::clone(&config);
    // The certificates are not whole: what follows them is shorter than what is not said.
    let crowd = move || (0..CHAINS).filter_map(|n| shake(to, n, &chains, 2_000).ok()).collect::<Vec<_>>();
    let more = costs(&victim, crowd).await;
    println!("{more} MiB more for unfinished chains of {SAID_BYTES} bytes");
    assert!((1..CHAINS_MIB_MAX).contains(&more), "{more} MiB more");
    // One that is whole is refused like any other.
    let whole = blocking(move || shake(to, 0, &config, 0)).await;
    victim.logs(|line| line.contains("was refused")).await;
    drop(whole);
    assert!(victim.is_alive());
}
