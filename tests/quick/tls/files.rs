//! Files that must not get an agent started, each refused by its own error.

use std::fs;
use std::path::Path;

use rcgen::{ExtendedKeyUsagePurpose as Purpose, KeyUsagePurpose as Usage};
use vmferry::net::tls::{Aead, Tls, TlsError, TlsPaths};

use super::pki::{self, Ca, Wish, agent_with_crl, chmod, dns, good, load};

/// Loads after `spoil` has had its way with the files of a good host, and checks that the
/// error names the file which it should.
fn spoil(named: &str, spoil: impl FnOnce(&mut TlsPaths)) -> TlsError {
    let dir = tempfile::tempdir().unwrap();
    let ca = Ca::new("ca");
    let mut paths = pki::write(dir.path(), &ca.cert, &ca.host("alpha"));
    Tls::load(&paths, Aead::Auto).expect("the files are good before they are spoiled");
    spoil(&mut paths);
    let error = Tls::load(&paths, Aead::Auto).expect_err("spoiled files were accepted");
    assert!(error.to_string().contains(named), "{error} does not name {named}");
    error
}

fn issued(wish: impl FnOnce(&mut Wish)) -> TlsError {
    let dir = tempfile::tempdir().unwrap();
    let ca = Ca::new("ca");
    let mut w = good("alpha");
    wish(&mut w);
    load(dir.path(), &ca.cert, &ca.issue(&w)).expect_err("a bad certificate was accepted")
}

fn cat(into: &Path, more: &str) {
    fs::write(into, fs::read_to_string(into).unwrap() + more).unwrap();
}

#[test]
fn a_key_that_others_may_read_is_refused() {
    for mode in [0o644, 0o640, 0o604, 0o660] {
        let error = spoil("key.pem", |p| chmod(&p.key, mode));
        assert!(matches!(&error, TlsError::KeyExposed { mode: m, .. } if *m == mode), "{error}");
        assert!(error.to_string().contains("chmod 600"), "{error}");
    }
}

#[test]
fn missing_mixed_up_and_damaged_files_are_told_apart() {
    let e = spoil("nowhere.pem", |p| p.cert = p.cert.with_file_name("nowhere.pem"));
    assert!(matches!(e, TlsError::Unreadable { what: "certificate", .. }), "{e}");
    let e = spoil("key.pem", |p| p.cert.clone_from(&p.key));
    assert!(matches!(e, TlsError::NotPem { what: "certificate", .. }), "{e}");
    let e = spoil("cert.pem", |p| {
        chmod(&p.cert, 0o600);
        p.key.clone_from(&p.cert);
    });
    assert!(matches!(e, TlsError::NotPem { what: "private key", .. }), "{e}");
    let e = spoil("ca-cert.pem", |p| fs::write(&p.ca, "not PEM").unwrap());
    assert!(matches!(e, TlsError::NotPem { what: "CA certificate", .. }), "{e}");
    let e = spoil("cert.pem", |p| fs::write(&p.cert, pki::pem("CERTIFICATE", b"no DER")).unwrap());
    assert!(matches!(e, TlsError::Undecodable { .. }), "{e}");
    let e = spoil("key.pem", |p| fs::write(&p.key, pki::pem("PRIVATE KEY", b"no DER")).unwrap());
    assert!(matches!(e, TlsError::KeyUnusable { .. }), "{e}");
}

#[test]
fn a_fifo_or_a_folder_does_not_hang_the_agent() {
    let e = spoil("fifo", |p| {
        p.cert = p.cert.with_file_name("fifo");
        nix::unistd::mkfifo(&p.cert, nix::sys::stat::Mode::S_IRWXU).unwrap();
    });
    assert!(matches!(e, TlsError::NotAFile { .. }), "{e}");
    let e = spoil("the certificate", |p| p.cert = p.cert.parent().unwrap().to_owned());
    assert!(matches!(e, TlsError::NotAFile { .. }), "{e}");
}

#[test]
fn key_certificate_and_ca_must_belong_together() {
    let ca = Ca::new("ca");
    let e = spoil("key.pem", |p| fs::write(&p.key, ca.host("alpha").key.serialize_pem()).unwrap());
    assert!(matches!(e, TlsError::KeyMismatch { .. }), "{e}");
    let e = spoil("ca-cert.pem", |p| fs::write(&p.ca, pki::pem("CERTIFICATE", &ca.cert)).unwrap());
    assert!(matches!(e, TlsError::NotIssuedByCa { .. }), "{e}");
    let e = spoil("cert.pem", |p| p.ca.clone_from(&p.cert));
    assert!(matches!(e, TlsError::NotACa { .. }), "{e}");
}

#[test]
fn own_dates_names_and_purposes_are_checked() {
    let e = issued(|w| (w.from_days, w.to_days) = (-9, -1));
    assert!(matches!(e, TlsError::Expired { .. }) && e.to_string().contains("clock says"), "{e}");
    let e = issued(|w| w.from_days = 2);
    assert!(matches!(e, TlsError::NotYetValid { .. }) && e.to_string().contains("clock says"), "{e}");
    let e = issued(|w| w.purposes = vec![Purpose::ServerAuth]);
    assert!(matches!(e, TlsError::WrongPurpose { missing: "the client's role", .. }), "{e}");
    let e = issued(|w| w.purposes = vec![Purpose::ClientAuth]);
    assert!(matches!(e, TlsError::WrongPurpose { missing: "the server's role", .. }), "{e}");
    let e = issued(|w| w.purposes.clear());
    assert!(matches!(e, TlsError::WrongPurpose { missing: "the server's role", .. }), "{e}");
    let e = issued(|w| w.usages = vec![Usage::KeyEncipherment]);
    assert!(matches!(e, TlsError::WrongPurpose { missing: "the signature of a handshake", .. }), "{e}");
    let e = issued(|w| w.sans.clear());
    assert!(matches!(e, TlsError::NoIdentity { .. }), "{e}");
    let e = issued(|w| w.sans.push(dns("second")));
    assert!(matches!(e, TlsError::NoIdentity { .. }), "{e}");
}

#[test]
fn an_expired_ca_is_left_out_and_alone_it_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let (old, ca) = (Ca::valid("old", -9, -1), Ca::new("ca"));
    let e = load(dir.path(), &old.cert, &old.host("alpha")).expect_err("trusts a dead CA");
    assert!(matches!(&e, TlsError::Expired { path, .. } if path.ends_with("ca-cert.pem")), "{e}");

    let paths = pki::write(dir.path(), &ca.cert, &ca.host("alpha"));
    cat(&paths.ca, &pki::pem("CERTIFICATE", &old.cert));
    let tls = Tls::load(&paths, Aead::Auto).unwrap();
    let of_old = [old.host("bravo").cert];
    let role = vmferry::net::tls::PeerRole::Server;
    assert!(tls.reverify(&of_old, role, &"bravo".parse().unwrap()).is_err());
}

#[test]
fn revocation_lists_must_be_current_and_ours() {
    let (ca, other) = (Ca::new("ca"), Ca::new("other"));
    agent_with_crl(&ca, "alpha", &ca.crl(&[], 10)).unwrap();
    let fails = |crl: &str| agent_with_crl(&ca, "alpha", crl).expect_err("accepted");
    let e = fails(&ca.crl(&[7], 10));
    assert!(matches!(e, TlsError::Revoked { .. }), "{e}");
    let e = fails(&ca.crl(&[], -1));
    assert!(matches!(e, TlsError::RevocationUnknown { .. }), "{e}");
    let e = fails(&other.crl(&[], 10));
    assert!(matches!(e, TlsError::RevocationUnknown { .. }), "{e}");
    let e = fails(&pki::pem("X509 CRL", b"no DER"));
    assert!(matches!(e, TlsError::BadCrl { .. }), "{e}");
    let e = fails("empty");
    assert!(matches!(e, TlsError::NotPem { what: "revocation list", .. }), "{e}");
}
