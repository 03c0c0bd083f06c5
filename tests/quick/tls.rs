//! Handshakes over real sockets, and the files behind them: what is good passes, and whatever
//! is bad is refused for the right reason, on both sides.

mod files;
mod organisation;
pub(crate) mod pki;

use std::io;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use pki::{Ca, Host, Wish, agent, agent_with_crl, dns, good, raw_client, raw_server, uri};
use rcgen::{ExtendedKeyUsagePurpose as Purpose, KeyUsagePurpose as Usage};
use rustls::{ClientConfig, HandshakeKind, NamedGroup, ServerConfig};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use vmferry::net::handshake::{
    HandshakeError, HandshakeFailure as F, Refusal, accept, classify_handshake_error, connect,
};
use vmferry::net::identity::Identity;
use vmferry::net::naming::Naming;
use vmferry::net::tls::{ALPN, Aead, KeyExchange, PeerRole, Tls};

/// Far beyond what a loaded machine needs; only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(60);

type Outcome<T> = Result<T, F>;

fn id(name: &str) -> Identity {
    name.parse().unwrap()
}

fn refused<T>(refusal: Refusal) -> Outcome<T> {
    Err(F::RefusedByPeer(refusal))
}

fn failure(error: HandshakeError) -> F {
    error.failure
}

fn classify(error: io::Error) -> F {
    classify_handshake_error(&error)
}

async fn listen() -> (TcpListener, std::net::SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// The product accepts; says one byte to whom it has accepted.
async fn accept_once(listener: &TcpListener, tls: &Tls) -> Outcome<Identity> {
    let (socket, _) = listener.accept().await.unwrap();
    let (mut stream, identity) = accept(tls, socket, PATIENCE).await.map_err(failure)?;
    stream.write_all(b"k").await.map_err(classify)?;
    stream.flush().await.map_err(classify)?;
    Ok(identity)
}

/// A client of the library dials, and waits for the acceptor's verdict, its first byte.
async fn dial_raw(address: std::net::SocketAddr, config: ClientConfig, name: &str) -> Outcome<()> {
    let socket = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let connector = TlsConnector::from(Arc::new(config));
    let mut stream = connector.connect(name, socket).await.map_err(classify)?;
    // The dialer's HELLO is on its way while the acceptor still judges the certificate.
    stream.write_all(&[0; 4096]).await.map_err(classify)?;
    stream.flush().await.map_err(classify)?;
    stream.read_u8().await.map(drop).map_err(classify)
}

/// Our acceptor against a client with this certificate: (acceptor's, dialer's) outcome.
async fn meet_client(tls: &Tls, client: ClientConfig) -> (Outcome<Identity>, Outcome<()>) {
    let (listener, address) = listen().await;
    let both = async { tokio::join!(accept_once(&listener, tls), dial_raw(address, client, "bravo")) };
    tokio::time::timeout(PATIENCE, both).await.expect("the handshake hangs")
}

/// Our dialer against a server with these settings: (dialer's, acceptor's) outcome.
async fn meet_server(tls: &Tls, server: ServerConfig, peer: &str) -> (Outcome<()>, Outcome<()>) {
    let (listener, address) = listen().await;
    let serve = async {
        let (socket, _) = listener.accept().await.unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(server));
        let mut stream = acceptor.accept(socket).await.map_err(classify)?;
        stream.write_all(b"k").await.map_err(classify)?;
        stream.read_u8().await.map(drop).map_err(classify)
    };
    let dial = async {
        let socket = TcpStream::connect(address).await.unwrap();
        let mut stream = connect(tls, socket, &id(peer), PATIENCE).await.map_err(failure)?;
        stream.read_u8().await.map_err(classify)?;
        stream.write_all(b"k").await.map_err(classify)?;
        stream.shutdown().await.map_err(classify)
    };
    let both = async { tokio::join!(dial, serve) };
    tokio::time::timeout(PATIENCE, both).await.expect("the handshake hangs")
}

fn spoiled(name: &str, spoil: impl FnOnce(&mut Wish)) -> Wish {
    let mut wish = good(name);
    spoil(&mut wish);
    wish
}

#[tokio::test]
async fn two_agents_shake_hands_whatever_library_seals() {
    let ca = Ca::new("ca");
    let dir = tempfile::tempdir().unwrap();
    let load = |name: &str, aead| {
        let paths = pki::write(&dir.path().join(name), &ca.cert, &ca.host(name));
        Tls::load(&paths, aead).unwrap()
    };
    for (ours, theirs) in [(Aead::Ring, Aead::AwsLc), (Aead::AwsLc, Aead::Ring), (Aead::Auto, Aead::Auto)] {
        let (alpha, bravo) = (load("Alpha", ours), load("bravo", theirs));
        let (listener, address) = listen().await;
        // Twice: the second must be as full a handshake as the first.
        for round in 0..2 {
            let dial = async {
                let socket = TcpStream::connect(address).await.unwrap();
                let mut stream = connect(&alpha, socket, &id("bravo"), PATIENCE).await.unwrap();
                assert_eq!(stream.read_u8().await.unwrap(), b'k');
                let state = stream.get_ref().1;
                let group = state.negotiated_key_exchange_group().unwrap().name();
                (state.handshake_kind(), group, state.negotiated_cipher_suite().unwrap().suite())
            };
            let (accepted, (kind, group, suite)) = tokio::join!(accept_once(&listener, &bravo), dial);
            let context = format!("{ours} to {theirs}, round {round}");
            assert_eq!(accepted, Ok(id("alpha")), "{context}");
            assert_eq!(kind, Some(HandshakeKind::Full), "{context}");
            assert_eq!(group, NamedGroup::X25519MLKEM768, "{context}");
            assert_eq!(suite, rustls::CipherSuite::TLS13_AES_128_GCM_SHA256, "{context}");
        }
    }
}

/// Key exchanges without a post-quantum part come last, and by policy not at all.
#[tokio::test]
async fn by_policy_nobody_connects_without_a_post_quantum_part() {
    let ca = Ca::new("ca");
    let dir = tempfile::tempdir().unwrap();
    let load = |name: &str, exchange| {
        let paths = pki::write(&dir.path().join(name), &ca.cert, &ca.host(name));
        Tls::load_as(&paths, Naming::Dns, (Aead::Auto, exchange)).unwrap()
    };
    let (first, only) = (load("bravo", KeyExchange::HybridFirst), load("charlie", KeyExchange::HybridOnly));
    let classical = || pki::classical_client(&ca, &ca.host("alpha"), &[ALPN]);
    assert_eq!(meet_client(&first, classical()).await.0, Ok(id("alpha")));
    let met = meet_client(&only, classical()).await;
    assert_eq!(met, (Err(F::NothingInCommon), refused(Refusal::HandshakeFailed)));
    // And where it dials.
    let server = pki::classical_server(&ca, &ca.host("delta"), &[ALPN]);
    assert_eq!(meet_server(&only, server, "delta").await.0, refused(Refusal::HandshakeFailed));
    // Agents agree on it whatever either of them says.
    for (ours, theirs) in [(&first, &only), (&only, &first), (&only, &only)] {
        let (listener, address) = listen().await;
        let dial = async {
            let socket = TcpStream::connect(address).await.unwrap();
            let stream = connect(ours, socket, &theirs.identity, PATIENCE).await.unwrap();
            stream.get_ref().1.negotiated_key_exchange_group().unwrap().name()
        };
        let (accepted, group) = tokio::join!(accept_once(&listener, theirs), dial);
        assert_eq!((accepted, group), (Ok(ours.identity.clone()), NamedGroup::X25519MLKEM768));
    }
}

#[tokio::test]
async fn a_bad_client_is_refused_and_told_so() {
    let (ca, other, twin) = (Ca::new("ca"), Ca::new("other"), Ca::new("ca"));
    let bravo = agent_with_crl(&ca, "bravo", &ca.crl(&[99], 10)).unwrap();
    let cases: Vec<(&str, Host, F, Refusal)> = vec![
        ("other CA", other.host("alpha"), F::UnknownCa, Refusal::UnknownCa),
        ("other CA of the same name", twin.host("alpha"), F::BadSignature, Refusal::BadSignature),
        (
            "expired",
            ca.issue(&spoiled("alpha", |w| (w.from_days, w.to_days) = (-9, -1))),
            F::Expired,
            Refusal::Expired,
        ),
        ("not yet valid", ca.issue(&spoiled("alpha", |w| w.from_days = 2)), F::NotYetValid, Refusal::Expired),
        ("revoked", ca.issue(&spoiled("alpha", |w| w.serial = 99)), F::Revoked, Refusal::Revoked),
        (
            "server only",
            ca.issue(&spoiled("alpha", |w| w.purposes = vec![Purpose::ServerAuth])),
            F::WrongPurpose,
            Refusal::WrongPurpose,
        ),
        (
            "no purpose",
            ca.issue(&spoiled("alpha", |w| w.purposes.clear())),
            F::WrongPurpose,
            Refusal::WrongPurpose,
        ),
        (
            "any purpose",
            ca.issue(&spoiled("alpha", |w| w.purposes = vec![Purpose::Any])),
            F::WrongPurpose,
            Refusal::WrongPurpose,
        ),
        (
            "no signature",
            ca.issue(&spoiled("alpha", |w| w.usages = vec![Usage::KeyEncipherment, Usage::KeyAgreement])),
            F::WrongPurpose,
            Refusal::WrongPurpose,
        ),
        (
            "two names",
            ca.issue(&spoiled("alpha", |w| w.sans.push(dns("beta")))),
            F::NoIdentity,
            Refusal::BadCertificate,
        ),
        ("wildcard", ca.issue(&good("*.rack.example")), F::NoIdentity, Refusal::BadCertificate),
        (
            "no DNS name",
            ca.issue(&spoiled("alpha", |w| w.sans = vec![uri("vmferry:alpha")])),
            F::NoIdentity,
            Refusal::BadCertificate,
        ),
        (
            "selector outside",
            ca.issue(&spoiled("alpha", |w| w.sans.push(uri("vmferry:bravo")))),
            F::NoIdentity,
            Refusal::BadCertificate,
        ),
    ];
    for (case, host, ours, theirs) in cases {
        let client = raw_client(&ca, Some(&host), &[ALPN]);
        let (accepted, dialled) = meet_client(&bravo, client).await;
        assert_eq!((accepted, dialled), (Err(ours), refused(theirs)), "{case}");
    }
}

#[tokio::test]
async fn a_client_without_certificate_or_protocol_is_refused() {
    let ca = Ca::new("ca");
    let bravo = agent(&ca, "bravo");
    let alpha = ca.host("alpha");

    let (accepted, dialled) = meet_client(&bravo, raw_client(&ca, None, &[ALPN])).await;
    assert_eq!(accepted, Err(F::NoClientCertificate));
    assert_eq!(dialled, refused(Refusal::CertificateRequired));

    let (accepted, dialled) = meet_client(&bravo, raw_client(&ca, Some(&alpha), &[b"h2"])).await;
    assert_eq!(accepted, Err(F::BadProtocol));
    assert_eq!(dialled, refused(Refusal::BadProtocol));

    let (accepted, dialled) = meet_client(&bravo, raw_client(&ca, Some(&alpha), &[])).await;
    assert_eq!(accepted, Err(F::BadProtocol));
    assert_eq!(dialled, Err(F::Closed));
}

#[tokio::test]
async fn one_name_picked_among_several_is_an_identity() {
    let ca = Ca::new("ca");
    let bravo = agent(&ca, "bravo");
    let shared = ca.issue(&spoiled("alpha", |w| {
        w.sans.push(dns("alpha.example"));
        w.sans.push(uri("vmferry:Alpha.example"));
        w.sans.push(uri("https://elsewhere.example/"));
    }));
    let client = raw_client(&ca, Some(&shared), &[ALPN]);
    assert_eq!(meet_client(&bravo, client).await, (Ok(id("alpha.example")), Ok(())));
}

#[tokio::test]
async fn a_bad_server_is_refused_and_told_so() {
    let (ca, other, twin) = (Ca::new("ca"), Ca::new("other"), Ca::new("ca"));
    let alpha = agent_with_crl(&ca, "alpha", &ca.crl(&[99], 10)).unwrap();
    let two = |w: &mut Wish| w.sans.push(dns("other"));
    let picks_other = |w: &mut Wish| w.sans.extend([dns("other"), uri("vmferry:other")]);
    let cases: Vec<(&str, Host, F, Refusal)> = vec![
        ("other CA", other.host("bravo"), F::UnknownCa, Refusal::UnknownCa),
        ("other CA of the same name", twin.host("bravo"), F::BadSignature, Refusal::BadSignature),
        (
            "expired",
            ca.issue(&spoiled("bravo", |w| (w.from_days, w.to_days) = (-9, -1))),
            F::Expired,
            Refusal::Expired,
        ),
        ("not yet valid", ca.issue(&spoiled("bravo", |w| w.from_days = 2)), F::NotYetValid, Refusal::Expired),
        ("revoked", ca.issue(&spoiled("bravo", |w| w.serial = 99)), F::Revoked, Refusal::Revoked),
        (
            "client only",
            ca.issue(&spoiled("bravo", |w| w.purposes = vec![Purpose::ClientAuth])),
            F::WrongPurpose,
            Refusal::WrongPurpose,
        ),
        (
            "no purpose",
            ca.issue(&spoiled("bravo", |w| w.purposes.clear())),
            F::WrongPurpose,
            Refusal::WrongPurpose,
        ),
        (
            "no signature",
            ca.issue(&spoiled("bravo", |w| w.usages = vec![Usage::KeyEncipherment, Usage::KeyAgreement])),
            F::WrongPurpose,
            Refusal::WrongPurpose,
        ),
        ("wrong name", ca.host("charlie"), F::WrongIdentity, Refusal::BadCertificate),
        ("two names", ca.issue(&spoiled("bravo", two)), F::NoIdentity, Refusal::BadCertificate),
        (
            "other name picked",
            ca.issue(&spoiled("bravo", picks_other)),
            F::WrongIdentity,
            Refusal::BadCertificate,
        ),
        ("wildcard", ca.issue(&good("*.rack.example")), F::NoIdentity, Refusal::BadCertificate),
    ];
    for (case, host, ours, theirs) in cases {
        let name = if case == "wildcard" { "bravo.rack.example" } else { "bravo" };
        let met = meet_server(&alpha, raw_server(&ca, &host, &[ALPN]), name).await;
        assert_eq!(met, (Err(ours), refused(theirs)), "{case}");
    }
}

/// A certificate need not say what its key may do; one that says so may say more.
#[tokio::test]
async fn a_key_of_which_nothing_is_said_may_sign() {
    let ca = Ca::new("ca");
    let bravo = agent(&ca, "bravo");
    for usages in [vec![], vec![Usage::KeyEncipherment, Usage::DigitalSignature]] {
        let alpha = ca.issue(&spoiled("alpha", |w| w.usages.clone_from(&usages)));
        let met = meet_server(&bravo, raw_server(&ca, &alpha, &[ALPN]), "alpha").await;
        assert_eq!(met, (Ok(()), Ok(())), "{usages:?}");
        let met = meet_client(&bravo, raw_client(&ca, Some(&alpha), &[ALPN])).await;
        assert_eq!(met, (Ok(id("alpha")), Ok(())), "{usages:?}");
    }
}

#[tokio::test]
async fn a_server_of_another_protocol_is_refused() {
    let ca = Ca::new("ca");
    let alpha = agent(&ca, "alpha");
    let host = ca.host("bravo");
    let (dialled, accepted) = meet_server(&alpha, raw_server(&ca, &host, &[b"h2"]), "bravo").await;
    assert_eq!((dialled, accepted), (refused(Refusal::BadProtocol), Err(F::BadProtocol)));
    let (dialled, accepted) = meet_server(&alpha, raw_server(&ca, &host, &[]), "bravo").await;
    assert_eq!((dialled, accepted), (Err(F::BadProtocol), Err(F::Closed)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn tls_1_2_is_refused() {
    let ca = Ca::new("ca");
    let bravo = agent(&ca, "bravo");
    let dir = tempfile::tempdir().unwrap();
    let paths = pki::write(dir.path(), &ca.cert, &ca.host("alpha"));
    let (listener, address) = listen().await;
    let openssl = |version: &str| {
        Command::new("openssl")
            .args(["s_client", "-brief", "-alpn", "vmferry/1", version, "-connect"])
            .arg(address.to_string())
            .arg("-CAfile")
            .arg(&paths.ca)
            .arg("-cert")
            .arg(&paths.cert)
            .arg("-key")
            .arg(&paths.key)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("openssl is needed by this test")
    };
    let old = openssl("-tls1_2");
    assert_eq!(accept_once(&listener, &bravo).await, Err(F::BadVersion));
    let said = tokio::task::spawn_blocking(|| old.wait_with_output()).await.unwrap().unwrap();
    let words = String::from_utf8_lossy(&said.stderr);
    assert!(!said.status.success() && words.contains("alert protocol version"), "{words}");

    // The control: the same program with the same files gets in with TLS 1.3.
    let new = openssl("-tls1_3");
    assert_eq!(accept_once(&listener, &bravo).await, Ok(id("alpha")));
    let said = tokio::task::spawn_blocking(|| new.wait_with_output()).await.unwrap().unwrap();
    let words = String::from_utf8_lossy(&said.stderr);
    assert!(words.contains("Protocol version: TLSv1.3"), "{words}");
}

#[tokio::test]
async fn garbage_silence_and_a_cut_are_told_apart() {
    let ca = Ca::new("ca");
    let bravo = agent(&ca, "bravo");

    let (ours, mut theirs) = tokio::io::duplex(4096);
    theirs.write_all(b"GET / HTTP/1.1\r\nHost: bravo\r\n\r\n").await.unwrap();
    let met = tokio::join!(accept(&bravo, ours, PATIENCE), async move {
        let mut alert = Vec::new();
        theirs.read_to_end(&mut alert).await.unwrap();
        // Not TLS, so there is nobody to alert in a way that matters; but the end must come.
    });
    assert_eq!(met.0.map(drop).map_err(failure), Err(F::Garbage));

    let (ours, theirs) = tokio::io::duplex(4096);
    let silent = accept(&bravo, ours, Duration::from_millis(20)).await;
    assert_eq!(silent.map(drop).map_err(failure), Err(F::Timeout));
    drop(theirs);

    let (ours, theirs) = tokio::io::duplex(4096);
    drop(theirs);
    let cut = connect(&bravo, ours, &id("alpha"), PATIENCE).await;
    assert_eq!(cut.map(drop).map_err(failure), Err(F::Closed));
}

/// Bytes that are unread when a socket is closed make the kernel send a reset, which can cost
/// the peer the alert. What a refused peer had under way is read, but not without end.
#[tokio::test]
async fn a_refused_peer_may_finish_its_sentence_but_not_talk_for_ever() {
    let ca = Ca::new("ca");
    let bravo = agent(&ca, "bravo");
    for (bytes, finishes) in [(32 * 1024, true), (1024 * 1024, false)] {
        let (ours, mut theirs) = tokio::io::duplex(1024);
        let talk = async move {
            let sentence = vec![b'G'; bytes];
            let (mut read, mut write) = tokio::io::split(&mut theirs);
            let mut alert = Vec::new();
            let (_, said) = tokio::join!(read.read_to_end(&mut alert), async {
                let said = write.write_all(&sentence).await;
                said.and(write.shutdown().await)
            });
            said
        };
        let (accepted, said) = tokio::join!(accept(&bravo, ours, PATIENCE), talk);
        assert_eq!(accepted.map(drop).map_err(failure), Err(F::Garbage));
        assert_eq!(said.is_ok(), finishes, "{bytes} bytes: {said:?}");
    }
}

#[tokio::test]
async fn the_dialled_name_stays_off_the_wire() {
    let ca = Ca::new("ca");
    let alpha = agent(&ca, "alpha");
    let (ours, mut theirs) = tokio::io::duplex(64 * 1024);
    let peer = id("a-host-with-a-name-to-look-for");
    let hello = async {
        let mut hello = vec![0; 16 * 1024];
        let n = theirs.read(&mut hello).await.unwrap();
        drop(theirs);
        hello.truncate(n);
        hello
    };
    let (_, hello) = tokio::join!(connect(&alpha, ours, &peer, PATIENCE), hello);
    let holds = |needle: &[u8]| hello.windows(needle.len()).any(|w| w == needle);
    assert!(holds(ALPN), "this is no ClientHello of ours: {} bytes", hello.len());
    assert!(!holds(peer.as_str().as_bytes()), "the name is sent in clear");
}

#[test]
fn a_live_peer_is_judged_again_by_a_new_revocation_list() {
    let ca = Ca::new("ca");
    let peer = ca.issue(&spoiled("bravo", |w| w.serial = 99));
    let chain = [peer.cert.clone()];
    let before = agent(&ca, "alpha");
    let after = agent_with_crl(&ca, "alpha", &ca.crl(&[99], 10)).unwrap();
    for role in [PeerRole::Client, PeerRole::Server] {
        assert_eq!(before.reverify(&chain, role, &id("bravo")), Ok(()));
        assert_eq!(before.reverify(&chain, role, &id("alpha")), Err(F::WrongIdentity));
        assert_eq!(after.reverify(&chain, role, &id("bravo")), Err(F::Revoked));
        assert_eq!(after.reverify(&[], role, &id("bravo")), Err(F::NoClientCertificate));
    }
}

/// A clock that was put back, seen from the certificate: that becomes valid tomorrow.
#[test]
fn a_clock_that_is_put_back_ends_no_session() {
    let ca = Ca::new("ca");
    let peer = ca.issue(&spoiled("bravo", |w| (w.serial, w.from_days) = (99, 1)));
    let chain = [peer.cert.clone()];
    let alpha = agent(&ca, "alpha");
    let revoked = agent_with_crl(&ca, "alpha", &ca.crl(&[99], 10)).unwrap();
    for role in [PeerRole::Client, PeerRole::Server] {
        assert_eq!(alpha.reverify_accepted(&chain, role, &id("bravo")), Ok(()));
        assert_eq!(alpha.reverify(&chain, role, &id("bravo")), Err(F::NotYetValid), "nor lets it begin one");
        assert_eq!(alpha.reverify_accepted(&chain, role, &id("alpha")), Err(F::WrongIdentity));
        assert_eq!(revoked.reverify_accepted(&chain, role, &id("bravo")), Err(F::Revoked));
        let unknown = agent(&Ca::new("other"), "alpha").reverify_accepted(&chain, role, &id("bravo"));
        assert_eq!(unknown, Err(F::UnknownCa));
    }
}

#[test]
fn every_failure_has_its_own_label_and_a_hint() {
    let plain = [
        F::UnknownCa,
        F::BadSignature,
        F::Expired,
        F::NotYetValid,
        F::Revoked,
        F::RevocationUnknown,
        F::WrongPurpose,
        F::WrongIdentity,
        F::NoIdentity,
        F::BadCertificate,
        F::NoClientCertificate,
        F::BadVersion,
        F::BadProtocol,
        F::NothingInCommon,
        F::Timeout,
        F::Closed,
        F::Garbage,
        F::Other,
    ];
    let refusals = [
        Refusal::UnknownCa,
        Refusal::BadSignature,
        Refusal::Expired,
        Refusal::Revoked,
        Refusal::WrongPurpose,
        Refusal::BadCertificate,
        Refusal::CertificateRequired,
        Refusal::BadVersion,
        Refusal::BadProtocol,
        Refusal::HandshakeFailed,
        Refusal::Other,
    ];
    let all: Vec<F> = plain.into_iter().chain(refusals.map(F::RefusedByPeer)).collect();
    let labels: std::collections::BTreeSet<&str> = all.iter().map(|f| f.label()).collect();
    assert_eq!(labels.len(), all.len());
    for failure in all {
        assert!(failure.to_string().contains("hint: "), "{failure:?}");
    }
}
