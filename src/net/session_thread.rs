//! How a session begins, new or left by another process, and the thread that runs its driver.
//!
//! Each session has a thread with a runtime of its own: the driver and the pumps of its
//! streams share one core's cache and wake each other without crossing threads, and a session
//! that ends takes its pumps, and with them every local socket they hold, along.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{mpsc, oneshot, watch};

use super::connection::{ConnectionInfo, Established};
use super::driver::{Beginning, Driver};
use super::endpoint::Endpoint;
use super::frozen::{FrozenSession, FrozenStream};
use super::identity::Identity;
use super::link::{EndCause, LinkState, SessionEnd};
use super::message_budget::MessageBudget;
use super::resume::Redial;
use super::session::{IncomingStream, Session, SessionInfo};
use super::stream::{Command, Stream};
use super::stream_port::Ports;
use crate::mux::{self, Code, Role, StreamId};

/// Tasks polled until the kernel is asked for events while there is always something to do: each
/// moves up to a batch, and what has arrived meanwhile waits.
const POLLS_PER_WAIT: u32 = 8;

/// Starts the driver of an established connection on a thread of its own. Streams that the
/// peer opens arrive on `incoming`; when that is full they are refused.
/// Errors: the operating system gives no further thread or descriptor.
pub(super) fn start(
    established: Established,
    endpoint: &Arc<Endpoint>,
    incoming: mpsc::Sender<IncomingStream>,
    messages: MessageBudget,
) -> std::io::Result<Session> {
    let Established { connection, peer, role, negotiated, key, address } = established;
    let now = Instant::now();
    let info = connection.info.clone();
    let beginning = Beginning {
        core: mux::Session::new(role, endpoint.config().clone(), &negotiated, now),
        connection: Some(connection),
        ports: Ports::default(),
        redial: redial(endpoint, address, &peer),
        generation: 0,
        resume_within: endpoint.resume_within(),
        incoming,
    };
    run(beginning, SessionInfo { peer, role, since: now, key, messages }, info, mpsc::unbounded_channel())
}

/// Takes up a session that another process has left, with those of its streams that have an
/// owner, in the order of `owned`; the others are ended. It waits for a connection at first.
pub(super) fn thaw(
    frozen: FrozenSession,
    owned: Vec<FrozenStream>,
    endpoint: &Arc<Endpoint>,
    incoming: mpsc::Sender<IncomingStream>,
    messages: MessageBudget,
) -> std::io::Result<(Session, Vec<Stream>)> {
    let (now, key, since) = (Instant::now(), frozen.key(), frozen.since());
    let FrozenSession { peer, is_dialer, generation, address, connection, core, backlogs, .. } = frozen;
    let role = if is_dialer { Role::Dialer } else { Role::Acceptor };
    let has_owner = |id: &StreamId| owned.iter().any(|stream| stream.id() == id.0);
    let orphans: Vec<StreamId> = core.established().filter(|id| !has_owner(id)).collect();
    let unanswered: Vec<bool> = owned.iter().map(|stream| core.is_opening(StreamId(stream.id()))).collect();
    let mut core = mux::Session::from_snapshot(endpoint.config().clone(), core, now);
    for id in orphans {
        core.reset(id, Code::Cancelled);
    }
    let (commands, queue) = mpsc::unbounded_channel();
    let mut ports = Ports::default();
    let handles = owned.iter().zip(unanswered).map(|(stream, unanswered)| {
        let (tell, accepted) = unanswered.then(oneshot::channel).unzip();
        (ports.open(StreamId(stream.id()), tell), accepted)
    });
    let handles: Vec<_> = handles.collect();
    backlogs.into_iter().for_each(|backlog| backlog.thaw(&mut ports));
    let streams = owned.into_iter().zip(handles).map(|(stream, ((inbox, shared), accepted))| {
        let id = StreamId(stream.id());
        Stream::new(id, commands.clone(), inbox, shared, accepted).taken_up(stream.thaw(&mut ports))
    });
    let streams = streams.collect();
    let beginning = Beginning {
        connection: None,
        core,
        ports,
        redial: redial(endpoint, address, &peer),
        generation,
        resume_within: endpoint.resume_within(),
        incoming,
    };
    let info = SessionInfo { peer, role, since, key, messages };
    Ok((run(beginning, info, connection.thaw(), (commands, queue))?, streams))
}

fn redial(endpoint: &Arc<Endpoint>, address: Option<String>, peer: &Identity) -> Option<Redial> {
    Some(Redial { endpoint: Arc::clone(endpoint), address: address?, peer: peer.clone() })
}

fn run(
    beginning: Beginning,
    info: SessionInfo,
    connection: ConnectionInfo,
    (commands, queue): (mpsc::UnboundedSender<Command>, mpsc::UnboundedReceiver<Command>),
) -> std::io::Result<Session> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().event_interval(POLLS_PER_WAIT).enable_all().build()?;
    let (end, ended) = watch::channel(None);
    let (state, link) = watch::channel(LinkState { away: None, connection: Arc::new(connection) });
    let session = Session::new(commands, runtime.handle().clone(), Arc::new(info), link, ended);
    let handle = session.clone();
    let drive = async move {
        match Driver::new(beginning, (handle, queue), state) {
            Ok(driver) => driver.run().await,
            Err(e) => SessionEnd { cause: EndCause::Io(e), stats: mux::Stats::default() },
        }
    };
    std::thread::Builder::new().name("vmferry-session".into()).spawn(move || {
        // A task among the pumps: the runtime asks the kernel for events before it polls what it
        // blocks on, which would be a system call for each chunk.
        match runtime.block_on(runtime.spawn(drive)) {
            Ok(session_end) => drop(end.send_replace(Some(Arc::new(session_end)))),
            Err(e) => {
                if let Ok(panic) = e.try_into_panic() {
                    std::panic::resume_unwind(panic);
                }
            }
        }
    })?;
    Ok(session)
}
