//! Enrolment: a host makes its key and gets its certificate with a ticket, once; and everybody else does not, between
//! the two or beside them.

mod rogue;

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rogue::{Rogue, ask, csr_of, tls_of, tls_of_parts};
use time::OffsetDateTime;
use vmferry::enrol::{Invitation, InviteError, JoinError, Ticket, join};
use vmferry::net::tls::{Aead, Tls, TlsPaths};
use vmferry::pki::{CaRequest, HostRequest, create_ca, issue_host};

use crate::rig::soon;

const HOUR: Duration = Duration::from_secs(3600);
const VMFERRY: &str = env!("CARGO_BIN_EXE_vmferry");

fn host(name: &str) -> HostRequest {
    HostRequest { name: name.parse().unwrap(), names: Vec::new(), days: 10, force: false }
}

fn ca(folder: &Path, domains: &[&str]) -> PathBuf {
    let dir = folder.join("pki");
    let domains = domains.iter().map(|domain| (*domain).to_owned()).collect();
    create_ca(&dir, &CaRequest { name: None, days: 30, domains }).unwrap();
    dir
}

/// A CA that has invited bravo.
struct Desk {
    folder: tempfile::TempDir,
    pki: PathBuf,
    ticket: Ticket,
    serving: tokio::task::JoinHandle<Result<vmferry::enrol::Refused, InviteError>>,
}

impl Desk {
    async fn open() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let pki = ca(folder.path(), &[]);
        let listen = "127.0.0.1:0".parse().unwrap();
        let opened = Invitation::open(pki.clone(), host("bravo"), (listen, "127.0.0.1:0"), HOUR).await;
        let invitation = opened.unwrap();
        let ticket = invitation.ticket().clone();
        let serving = tokio::spawn(invitation.serve());
        Self { folder, pki, ticket, serving }
    }

    fn target(&self) -> PathBuf {
        self.folder.path().join("tls")
    }

    async fn join(&self, ticket: &Ticket) -> Result<vmferry::enrol::Joined, JoinError> {
        soon("an answer", join(ticket, &self.target(), false)).await
    }

    /// The honest host still joins, and the invitation ends then: with what was refused before.
    async fn joins(self) -> vmferry::enrol::Refused {
        self.join(&self.ticket).await.unwrap();
        assert_eq!(agent(&self.target()).identity.as_str(), "bravo");
        soon("the end of the invitation", self.serving).await.unwrap().unwrap()
    }

    fn has_issued(&self) -> bool {
        self.pki.join("hosts").exists()
    }
}

fn agent(dir: &Path) -> Tls {
    let [ca, cert, key] = ["ca-cert.pem", "cert.pem", "key.pem"].map(|file| dir.join(file));
    Tls::load(&TlsPaths { ca, cert, key, crl: None }, Aead::Auto).unwrap()
}

/// `vmferry certs invite`, and the ticket that it has printed.
fn invite(pki: &Path, words: &[&str]) -> (Child, String, BufReader<std::process::ChildStdout>) {
    let mut command = Command::new(VMFERRY);
    command.args(["certs", "invite"]).args(words).arg("--dir").arg(pki);
    command.args(["--address", "127.0.0.1:0", "--listen", "127.0.0.1:0"]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("vmferry join '") {
        line.clear();
        assert!(said.read_line(&mut line).unwrap() > 0, "no ticket");
    }
    let ticket = line.trim().trim_start_matches("vmferry join '").trim_end_matches('\'').to_owned();
    (child, ticket, said)
}

fn joins(ticket: &str, dir: &Path, more: &[&str]) -> (bool, String) {
    let said = Command::new(VMFERRY).args(["join", ticket, "--dir"]).arg(dir).args(more).output().unwrap();
    (said.status.success(), String::from_utf8_lossy(&[said.stdout, said.stderr].concat()).into_owned())
}

#[test]
fn a_host_joins_by_two_commands_and_no_key_is_at_the_ca() {
    let folder = tempfile::tempdir().unwrap();
    let pki = ca(folder.path(), &["rack.example"]);
    let dir = folder.path().join("tls");
    let words = ["b.rack.example", "--san", "10.0.0.1", "--trust-domain", "corp.example"];
    let (mut inviting, ticket, mut said) = invite(&pki, &words);
    let (good, words) = joins(&ticket, &dir, &[]);
    assert!(good && words.contains("b.rack.example"), "{words}");
    assert!(inviting.wait().unwrap().success());
    let mut end = String::new();
    while said.read_line(&mut end).unwrap() > 0 {}
    assert!(end.contains("b.rack.example has joined"), "{end}");
    let tls = agent(&dir);
    assert_eq!(tls.identity.as_str(), "b.rack.example");
    let mode = |name: &str| std::fs::metadata(dir.join(name)).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode("key.pem"), mode("cert.pem")), (0o600, 0o644));
    assert!(!pki.join("hosts/b.rack.example/key.pem").exists());
    let left: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 3, "{left:?}");
    // The CA's folder knows it like any other host: it renews, and revokes it.
    let certs = |words: &[&str]| {
        let said = Command::new(VMFERRY).arg("certs").args(words).arg("--dir").arg(&pki).output().unwrap();
        assert!(said.status.success(), "{said:?}");
    };
    certs(&["renew", "b.rack.example"]);
    std::fs::copy(pki.join("hosts/b.rack.example/cert.pem"), dir.join("cert.pem")).unwrap();
    assert!(agent(&dir).not_after > tls.not_after - time::Duration::days(1));
    certs(&["revoke", "b.rack.example"]);

    // What is there is not replaced unasked, on either side.
    let (good, words) = joins(&ticket, &dir, &[]);
    assert!(!good && words.contains("--force"), "{words}");
    let mut again = Command::new(VMFERRY);
    again.args(["certs", "invite", "b.rack.example", "--address", "127.0.0.1:0", "--dir"]).arg(&pki);
    let refused = again.output().unwrap();
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("--force"));
    let (mut inviting, ticket, _said) = invite(&pki, &["b.rack.example", "--force"]);
    let key = std::fs::read(dir.join("key.pem")).unwrap();
    let (good, words) = joins(&ticket, &dir, &["--force"]);
    // With what was revoked: the list comes along.
    assert!(good && words.contains("crl.pem"), "{words}");
    assert!(inviting.wait().unwrap().success());
    assert_ne!(std::fs::read(dir.join("key.pem")).unwrap(), key);
    agent(&dir);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_secret_gets_nothing_and_the_right_one_still_does() {
    let desk = Desk::open().await;
    let guessed = Ticket { secret: [7; 32], ..desk.ticket.clone() };
    for _ in 0..2 {
        let refused = desk.join(&guessed).await.unwrap_err();
        assert!(matches!(&refused, JoinError::Refused(text) if text.contains("secret")), "{refused:?}");
    }
    assert!(!desk.has_issued() && !desk.target().join("key.pem").exists());
    let refused = desk.joins().await;
    assert_eq!((refused.wrong_secret, refused.unproved, refused.bad_request), (2, 0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ticket_is_good_for_one_key() {
    let desk = Desk::open().await;
    // A host that asks, and does not say that it has stored the answer; and asks again.
    let ours = csr_of("bravo", &[]);
    for _ in 0..2 {
        let answer = ask(&desk.ticket, &ours, |_| {}).await.unwrap();
        assert!(answer["granted"]["cert"].as_str().unwrap().contains("BEGIN CERTIFICATE"), "{answer}");
    }
    // Somebody else with the ticket.
    let refused = desk.join(&desk.ticket).await.unwrap_err();
    assert!(matches!(&refused, JoinError::Refused(text) if text.contains("used already")), "{refused:?}");
    let issued = std::fs::read_dir(desk.pki.join("issued")).unwrap().count();
    assert_eq!(issued, 1, "certificates of one ticket");
    desk.serving.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_used_ticket_leads_nowhere() {
    let desk = Desk::open().await;
    let (ticket, target) = (desk.ticket.clone(), desk.folder.path().join("second"));
    let folder = desk.folder.path().to_owned();
    desk.join(&ticket).await.unwrap();
    soon("the end of the invitation", desk.serving).await.unwrap().unwrap();
    let refused = soon("an answer", join(&ticket, &target, false)).await.unwrap_err();
    // Nobody listens there any more, or somebody else by now.
    let nobody = matches!(refused, JoinError::Unreachable { .. } | JoinError::NotTheCa { .. });
    assert!(nobody, "{refused:?}");
    assert!(folder.exists() && !target.join("key.pem").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ticket_whose_time_is_over_is_none_on_either_side() {
    let desk = Desk::open().await;
    let over =
        Ticket { expires: OffsetDateTime::now_utc() - time::Duration::seconds(1), ..desk.ticket.clone() };
    let refused = desk.join(&over).await.unwrap_err();
    assert!(matches!(refused, JoinError::Expired(_)), "{refused:?}");
    desk.joins().await;
    let folder = tempfile::tempdir().unwrap();
    let pki = ca(folder.path(), &[]);
    let listen = "127.0.0.1:0".parse().unwrap();
    for lifetime in [Duration::ZERO, 24 * 8 * HOUR] {
        let refused = Invitation::open(pki.clone(), host("bravo"), (listen, "127.0.0.1:0"), lifetime).await;
        assert!(matches!(refused, Err(InviteError::Lifetime)), "{lifetime:?}");
    }
    // One that is over while nobody comes, whatever a host's clock says.
    let second = Duration::from_secs(1);
    let opened = Invitation::open(pki.clone(), host("bravo"), (listen, "127.0.0.1:0"), second).await.unwrap();
    let late = Ticket { expires: OffsetDateTime::now_utc() + HOUR, ..opened.ticket().clone() };
    let ended = soon("the end of the ticket", opened.serve()).await.unwrap_err();
    assert!(matches!(ended, InviteError::Expired { .. }), "{ended:?}");
    let refused = soon("an answer", join(&late, &folder.path().join("tls"), false)).await.unwrap_err();
    let nobody = matches!(refused, JoinError::Unreachable { .. } | JoinError::NotTheCa { .. });
    assert!(nobody && !pki.join("hosts").exists(), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_for_anything_but_the_name_is_refused() {
    let desk = Desk::open().await;
    let stolen = {
        let mut other = csr_of("bravo", &[]);
        let last = other.len() - 1;
        other[last] ^= 1;
        other
    };
    let cases = [
        ("another name", csr_of("charlie", &[]), "not for the name"),
        ("another name beside it", csr_of("bravo", &["bravo", "charlie"]), "other names"),
        ("a wildcard", csr_of("*", &[]), "not for the name"),
        ("a key that it has not", stolen, "not signed by the key"),
        ("no request", b"no request".to_vec(), "cannot be decoded"),
        ("nothing", Vec::new(), "cannot be decoded"),
        ("a CA's", rogue::ca_csr("bravo"), "more than a name"),
        ("one that is too long", vec![0x30; 5000], "too long"),
    ];
    for (case, csr, named) in &cases {
        let answer = ask(&desk.ticket, csr, |_| {}).await.unwrap();
        let text = answer["refused"]["text"].as_str().unwrap_or_default();
        assert!(text.contains(named), "{case}: {answer}");
    }
    assert!(!desk.has_issued());
    let refused = desk.joins().await;
    assert_eq!((refused.bad_request, refused.wrong_secret), (cases.len() as u64, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_between_the_two_learns_or_passes_on_anything() {
    let desk = Desk::open().await;
    let other = ca(&desk.folder.path().join("other"), &[]);
    // Another CA; a host of the ticket's own CA; the CA's certificate beside a leaf of another one.
    issue_host(&desk.pki, &host("mallory")).unwrap();
    let of_mallory = desk.pki.join("hosts/mallory");
    let real_ca = desk.pki.join("ca-cert.pem");
    issue_host(&other, &host("mallory")).unwrap();
    let of_other = other.join("hosts/mallory");
    for (case, chain, key) in [
        ("another CA", vec![of_other.join("cert.pem"), other.join("ca-cert.pem")], of_other.join("key.pem")),
        ("a host", vec![of_mallory.join("cert.pem"), real_ca.clone()], of_mallory.join("key.pem")),
        ("the CA's own beside another's", vec![of_other.join("cert.pem"), real_ca], of_other.join("key.pem")),
    ] {
        let rogue = Rogue::listen(tls_of(&chain, &key)).await;
        let ticket = Ticket { address: rogue.address.to_string(), ..desk.ticket.clone() };
        let refused = desk.join(&ticket).await.unwrap_err();
        assert!(matches!(refused, JoinError::NotTheCa { .. }), "{case}: {refused:?}");
        assert_eq!(rogue.heard().await, 0, "{case}: something was told to it");
    }
    // Somebody who has the machine's certificate, and passes on what he hears: his connection is another one.
    let machine = vmferry::pki::enrolment::server(&desk.pki, HOUR).unwrap();
    let rogue = Rogue::relay(tls_of_parts(machine), desk.ticket.clone()).await;
    let ticket = Ticket { address: rogue.address.to_string(), ..desk.ticket.clone() };
    let refused = desk.join(&ticket).await.unwrap_err();
    assert!(matches!(&refused, JoinError::Refused(text) if text.contains("secret")), "{refused:?}");
    // Or answers with a certificate that he got himself.
    let machine = vmferry::pki::enrolment::server(&desk.pki, HOUR).unwrap();
    let files = [&of_mallory.join("cert.pem"), &of_mallory.join("ca-cert.pem")];
    let [cert, ca] = files.map(|path| std::fs::read_to_string(path).unwrap());
    let rogue = Rogue::answer(tls_of_parts(machine), cert, ca).await;
    let ticket = Ticket { address: rogue.address.to_string(), ..desk.ticket.clone() };
    let refused = desk.join(&ticket).await.unwrap_err();
    assert!(matches!(refused, JoinError::NotProved), "{refused:?}");
    assert!(!desk.target().join("key.pem").exists());
    let refused = desk.joins().await;
    assert_eq!(refused.wrong_secret, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_has_proved_nothing_holds_little_and_keeps_nobody_out() {
    let desk = Desk::open().await;
    let address = desk.ticket.address.clone();
    // Many more than there are places, that say nothing, or half of something; the newest are let in.
    let mut silent = Vec::new();
    for n in 0..300 {
        let mut stream = tokio::net::TcpStream::connect(&address).await.unwrap();
        if n % 2 == 0 {
            let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, &[0x16, 0x03]).await;
        }
        silent.push(stream);
    }
    // What is announced is not held, and a request that is too long is none.
    for (announced, sent) in [(u32::MAX, 10), (16 * 1024 + 1, 10), (1000, 10)] {
        let answer = rogue::say(&desk.ticket, announced, &vec![b'x'; sent]).await;
        assert!(answer.is_none(), "{announced}: {answer:?}");
    }
    let began = std::time::Instant::now();
    let refused = desk.joins().await;
    assert!(refused.unproved >= 2, "{refused:?}");
    eprintln!("  joined after {:?}, {refused:?}", began.elapsed());
    drop(silent);
}
