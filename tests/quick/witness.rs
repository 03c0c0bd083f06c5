//! A witness as an agent and `vmferry doctor` look at it, where there is no migration. The etcd is a made-up one; with a
//! real one are the tests in `tests/real/witness.rs`.

use std::fmt::Write as _;
use std::fs::Permissions;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;

use crate::doctor::{look, state};
use crate::forward::agents::{Ground, wait};
use crate::rig::own_address;

/// Something that answers as an etcd of that cluster that keeps nothing. Its threads end with the test's process.
fn etcd(cluster: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || answer(&stream, cluster));
        }
    });
    address
}

fn answer(stream: &TcpStream, cluster: &str) -> Option<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let mut length = 0;
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).ok()? == 0 {
                return None;
            }
            if let Some(bytes) = line.to_lowercase().strip_prefix("content-length: ") {
                length = bytes.trim().parse().unwrap();
            }
            if line == "\r\n" {
                break;
            }
        }
        reader.read_exact(&mut vec![0; length]).ok()?;
        let body = format!(r#"{{"header":{{"cluster_id":"{cluster}","revision":"4"}}}}"#);
        let mut to = stream;
        write!(to, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len()).ok()?;
    }
}

fn table(endpoints: &[SocketAddr], more: &str) -> String {
    let mut text = String::from("[witness]\nendpoints = [");
    for endpoint in endpoints {
        write!(text, "\"http://{endpoint}\", ").unwrap();
    }
    text + "]\n" + more
}

#[test]
fn whether_a_witness_is_there_is_known_before_a_migration_wants_it() {
    let (ground, silent) = (Ground::new(), TcpListener::bind("127.0.0.1:0").unwrap());
    let mut alpha = ground.alpha(&table(&[etcd("7")], ""));
    wait("the witness to be up", || (alpha.metric("vmferry_witness_up") == 1).then_some(()));
    assert!(alpha.metric("vmferry_witness_requests_total{result=\"answered\"}") >= 1);
    alpha.stop();
    let mut bravo = ground.bravo(&table(&[silent.local_addr().unwrap()], "answer_s = 1\n"));
    bravo.says("the witness does not answer");
    assert_eq!(bravo.metric("vmferry_witness_requests_total{result=\"unanswered\"}"), 1);
    bravo.stop();
}

#[test]
fn a_doctor_looks_at_the_witness() {
    let (ground, nobody) = (Ground::new(), own_address());
    let [one, two, other] = ["7", "7", "8"].map(etcd);
    let _bravo = ground.bravo(&table(&[one, nobody, other, two], ""));
    let (code, findings) = look(&ground.path("bravo"));
    assert_eq!(code, 1);
    for (endpoint, expected) in [(one, "ok"), (nobody, "warning"), (other, "failed"), (two, "ok")] {
        let seen = state(&findings, &format!("witness http://{endpoint}"));
        assert_eq!(seen, expected, "{endpoint}: {findings:?}");
    }
    assert!(findings.iter().all(|f| f["state"] == "ok" || f["remedy"].is_string()), "{findings:?}");

    let key = ground.path("etcd-key.pem");
    std::fs::copy(ground.path("pki/hosts/alpha/key.pem"), &key).unwrap();
    std::fs::set_permissions(&key, Permissions::from_mode(0o644)).unwrap();
    let own = "cert = 'DIR/pki/hosts/alpha/cert.pem'\nkey = 'DIR/etcd-key.pem'\n";
    let said = ground.alpha_fails(&table(&[one], own));
    assert!(said.contains("others may read the private key"), "{said}");
    let (code, findings) = look(&ground.path("alpha"));
    assert_eq!((code, state(&findings, "witness's key")), (1, "failed"));
    let what: Vec<_> = findings.iter().filter(|f| f["state"] == "failed").map(|f| &f["what"]).collect();
    assert!(what.iter().any(|what| *what == "witness"), "{findings:?}");
}
