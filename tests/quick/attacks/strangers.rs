//! The table of those who get no session: each is refused, counted under its reason, told once, and a migration that is
//! under way does not notice.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::sync::Arc;

use rcgen::{ExtendedKeyUsagePurpose as Purpose, KeyUsagePurpose as Usage};
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use vmferry::mux::Config;
use vmferry::mux::hello::{FirstFrame, Hello, Mode};

use super::moving::Moving;
use super::raw::Raw;
use super::trust::{reconfigure, reload};
use super::victim::{Attacker, PATIENT, Victim};
use crate::rig::{PATIENCE, blocking, soon, until};
use crate::tls::pki::{Ca, Host, Wish, classical_client, dns, good, raw_client, uri, write};

const ALPN: &[u8] = b"vmferry/1";
/// How often each attack is made.
const TIMES: usize = 3;

/// Waits until all of `TIMES` are counted, and holds the log to one word.
struct Table {
    victim: Victim,
    counted: std::collections::BTreeMap<&'static str, f64>,
}

impl Table {
    /// `reason` has been the cause so many times more.
    async fn refused(&mut self, what: &str, reason: &'static str) {
        let metric = format!("vmferry_connect_failures_total{{direction=\"in\",reason=\"{reason}\"}}");
        let before = self.counted.entry(reason).or_insert(0.0);
        *before += TIMES as f64;
        let now = *before;
        until(&format!("{what} to be counted as {reason}"), || self.victim.metric(&metric) >= now).await;
        assert!(self.victim.metric(&metric) <= now, "{what}: {reason} is counted too often");
    }

    async fn client(&mut self, what: &str, reason: &'static str, config: ClientConfig) {
        let config = Arc::new(config);
        for _ in 0..TIMES {
            let tcp = TcpStream::connect(self.victim.address).await.unwrap();
            let connector = tokio_rustls::TlsConnector::from(Arc::clone(&config));
            let name = ServerName::try_from("alpha").unwrap();
            let Ok(mut stream) = soon(what, connector.connect(name, tcp)).await else { continue };
            // A client of TLS 1.3 hears what is thought of its certificate when it reads.
            let _ = stream.write_all(&[0; 64]).await;
            let heard = soon(what, stream.read(&mut [0; 64])).await;
            assert!(!matches!(heard, Ok(n) if n > 0), "{what} was answered");
        }
        self.refused(what, reason).await;
    }

    async fn bytes(&mut self, what: &str, reason: &'static str, bytes: &[u8]) {
        for _ in 0..TIMES {
            let (address, bytes) = (self.victim.address, bytes.to_vec());
            blocking(move || {
                let mut stream = std::net::TcpStream::connect(address).unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                let _ = stream.write_all(&bytes);
                let _ = stream.shutdown(std::net::Shutdown::Write);
                let _ = stream.read_to_end(&mut Vec::new());
            })
            .await;
        }
        self.refused(what, reason).await;
    }

    /// With a certificate that is right.
    async fn of_tls_1_2(&mut self, host: &Host) {
        let folder = tempfile::tempdir().unwrap();
        let paths = write(folder.path(), &host.cert, host);
        for _ in 0..TIMES {
            let mut openssl = Command::new("openssl");
            openssl.args(["s_client", "-tls1_2", "-alpn", "vmferry/1", "-connect"]);
            openssl
                .arg(self.victim.address.to_string())
                .arg("-cert")
                .arg(&paths.cert)
                .arg("-key")
                .arg(&paths.key);
            let said = blocking(move || openssl.stdin(Stdio::null()).output()).await.unwrap();
            let words = String::from_utf8_lossy(&said.stderr);
            assert!(!said.status.success() && words.contains("alert protocol version"), "{words}");
        }
        self.refused("TLS 1.2", "bad_version").await;
    }

    /// What is said first by somebody with the certificate of `name`.
    async fn first(&mut self, what: &str, reason: &'static str, name: &str, said: impl Fn(&Raw) -> Vec<u8>) {
        for _ in 0..TIMES {
            let mut raw = Raw::connect(&self.victim, name).await;
            let bytes = said(&raw);
            let _ = raw.say(&bytes).await;
            let heard = raw.first_frame().await;
            assert!(!matches!(heard, Some(FirstFrame::Hello { .. })), "{what} was answered: {heard:?}");
        }
        self.refused(what, reason).await;
    }
}

fn spoiled(spoil: impl FnOnce(&mut Wish)) -> Wish {
    let mut wish = good("bravo");
    spoil(&mut wish);
    wish
}

/// Certificates that are wrong, and the reasons for which.
fn certificates(ca: &Ca) -> Vec<(&'static str, &'static str, Host)> {
    let of = |wish: Wish| ca.issue(&wish);
    vec![
        ("another authority", "unknown_ca", Ca::new("other").host("bravo")),
        ("another authority of the same name", "bad_signature", ca.twin().host("bravo")),
        ("expired", "expired", of(spoiled(|w| (w.from_days, w.to_days) = (-9, -1)))),
        ("not yet valid", "not_yet_valid", of(spoiled(|w| w.from_days = 2))),
        ("revoked", "revoked", of(spoiled(|w| w.serial = 4711))),
        ("two names", "no_identity", of(spoiled(|w| w.sans.push(dns("charlie"))))),
        ("a wildcard", "no_identity", of(good("*.example"))),
        ("no DNS name", "no_identity", of(spoiled(|w| w.sans = vec![uri("vmferry:bravo")]))),
        ("another's name picked", "no_identity", of(spoiled(|w| w.sans.push(uri("vmferry:charlie"))))),
        ("for servers", "wrong_purpose", of(spoiled(|w| w.purposes = vec![Purpose::ServerAuth]))),
        ("for nothing", "wrong_purpose", of(spoiled(|w| w.purposes.clear()))),
        ("for anything", "wrong_purpose", of(spoiled(|w| w.purposes = vec![Purpose::Any]))),
        ("for no signature", "wrong_purpose", of(spoiled(|w| w.usages = vec![Usage::KeyEncipherment]))),
    ]
}

fn hello(mode: Mode) -> Vec<u8> {
    Hello::new(&Config::default(), [9; 16], mode).encode().to_vec()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_have_no_session_is_refused_counted_and_told_once() {
    // The session of the last rows is there for as long as all others take.
    let victim = Victim::start_with(|text| text + PATIENT + "resume_s = 3600\n");
    let ca = Ca::read(&victim.pki());
    let list = victim.pki().join("crl.pem");
    std::fs::write(&list, ca.crl(&[4711], 10)).unwrap();
    reconfigure(&victim, "[metrics]", &format!("crl = '{}'\n[metrics]", list.display()));
    reload(&victim);
    victim.logs(|line| line.contains("certificates reloaded")).await;
    let moving = Moving::begin(&victim).await;
    let mut owner = Raw::connect(&victim, "charlie").await;
    let known = owner.greet(5).await;
    let mut table = Table { victim, counted: Default::default() };

    for (what, reason, host) in certificates(&ca) {
        table.client(what, reason, raw_client(&ca, Some(&host), &[ALPN])).await;
    }
    table.client("no certificate", "no_client_certificate", raw_client(&ca, None, &[ALPN])).await;
    let host = ca.host("bravo");
    table.client("another protocol", "bad_protocol", raw_client(&ca, Some(&host), &[b"h2"])).await;
    table.of_tls_1_2(&host).await;
    table.bytes("plain HTTP", "garbage", b"GET / HTTP/1.1\r\n\r\n").await;
    table.bytes("a frame in clear", "garbage", &hello(Mode::Accepted { secret_share: [0; 32] })).await;
    table.bytes("nothing", "closed", b"").await;

    let new = || hello(Mode::New { session_id: [9; 16], secret_share: [1; 32] });
    table.first("nobody whom it knows", "unknown_peer", "mallory", |_| new()).await;
    table.first("its own identity", "unknown_peer", "alpha", |_| new()).await;
    table.first("no HELLO", "hello", "bravo", |_| vec![0x12; 64]).await;
    table
        .first("a HELLO of 60,000 bytes", "hello", "bravo", |_| [&[1, 0, 0xea, 0x60][..], &[0; 12]].concat())
        .await;
    table
        .first("another magic", "hello", "bravo", |_| {
            new().iter().map(|b| b ^ (b"m" == &[*b]) as u8).collect()
        })
        .await;
    // Somebody else's session, whose number is known, even with its secret.
    let stolen = known.clone();
    table.first("a stolen session", "incompatible", "bravo", |raw| raw.resumption(&stolen, 1)).await;
    table
        .first("no session", "incompatible", "charlie", |_| {
            hello(Mode::Resume { session_id: [6; 16], generation: 1, rx_seq: 0, proof: [0; 32] })
        })
        .await;
    // The right identity in another process, without the secret.
    table
        .first("no secret", "wrong_proof", "charlie", |_| {
            hello(Mode::Resume { session_id: [5; 16], generation: 9, rx_seq: 0, proof: [7; 32] })
        })
        .await;
    // The right bytes of the right peer, of another connection.
    let right = Raw::connect(&table.victim, "charlie").await.resumption(&known, 3);
    table.first("a replayed RESUME", "wrong_proof", "charlie", |_| right.clone()).await;
    // And on its own connection it is right: what is refused above is refused for what it says.
    let mut again = Raw::connect(&table.victim, "charlie").await;
    let resumption = again.resumption(&known, 4);
    again.say(&resumption).await.unwrap();
    assert!(matches!(again.first_frame().await, Some(FirstFrame::Hello { .. })), "the owner itself");
    let mut late = Raw::connect(&table.victim, "charlie").await;
    let old = late.resumption(&known, 2);
    late.say(&old).await.unwrap();
    assert!(!matches!(late.first_frame().await, Some(FirstFrame::Hello { .. })), "an old attempt");

    let log = table.victim.log();
    let told = log.iter().filter(|line| line.contains("was refused")).count();
    let reasons = table.counted.len();
    let most = (reasons + 1) * table.victim.told_at_most();
    assert!(told >= reasons && told <= most, "{told} told of {reasons} reasons: {log:#?}");
    moving.goes_on("beside whoever was refused").await;
    moving.ends_whole(&table.victim).await;
}

/// RFC 8446 §4.6.1: with a ticket somebody could come back without a certificate, or say something before any handshake
/// (0-RTT).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_given_a_ticket() {
    let victim = Victim::start();
    let host = Ca::read(&victim.pki()).host("bravo");
    let folder = tempfile::tempdir().unwrap();
    let paths = write(folder.path(), &host.cert, &host);
    let ticket = folder.path().join("ticket");
    let mut openssl = Command::new("openssl");
    // Until the other side ends it, which waits for a HELLO.
    openssl.args(["s_client", "-tls1_3", "-ign_eof", "-alpn", "vmferry/1", "-connect"]);
    openssl.arg(victim.address.to_string()).arg("-cert").arg(&paths.cert).arg("-key").arg(&paths.key);
    openssl.arg("-sess_out").arg(&ticket);
    let said = blocking(move || openssl.stdin(Stdio::null()).output()).await.unwrap();
    let words = String::from_utf8_lossy(&said.stdout);
    assert!(words.contains("New, TLSv1.3"), "{words}");
    // Its certificate was taken.
    let metric = "vmferry_connect_failures_total{direction=\"in\",reason=\"no_answer\"}";
    until("an end for want of a HELLO", || victim.metric(metric) == 1.0).await;
    assert!(!words.contains("New Session Ticket") && !ticket.exists(), "{words}");
}

/// `key_exchange = "hybrid-only"`: who has no post-quantum part is refused as one with whom nothing is in common, and
/// what a session has is told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn by_policy_nobody_has_a_session_without_a_post_quantum_part() {
    let victim = Victim::start_with(|text| text.replace("[tls]\n", "[tls]\nkey_exchange = 'hybrid-only'\n"));
    let ca = Ca::read(&victim.pki());
    let bravo = Attacker::new(&victim, "bravo");
    let session = bravo.session(&victim).await;
    let mut table = Table { victim, counted: Default::default() };
    let classical = classical_client(&ca, &ca.host("bravo"), &[ALPN]);
    table.client("keys of today's kind", "nothing_in_common", classical).await;
    let shown = blocking(move || table.victim.get("/v1/status")["sessions"].clone()).await;
    assert!(session.is_live());
    let cipher = shown[0]["cipher"].as_str().unwrap_or_default();
    assert!(cipher.ends_with(" X25519MLKEM768"), "{shown}");
}
