//! Certificates as an organisation makes them, with openssl and nothing of ours: a root, authorities between it
//! and the hosts, DNS names and URI names, revocation lists, two roots at once.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use vmferry::net::naming::Naming;
use vmferry::net::tls::TlsPaths;

use super::*;

const EC: &str = "ec -pkeyopt ec_paramgen_curve:P-256";
const RSA: &str = "rsa:2048";
const BOTH_ROLES: &str = "serverAuth,clientAuth";

/// A certificate with its key and what stands above it, in a folder of openssl's files.
#[derive(Clone)]
struct Issued {
    name: String,
    /// The certificates from this one up to, but without, the root.
    chain: Vec<PathBuf>,
    folder: PathBuf,
}

fn openssl(folder: &Path, line: &str, more: &[&str]) {
    let mut command = Command::new("openssl");
    command.current_dir(folder).args(line.split_whitespace()).args(more);
    let done = command.output().expect("openssl is needed by this test");
    assert!(done.status.success(), "openssl {line}: {}", String::from_utf8_lossy(&done.stderr));
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

impl Issued {
    fn root(folder: &Path, name: &str) -> Self {
        let ec = "-newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -sha384";
        let line =
            format!("req -x509 {ec} -keyout {name}.key -out {name}.pem -subj /O=Corp/CN={name} -days 30");
        openssl(folder, &line, &["-addext", "keyUsage=critical,keyCertSign,cRLSign"]);
        Self { name: name.into(), chain: Vec::new(), folder: folder.into() }
    }

    /// Signs a request for `name` with these extensions; `key` is what `-newkey` is given.
    fn sign(&self, name: &str, serial: u32, key: &str, extensions: &str) -> Self {
        let (folder, by) = (&self.folder, &self.name);
        let asked = format!(
            "req -new -newkey {key} -nodes -keyout {name}.key -out {name}.csr -subj /O=Corp/CN={name}"
        );
        openssl(folder, &asked, &[]);
        fs::write(folder.join("extensions"), extensions).unwrap();
        let signed = format!(
            "x509 -req -in {name}.csr -CA {by}.pem -CAkey {by}.key -set_serial {serial} -days 20 -sha256 \
             -extfile extensions -out {name}.pem"
        );
        openssl(folder, &signed, &[]);
        let chain = [&[folder.join(format!("{name}.pem"))], self.chain.as_slice()].concat();
        Self { name: name.into(), chain, folder: folder.clone() }
    }

    fn authority(&self, name: &str, serial: u32) -> Self {
        let extensions =
            "basicConstraints=critical,CA:TRUE,pathlen:0\nkeyUsage=critical,keyCertSign,cRLSign\n";
        self.sign(name, serial, EC, extensions)
    }

    fn host(&self, name: &str, names: &str) -> Self {
        self.host_for(name, 7, names, BOTH_ROLES)
    }

    fn host_for(&self, name: &str, serial: u32, names: &str, purposes: &str) -> Self {
        let key = if name == "bravo" { RSA } else { EC };
        let extensions = format!(
            "basicConstraints=CA:FALSE\nkeyUsage=critical,digitalSignature,keyEncipherment\n\
             extendedKeyUsage={purposes}\nsubjectAltName={names}\n"
        );
        self.sign(name, serial, key, &extensions)
    }

    /// A list of what this authority has revoked.
    fn revocation_list(&self, serials: &[u32]) -> String {
        let (folder, by) = (&self.folder, &self.name);
        let entry = |serial: &u32| format!("R\t351231235959Z\t260101000000Z\t{serial:02X}\tunknown\t/CN=x\n");
        fs::write(folder.join("index"), serials.iter().map(entry).collect::<String>()).unwrap();
        fs::write(folder.join("number"), "01\n").unwrap();
        let config = "[ca]\ndefault_ca=d\n[d]\ndatabase=index\ncrlnumber=number\ndefault_md=sha256\n\
                      default_crl_days=9\nunique_subject=no\ncrl_extensions=e\n[e]\nauthorityKeyIdentifier=keyid\n";
        fs::write(folder.join("ca.conf"), config).unwrap();
        let line = format!("ca -config ca.conf -gencrl -keyfile {by}.key -cert {by}.pem -out {by}.crl");
        openssl(folder, &line, &[]);
        read(&folder.join(format!("{by}.crl")))
    }

    fn pem(&self) -> String {
        read(&self.folder.join(format!("{}.pem", self.name)))
    }

    /// A host's files: whom it trusts, its chain, its key.
    fn files(&self, trusted: &[&Issued], lists: &[String]) -> TlsPaths {
        let folder = self.folder.join(format!("{}-files", self.name));
        fs::create_dir_all(&folder).unwrap();
        let [ca, cert, key, crl] = ["ca-cert.pem", "cert.pem", "key.pem", "crl.pem"].map(|f| folder.join(f));
        fs::write(&ca, trusted.iter().map(|root| root.pem()).collect::<String>()).unwrap();
        fs::write(&cert, self.chain.iter().map(|path| read(path)).collect::<String>()).unwrap();
        fs::write(&key, read(&self.folder.join(format!("{}.key", self.name)))).unwrap();
        pki::chmod(&key, 0o600);
        fs::write(&crl, lists.concat()).unwrap();
        TlsPaths { ca, cert, key, crl: (!lists.is_empty()).then_some(crl) }
    }

    fn agent(&self, trusted: &[&Issued], naming: &Naming) -> Tls {
        Tls::load_named(&self.files(trusted, &[]), naming.clone(), Aead::Auto).unwrap()
    }
}

fn corp() -> Naming {
    Naming::Uri("corp.example".parse().unwrap())
}

fn by_uri(name: &str) -> String {
    format!("URI:vmferry://corp.example/host/{name}")
}

fn both(name: &str) -> String {
    format!("DNS:{name},{}", by_uri(name))
}

/// One agent dials another: the dialer's and the acceptor's outcome.
async fn meet(dialer: &Tls, acceptor: &Tls, peer: &str) -> (Outcome<()>, Outcome<Identity>) {
    let (listener, address) = listen().await;
    let dial = async {
        let socket = TcpStream::connect(address).await.unwrap();
        let mut stream = connect(dialer, socket, &id(peer), PATIENCE).await.map_err(failure)?;
        stream.write_all(&[0; 4096]).await.map_err(classify)?;
        stream.flush().await.map_err(classify)?;
        stream.read_u8().await.map(drop).map_err(classify)
    };
    let both = async { tokio::join!(dial, accept_once(&listener, acceptor)) };
    tokio::time::timeout(PATIENCE, both).await.expect("the handshake hangs")
}

#[tokio::test]
async fn hosts_of_two_authorities_under_one_root_know_each_other_by_dns_and_by_uri() {
    let dir = tempfile::tempdir().unwrap();
    let root = Issued::root(dir.path(), "root");
    let (east, west) = (root.authority("east", 2), root.authority("west", 3));
    for (naming, of_alpha, of_bravo) in [
        (Naming::Dns, "DNS:alpha".to_owned(), both("bravo")),
        (corp(), by_uri("alpha"), both("bravo")),
        // What else an organisation writes into certificates.
        (corp(), format!("{},URI:spiffe://corp.example/ns/x,IP:10.0.0.1", by_uri("Alpha")), by_uri("bravo")),
        // With a trust domain DNS names say nothing, however many there are.
        (corp(), format!("DNS:web.corp.example,DNS:www.corp.example,{}", by_uri("alpha")), both("bravo")),
    ] {
        let alpha = east.host("alpha", &of_alpha).agent(&[&root], &naming);
        let bravo = west.host("bravo", &of_bravo).agent(&[&root], &naming);
        assert_eq!(alpha.identity.as_str(), "alpha", "{of_alpha}");
        assert_eq!(meet(&alpha, &bravo, "bravo").await, (Ok(()), Ok(id("alpha"))), "{of_alpha}");
        assert_eq!(meet(&bravo, &alpha, "alpha").await, (Ok(()), Ok(id("bravo"))), "{of_bravo}");
    }
    // Whoever has both kinds of names is known to hosts with and without the trust domain.
    let with = east.host("alpha", &both("alpha")).agent(&[&root], &corp());
    let without = west.host("bravo", &both("bravo")).agent(&[&root], &Naming::Dns);
    assert_eq!(meet(&with, &without, "bravo").await, (Ok(()), Ok(id("alpha"))));
    assert_eq!(meet(&without, &with, "alpha").await, (Ok(()), Ok(id("bravo"))));
}

#[tokio::test]
async fn in_a_trust_domain_other_names_are_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let root = Issued::root(dir.path(), "root");
    let authority = root.authority("authority", 2);
    let bravo = authority.host("bravo", &both("bravo")).agent(&[&root], &corp());
    let cases = [
        ("a web server's", "DNS:alpha".to_owned()),
        ("another trust domain", "URI:vmferry://evil.example/host/alpha".into()),
        ("a longer trust domain", "URI:vmferry://corp.example.evil/host/alpha".into()),
        ("two", format!("{},{}", by_uri("alpha"), by_uri("charlie"))),
        ("two trust domains", format!("{},URI:vmferry://evil.example/host/alpha", by_uri("alpha"))),
        ("a path", by_uri("alpha/x")),
        ("a wildcard", by_uri("*.rack")),
        ("the selector beside a DNS name", "DNS:alpha,URI:vmferry:alpha".into()),
    ];
    for (case, names) in cases {
        // It judges itself by no rule that would refuse it.
        let host = authority.host("alpha", &names);
        let files = host.files(&[&root], &[]);
        let chain = vmferry::net::credentials::read_certificates("certificate", &files.cert).unwrap();
        for role in [PeerRole::Client, PeerRole::Server] {
            assert_eq!(bravo.reverify(&chain, role, &id("alpha")), Err(F::NoIdentity), "{case} {role:?}");
        }
        assert!(Tls::load_named(&files, corp(), Aead::Auto).is_err(), "{case} as its own");
    }
    // Over the wire, too: a DNS name is enough where no trust domain is set, and here it is not.
    let stranger = authority.host("alpha", "DNS:alpha").agent(&[&root], &Naming::Dns);
    let told = Err(F::RefusedByPeer(Refusal::BadCertificate));
    assert_eq!(meet(&stranger, &bravo, "bravo").await.1, Err(F::NoIdentity));
    assert_eq!(meet(&bravo, &stranger, "alpha").await, (Err(F::NoIdentity), told));
    // A host that is not the one that was dialled.
    let charlie = authority.host("charlie", &by_uri("charlie")).agent(&[&root], &corp());
    assert_eq!(meet(&bravo, &charlie, "alpha").await.0, Err(F::WrongIdentity));
    // Every certificate is for both roles, or for none.
    for purpose in ["serverAuth", "clientAuth", "codeSigning"] {
        let host = authority.host_for("alpha", 8, &by_uri("alpha"), purpose);
        let files = host.files(&[&root], &[]);
        let chain = vmferry::net::credentials::read_certificates("certificate", &files.cert).unwrap();
        let judged = bravo.reverify(&chain, PeerRole::Server, &id("alpha"));
        assert_eq!(judged, Err(F::WrongPurpose), "{purpose}");
    }
}

#[tokio::test]
async fn a_chain_with_a_gap_or_out_of_place_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let root = Issued::root(dir.path(), "root");
    let authority = root.authority("authority", 2);
    let bravo = authority.host("bravo", "DNS:bravo").agent(&[&root], &Naming::Dns);
    let judged = |host: &Issued, chain: &[PathBuf]| {
        let host = Issued { chain: chain.to_vec(), ..host.clone() };
        let files = host.files(&[&root], &[]);
        let chain = vmferry::net::credentials::read_certificates("certificate", &files.cert).unwrap();
        let loaded = Tls::load(&files, Aead::Auto);
        let judged = bravo.reverify(&chain, PeerRole::Client, &id("alpha"));
        assert_eq!(loaded.is_ok(), judged.is_ok(), "what peers refuse, an agent does not start with");
        judged
    };
    let alpha = authority.host("alpha", "DNS:alpha");
    assert_eq!(judged(&alpha, &alpha.chain), Ok(()));
    assert_eq!(judged(&alpha, &alpha.chain[..1]), Err(F::UnknownCa), "without the authority between");
    // The root along with it does no harm.
    assert_eq!(judged(&alpha, &[alpha.chain.as_slice(), &[dir.path().join("root.pem")]].concat()), Ok(()));
    // A host signs a host, and an authority another, beyond its length.
    let below = alpha.host("alpha2", "DNS:alpha");
    assert!(judged(&below, &below.chain).is_err(), "signed by a host");
    let deeper = authority.authority("deeper", 3).host("alpha3", "DNS:alpha");
    assert!(judged(&deeper, &deeper.chain).is_err(), "an authority too many");
}

#[tokio::test]
async fn two_roots_are_trusted_at_once_while_one_replaces_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (Issued::root(dir.path(), "old"), Issued::root(dir.path(), "new"));
    let (by_old, by_new) = (old.authority("by-old", 2), new.authority("by-new", 2));
    let alpha = |by: &Issued, trusted: &[&Issued]| by.host("alpha", "DNS:alpha").agent(trusted, &Naming::Dns);
    let bravo = |by: &Issued, trusted: &[&Issued]| by.host("bravo", "DNS:bravo").agent(trusted, &Naming::Dns);
    let (welcome, both) = ((Ok(()), Ok(id("alpha"))), [&old, &new]);
    // Each step that one of two hosts takes while the other is a step behind.
    for (alpha, bravo) in [
        (alpha(&by_old, &[&old]), bravo(&by_old, &both)),
        (alpha(&by_old, &both), bravo(&by_old, &both)),
        (alpha(&by_new, &both), bravo(&by_old, &both)),
        (alpha(&by_new, &both), bravo(&by_new, &both)),
        (alpha(&by_new, &[&new]), bravo(&by_new, &both)),
        (alpha(&by_new, &[&new]), bravo(&by_new, &[&new])),
    ] {
        assert_eq!(meet(&alpha, &bravo, "bravo").await, welcome);
    }
    // Out of order: a new certificate before everybody trusts its root, and an old one afterwards.
    for (alpha, bravo) in
        [(alpha(&by_new, &both), bravo(&by_old, &[&old])), (alpha(&by_old, &both), bravo(&by_new, &[&new]))]
    {
        assert_eq!(meet(&alpha, &bravo, "bravo").await.1, Err(F::UnknownCa));
    }
}

#[tokio::test]
async fn lists_are_needed_of_every_authority_in_a_chain() {
    let dir = tempfile::tempdir().unwrap();
    let root = Issued::root(dir.path(), "root");
    let (east, west) = (root.authority("east", 2), root.authority("west", 3));
    let bravo = west.host("bravo", "DNS:bravo");
    let alpha = east.host_for("alpha", 77, "DNS:alpha", BOTH_ROLES);
    let files = alpha.files(&[&root], &[]);
    let chain = vmferry::net::credentials::read_certificates("certificate", &files.cert).unwrap();
    let judged = |lists: &[String]| {
        let tls = Tls::load(&bravo.files(&[&root], lists), Aead::Auto).unwrap();
        tls.reverify(&chain, PeerRole::Client, &id("alpha"))
    };
    let of = |by: &Issued, serials: &[u32]| by.revocation_list(serials);
    let all = [of(&root, &[]), of(&east, &[]), of(&west, &[])];
    assert_eq!(judged(&all), Ok(()));
    let [of_root, of_east, of_west] = all;
    // The host's certificate, or that of the authority above it.
    assert_eq!(judged(&[of_root.clone(), of(&east, &[77]), of_west.clone()]), Err(F::Revoked));
    assert_eq!(judged(&[of(&root, &[2]), of_east.clone(), of_west.clone()]), Err(F::Revoked));
    assert_eq!(judged(&[of_root, of_west.clone()]), Err(F::RevocationUnknown));
    // Its own chain is judged as severely.
    assert!(Tls::load(&bravo.files(&[&root], &[of_east, of_west]), Aead::Auto).is_err());
}
