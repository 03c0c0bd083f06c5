//! Renewal, and one CA in the place of another: what two hosts think of each other after each step.

use std::fs;
use std::path::PathBuf;

use super::*;

/// A host that copies its files from the CA's folder when it is told to.
struct Host {
    name: &'static str,
    folder: PathBuf,
    key: Vec<u8>,
}

impl Host {
    fn new(bench: &Bench, name: &'static str) -> Self {
        let folder = bench.path(name);
        fs::create_dir(&folder).unwrap();
        let key = fs::read(bench.path("ca/hosts").join(name).join("key.pem")).unwrap();
        fs::write(folder.join("key.pem"), &key).unwrap();
        fs::set_permissions(folder.join("key.pem"), fs::Permissions::from_mode(0o600)).unwrap();
        let host = Self { name, folder, key };
        host.copy(bench);
        host
    }

    /// What the steps say: certificates and the list, and never a key.
    fn copy(&self, bench: &Bench) {
        let of_host = bench.path("ca/hosts").join(self.name);
        for file in ["ca-cert.pem", "cert.pem"] {
            fs::copy(of_host.join(file), self.folder.join(file)).unwrap();
        }
        fs::copy(bench.path("ca/crl.pem"), self.folder.join("crl.pem")).unwrap();
        assert_eq!(fs::read(of_host.join("key.pem")).unwrap(), self.key, "the key has changed");
    }

    fn tls(&self) -> Tls {
        let [ca, cert, key, crl] =
            ["ca-cert.pem", "cert.pem", "key.pem", "crl.pem"].map(|file| self.folder.join(file));
        Tls::load(&TlsPaths { ca, cert, key, crl: Some(crl) }, Aead::Auto).unwrap()
    }

    fn chain(&self) -> Vec<rustls_pki_types::CertificateDer<'static>> {
        vmferry::net::credentials::read_certificates("certificate", &self.folder.join("cert.pem")).unwrap()
    }

    fn judges(&self, peer: &Self) -> Result<(), HandshakeFailure> {
        let id: Identity = peer.name.parse().unwrap();
        self.tls().reverify(&peer.chain(), PeerRole::Server, &id)?;
        self.tls().reverify(&peer.chain(), PeerRole::Client, &id)
    }
}

fn step_of(bench: &Bench) -> String {
    bench.ok("rotate-ca --dir DIR/ca")
}

#[test]
fn hosts_know_each_other_after_each_step_and_within_it() {
    let bench = Bench::with_ca();
    for name in ["alpha", "bravo", "charlie"] {
        bench.ok(&format!("host {name} --dir DIR/ca"));
    }
    bench.ok("revoke charlie --dir DIR/ca");
    let (alpha, bravo) = (Host::new(&bench, "alpha"), Host::new(&bench, "bravo"));
    let charlie = Host::new(&bench, "charlie");
    let old_ca = fs::read_to_string(bench.path("ca/ca-cert.pem")).unwrap();
    for (step, cas, said) in
        [("begin", 2, "rotate-ca switch"), ("switch", 2, "rotate-ca end"), ("end", 1, "rotate-ca begin")]
    {
        let words = bench.ok(&format!("rotate-ca {step} --dir DIR/ca"));
        assert!(words.contains(said), "{step}: {words}");
        // One host after the other, in either order of who dials.
        for host in [&alpha, &bravo] {
            host.copy(&bench);
            assert_eq!(alpha.judges(&bravo), Ok(()), "{step}");
            assert_eq!(bravo.judges(&alpha), Ok(()), "{step}");
            let judged = host.judges(&charlie);
            let gone = if step == "end" { HandshakeFailure::UnknownCa } else { HandshakeFailure::Revoked };
            assert_eq!(judged, Err(gone), "{step}");
        }
        let trusted = fs::read_to_string(alpha.folder.join("ca-cert.pem")).unwrap();
        assert_eq!(trusted.matches("BEGIN CERTIFICATE").count(), cas, "{step}");
        let keys = fs::read_to_string(bench.path("ca/ca-key.pem")).unwrap();
        assert_eq!(keys.matches("BEGIN PRIVATE KEY").count(), cas, "{step}");
        let mode = fs::metadata(bench.path("ca/ca-key.pem")).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode, 0o600, "{step}");
        // Both CAs sign what is revoked.
        let lists = fs::read_to_string(bench.path("ca/crl.pem")).unwrap();
        assert_eq!(lists.matches("BEGIN X509 CRL").count(), cas, "{step}");
    }
    let new_ca = fs::read_to_string(bench.path("ca/ca-cert.pem")).unwrap();
    assert_ne!(old_ca, new_ca);
    // The new CA does by itself whatever the old one did.
    bench.ok("host delta --dir DIR/ca");
    bench.ok("revoke delta --dir DIR/ca");
    let (good, words) =
        verify(&bench.path("ca/ca-cert.pem"), &bench.path("ca/hosts/alpha/cert.pem"), "sslserver");
    assert!(good, "{words}");
}

#[test]
fn steps_out_of_order_are_refused_and_one_that_was_cut_short_goes_on() {
    let bench = Bench::new();
    bench.ok("ca --dir DIR/ca --domain rack.example");
    bench.ok("host a.rack.example --dir DIR/ca");
    bench.ok("host b.rack.example --dir DIR/ca");
    for (step, then) in [("switch", "rotate-ca begin"), ("end", "rotate-ca begin")] {
        let error = bench.fails(&format!("rotate-ca {step} --dir DIR/ca"));
        assert!(error.contains(then), "{step}: {error}");
    }
    bench.ok("rotate-ca begin --dir DIR/ca");
    for (step, then) in [("begin", "rotate-ca switch"), ("end", "rotate-ca switch")] {
        let error = bench.fails(&format!("rotate-ca {step} --dir DIR/ca"));
        assert!(error.contains(then), "{step}: {error}");
    }
    // A host that is issued meanwhile is the old CA's, and the new one has the same limits.
    bench.ok("host c.rack.example --dir DIR/ca");
    let of_old = fs::read(bench.path("ca/hosts/b.rack.example/cert.pem")).unwrap();
    bench.ok("rotate-ca switch --dir DIR/ca");
    assert!(step_of(&bench).contains("rotate-ca end"));
    let error = bench.fails("host a.other.example --dir DIR/ca");
    assert!(error.contains("can't vouch"), "{error}");
    // As if the renewals had been cut short.
    fs::write(bench.path("ca/hosts/b.rack.example/cert.pem"), of_old).unwrap();
    let error = bench.fails("rotate-ca end --dir DIR/ca");
    assert!(error.contains("b.rack.example") && error.contains("certs renew"), "{error}");
    let words = bench.ok("rotate-ca switch --dir DIR/ca");
    assert_eq!(words.matches("valid until").count(), 1, "{words}");
    bench.ok("rotate-ca end --dir DIR/ca");
    assert!(step_of(&bench).contains("One CA"));
}

fn shown(bench: &Bench, name: &str) -> serde_json::Value {
    let shown = bench.ok(&format!("show --json DIR/ca/hosts/{name}/cert.pem"));
    serde_json::from_str::<serde_json::Value>(&shown).unwrap()[0].take()
}

#[test]
fn a_renewed_host_keeps_its_names_and_its_key() {
    let bench = Bench::with_ca();
    bench.ok("host alpha --dir DIR/ca --days 20 --san alpha.example --san 10.0.0.1 --san URI:spiffe://corp/x --trust-domain corp.example");
    bench.ok("host bravo --dir DIR/ca");
    let key = fs::read(bench.path("ca/hosts/alpha/key.pem")).unwrap();
    let before = shown(&bench, "alpha");
    // The key need not be here.
    fs::remove_file(bench.path("ca/hosts/alpha/key.pem")).unwrap();
    let words = bench.ok("renew --within 60 --dir DIR/ca");
    assert!(words.contains("alpha:") && !words.contains("bravo:"), "{words}");
    fs::write(bench.path("ca/hosts/alpha/key.pem"), &key).unwrap();
    fs::set_permissions(bench.path("ca/hosts/alpha/key.pem"), fs::Permissions::from_mode(0o600)).unwrap();
    let after = shown(&bench, "alpha");
    assert_eq!(before["names"], after["names"]);
    assert_eq!(after["names"].as_array().unwrap().len(), 6, "{after}");
    assert_ne!(before["serial"], after["serial"]);
    assert!(after["days_left"].as_i64() > before["days_left"].as_i64(), "{after}");
    bench.load("alpha").unwrap();
    assert!(bench.ok("renew --within 60 --dir DIR/ca").contains("Nothing to renew"));

    bench.ok("renew alpha --new-key --dir DIR/ca");
    assert_ne!(fs::read(bench.path("ca/hosts/alpha/key.pem")).unwrap(), key);
    assert_eq!(shown(&bench, "alpha")["names"], before["names"]);
    bench.load("alpha").unwrap();
    // All of them, revoked for good: their keys get no further certificates.
    bench.ok("revoke alpha --dir DIR/ca");
    let error = bench.fails("renew alpha --dir DIR/ca");
    assert!(error.contains("is revoked") && error.contains("--new-key"), "{error}");
    bench.ok("renew alpha --new-key --dir DIR/ca");
    let error = bench.fails("renew delta --dir DIR/ca");
    assert!(error.contains("no certificate of `delta`"), "{error}");
}
