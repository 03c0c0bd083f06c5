//! The destination's part: says whether a peer's libvirt may move a domain here, makes the folder, grants the
//! sockets in it for as long as it is asked to, and takes everything away.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use time::OffsetDateTime;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::context::{Context, target};
use super::message::{Answer, Ask, DOMAIN_BYTES_MAX, KEPT, Refused};
use super::state::{Channel, Channels, Ended, Moved, Role, Stage, State};
use super::store::Record;
use super::{folder, libvirtd};
use crate::access::{Action, Who, authorize};
use crate::config::LocalSocket;
use crate::error_chain::chain;
use crate::forward::{Grant, TargetStatus, Totals};
use crate::net::identity::Identity;
use crate::net::message::{self, MessageError};
use crate::net::session::IncomingStream;
use crate::peer_refusals::Reason;

/// How long a peer may take for its question.
const ASK_DEADLINE: Duration = Duration::from_secs(30);
/// How long a question is still waited for when everything is about to stop.
const LAST_ASK: Duration = Duration::from_secs(1);
/// For the word how it ended, which follows at once if it does.
const HOW_DEADLINE: Duration = Duration::from_secs(2);
/// Between two looks at it.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Serves a question of a peer.
pub(super) async fn serve(context: Arc<Context>, stream: IncomingStream) {
    let id = Uuid::from_bytes(stream.open.migration);
    let peer = stream.session().info().peer.clone();
    let session = stream.session().clone();
    let (who, what) =
        (Who::Peer(context.peer_of(&peer)), || format!("a question about migration {id} of libvirt's"));
    let accepted = context.control_streams.accept(stream, who, what).await;
    let Some((stream, _place)) = accepted else { return };
    let (mut sender, mut receiver) = message::split(stream, &session);
    let asked = tokio::select! {
        asked = timeout(ASK_DEADLINE, receiver.recv::<Ask>()) => asked,
        // What was asked just now is still heard. The next process is asked again.
        () = async { context.ends().await; sleep(LAST_ASK).await } => return,
    };
    let ask = match asked {
        Ok(Ok(Some(ask))) => ask,
        Ok(Err(e)) => {
            let reason = match e {
                MessageError::Json(_) | MessageError::TooLong(_) => Reason::NotUnderstood,
                MessageError::Ended(_) | MessageError::Truncated => Reason::NothingAsked,
            };
            return context.refusals.refused(&peer, reason, || format!("{}: {}", what(), chain(&e)));
        }
        Ok(Ok(None)) | Err(_) => return context.refusals.refused(&peer, Reason::NothingAsked, what),
    };
    let answer = match ask {
        Ask::Look { domain, folder } => look(&context, &peer, &domain, &folder),
        Ask::Prepare { domain, folder, rpc } => prepare(&context, &peer, id, &domain, &folder, rpc),
        Ask::Renew => renew(&context, &peer, id).await,
        Ask::End => {
            let how = timeout(HOW_DEADLINE, receiver.recv::<Ended>()).await;
            let how = how.ok().and_then(Result::ok).flatten().unwrap_or(Ended::Unknown);
            Ok(Answer::Gone { left: end_for(&context, &peer, id, how) })
        }
    };
    let answer = answer.unwrap_or_else(|No { reason, said }| {
        let what = || format!("migration {id} of libvirt's: {}", said.text);
        if let Some(unsaid) = context.refusals.to_be_said(&peer, reason, what) {
            let cause = &said.text;
            tracing::warn!(%peer, migration = %id, reason = reason.label(), cause, unsaid, "a migration of libvirt's was refused");
        }
        Answer::Refused(said)
    });
    if let Err(e) = sender.send(&answer).await {
        tracing::debug!(%peer, error = chain(&e), "the peer does not hear us");
    }
    sender.finish();
}

/// An answer that says no.
struct No {
    reason: Reason,
    said: Refused,
}

fn refused(text: impl Into<String>, remedy: impl Into<String>) -> No {
    No { reason: Reason::NotPossible, said: Refused { text: text.into(), remedy: remedy.into() } }
}

fn denied(text: impl Into<String>, remedy: impl Into<String>) -> No {
    No { reason: Reason::NotPermitted, ..refused(text, remedy) }
}

/// Whether this peer may; whether libvirt's own connection, too.
fn permitted(context: &Context, peer: &Identity, domain: &str, folder: &Path) -> Result<bool, No> {
    if domain.is_empty() || domain.len() > DOMAIN_BYTES_MAX {
        return Err(refused(
            format!("a domain's name has 1 to {DOMAIN_BYTES_MAX} bytes"),
            "give the domain's name",
        ));
    }
    let who = Who::Peer(context.peer_of(peer));
    if authorize(Action::MoveDomain(domain), who).is_err() {
        return Err(denied(
            format!("{} does not permit {peer} to move domain {domain} to it by libvirt", context.identity),
            format!(
                "add a pattern for it to `libvirt` of that peer in the configuration of {}",
                context.identity
            ),
        ));
    };
    if folder != context.folder {
        return Err(refused(
            format!(
                "libvirt needs the same path on both hosts, and {} has its folders in {}, not in {}",
                context.identity,
                context.folder.display(),
                folder.display()
            ),
            "set `folder` in [libvirt] to the same on both hosts",
        ));
    }
    Ok(authorize(Action::ReachLibvirt(domain), who).is_ok())
}

fn look(context: &Context, peer: &Identity, domain: &str, folder: &Path) -> Result<Answer, No> {
    let rpc = permitted(context, peer, domain, folder)?;
    let socket = rpc.then(|| libvirtd::socket(context.config.socket.as_deref()));
    let group = libvirtd::qemu_group(context.config.qemu_group.as_deref());
    let mut lacks = libvirtd::lacks(socket.as_deref(), group.as_deref());
    if rpc && !libvirtd::is_known_user() {
        lacks.push(
            "the system does not know the agent's user by name, and libvirt asks for that of its clients"
                .into(),
        );
    }
    Ok(Answer::Looked { rpc, lacks })
}

fn prepare(
    context: &Arc<Context>,
    peer: &Identity,
    id: Uuid,
    domain: &str,
    folder: &Path,
    rpc: bool,
) -> Result<Answer, No> {
    let above = folder.parent().unwrap_or(Path::new("/"));
    let may_rpc = permitted(context, peer, domain, above)?;
    // Which path that is, this host says.
    let folder = folder::of(&context.folder, id);
    if rpc && !may_rpc {
        return Err(denied(
            format!("{} does not let {peer} reach its libvirt", context.identity),
            format!(
                "give the URI of its libvirt, as in --dest-uri qemu+ssh://{0}/system, or set `libvirt_rpc = true` for that \
                 peer in the configuration of {0}: then the peer's libvirt may do everything with that of {0}",
                context.identity
            ),
        ));
    }
    let group = libvirtd::qemu_group(context.config.qemu_group.as_deref());
    folder::make(&folder, Role::Destination, group.as_deref()).map_err(|e| not_made(context, &folder, &e))?;
    let state = State {
        id,
        domain: domain.to_owned(),
        role: Role::Destination,
        peer: peer.to_string(),
        folder: folder.clone(),
        stage: Stage::Prepared,
        began_at: OffsetDateTime::now_utc(),
        channels: Channels { rpc: rpc.then(Moved::default), ..Channels::default() },
        expected: None,
        causes: Vec::new(),
        ended: None,
        left: Vec::new(),
    };
    let record = Record { state, to: String::new(), forwardings: BTreeMap::new(), hold_s: None };
    let undone = |e: &dyn std::fmt::Display, remedy: String| {
        folder::remove(&folder);
        refused(e.to_string(), remedy)
    };
    context.store.add(record, KEPT).map_err(|e| undone(&chain(&e), e.remedy()))?;
    if let Err(e) = grant_all(context, peer, id, &folder, rpc) {
        take_away(context, id, Ended::Failed);
        return Err(refused(e, "look at the log of that agent"));
    }
    tracing::info!(%peer, migration = %id, domain, rpc, folder = %folder.display(), "prepared for libvirt");
    Ok(Answer::Prepared)
}

fn not_made(context: &Context, folder: &Path, error: &std::io::Error) -> No {
    let there = folder.display();
    // The source has made it just now, under a name that nobody had before.
    if error.kind() == std::io::ErrorKind::AlreadyExists {
        return refused(
            format!(
                "{} sees the folder {there} that the source has made: both hosts share it, so libvirt would connect past the tunnel",
                context.identity
            ),
            "put `folder` in [libvirt] where each host has a file system of its own, as /run is",
        );
    }
    refused(
        format!("{} cannot make the folder {there}: {error}", context.identity),
        "let the agent's user be in QEMU's group, and write into `folder` of [libvirt]: deploy/README.md has libvirt's hosts",
    )
}

fn grant_all(context: &Context, peer: &Identity, id: Uuid, folder: &Path, rpc: bool) -> Result<(), String> {
    for channel in Channel::ALL {
        let connect = match channel {
            Channel::Rpc if !rpc => continue,
            Channel::Rpc => libvirtd::socket(context.config.socket.as_deref()),
            Channel::Ram | Channel::Nbd => channel.socket(folder),
        };
        let name = target(id, channel).map_err(|e| e.to_string())?;
        // QEMU listens for RAM before any disk is connected. If it does not, its RAM would come by a port of
        // the network: without disks libvirt gives up before.
        let beside = (channel == Channel::Nbd).then(|| Channel::Ram.socket(folder));
        let connect = LocalSocket::Unix(connect);
        let grant = Grant { name, connect, peer: peer.clone(), beside, within: KEPT };
        context.forwards.grant(grant).map_err(|e| chain(&e))?;
    }
    Ok(())
}

async fn renew(context: &Context, peer: &Identity, id: Uuid) -> Result<Answer, No> {
    let gone = || {
        refused(
            format!("{} has taken away what it had prepared", context.identity),
            "its log says why; begin again",
        )
    };
    let record = context.store.record(id).filter(|record| is_of(record, peer)).ok_or_else(gone)?;
    for channel in Channel::ALL {
        if let Ok(name) = target(id, channel) {
            context.forwards.prolong(&name, KEPT);
        }
    }
    context.store.change(id, |entry| entry.kept_until = Instant::now() + KEPT);
    let _ = record;
    let channels = seen(context, id).await;
    Ok(Answer::Renewed { channels })
}

fn is_of(record: &Record, peer: &Identity) -> bool {
    let state = &record.state;
    state.role == Role::Destination && state.stage != Stage::Ended && state.peer == peer.as_str()
}

fn end_for(context: &Context, peer: &Identity, id: Uuid, how: Ended) -> Vec<String> {
    match context.store.record(id) {
        Some(record) if is_of(&record, peer) => take_away(context, id, how),
        _ => Vec::new(),
    }
}

/// What has gone through at this end.
async fn seen(context: &Context, id: Uuid) -> Channels {
    let targets = context.forwards.targets().await;
    let of = |channel| {
        let name = target(id, channel).ok()?;
        targets.iter().find(|status| status.name == name.as_str()).map(moved)
    };
    Channels {
        rpc: of(Channel::Rpc),
        ram: of(Channel::Ram).unwrap_or_default(),
        nbd: of(Channel::Nbd).unwrap_or_default(),
    }
}

fn moved(status: &TargetStatus) -> Moved {
    Moved { open: status.open as u64, ..moved_in_all(&status.totals) }
}

fn moved_in_all(totals: &Totals) -> Moved {
    Moved {
        connections: totals.opened,
        open: 0,
        failed: totals.failed.values().sum(),
        sent_bytes: totals.sent_bytes,
        received_bytes: totals.received_bytes,
        replaced: false,
    }
}

/// Ends grants and connections, takes the sockets away; what could not be.
pub(super) fn take_away(context: &Context, id: Uuid, ended: Ended) -> Vec<String> {
    let Some(record) = context.store.record(id) else { return Vec::new() };
    let mut channels = Channels::default();
    for channel in Channel::ALL {
        let revoked = target(id, channel).ok().and_then(|name| context.forwards.revoke(&name));
        if let Some(totals) = revoked {
            *channels.of(channel) = moved_in_all(&totals);
        }
    }
    let left = folder::remove(&record.state.folder);
    if !left.is_empty() {
        tracing::warn!(migration = %id, ?left, "something of a migration of libvirt's is left");
    }
    context.store.ended(id, |state| {
        state.channels = channels;
        state.ended = Some(ended);
        state.left.clone_from(&left);
    });
    tracing::info!(migration = %id, domain = record.state.domain, ended = ended.name(), "what was prepared for libvirt is taken away");
    left
}

/// Looks at what is prepared here, and takes away what nobody renews or uses.
pub(super) async fn watch(context: &Context) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        if context.is_frozen() {
            continue;
        }
        let all = context.store.all().into_iter();
        for state in all.filter(|s| s.role == Role::Destination && s.stage != Stage::Ended) {
            let channels = seen(context, state.id).await;
            if context.is_frozen() {
                break;
            }
            let is_idle = channels.open() == 0;
            let is_over = context.store.change(state.id, |entry| {
                if channels.is_used() {
                    entry.record.state.stage = Stage::UnderWay;
                }
                entry.record.state.channels = channels;
                is_idle && Instant::now() >= entry.kept_until
            });
            if is_over == Some(true) {
                tracing::warn!(migration = %state.id, peer = state.peer, "nobody has renewed a migration of libvirt's");
                take_away(context, state.id, Ended::Unknown);
            }
        }
    }
}

/// Goes on with what an earlier process has left, or takes it away: the grants say which.
pub(super) async fn take_up(context: &Context, record: Record) {
    let id = record.state.id;
    let name = target(id, Channel::Ram).map(|name| name.to_string()).unwrap_or_default();
    let is_granted = context.forwards.targets().await.iter().any(|status| status.name == name);
    if is_granted && context.store.add(record.clone(), KEPT).is_ok() {
        return;
    }
    let left = folder::remove(&record.state.folder);
    context.store.forget_file(id);
    tracing::info!(migration = %id, ?left, "what a crashed agent had prepared for libvirt is taken away");
}
