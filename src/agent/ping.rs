//! The way to a peer, tried; and the probes of peers.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::time::timeout;

use crate::access::{Action, authorize};
use crate::api::{Ping, PingRequest, Probe, ProbeBytes, Reached, Reconnecting};
use crate::config::PeerConfig;
use crate::error_chain::chain;
use crate::migrate::Host;
use crate::mux::{Code, Role, purpose};
use crate::net::identity::Identity;
use crate::net::probe;
use crate::net::purposes::Purposes;
use crate::net::session::{IncomingStream, Session};
use crate::net::trust;
use crate::peer_refusals::Reason;

/// What is sent unless somebody wants otherwise.
const BYTES: u64 = 8 * 1024 * 1024;
/// How long a session may take to come about.
const CONNECT_DEADLINE: Duration = Duration::from_secs(15);

/// Tries the way to a peer.
pub(super) async fn ping(host: &Host, name: &str, config: &PeerConfig, request: &PingRequest) -> Ping {
    let bytes = request.bytes.map_or(BYTES, ProbeBytes::get);
    let identity = &config.identity;
    let ping = |reached, cause| Ping { peer: name.into(), identity: identity.to_string(), reached, cause };
    let pool = &host.pool;
    let was_connected = pool.reachable(identity) == Some(true);
    let began = Instant::now();
    let session = match timeout(CONNECT_DEADLINE, pool.session(identity, config.address.as_deref())).await {
        Ok(Ok(session)) => session,
        Ok(Err(e)) => return ping(None, Some(chain(&e))),
        Err(_) => return ping(None, Some(why_not_in_time(host, identity))),
    };
    let connected_in = (!was_connected).then(|| ms(began.elapsed()));
    let probed = probe::probe(&session, bytes).await;
    let cause = probed.as_ref().err().map(|e| format!("no probe went through: {}", chain(e)));
    let probe = probed.ok().map(|probed| Probe {
        version: probed.answerer.version,
        protocol_min: probed.answerer.protocols.0,
        protocol_max: probed.answerer.protocols.1,
        round_trip_ms: ms(probed.round_trip),
        sent_bytes: probed.sent_bytes,
        bytes_per_s: (probed.sent_bytes as f64 / probed.sent_in.as_secs_f64().max(1e-6)) as u64,
    });
    ping(Some(reached(&session, connected_in, probe).await), cause)
}

/// A session that waits for a connection says why.
fn why_not_in_time(host: &Host, identity: &Identity) -> String {
    let within = format!("not within {} s", CONNECT_DEADLINE.as_secs());
    let sessions = host.pool.all().into_iter().filter(|session| session.info().peer == *identity);
    let away = sessions.filter_map(|session| session.link().away).next();
    match away {
        Some(away) => {
            format!(
                "the connection is lost and has not come back, {within}: {}",
                Reconnecting::from(&away).cause
            )
        }
        None => format!("there was no session, {within}"),
    }
}

async fn reached(session: &Session, connected_in_ms: Option<f64>, probe: Option<Probe>) -> Reached {
    let connection = session.link().connection;
    Reached {
        address: connection.address.to_string(),
        dialed: session.info().role == Role::Dialer,
        connected_in_ms,
        cipher: connection.cipher.clone(),
        certificate: connection.fingerprint(),
        segment_bytes: connection.segment_bytes,
        rtt_ms: session.stats().await.rtt_min.map(ms),
        probe,
    }
}

fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// Peers whose probe is under way: one of each at a time.
#[derive(Debug, Default)]
struct Probing(Mutex<BTreeSet<Identity>>);

impl Probing {
    fn begin(self: &Arc<Self>, peer: &Identity) -> Option<Place> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(peer.clone()).then(|| Place(Arc::clone(self), peer.clone()))
    }
}

struct Place(Arc<Probing>, Identity);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.1);
    }
}

/// Takes the probes of peers.
pub(super) fn accept_probes(purposes: &mut Purposes, host: &Arc<Host>) {
    let (host, probing) = (Arc::clone(host), Arc::new(Probing::default()));
    purposes.register(purpose::PROBE, move |stream| accept(Arc::clone(&host), Arc::clone(&probing), stream));
}

async fn accept(host: Arc<Host>, probing: Arc<Probing>, stream: IncomingStream) {
    let session = stream.session().clone();
    let peer = session.info().peer.clone();
    let what = || "a probe".to_owned();
    if trust::judge(host.pool.endpoint(), &session).is_err() {
        host.refused(&peer, Reason::NotTrusted, what);
        return stream.refuse(Code::Auth);
    }
    if authorize(Action::Probe, host.who(&peer)).is_err() {
        host.refused(&peer, Reason::NotPermitted, what);
        return stream.refuse(Code::Denied);
    }
    let Some(_place) = probing.begin(&peer) else {
        host.refused(&peer, Reason::Quota, || "a second probe beside the first".to_owned());
        return stream.refuse(Code::Limit);
    };
    let Ok(stream) = stream.accept().await else { return };
    tokio::select! {
        () = probe::answer(stream) => {}
        () = host.freeze.begun() => {}
    }
}
