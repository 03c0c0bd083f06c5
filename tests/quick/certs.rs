//! `vmferry certs` from its arguments to its files, judged by openssl, by the agent's own
//! loader and by the permission bits.

mod rotation;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::Parser;
use tempfile::TempDir;
use vmferry::cli::certs::{CertsArgs, run_to};
use vmferry::net::handshake::HandshakeFailure;
use vmferry::net::identity::Identity;
use vmferry::net::tls::{Aead, PeerRole, Tls, TlsError, TlsPaths};

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    certs: CertsArgs,
}

/// A folder for one test, and `vmferry certs` run in it. The umask of the test's thread is 0: a
/// careless program would leave everything open to everybody.
struct Bench {
    dir: TempDir,
}

impl Bench {
    fn new() -> Self {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).unwrap();
        nix::sys::stat::umask(nix::sys::stat::Mode::empty());
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn with_ca() -> Self {
        let bench = Self::new();
        bench.ok("ca --dir DIR/ca");
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs with `DIR` replaced by the test's folder: output and whether it was exit code 0.
    fn run(&self, line: &str) -> Result<(String, bool), String> {
        let line = line.replace("DIR", self.dir.path().to_str().unwrap());
        let words = ["certs"].into_iter().chain(line.split_whitespace());
        let cli = Cli::try_parse_from(words).map_err(|e| e.to_string())?;
        let mut out = Vec::new();
        let code = run_to(cli.certs, &mut out).map_err(|e| format!("{e:#}"))?;
        let good = format!("{code:?}") == format!("{:?}", ExitCode::SUCCESS);
        Ok((String::from_utf8(out).unwrap(), good))
    }

    fn ok(&self, line: &str) -> String {
        match self.run(line) {
            Ok((out, true)) => out,
            other => panic!("`{line}`: {other:?}"),
        }
    }

    fn fails(&self, line: &str) -> String {
        match self.run(line) {
            Err(error) => error,
            Ok(ok) => panic!("`{line}` succeeded: {ok:?}"),
        }
    }

    fn host_paths(&self, name: &str) -> TlsPaths {
        let dir = self.path("ca/hosts").join(name);
        TlsPaths {
            ca: dir.join("ca-cert.pem"),
            cert: dir.join("cert.pem"),
            key: dir.join("key.pem"),
            crl: None,
        }
    }

    fn load(&self, name: &str) -> Result<Tls, TlsError> {
        Tls::load(&self.host_paths(name), Aead::Auto)
    }
}

/// Every name under `dir` with its mode; links are followed for nothing.
fn modes(dir: &Path) -> BTreeMap<String, u32> {
    let mut found = BTreeMap::new();
    let mut pending = vec![dir.to_owned()];
    while let Some(next) = pending.pop() {
        for entry in fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            let metadata = fs::symlink_metadata(&path).unwrap();
            let name = path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned();
            if metadata.is_dir() {
                pending.push(path);
            }
            found.insert(name, metadata.permissions().mode() & 0o7777);
        }
    }
    found
}

fn openssl(args: &[&str], paths: &[&Path]) -> (bool, String) {
    let done = Command::new("openssl").args(args).args(paths).output();
    let done = done.expect("openssl is needed by this test");
    let words = [done.stdout, done.stderr].concat();
    (done.status.success(), String::from_utf8_lossy(&words).into_owned())
}

fn verify(ca: &Path, cert: &Path, purpose: &str) -> (bool, String) {
    let ca = ca.to_str().unwrap();
    let args = ["verify", "-x509_strict", "-purpose", purpose, "-CAfile", ca];
    openssl(&args, &[cert])
}

#[test]
fn everything_has_its_place_and_no_secret_is_open() {
    let bench = Bench::with_ca();
    bench.ok("host alpha --dir DIR/ca");
    let serial = bench.ok("show --json DIR/ca/hosts/alpha/cert.pem");
    let serial: serde_json::Value = serde_json::from_str(&serial).unwrap();
    let record = format!("issued/{}.pem", serial[0]["serial"].as_str().unwrap());
    let (dir, secret, public, link) = (0o700, 0o600, 0o644, 0o777);
    let expected = [
        ("ca-cert.pem", public),
        ("ca-key.pem", secret),
        ("hosts", dir),
        ("hosts/alpha", dir),
        ("hosts/alpha/ca-cert.pem", public),
        ("hosts/alpha/cert.pem", public),
        ("hosts/alpha/key.pem", secret),
        ("hosts/alpha/server-cert.pem", link),
        ("hosts/alpha/server-key.pem", link),
        ("hosts/alpha/client-cert.pem", link),
        ("hosts/alpha/client-key.pem", link),
        ("issued", dir),
        (record.as_str(), public),
    ];
    let expected: BTreeMap<String, u32> = expected.map(|(n, m)| (n.to_owned(), m)).into();
    assert_eq!(modes(&bench.path("ca")), expected);
    let top = fs::metadata(bench.path("ca")).unwrap().permissions().mode() & 0o7777;
    assert_eq!(top, dir);
}

#[test]
fn openssl_accepts_a_host_in_both_roles_and_the_ca_in_none() {
    let bench = Bench::with_ca();
    bench.ok("host alpha --dir DIR/ca --san 10.77.0.1 --san fd77::1 --san alpha.example --san URI:https://alpha.example/");
    let ca = bench.path("ca/ca-cert.pem");
    let cert = bench.path("ca/hosts/alpha/cert.pem");
    for purpose in ["sslserver", "sslclient"] {
        let (good, words) = verify(&ca, &cert, purpose);
        assert!(good, "{purpose}: {words}");
    }
    let other = Bench::with_ca();
    let (good, words) = verify(&other.path("ca/ca-cert.pem"), &cert, "sslserver");
    assert!(!good, "another CA vouches for it: {words}");

    let (_, text) = openssl(&["x509", "-noout", "-text", "-in"], &[&cert]);
    for needed in [
        "Digital Signature, Key Encipherment",
        "TLS Web Server Authentication, TLS Web Client Authentication",
        "DNS:alpha, IP Address:10.77.0.1, IP Address:FD77:0:0:0:0:0:0:1, DNS:alpha.example, URI:https://alpha.example/, URI:vmferry:alpha",
        "CA:FALSE",
        "X509v3 Authority Key Identifier",
        "NIST CURVE: P-256",
    ] {
        assert!(text.contains(needed), "{needed} is missing in {text}");
    }
    let (_, text) = openssl(&["x509", "-noout", "-text", "-in"], &[&ca]);
    for needed in ["CA:TRUE, pathlen:0", "Certificate Sign, CRL Sign"] {
        assert!(text.contains(needed), "{needed} is missing in {text}");
    }
    assert_eq!(bench.load("alpha").unwrap().identity.as_str(), "alpha");
}

#[test]
fn qemus_names_lead_to_the_same_pair() {
    let bench = Bench::with_ca();
    bench.ok("host alpha --dir DIR/ca");
    let read = |name: &str| fs::read(bench.path("ca/hosts/alpha").join(name)).unwrap();
    for role in ["server", "client"] {
        assert_eq!(read(&format!("{role}-cert.pem")), read("cert.pem"));
        assert_eq!(read(&format!("{role}-key.pem")), read("key.pem"));
    }
}

#[test]
fn nothing_is_overwritten_without_being_asked() {
    let bench = Bench::with_ca();
    bench.ok("host alpha --dir DIR/ca");
    let before = snapshot(&bench.path("ca"));
    let error = bench.fails("ca --dir DIR/ca");
    assert!(error.contains("is there already") && error.contains("another folder"), "{error}");
    let error = bench.fails("host alpha --dir DIR/ca");
    assert!(error.contains("is there already") && error.contains("--force"), "{error}");
    assert_eq!(snapshot(&bench.path("ca")), before, "a refusal has left traces");

    // Half a CA is in the way as well: its key may be somebody's only copy.
    fs::remove_file(bench.path("ca/ca-cert.pem")).unwrap();
    let before = snapshot(&bench.path("ca"));
    bench.fails("ca --dir DIR/ca");
    bench.fails("host bravo --dir DIR/ca");
    assert_eq!(snapshot(&bench.path("ca")), before);
}

fn snapshot(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let names = modes(dir).into_keys();
    names
        .map(|name| {
            let content = fs::read(dir.join(&name)).unwrap_or_default();
            (name, content)
        })
        .collect()
}

#[test]
fn renewal_keeps_the_ca_and_changes_the_key() {
    let bench = Bench::with_ca();
    bench.ok("host alpha --dir DIR/ca");
    let before = snapshot(&bench.path("ca"));
    fs::write(bench.path("ca/hosts/alpha/notes.txt"), "mine").unwrap();
    let words = bench.ok("host alpha --dir DIR/ca --force");
    let after = snapshot(&bench.path("ca"));
    for same in ["ca-cert.pem", "ca-key.pem", "hosts/alpha/ca-cert.pem"] {
        assert_eq!(before[same], after[same], "{same}");
    }
    for new in ["hosts/alpha/cert.pem", "hosts/alpha/key.pem"] {
        assert_ne!(before[new], after[new], "{new}");
    }
    bench.load("alpha").unwrap();
    // What somebody else has put there is kept, and it is said where; old keys are gone.
    assert!(words.contains("files of others"), "{words}");
    let notes: Vec<&String> = after.keys().filter(|n| n.ends_with("notes.txt")).collect();
    assert_eq!(notes.len(), 1, "{:?}", after.keys());
    let keys = after.keys().filter(|n| n.ends_with("/key.pem")).count();
    assert_eq!(keys, 1, "{:?}", after.keys());

    // Without such a file nothing is left over.
    bench.ok("host bravo --dir DIR/ca");
    bench.ok("host bravo --dir DIR/ca --force");
    let names = snapshot(&bench.path("ca"));
    let left = names.keys().filter(|n| n.contains("/.bravo"));
    assert_eq!(left.count(), 0, "{:?}", names.keys());
}

#[test]
fn two_who_issue_the_same_host_at_once_do_not_mix() {
    let bench = Bench::with_ca();
    let outcomes: Vec<bool> = std::thread::scope(|scope| {
        let issue = || bench.run("host alpha --dir DIR/ca").is_ok();
        let all: Vec<_> = (0..8).map(|_| scope.spawn(issue)).collect();
        all.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(outcomes.iter().filter(|won| **won).count(), 1, "{outcomes:?}");
    bench.load("alpha").unwrap();
    let names = modes(&bench.path("ca/hosts"));
    assert_eq!(names.keys().filter(|n| !n.contains('/')).count(), 1, "{names:?}");
}

#[test]
fn a_limited_ca_vouches_only_for_its_domain() {
    let bench = Bench::new();
    bench.ok("ca --dir DIR/ca --domain rack.example");
    bench.ok("host a.rack.example --dir DIR/ca");
    let (good, words) =
        verify(&bench.path("ca/ca-cert.pem"), &bench.path("ca/hosts/a.rack.example/cert.pem"), "sslserver");
    assert!(good, "{words}");
    let error = bench.fails("host a.other.example --dir DIR/ca");
    assert!(error.contains("can't vouch"), "{error}");
    assert!(!bench.path("ca/hosts/a.other.example").exists());
}

#[test]
fn a_host_never_outlives_its_ca() {
    let bench = Bench::new();
    bench.ok("ca --dir DIR/ca --days 20");
    let words = bench.ok("host alpha --dir DIR/ca --days 800");
    assert!(words.contains("because its CA does"), "{words}");
    let (good, words) =
        verify(&bench.path("ca/ca-cert.pem"), &bench.path("ca/hosts/alpha/cert.pem"), "sslclient");
    assert!(good, "{words}");
    assert!(
        bench.load("alpha").unwrap().not_after <= time::OffsetDateTime::now_utc() + time::Duration::days(20)
    );
    for days in ["0", "36501"] {
        let error = bench.fails(&format!("host bravo --dir DIR/ca --days {days}"));
        assert!(error.contains("choose 1 to"), "{error}");
    }
}

#[test]
fn names_that_are_no_names_are_refused() {
    let bench = Bench::with_ca();
    for bad in ["*.example", "10.0.0.1", "a/b", "..", "-x", "a..b", "bravo."] {
        let error = bench.fails(&format!("host --dir DIR/ca -- {bad}"));
        assert!(error.contains("identity"), "{bad}: {error}");
    }
    for bad in ["*.example", "IP:300.1.1.1", "URI:vmferry:other", "URI:x", "DNS:10.0.0.1"] {
        let error = bench.fails(&format!("host alpha --dir DIR/ca --san {bad}"));
        assert!(error.contains("name"), "{bad}: {error}");
    }
    assert!(!bench.path("ca/hosts").exists());
}

#[test]
fn a_ca_whose_key_is_another_ones_does_not_sign() {
    let (bench, other) = (Bench::with_ca(), Bench::with_ca());
    fs::copy(other.path("ca/ca-key.pem"), bench.path("ca/ca-key.pem")).unwrap();
    let error = bench.fails("host alpha --dir DIR/ca");
    assert!(error.contains("does not belong"), "{error}");
    let error = bench.fails("host alpha --dir DIR/nowhere");
    assert!(error.contains("holds no CA"), "{error}");
}

#[test]
fn show_says_what_openssl_says() {
    let bench = Bench::with_ca();
    bench.ok("host alpha --dir DIR/ca --days 100 --san alpha.example");
    let cert = bench.path("ca/hosts/alpha/cert.pem");
    let shown = bench.ok("show --json DIR/ca/hosts/alpha/cert.pem DIR/ca/ca-cert.pem");
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    let of = |args: &[&str]| {
        let args = [&["x509", "-noout"], args, &["-in"]].concat();
        let (_, text) = openssl(&args, &[&cert]);
        let text = text.split_once('=').unwrap().1.trim().to_owned();
        text.replace(':', "").to_ascii_lowercase()
    };
    assert_eq!(shown[0]["fingerprint_sha256"], of(&["-fingerprint", "-sha256"]));
    assert_eq!(shown[0]["serial"], of(&["-serial"]));
    assert_eq!(shown[0]["identity"], "alpha");
    assert_eq!(shown[0]["days_left"], 99);
    assert_eq!(shown[0]["names"], serde_json::json!(["DNS:alpha", "DNS:alpha.example", "URI:vmferry:alpha"]));
    assert_eq!(shown[0]["issuer"], shown[1]["subject"]);
    assert_eq!(shown[1]["is_ca"], true);
    assert_eq!(shown[1]["key_usage"], serde_json::json!(["keyCertSign", "cRLSign"]));

    let table = bench.ok("show DIR/ca/hosts/alpha/cert.pem");
    for needed in ["serverAuth, clientAuth", "99 days left", "identity    alpha"] {
        assert!(table.contains(needed), "{needed}: {table}");
    }
}

const CHECK: &str = "check --ca DIR/h/ca-cert.pem --cert DIR/h/cert.pem --key DIR/h/key.pem";

/// `certs check` over a host's files after something was done to them.
fn findings(more: &str, spoil: impl FnOnce(&Bench, &Path)) -> (String, bool) {
    let bench = Bench::with_ca();
    bench.ok("host alpha --dir DIR/ca");
    bench.ok("host bravo --dir DIR/ca");
    fs::rename(bench.path("ca/hosts/alpha"), bench.path("h")).unwrap();
    bench.ok(&format!("{CHECK} --peer-cert DIR/ca/hosts/bravo/cert.pem"));
    spoil(&bench, &bench.path("h"));
    bench.run(&format!("{CHECK} {more}")).unwrap()
}

#[test]
fn check_names_every_problem_and_its_remedy() {
    let (words, good) = findings("", |bench, host| {
        fs::set_permissions(host.join("key.pem"), fs::Permissions::from_mode(0o640)).unwrap();
        fs::write(host.join("ca-cert.pem"), "nothing").unwrap();
        fs::copy(bench.path("ca/ca-cert.pem"), host.join("cert.pem")).unwrap();
    });
    assert!(!good);
    let problems = words.lines().filter(|l| l.starts_with("problem: "));
    assert_eq!(problems.count(), 4, "{words}");
    for needed in [
        "chmod 600",
        "ca-cert.pem` holds no CA certificate in PEM form",
        "may not be used for the server's role",
        "does not say who this host is",
    ] {
        assert!(words.contains(needed), "{needed}: {words}");
    }

    let (words, good) = findings("", |bench, host| {
        fs::copy(bench.path("ca/hosts/bravo/key.pem"), host.join("key.pem")).unwrap();
    });
    assert!(!good && words.contains("does not belong to the certificate"), "{words}");

    let (words, good) = findings("", |_, host| {
        let other = Bench::with_ca();
        fs::copy(other.path("ca/ca-cert.pem"), host.join("ca-cert.pem")).unwrap();
    });
    assert!(!good && words.contains("does not verify under the CA"), "{words}");
}

#[test]
fn check_judges_peers_by_the_hosts_ca() {
    let other = Bench::with_ca();
    other.ok("host charlie --dir DIR/ca");
    let peer = other.path("ca/hosts/charlie/cert.pem");
    let (words, good) = findings(&format!("--peer-cert {}", peer.display()), |_, _| {});
    assert!(!good, "{words}");
    assert!(words.contains("dialling it fails") && words.contains("being dialled by it fails"), "{words}");
}

#[test]
fn check_remarks_on_an_early_end() {
    let bench = Bench::with_ca();
    bench.ok("host alpha --dir DIR/ca --days 10");
    fs::rename(bench.path("ca/hosts/alpha"), bench.path("h")).unwrap();
    let words = bench.ok(CHECK);
    assert!(words.contains("remark:") && words.contains("ends in 9 days; renew it"), "{words}");
}

#[test]
fn the_revoked_are_refused_and_stay_revoked() {
    let bench = Bench::with_ca();
    for name in ["alpha", "bravo", "charlie"] {
        bench.ok(&format!("host {name} --dir DIR/ca"));
    }
    let first_bravo = chain(&bench, "bravo");
    bench.ok("host bravo --dir DIR/ca --force");
    let second_bravo = chain(&bench, "bravo");
    bench.ok("revoke --dir DIR/ca");
    assert_eq!(judge(&bench, &first_bravo, "bravo"), Ok(()));

    // By name, everything the host ever had.
    let words = bench.ok("revoke bravo --dir DIR/ca");
    assert_eq!(words.matches("Revoked ").count(), 2, "{words}");
    assert_eq!(judge(&bench, &first_bravo, "bravo"), Err(HandshakeFailure::Revoked));
    assert_eq!(judge(&bench, &second_bravo, "bravo"), Err(HandshakeFailure::Revoked));

    // By serial number; and what was revoked before stays so.
    let shown = bench.ok("show --json DIR/ca/hosts/charlie/cert.pem");
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    let serial = shown[0]["serial"].as_str().unwrap();
    bench.ok(&format!("revoke --serial {serial} --dir DIR/ca"));
    assert_eq!(judge(&bench, &chain(&bench, "charlie"), "charlie"), Err(HandshakeFailure::Revoked));
    assert_eq!(judge(&bench, &first_bravo, "bravo"), Err(HandshakeFailure::Revoked));

    // A new certificate after that is good.
    bench.ok("host bravo --dir DIR/ca --force");
    assert_eq!(judge(&bench, &chain(&bench, "bravo"), "bravo"), Ok(()));

    let (good, words) = openssl(
        &["crl", "-noout", "-text", "-CAfile", bench.path("ca/ca-cert.pem").to_str().unwrap(), "-in"],
        &[&bench.path("ca/crl.pem")],
    );
    assert!(good && words.contains("verify OK"), "{words}");
    assert_eq!(words.matches("Serial Number: ").count(), 3, "{words}");
    let words: Vec<&str> = words.split_whitespace().collect();
    assert!(words.join(" ").contains("CRL Number: 3"), "{words:?}");

    let error = bench.fails("revoke nobody --dir DIR/ca");
    assert!(error.contains("issued nothing for `nobody`"), "{error}");
}

/// A certificate that the CA's key has signed, and of which its folder knows nothing.
#[test]
fn a_serial_number_without_a_record_is_revoked_with_a_warning() {
    let bench = Bench::with_ca();
    bench.ok("host alpha --dir DIR/ca");
    bench.ok("host bravo --dir DIR/ca");
    let stolen = chain(&bench, "bravo");
    let shown = bench.ok("show --json DIR/ca/hosts/bravo/cert.pem");
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    let serial = shown[0]["serial"].as_str().unwrap().to_uppercase();
    fs::remove_file(bench.path(&format!("ca/issued/{}.pem", serial.to_lowercase()))).unwrap();
    let said = bench.ok(&format!("revoke --serial {serial} --dir DIR/ca"));
    assert!(said.contains("WARNING") && said.contains("no record"), "{said}");
    assert_eq!(judge(&bench, &stolen, "bravo"), Err(HandshakeFailure::Revoked));
    let said = bench.ok(&format!("revoke --serial {serial} --dir DIR/ca"));
    assert!(said.contains("Revoked already"), "{said}");
    // Whatever it is given as, it is one number, and a positive one.
    bench.ok("revoke --serial 00:ff --dir DIR/ca");
    assert!(bench.ok("revoke --serial FF --dir DIR/ca").contains("Revoked already"));
    for bad in ["", "0", "xy", "+f", "-1", "12:3g", &"1".repeat(43)] {
        let error = bench.fails(&format!("revoke --serial={bad} --dir DIR/ca"));
        assert!(error.contains("is no certificate's serial number"), "{bad}: {error}");
    }
}

fn chain(bench: &Bench, name: &str) -> Vec<rustls_pki_types::CertificateDer<'static>> {
    let path = bench.host_paths(name).cert;
    vmferry::net::credentials::read_certificates("certificate", &path).unwrap()
}

/// What alpha, with the present revocation list, thinks of a peer.
fn judge(
    bench: &Bench,
    chain: &[rustls_pki_types::CertificateDer<'_>],
    name: &str,
) -> Result<(), HandshakeFailure> {
    let mut paths = bench.host_paths("alpha");
    paths.crl = Some(bench.path("ca/crl.pem"));
    let tls = Tls::load(&paths, Aead::Auto).unwrap();
    let peer: Identity = name.parse().unwrap();
    tls.reverify(chain, PeerRole::Server, &peer)?;
    tls.reverify(chain, PeerRole::Client, &peer)
}

#[test]
fn what_several_revoke_at_once_is_all_revoked() {
    let bench = Bench::with_ca();
    let names: Vec<String> = (0..6).map(|n| format!("host{n}")).collect();
    for name in &names {
        bench.ok(&format!("host {name} --dir DIR/ca"));
    }
    let bench = &bench;
    std::thread::scope(|scope| {
        for name in &names {
            scope.spawn(move || bench.ok(&format!("revoke {name} --dir DIR/ca")));
        }
    });
    let last = bench.ok("revoke --dir DIR/ca");
    assert!(last.contains("holds 6 certificates"), "{last}");
}
