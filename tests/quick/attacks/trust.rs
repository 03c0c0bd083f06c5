//! A peer that is trusted no more: by a list that a reload finds in the configuration, or because its certificate
//! has expired while a connection was up.

use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vmferry::mux::Code;
use vmferry::net::connect_error::ConnectError;
use vmferry::net::handshake_failure::{HandshakeFailure, Refusal, classify_handshake_error};
use vmferry::pki::revocation::{Revoke, revoke};

use super::victim::{Attacker, Victim, open_control};
use crate::rig::{soon, until};

pub(super) fn reload(victim: &Victim) {
    kill(Pid::from_raw(victim.pid()), Signal::SIGHUP).unwrap();
}

/// Changes the configuration's `[tls]`.
pub(super) fn reconfigure(victim: &Victim, from: &str, to: &str) {
    let text = std::fs::read_to_string(victim.config()).unwrap();
    assert!(text.contains(from), "{from} in {text}");
    std::fs::write(victim.config(), text.replacen(from, to, 1)).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_that_the_configuration_names_newly_revokes_at_a_reload() {
    let victim = Victim::start();
    let (bravo, charlie) = (Attacker::new(&victim, "bravo"), Attacker::new(&victim, "charlie"));
    let (revoked, good) = (bravo.session(&victim).await, charlie.session(&victim).await);
    let list = revoke(&victim.pki(), &Revoke::Host("bravo".into()), 10).unwrap().path;
    reconfigure(&victim, "[metrics]", &format!("crl = '{}'\n[metrics]", list.display()));
    reload(&victim);
    victim.logs(|line| line.contains("not trusted any more") && line.contains("bravo")).await;
    soon("the end of the session", revoked.ended()).await;
    // It is not let in again, and told why.
    let refused = bravo.dial(&victim).await.unwrap_err();
    let ConnectError::Shared(shared) = &refused else { panic!("{refused:?}") };
    let ConnectError::BeforeHello(error) = &**shared else { panic!("{refused:?}") };
    let told = classify_handshake_error(error);
    assert_eq!(told, HandshakeFailure::RefusedByPeer(Refusal::Revoked));
    let counted = "vmferry_connect_failures_total{direction=\"in\",reason=\"revoked\"}";
    until("the refusal to be counted", || victim.metric(counted) >= 1.0).await;
    // Nobody else is touched.
    assert!(good.is_live());
    drop(open_control(&good).await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_authority_is_replaced_by_reloads_while_sessions_live() {
    let victim = Victim::start();
    let bravo = Attacker::new(&victim, "bravo");
    let session = bravo.session(&victim).await;
    // Another authority, and both trusted for a time, by another file.
    let other = victim.folder.path().join("other");
    let ca = |dir: &std::path::Path| std::fs::read_to_string(dir.join("ca-cert.pem")).unwrap();
    let vmferry = |words: &[&str]| {
        let made = Command::new(env!("CARGO_BIN_EXE_vmferry"))
            .arg("certs")
            .args(words)
            .arg("--dir")
            .arg(&other)
            .output();
        assert!(made.unwrap().status.success());
    };
    vmferry(&["ca"]);
    ["alpha", "bravo"].iter().for_each(|name| vmferry(&["host", name]));
    let both = victim.folder.path().join("both.pem");
    std::fs::write(&both, ca(&victim.pki()) + &ca(&other)).unwrap();
    let old = victim.pki().join("hosts/alpha/ca-cert.pem");
    reconfigure(&victim, &format!("{}", old.display()), &format!("{}", both.display()));
    reload(&victim);
    victim.logs(|line| line.contains("certificates reloaded")).await;
    assert!(session.is_live());
    // Its own certificate is the new authority's from now on, and the old one is trusted no more.
    let new = other.join("hosts/alpha");
    reconfigure(&victim, &format!("{}", both.display()), &format!("{}", new.join("ca-cert.pem").display()));
    let of_old = victim.pki().join("hosts/alpha");
    for file in ["cert.pem", "key.pem"] {
        reconfigure(
            &victim,
            &format!("{}", of_old.join(file).display()),
            &format!("{}", new.join(file).display()),
        );
    }
    reload(&victim);
    soon("the end of the session", session.ended()).await;
    victim.logs(|line| line.contains("not trusted any more") && line.contains("bravo")).await;
}

/// What is wrong with the configuration changes nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_configuration_that_is_wrong_is_not_taken_at_a_reload() {
    let victim = Victim::start();
    let bravo = Attacker::new(&victim, "bravo");
    let session = bravo.session(&victim).await;
    reconfigure(&victim, "[metrics]", "crl = 'nowhere.pem'\n[metrics]");
    reload(&victim);
    victim.logs(|line| line.contains("certificates not reloaded") && line.contains("nowhere.pem")).await;
    reconfigure(&victim, "nowhere.pem'", "");
    reload(&victim);
    victim.logs(|line| line.contains("certificates not reloaded") && line.contains("TOML")).await;
    assert!(session.is_live() && victim.is_alive());
    session.close(Code::Shutdown, "");
}
