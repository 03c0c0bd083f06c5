//! The source's part: makes the folder and the sockets, has the destination make its own, watches what goes
//! through, renews, and takes everything away on both hosts.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use time::OffsetDateTime;
use uuid::Uuid;

use super::causes;
use super::context::{Context, Untold, target};
use super::error::LibvirtError;
use super::message::{Answer, Ask, DOMAIN_BYTES_MAX, KEPT};
use super::state::{
    Channel, Channels, Ended, HOLD_S_MAX, HoldSeconds, Moved, Request, Role, Stage, State, Told,
};
use super::store::{ACTIVE_MAX, Record};
use super::{folder, libvirtd};
use crate::config::{LocalSocket, SocketMode};
use crate::error_chain::chain;
use crate::forward::{ForwardingStatus, Spec};

/// How long what nobody follows is kept while nothing is connected.
pub(super) const UNFOLLOWED: Duration = Duration::from_secs(10);
/// How long it is waited for a first follower.
const UNFOLLOWED_FIRST: Duration = Duration::from_secs(30);
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Between two requests to keep what is prepared at the destination.
const RENEW_EVERY: Duration = Duration::from_secs(30);
/// Between two tries to tell a destination of an end.
const TELL_EVERY: Duration = Duration::from_secs(3);
/// For its owner, and for whoever is in its group.
const GROUP_MODE: &str = "0660";

/// Asks the destination whether it would be permitted: whether libvirt's own connection, too, and what its
/// host lacks.
pub(super) async fn look(context: &Context, request: &Request) -> Result<(bool, Vec<String>), LibvirtError> {
    check_name(request)?;
    context.peer_for(&request.to, &request.domain)?;
    let ask = Ask::Look { domain: request.there().to_owned(), folder: context.folder.clone() };
    match context.ask(&request.to, Uuid::new_v4(), ask).await? {
        Answer::Looked { rpc, lacks } => Ok((rpc, lacks)),
        _ => Err(LibvirtError::Unexpected { peer: request.to.clone() }),
    }
}

fn check_name(request: &Request) -> Result<(), LibvirtError> {
    let is_name = |name: &str| (1..=DOMAIN_BYTES_MAX).contains(&name.len());
    if is_name(&request.domain) && is_name(request.there()) {
        Ok(())
    } else {
        Err(LibvirtError::Name(DOMAIN_BYTES_MAX))
    }
}

/// Makes everything on both hosts.
pub(super) async fn prepare(context: &Context, request: &Request) -> Result<State, LibvirtError> {
    check_name(request)?;
    let peer = context.peer_for(&request.to, &request.domain)?.identity.to_string();
    let id = Uuid::new_v4();
    let own = folder::of(&context.folder, id);
    folder::make(&own, Role::Source, None).map_err(|source| LibvirtError::Here {
        what: format!("cannot make the folder {}", own.display()),
        remedy: "let the agent's user write into `folder` of [libvirt]".into(),
        source,
    })?;
    let state = State {
        id,
        domain: request.domain.clone(),
        role: Role::Source,
        peer,
        folder: own.clone(),
        stage: Stage::Prepared,
        began_at: OffsetDateTime::now_utc(),
        channels: Channels { rpc: request.rpc.then(Moved::default), ..Channels::default() },
        expected: request.expected,
        causes: Vec::new(),
        ended: None,
        left: Vec::new(),
    };
    let record = Record {
        state,
        to: request.to.clone(),
        forwardings: BTreeMap::new(),
        hold_s: request.hold_s.map(HoldSeconds::get),
    };
    let kept = kept_for(record.hold_s);
    context.store.add(record, kept).inspect_err(|_| drop(folder::remove(&own)))?;
    match prepare_both(context, request, id).await {
        Ok(state) => Ok(state),
        Err(e) => {
            // What the destination has made by then goes as well.
            finish(context, id, Ended::Failed).await;
            Err(e)
        }
    }
}

async fn prepare_both(context: &Context, request: &Request, id: Uuid) -> Result<State, LibvirtError> {
    let own = folder::of(&context.folder, id);
    let ask = Ask::Prepare { domain: request.there().to_owned(), folder: own.clone(), rpc: request.rpc };
    match context.ask(&request.to, id, ask).await? {
        Answer::Prepared => {}
        _ => return Err(LibvirtError::Unexpected { peer: request.to.clone() }),
    }
    let mut forwardings = BTreeMap::new();
    for channel in Channel::ALL.into_iter().filter(|channel| request.rpc || *channel != Channel::Rpc) {
        let socket = channel.socket(&own);
        let spec = spec(context, request, id, channel)?;
        let added = context.forwards.add(spec);
        let added =
            added.map_err(|source| LibvirtError::Forward { socket: socket.display().to_string(), source })?;
        forwardings.insert(channel, added);
        // So that a failure of the next finds this one.
        context.store.change(id, |entry| entry.record.forwardings.clone_from(&forwardings));
    }
    context.store.rewrite(id)?;
    let record = context.store.record(id).ok_or(LibvirtError::Unknown(id))?;
    tracing::info!(migration = %id, domain = request.domain, peer = record.state.peer, rpc = request.rpc, folder = %own.display(), "prepared for libvirt");
    Ok(record.state)
}

/// A socket that libvirt and QEMU may connect to: libvirt's daemon is root, its QEMUs and its users are not.
fn spec(context: &Context, request: &Request, id: Uuid, channel: Channel) -> Result<Spec, LibvirtError> {
    let listen = LocalSocket::Unix(channel.socket(&folder::of(&context.folder, id)));
    let target = target(id, channel).map_err(|_| LibvirtError::Unknown(id))?;
    let group = match channel {
        Channel::Rpc => context.config.client_group.clone(),
        Channel::Ram | Channel::Nbd => libvirtd::qemu_group(context.config.qemu_group.as_deref()),
    };
    let group = group.filter(|group| libvirtd::may_use(group));
    let mode =
        group.as_ref().and_then(|_| SocketMode::try_from(GROUP_MODE.to_owned()).ok()).unwrap_or_default();
    // libvirt gives its peer up when its own connection is silent: it goes before bulk.
    let urgent = channel == Channel::Rpc;
    Ok(Spec { urgent, group, mode, ..Spec::new(listen, &request.to, target) })
}

/// What has gone through at this end; none while everything has stopped.
async fn seen(context: &Context, record: &Record) -> Option<(Channels, Vec<String>)> {
    let mut channels = Channels { rpc: record.state.channels.rpc.clone(), ..Channels::default() };
    let mut reasons = Vec::new();
    for (channel, id) in &record.forwardings {
        let status = context.forwards.status(*id).await;
        if context.is_frozen() {
            return None;
        }
        match status {
            Some(status) => {
                *channels.of(*channel) = moved(&status);
                reasons.extend(causes::of_totals(*channel, &status.totals, &record.state.peer));
            }
            None => reasons.push(format!("the agent has no socket {} any more", channel.file())),
        }
    }
    Some((channels, reasons))
}

fn moved(status: &ForwardingStatus) -> Moved {
    Moved {
        connections: status.totals.opened,
        open: status.open as u64,
        failed: status.totals.failed.values().sum(),
        sent_bytes: status.totals.sent_bytes,
        received_bytes: status.totals.received_bytes,
        replaced: !status.is_intact,
    }
}

/// Looks at a migration, and has it kept at the destination, until it is over.
pub(super) async fn watch(context: Arc<Context>, id: Uuid) {
    tokio::select! {
        () = look_on(&context, id) => {}
        () = renew(&context, id) => {}
    }
}

async fn look_on(context: &Context, id: Uuid) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        if context.is_frozen() {
            continue;
        }
        let Some(record) = context.store.record(id).filter(|r| r.state.stage != Stage::Ended) else { return };
        let Some((channels, reasons)) = seen(context, &record).await else { continue };
        let link = causes::of_link(&context.pool.all(), &record.state.peer);
        let is_over = context.store.change(id, |entry| {
            let is_idle = channels.open() == 0 && !entry.is_ending;
            let state = &mut entry.record.state;
            if channels.is_used() {
                state.stage = Stage::UnderWay;
            }
            state.channels = channels;
            reasons.into_iter().chain(link).for_each(|cause| causes::add(&mut state.causes, cause));
            is_idle && entry.followers == 0 && Instant::now() >= entry.kept_until
        });
        if is_over == Some(true) {
            tracing::warn!(migration = %id, domain = record.state.domain, "nobody follows a migration of libvirt's any more");
            finish(context, id, Ended::Unknown).await;
            return;
        }
    }
}

async fn renew(context: &Context, id: Uuid) {
    loop {
        tokio::time::sleep(RENEW_EVERY).await;
        if context.is_frozen() {
            continue;
        }
        let Some(record) = context.store.record(id) else { return };
        if let Err(e) = context.ask(&record.to, id, Ask::Renew).await
            && !context.is_frozen()
        {
            tracing::warn!(migration = %id, cause = chain(&e), "the destination was not told that a migration of libvirt's goes on");
            context.store.change(id, |entry| causes::add(&mut entry.record.state.causes, chain(&e)));
        }
    }
}

/// What virsh has said, and what must have been seen then.
pub(super) async fn end(context: &Context, id: Uuid, told: Told) -> Result<State, LibvirtError> {
    let record = context.store.record(id).filter(|record| record.state.role == Role::Source);
    let record = record.ok_or(LibvirtError::Unknown(id))?;
    if record.state.stage == Stage::Ended {
        return Ok(record.state);
    }
    let ended = match told {
        Told::Failed => Ended::Failed,
        Told::Unknown => {
            let seen = &record.state.channels;
            if seen.nbd.connections > 0 && seen.ram.connections == 0 {
                let cause = "disks went through the tunnel and no RAM did: if the domain has moved, its RAM took another way";
                context
                    .store
                    .change(id, |entry| causes::add(&mut entry.record.state.causes, cause.to_owned()));
            }
            Ended::Unknown
        }
        Told::Moved(expected) => {
            let channels =
                seen(context, &record).await.map_or_else(|| record.state.channels.clone(), |(c, _)| c);
            let missed = expected.missed(&channels);
            let is_bypassed = !missed.is_empty();
            if is_bypassed {
                tracing::error!(migration = %id, domain = record.state.domain, ?missed, "libvirt has moved a domain past the tunnel");
            }
            context.store.change(id, |entry| {
                missed.into_iter().for_each(|m| causes::add(&mut entry.record.state.causes, m))
            });
            if is_bypassed { Ended::Bypassed } else { Ended::Moved }
        }
    };
    finish(context, id, ended).await.ok_or(LibvirtError::Unknown(id))
}

/// Takes everything away on both hosts; what has become of it.
async fn finish(context: &Context, id: Uuid, ended: Ended) -> Option<State> {
    let first = context.store.change(id, |entry| !std::mem::replace(&mut entry.is_ending, true));
    let record = context.store.record(id)?;
    if first != Some(true) {
        return Some(record.state);
    }
    let mut channels = record.state.channels.clone();
    let mut reasons = Vec::new();
    for (channel, forwarding) in &record.forwardings {
        // Both ends of its connections are closed at once: libvirt must not wait for what is dead.
        if let Some(status) = context.forwards.end(*forwarding).await {
            reasons.extend(causes::of_totals(*channel, &status.totals, &record.state.peer));
            *channels.of(*channel) = Moved { open: 0, ..moved(&status) };
        }
    }
    let mut left = folder::remove(&record.state.folder);
    match context.ask_to_end(&record.to, id, ended).await {
        Ok(Answer::Gone { left: there }) => {
            left.extend(there.into_iter().map(|what| format!("{}: {what}", record.state.peer)));
        }
        Ok(_) => {}
        // It takes away by itself what is not renewed.
        Err(e) => {
            reasons.push(format!(
                "{}; it is told again, and takes its part away by itself in a few minutes",
                chain(&e)
            ));
            let untold = Untold { id, to: record.to.clone(), ended, until: Instant::now() + KEPT };
            let mut all = context.untold.lock().unwrap_or_else(PoisonError::into_inner);
            if all.len() < ACTIVE_MAX {
                all.push(untold);
            }
        }
    }
    let state = context.store.ended(id, |state| {
        state.channels = channels;
        state.ended = Some(ended);
        state.left = left;
        reasons.into_iter().for_each(|cause| causes::add(&mut state.causes, cause));
    });
    tracing::info!(migration = %id, domain = record.state.domain, ended = ended.name(), "a migration of libvirt's is over here");
    state
}

/// Tells destinations of ends that they have not heard of.
pub(super) async fn tell_ends(context: &Context) {
    loop {
        tokio::time::sleep(TELL_EVERY).await;
        let all = context.untold.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for Untold { id, to, ended, until } in all {
            let told = context.ask_to_end(&to, id, ended).await.is_ok();
            if told || Instant::now() >= until {
                context.untold.lock().unwrap_or_else(PoisonError::into_inner).retain(|other| other.id != id);
            }
        }
    }
}

/// How long it is kept without a follower.
fn kept_for(hold_s: Option<u64>) -> Duration {
    hold_s.map_or(UNFOLLOWED_FIRST, |hold_s| Duration::from_secs(hold_s.min(HOLD_S_MAX)))
}

/// Goes on with what an earlier process has left, or takes it away: the sockets say which. Whether there is
/// something to watch.
pub(super) async fn take_up(context: &Context, record: Record) -> bool {
    let id = record.state.id;
    let mut is_there = !record.forwardings.is_empty();
    for forwarding in record.forwardings.values() {
        is_there &= context.forwards.status(*forwarding).await.is_some();
    }
    // Who follows it has lost its connection, and comes again.
    let kept = kept_for(record.hold_s);
    let is_added = context.store.add(record, kept).is_ok();
    if !is_there && is_added {
        tracing::info!(migration = %id, "what a crashed agent had prepared for libvirt is taken away");
        finish(context, id, Ended::Unknown).await;
    }
    is_there && is_added
}
