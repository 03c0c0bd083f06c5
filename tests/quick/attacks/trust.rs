//! A peer that is trusted no more: by a list that a reload finds in the configuration, or because its authority
//! or its keys are not good enough by now. Certificates that end are in `expiry.rs`.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vmferry::mux::Code;
use vmferry::mux::hello::FirstFrame;
use vmferry::net::connect_error::ConnectError;
use vmferry::net::handshake_failure::{HandshakeFailure, Refusal, classify_handshake_error};
use vmferry::net::tls::{Aead, Tls, TlsPaths};
use vmferry::pki::revocation::{Revoke, revoke};

use super::raw::Raw;
use super::victim::{Attacker, PATIENT, Victim, open_control, patient};
use crate::rig::{soon, until};
use crate::tls::pki::{Ca, Wish, good, pem, write};

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
    let of_bravo = victim.pki().join("hosts/bravo");
    let [cert, key] = ["cert.pem", "key.pem"].map(|file| of_bravo.join(file));
    let trusting = TlsPaths { ca: both.clone(), cert, key, crl: None };
    bravo.pool.endpoint().set_tls(Tls::load(&trusting, Aead::Auto).unwrap());
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
    victim.logs(|line| line.contains("has to prove itself again") && line.contains("bravo")).await;
    // With what it has it does not come back, and nothing is done for it.
    until("the connection to be lost", || session.away_since().is_some()).await;
    let counted = "vmferry_connect_failures_total{direction=\"in\",reason=\"unknown_ca\"}";
    until("it to be refused with its old certificate", || victim.metric(counted) >= 2.0).await;
    assert!(session.away_since().is_some());
    // With a certificate of the new authority its session goes on.
    bravo.pool.endpoint().set_tls(super::victim::tls(&other, "bravo"));
    until("the session to go on", || session.away_since().is_none()).await;
    assert!(session.is_live());
    drop(open_control(&session).await.unwrap());
}

/// What is recorded of a session that lives on is to be read by nobody tomorrow either.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_policy_for_keys_is_for_sessions_that_live_as_well() {
    let victim = Victim::start_with(|text| text + PATIENT);
    let bravo = Attacker::with(&victim, "bravo", patient());
    let session = bravo.session(&victim).await;
    let mut classical = Raw::connect_classically(&victim, "charlie").await;
    let known = classical.greet(5).await;
    victim.logs(|line| line.contains("session begins peer=\"charlie\"")).await;
    reconfigure(&victim, "[tls]\n", "[tls]\nkey_exchange = 'hybrid-only'\n");
    reload(&victim);
    let anew = |line: &str| line.contains("a session's peer has to prove itself again");
    let line = victim.logs(anew).await;
    assert!(line.contains("peer=charlie") && line.contains("key exchange"), "{line}");
    assert!(classical.is_ended().await, "its connection");
    // The session goes on over one that the policy has.
    let mut again = Raw::connect(&victim, "charlie").await;
    let resumption = again.resumption(&known, 1);
    again.say(&resumption).await.unwrap();
    assert!(matches!(again.first_frame().await, Some(FirstFrame::Hello { .. })), "the session is over");
    // Whose keys are of the right kind does not notice.
    drop(open_control(&session).await.unwrap());
    assert_eq!(session.stats().await.reconnects, 0);
    assert_eq!(victim.log().into_iter().filter(|line| anew(line)).count(), 1, "{:?}", victim.log());
}

/// What ends soon is said when the agent learns of it, and the metrics have all ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_ends_soon_is_said_and_when_is_in_the_metrics() {
    let victim = Victim::start();
    let ends = |name: &str| victim.metric(&format!("vmferry_{name}_expiry_timestamp_seconds")) as i64;
    let in_days = |at: i64| (at - time::OffsetDateTime::now_utc().unix_timestamp() + 3600) / 86_400;
    let (own, list) = (in_days(ends("certificate")), ends("revocation_list"));
    // The authority is said to end in thirty days, and lives for no longer.
    assert_eq!((own, in_days(ends("authority")), list), (10, 30, 0));
    assert!(!victim.log().iter().any(|line| line.contains("ends soon")), "{:?}", victim.log());
    let ca = Ca::valid("short", -50, 10);
    let host = ca.issue(&Wish { from_days: -40, to_days: 5, ..good("alpha") });
    let folder = victim.folder.path().join("short");
    let paths = write(&folder, &ca.cert, &host);
    let list = folder.join("crl.pem");
    std::fs::write(&list, ca.crl(&[], 3)).unwrap();
    let of_old = victim.pki().join("hosts/alpha");
    for new in [&paths.ca, &paths.cert, &paths.key] {
        let old = of_old.join(new.file_name().unwrap());
        reconfigure(&victim, &format!("{}", old.display()), &format!("{}", new.display()));
    }
    reconfigure(&victim, "[metrics]", &format!("crl = '{}'\n[metrics]", list.display()));
    reload(&victim);
    for (what, remedy) in [
        ("this host's certificate ends soon", "certs renew"),
        ("the last CA certificate that this host trusts ends soon", "rotate-ca"),
    ] {
        let line = victim.logs(|line| line.contains(what)).await;
        assert!(line.contains(remedy) && line.contains("days_left"), "{line}");
    }
    let ends = ["certificate", "authority", "revocation_list"].map(|name| in_days(ends(name)));
    assert_eq!(ends, [5, 10, 3]);
}

/// Files are replaced, one after the other, and nobody says so to the agent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_that_have_changed_are_taken_once_they_are_whole() {
    let victim = Victim::start();
    let (bravo, charlie) = (Attacker::new(&victim, "bravo"), Attacker::new(&victim, "charlie"));
    let revoke = |who: &str| revoke(&victim.pki(), &Revoke::Host(who.into()), 10).unwrap().path;
    let list = revoke("mallory");
    reconfigure(&victim, "[metrics]", &format!("crl = '{}'\n[metrics]", list.display()));
    reload(&victim);
    victim.logs(|line| line.contains("certificates reloaded")).await;
    let reloads = |cause, result| {
        let labels = format!("{{cause=\"{cause}\",result=\"{result}\"}}");
        victim.metric(&format!("vmferry_certificate_reloads_total{labels}"))
    };
    assert_eq!((reloads("signal", "taken"), reloads("files", "taken")), (1.0, 0.0));
    let (revoked, other) = (bravo.session(&victim).await, charlie.session(&victim).await);
    // The list alone: it ends a session, as after a reload.
    revoke("bravo");
    soon("the end of the session", revoked.ended()).await;
    assert_eq!((reloads("files", "taken"), reloads("files", "refused")), (1.0, 0.0));
    // A certificate without its key is half a set.
    let host = victim.pki().join("hosts/alpha");
    let issued = Ca::read(&victim.pki()).issue(&Wish { to_days: 25, ..good("alpha") });
    let place = |file: &str, text: String| {
        let next = host.join("next");
        std::fs::write(&next, text).unwrap();
        std::fs::set_permissions(&next, PermissionsExt::from_mode(0o600)).unwrap();
        std::fs::rename(&next, host.join(file)).unwrap();
    };
    place("cert.pem", pem("CERTIFICATE", &issued.cert));
    let refused = |line: &str| line.contains("have changed and are not taken");
    let line = victim.logs(refused).await;
    assert!(line.contains("key.pem"), "{line}");
    let ends = || victim.metric("vmferry_certificate_expiry_timestamp_seconds") as i64;
    let in_days = |at: i64| (at - time::OffsetDateTime::now_utc().unix_timestamp() + 3600) / 86_400;
    assert_eq!(in_days(ends()), 10, "the old one is in use");
    drop(open_control(&other).await.unwrap());
    // And now it is whole.
    place("key.pem", issued.key.serialize_pem());
    until("the new certificate to be in use", || in_days(ends()) == 25).await;
    assert_eq!((reloads("files", "taken"), reloads("files", "refused")), (2.0, 1.0));
    assert_eq!(victim.log().into_iter().filter(|line| refused(line)).count(), 1, "{:?}", victim.log());
    assert!(other.is_live());
    drop(open_control(&other).await.unwrap());
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
    victim.logs(|line| line.contains("certificates not reloaded") && line.contains("tls.crl")).await;
    assert!(session.is_live() && victim.is_alive());
    session.close(Code::Shutdown, "");
}
