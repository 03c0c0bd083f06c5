//! Certificates that expire while their sessions live: who has no other by then loses the session, and a guest is
//! neither given to such a peer nor taken from it.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;
use time::OffsetDateTime;
use tokio::time::{sleep, timeout};
use uuid::Uuid;
use vmferry::migrate::message::{Asked, Fate, Notice, Reply, Request, Response};
use vmferry::mux::purpose;
use vmferry::net::connect_error::ConnectError;
use vmferry::net::endpoint::Endpoint;
use vmferry::net::handshake_failure::{HandshakeFailure, Refusal, classify_handshake_error};
use vmferry::net::message;
use vmferry::net::session::{IncomingStream, Session};
use vmferry::qemu::{Cont, QueryStatus};

use super::outside_grant::{one_disk, waiting_qemu};
use super::victim::{Attacker, Victim, answer, control, open_control, tls};
use crate::qmp_real::machine::{Machine, binary};
use crate::rig::{blocking, soon, until};
use crate::tls::pki::{Ca, good, load};

/// The agent looks at its sessions each minute from its start on. What has to be found otherwise is not there to be
/// found when the minute ends.
const LOOK_EVERY_S: u64 = 60;
/// What such a test takes at most from there on.
const UNSEEN_S: u64 = 30;

/// Has the peer prove itself anew in this session, with a certificate that ends soon, and waits for that. The next
/// look of the victim's is a while off. Its next proof would be with the same one.
async fn let_expire(victim: &Victim, began: Instant, endpoint: &Endpoint, session: &Session) {
    let second = began.elapsed().as_secs() % LOOK_EVERY_S;
    if second > LOOK_EVERY_S - UNSEEN_S {
        sleep(Duration::from_secs(LOOK_EVERY_S + 1 - second)).await;
    }
    let ca = Ca::read(&victim.pki());
    let name = endpoint.tls().identity.clone();
    // On a busy machine a certificate may be over before it has been shown.
    for life_s in [3, 6, 12, 24] {
        let folder = tempfile::tempdir().unwrap();
        let ends = OffsetDateTime::now_utc() + Duration::from_secs(life_s);
        let Ok(short) = load(folder.path(), &ca.cert, &ca.issue_until(&good(name.as_str()), ends)) else {
            continue;
        };
        let before = session.link().connection.since;
        endpoint.set_tls(short);
        session.renew_connection();
        let mut link = session.watch_link();
        let shown = link.wait_for(|now| now.away.is_none() && now.connection.since != before);
        let shown = timeout(Duration::from_secs(life_s + 1), shown).await.is_ok_and(|shown| shown.is_ok());
        if shown {
            let is_over = || OffsetDateTime::now_utc().unix_timestamp() > ends.unix_timestamp();
            return until("the certificate's end", is_over).await;
        }
    }
    panic!("no certificate was shown in time");
}

/// Who dials with it is told that it has expired.
async fn is_refused_as_expired(attacker: &Attacker, victim: &Victim) {
    let stranger = Attacker::new(victim, "charlie");
    stranger.pool.endpoint().set_tls((*attacker.pool.endpoint().tls()).clone());
    let refused = stranger.dial(victim).await.unwrap_err();
    let ConnectError::Shared(shared) = &refused else { panic!("{refused:?}") };
    let ConnectError::BeforeHello(error) = &**shared else { panic!("{refused:?}") };
    let told = classify_handshake_error(error);
    assert_eq!(told, HandshakeFailure::RefusedByPeer(Refusal::Expired));
}

/// Nobody asks for anything: it is found by the look of each minute.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_whose_certificate_ends_goes_on_with_another_or_ends() {
    let victim = Victim::start_with(|text| text + "[deadlines]\nresume_s = 30\n");
    let began = Instant::now();
    let (bravo, charlie) = (Attacker::new(&victim, "bravo"), Attacker::new(&victim, "charlie"));
    let (renewed, lost) = (bravo.session(&victim).await, charlie.session(&victim).await);
    tokio::join!(
        let_expire(&victim, began, bravo.pool.endpoint(), &renewed),
        let_expire(&victim, began, charlie.pool.endpoint(), &lost)
    );
    // One of them has been given another by now.
    bravo.pool.endpoint().set_tls(tls(&victim.pki(), "bravo"));
    let before = renewed.link().connection.since;
    for peer in ["bravo", "charlie"] {
        let words = format!("a session's peer has to prove itself again peer={peer}");
        let line = victim.logs(|line| line.contains(&words)).await;
        assert!(line.contains("has expired"), "{line}");
    }
    until("the other connection", || {
        let now = renewed.link();
        now.away.is_none() && now.connection.since != before
    })
    .await;
    drop(open_control(&renewed).await.unwrap());
    let sessions = || victim.get("/v1/status")["sessions"].as_array().unwrap().clone();
    until("the end of the session", || sessions().len() == 1).await;
    let shown = sessions();
    assert!(shown[0]["peer"] == "bravo", "{shown:?}");
    is_refused_as_expired(&charlie, &victim).await;
    let counted = "vmferry_connect_failures_total{direction=\"in\",reason=\"expired\"}";
    assert!(victim.metric(counted) >= 1.0);
    assert!(renewed.is_live());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_guest_is_taken_from_a_source_whose_certificate_has_ended() {
    let victim = Victim::start();
    let began = Instant::now();
    let mut qemu = waiting_qemu(&victim).await;
    let bravo = Attacker::new(&victim, "bravo");
    let session = bravo.session(&victim).await;
    let migration = Uuid::new_v4();
    let stream = soon("a control stream", session.open(control(migration))).await.unwrap();
    let (mut sender, mut receiver) = message::split(stream, &session);
    let granted = answer(&mut sender, &mut receiver, Request::Prepare(one_disk())).await;
    assert!(matches!(granted, Response::Prepared(_)), "{granted:?}");
    // As long as it is good, the last one is done as well.
    for request in [Request::Incoming, Request::Switchover] {
        let done = answer(&mut sender, &mut receiver, request).await;
        assert!(matches!(done, Response::Done), "{done:?}");
    }
    let_expire(&victim, began, bravo.pool.endpoint(), &session).await;
    let refused = answer(&mut sender, &mut receiver, Request::Switchover).await;
    let Response::Refused(refusal) = refused else { panic!("{refused:?}") };
    assert!(refusal.text.contains("bravo is not trusted any more"), "{refusal:?}");
    assert!(refusal.text.contains("has expired"), "{refusal:?}");
    let counted = "vmferry_peer_refusals_total{peer=\"bravo\",reason=\"not_trusted\"}";
    assert_eq!(victim.metric(counted), 1.0);
    let result = || victim.get(&format!("/v1/migrations/{migration}"))["outcome"]["result"].clone();
    until("the end at the destination", || result() == "failed").await;
    // And with it that of the QEMU that waited.
    qemu.ended().await;
}

/// A QEMU with a guest that runs, at the monitor that the configuration has for web1.
async fn running_qemu(victim: &Victim) -> Machine {
    let folder = victim.folder.path();
    let monitor = format!("socket,id=agent,path={},server=on,wait=off", folder.join("web1.qmp").display());
    let more = ["-chardev", &monitor, "-mon", "chardev=agent,mode=control"].map(str::to_owned);
    let qemu = Machine::start(&binary("VMFERRY_QEMU10"), folder, "test", &more).await;
    qemu.qmp.execute(Cont).await.unwrap();
    qemu
}

/// A destination that does all that is asked of it, but that its certificate ends meanwhile.
struct Destination {
    victim: Arc<Victim>,
    began: Instant,
    endpoint: Arc<Endpoint>,
    asked: Mutex<Vec<&'static str>>,
}

impl Destination {
    async fn serve(self: Arc<Self>, stream: IncomingStream) {
        match stream.open.purpose {
            purpose::CONTROL => self.answer(stream).await,
            purpose::RAM => take(stream).await,
            other => panic!("a stream of purpose {other}"),
        }
    }

    async fn answer(&self, stream: IncomingStream) {
        let session = stream.session().clone();
        let Ok(stream) = stream.accept().await else { return };
        let (mut sender, mut receiver) = message::split(stream, &session);
        while let Ok(Some(Asked { number, request, .. })) = receiver.recv::<Asked>().await {
            self.asked.lock().unwrap().push(request.name());
            let is_last = matches!(request, Request::Switchover);
            let response = match request {
                Request::Check(_) => Response::Checked(Vec::new()),
                Request::Prepare(_) => {
                    let_expire(&self.victim, self.began, &self.endpoint, &session).await;
                    // Whoever drops the connection from now on is come back to.
                    self.endpoint.set_tls(tls(&self.victim.pki(), "bravo"));
                    let words = r#"{"exports":[],"qemu":"QEMU 10.0.2","restartable":true}"#;
                    Response::Prepared(serde_json::from_str(words).unwrap())
                }
                Request::Start => Response::Fate(Fate::Runs),
                Request::Abort { .. } | Request::Settle => Response::Fate(Fate::NeverRan),
                _ => Response::Done,
            };
            let _ = sender.send(&Reply::Response { number, response }).await;
            if is_last {
                let _ = sender.send(&Reply::Notice(Notice::Loaded)).await;
            }
        }
    }
}

/// Takes the guest's RAM as a QEMU would, and throws it away. What it says to that is that it has come whole.
async fn take(stream: IncomingStream) {
    let Ok(mut stream) = stream.accept().await else { return };
    // QEMU's MIG_RP_MSG_SHUT, of four bytes, without an error.
    let whole: &[u8] = &[0, 1, 0, 4, 0, 0, 0, 0];
    let _ = stream.send.send(whole.into()).await;
    while let Ok(Some(bytes)) = stream.recv.recv().await {
        stream.recv.consumed(bytes.len());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_guest_is_given_to_a_destination_whose_certificate_has_ended() {
    let victim = Arc::new(Victim::start());
    let began = Instant::now();
    let qemu = running_qemu(&victim).await;
    let mut bravo = Attacker::new(&victim, "bravo");
    let _session = bravo.session(&victim).await;
    let endpoint = Arc::clone(bravo.pool.endpoint());
    let destination =
        Arc::new(Destination { victim: Arc::clone(&victim), began, endpoint, asked: Mutex::default() });
    let at_work = Arc::clone(&destination);
    let serving = tokio::spawn(async move {
        while let Some(stream) = bravo.incoming.recv().await {
            tokio::spawn(Arc::clone(&at_work).serve(stream));
        }
    });
    let asking = Arc::clone(&victim);
    let (id, begun) =
        blocking(move || asking.vmferry(&["migrate", "web1", "--to", "bravo", "--detach"])).await;
    assert!(begun, "{id}");
    let now = || victim.get(&format!("/v1/migrations/{}", id.trim()));
    until("the migration's end", || now()["outcome"] != Value::Null).await;
    let (report, asked) = (now(), destination.asked.lock().unwrap().clone());
    assert_eq!(
        (&report["outcome"]["result"], &report["outcome"]["phase"]),
        (&"failed".into(), &"hand-over".into()),
        "{report}"
    );
    let cause = report["outcome"]["cause"].to_string();
    assert!(cause.contains("bravo is not trusted any more") && cause.contains("has expired"), "{report}");
    // Everything was done but the last.
    assert!(asked.contains(&"switchover") && !asked.contains(&"start"), "{asked:?}");
    assert!(qemu.qmp.execute(QueryStatus).await.unwrap().running, "it goes on where it was");
    serving.abort();
}
