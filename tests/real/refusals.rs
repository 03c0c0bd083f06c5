//! Connections that must not become sessions, against a real agent: each is refused, the log and
//! the metrics say why, others are served meanwhile, and nothing is left of it.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::agent::PORT;
use crate::support::process::{LONG, SHORT, run_any, wait_for};
use crate::support::{Agent, AgentSpec, Credentials, Lab, Net, VmEntry, proof, with_lab};
use anyhow::{Context, Result, ensure};
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, SanType};
use serde_json::Value;
use time::OffsetDateTime;

/// More than the agent keeps waiting for their proof of identity.
const SILENT: usize = 400;
/// After which the agent ends a silent connection; its own deadlines are 5 s each.
const ENDED_WITHIN: Duration = Duration::from_secs(60);
/// What alpha offers; it has no QEMU, which is no matter here.
const VM: &str = "web1";

struct Refused {
    name: &'static str,
    /// The metric's label.
    reason: &'static str,
    /// In the log.
    words: &'static str,
    intrude: fn(&Stage) -> Result<()>,
}

const fn refused(
    name: &'static str,
    reason: &'static str,
    words: &'static str,
    intrude: fn(&Stage) -> Result<()>,
) -> Refused {
    Refused { name, reason, words, intrude }
}

const ALL: &[Refused] = &[
    refused("another authority", "unknown_ca", "not issued by our CA", |s| s.openssl(&s.cert("stranger"))),
    refused("another authority of our name", "bad_signature", "CA only has the name of ours", |s| {
        s.openssl(&s.cert("twin"))
    }),
    refused("expired", "expired", "certificate has expired", |s| s.openssl(&s.cert("expired"))),
    refused("no certificate", "no_client_certificate", "presented no certificate", |s| {
        s.openssl(&["-alpn", "vmferry/1"].map(str::to_owned))
    }),
    refused("TLS 1.2", "bad_version", "does not speak TLS 1.3", |s| {
        s.openssl(&[&s.cert("alpha")[..], &["-tls1_2".to_owned()]].concat())
    }),
    refused("another protocol", "bad_protocol", "does not speak the protocol", |s| {
        s.openssl(&s.cert("alpha")[2..])
    }),
    refused("garbage", "garbage", "not a valid TLS handshake", |s| {
        s.says(b"GET / HTTP/1.1\r\nHost: bravo\r\n\r\n")
    }),
    refused("gone at once", "closed", "connection ended during the handshake", |s| {
        s.connect()?.shutdown(Shutdown::Both).map_err(Into::into)
    }),
    refused("nothing at all", "timeout", "did not finish the handshake in time", |s| s.says_and_waits(b"")),
    // A record of 512 bytes that begins a ClientHello and does not go on.
    refused("half a handshake", "timeout", "did not finish the handshake in time", |s| {
        s.says_and_waits(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03half of a random")
    }),
    refused("a proof and then nothing", "no_answer", "no answer from the peer within 5 s", |s| {
        s.openssl(&[&s.cert("alpha")[..], &["-ign_eof".to_owned()]].concat())
    }),
];

#[test]
fn who_must_not_have_a_session_is_refused_with_words() -> Result<()> {
    with_lab("who_must_not_have_a_session_is_refused_with_words", |lab| {
        let mut stage = Stage::set_up(lab)?;
        stage.serves()?;
        stage.end_session()?;
        let idle = stage.bravo.open_descriptors()?;
        for refused in ALL {
            stage.play(refused).with_context(|| refused.name)?;
        }
        stage.end_session()?;
        proof::agent_is_clean(&stage.bravo, idle)?;
        stage.serves()
    })
}

#[test]
fn silent_connections_keep_nobody_out() -> Result<()> {
    with_lab("silent_connections_keep_nobody_out", |lab| {
        let mut stage = Stage::set_up(lab)?;
        stage.serves()?;
        stage.end_session()?;
        let idle = stage.bravo.open_descriptors()?;
        let silent = (0..SILENT).map(|_| stage.connect()).collect::<Result<Vec<_>>>()?;
        // The first try, and not one after a deadline.
        stage.serves()?;
        ensure!(stage.failures("too_many")? > 0.0, "none of {SILENT} had to make room");
        for mut connection in silent {
            ended(&mut connection)?;
        }
        stage.end_session()?;
        proof::agent_is_clean(&stage.bravo, idle)
    })
}

struct Stage {
    net: Net,
    alpha: Agent,
    bravo: Agent,
    certs: PathBuf,
}

impl Stage {
    fn set_up(lab: &Lab) -> Result<Self> {
        let net = lab.two_hosts()?;
        let certs = lab.dir().join("presented");
        let ours = Credentials::create(&lab.paths, lab.dir())?;
        present(&certs, "alpha", &ours.issue("alpha")?)?;
        for (name, ca) in [("stranger", "somebody else's"), ("twin", "vmferry test")] {
            let folder = lab.dir().join(name);
            fs::create_dir(&folder)?;
            present(&certs, name, &Credentials::create_named(&lab.paths, &folder, ca)?.issue("alpha")?)?;
        }
        present(&certs, "expired", &expired(&ours, lab.dir())?)?;
        let nowhere = VmEntry {
            name: VM.to_owned(),
            qmp: net.alpha.dir.join("nobody.qmp"),
            start: None,
            before_start: None,
        };
        let on_alpha = AgentSpec::default().peer(&net.bravo).vm(nowhere);
        let on_bravo = AgentSpec::default().peer(&net.alpha);
        let alpha = Agent::start(&lab.paths, &net.alpha, &on_alpha, &lab.dir().join("certs/hosts/alpha"))?;
        let bravo = Agent::start(&lab.paths, &net.bravo, &on_bravo, &ours.issue("bravo")?)?;
        Ok(Self { net, alpha, bravo, certs })
    }

    /// One connection that must be refused, and how it is told.
    fn play(&mut self, refused: &Refused) -> Result<()> {
        let before = self.failures(refused.reason)?;
        (refused.intrude)(self)?;
        wait_for("the metric to count it", SHORT, || {
            Ok((self.failures(refused.reason)? >= before + 1.0).then_some(()))
        })
        .with_context(|| format!("{}: {:?}", refused.reason, self.bravo.metrics()))?;
        // The first of each reason and address is told.
        wait_for(&format!("{:?} in the log", refused.words), SHORT, || {
            let log = fs::read_to_string(self.bravo.log())?;
            let mut told = log.lines().filter(|line| line.contains("a connection was refused"));
            let is_it = |line: &str| line.contains(refused.words) && line.contains(&self.net.alpha.v4);
            Ok(told.any(is_it).then_some(()))
        })
    }

    /// How often bravo has refused for this reason.
    fn failures(&self, reason: &str) -> Result<f64> {
        let labels = [("direction", "in"), ("reason", reason)];
        Ok(self.bravo.metrics()?.find("vmferry_connect_failures_total", &labels).unwrap_or(0.0))
    }

    /// The good peer gets a session: nothing that it asks fails for want of one.
    fn serves(&self) -> Result<()> {
        let checked = self.alpha.vmferry(&["check", VM, "--to", "bravo", "--json"])?;
        let report: Value = serde_json::from_str(&checked.stdout).with_context(|| format!("{checked:?}"))?;
        let kinds: Vec<_> =
            report["problems"].as_array().into_iter().flatten().map(|problem| &problem["kind"]).collect();
        ensure!(kinds == ["qemu-unreachable"], "{report}");
        ensure!(sessions(&self.bravo)? == 1, "the good peer has no session");
        Ok(())
    }

    /// The good peer goes away and comes back, with no session.
    fn end_session(&mut self) -> Result<()> {
        self.alpha.terminate()?;
        wait_for("the session's end", SHORT, || Ok((sessions(&self.bravo)? == 0).then_some(())))?;
        self.alpha.restart()
    }

    fn connect(&self) -> Result<TcpStream> {
        let address = SocketAddr::new(self.net.bravo.v4.parse()?, PORT);
        let stream =
            self.net.alpha.inside(|| TcpStream::connect_timeout(&address, Duration::from_secs(10)))?;
        stream.set_read_timeout(Some(ENDED_WITHIN))?;
        Ok(stream)
    }

    /// Says something and expects to be cut off.
    fn says(&self, bytes: &[u8]) -> Result<()> {
        let mut stream = self.connect()?;
        stream.write_all(bytes)?;
        ended(&mut stream)
    }

    /// The same, and the good peer is served while the agent waits for more.
    fn says_and_waits(&self, bytes: &[u8]) -> Result<()> {
        let mut stream = self.connect()?;
        stream.write_all(bytes)?;
        self.serves()?;
        ended(&mut stream)
    }

    /// Arguments that present a certificate, and ask for the right protocol first of all.
    fn cert(&self, name: &str) -> Vec<String> {
        let file = |part: &str| self.certs.join(format!("{name}-{part}.pem")).display().to_string();
        let words = ["-alpn", "vmferry/1", "-cert", &file("cert"), "-key", &file("key")];
        words.map(str::to_owned).to_vec()
    }

    /// Another implementation of TLS knocks at the door.
    fn openssl(&self, words: &[String]) -> Result<()> {
        let door = format!("{}:{PORT}", self.net.bravo.v4);
        let mut command = self.net.alpha.command("openssl");
        command.args(["s_client", "-connect", &door]).args(words);
        // Whether it is content with what it got does not matter: the agent's word does.
        run_any(&mut command, LONG).map(drop)
    }
}

/// Reads until the other end has closed; a reset is an end as well.
fn ended(stream: &mut TcpStream) -> Result<()> {
    match stream.read_to_end(&mut Vec::new()) {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => Ok(()),
        Err(e) => Err(e).context("the connection is still open"),
    }
}

fn sessions(agent: &Agent) -> Result<usize> {
    Ok(agent.api("/v1/status")?["sessions"].as_array().map_or(0, Vec::len))
}

/// Puts a host's certificate and key aside under another name.
fn present(certs: &Path, name: &str, host: &Path) -> Result<()> {
    fs::create_dir_all(certs)?;
    for part in ["cert", "key"] {
        fs::copy(host.join(format!("{part}.pem")), certs.join(format!("{name}-{part}.pem")))?;
    }
    Ok(())
}

/// A certificate of our authority for alpha that was good until yesterday.
fn expired(ca: &Credentials, dir: &Path) -> Result<PathBuf> {
    let read = |name: &str| fs::read_to_string(ca.dir().join(name)).with_context(|| name.to_owned());
    let issuer = Issuer::from_ca_cert_pem(&read("ca-cert.pem")?, KeyPair::from_pem(&read("ca-key.pem")?)?)?;
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::DnsName("alpha".try_into()?)];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.not_before = OffsetDateTime::now_utc() - time::Duration::days(9);
    params.not_after = OffsetDateTime::now_utc() - time::Duration::days(1);
    let key = KeyPair::generate()?;
    let folder = dir.join("expired");
    fs::create_dir(&folder)?;
    fs::write(folder.join("cert.pem"), params.signed_by(&key, &issuer)?.pem())?;
    fs::write(folder.join("key.pem"), key.serialize_pem())?;
    Ok(folder)
}
