//! vmferry's own data path with the two faces of `tls_copy.rs`: one session over one TLS
//! connection, a stream and a pump for each local connection. What an agent does with QEMU's
//! sockets, without QEMU.

mod ends;
mod relay;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Parser};
use ends::{Cli, End};
use relay::{CONGESTION, Credentials, FAR, ready, report};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use vmferry::mux::{Class, Code, Config, Name, Open, OpenError, WEIGHT_DEFAULT, purpose};
use vmferry::net::accept::listen;
use vmferry::net::endpoint::Endpoint;
use vmferry::net::pool::Pool;
use vmferry::net::pump::{Pump, PumpEnd};
use vmferry::net::session::{IncomingStream, OpenStreamError, Session};
use vmferry::net::stream::{Stream, StreamEnded};

/// As the agent's default.
const DEAD_PEER: Duration = Duration::from_secs(5);
/// Streams that the peer has opened and that nobody has looked at yet.
const INCOMING_MAX: usize = 64;
/// Between two attempts to open a stream.
const OPEN_PAUSE: Duration = Duration::from_millis(20);

#[derive(Args)]
struct How {
    #[command(flatten)]
    kind: Kind,
    #[command(flatten)]
    credentials: Credentials,
}

/// What streams are opened for: disks, unless told otherwise.
#[derive(Args, Clone, Copy)]
struct Kind {
    /// The first local connection becomes an urgent stream, as requests between agents are.
    #[arg(long)]
    urgent_first: bool,
    /// The others are the guest's memory.
    #[arg(long)]
    ram: bool,
}

impl Kind {
    fn of(self, is_first: bool) -> (Class, u16) {
        match self {
            Self { urgent_first: true, .. } if is_first => (Class::Urgent, purpose::QMP),
            Self { ram: true, .. } => (Class::Bulk, purpose::RAM),
            _ => (Class::Bulk, purpose::NBD),
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    match Cli::<How>::parse().end {
        End::Near { local, peer, how } => near(local, peer, how.kind, &how.credentials).await,
        End::Far { remote, listen, how } => far(remote, listen, &how.credentials).await,
    }
}

/// The agent's pool of sessions, and what the peer opens in them.
fn pool(credentials: &Credentials) -> anyhow::Result<(Pool, mpsc::Receiver<IncomingStream>)> {
    let endpoint = Endpoint::new(credentials.load()?, Config::default(), DEAD_PEER)?;
    let (offers, incoming) = mpsc::channel(INCOMING_MAX);
    let (started, _) = mpsc::unbounded_channel();
    Ok((Pool::new(endpoint.with_congestion(CONGESTION), offers, started), incoming))
}

async fn near(local: PathBuf, peer: SocketAddr, kind: Kind, credentials: &Credentials) -> anyhow::Result<()> {
    let (pool, _unwanted) = pool(credentials)?;
    let session = pool.session(&FAR.parse()?, Some(&peer.to_string())).await?;
    let listener = UnixListener::bind(&local).context("can't listen on the local socket")?;
    ready("")?;
    let mut relays = JoinSet::new();
    let mut is_first = true;
    loop {
        let (socket, _) = listener.accept().await?;
        let session = session.clone();
        let of = kind.of(std::mem::take(&mut is_first));
        relays.spawn(async move { report(relay_near(socket, session, of).await) });
        while relays.try_join_next().is_some() {}
    }
}

async fn relay_near(local: UnixStream, session: Session, of: (Class, u16)) -> anyhow::Result<()> {
    let (class, purpose) = of;
    let open =
        Open { purpose, class, weight: WEIGHT_DEFAULT, migration: [0; 16], channel: 0, name: Name::NONE };
    let stream = loop {
        match session.open(open).await {
            // An agent opens streams at the rate that a peer allows; so do we.
            Err(e) if is_too_fast(&e) => tokio::time::sleep(OPEN_PAUSE).await,
            opened => break opened?,
        }
    };
    pump(local, stream, &session).await
}

fn is_too_fast(error: &OpenStreamError) -> bool {
    matches!(
        error,
        OpenStreamError::Limit { source: OpenError::Rate | OpenError::Pending { .. }, .. }
            | OpenStreamError::Refused { source: StreamEnded(Code::Limit), .. }
    )
}

async fn far(remote: PathBuf, at: SocketAddr, credentials: &Credentials) -> anyhow::Result<()> {
    let (pool, mut incoming) = pool(credentials)?;
    let pool = Arc::new(pool);
    let listener = listen(at)?;
    ready(&listener.local_addr()?.to_string())?;
    let mut relays = JoinSet::new();
    loop {
        let (pool, remote) = (Arc::clone(&pool), remote.clone());
        tokio::select! {
            // The first connection begins the session, a later one goes on with it.
            accepted = listener.accept() => {
                let (tcp, _) = accepted?;
                relays.spawn(async move {
                    report(pool.accept(tcp, |_| true).await.map(drop).map_err(Into::into));
                });
            }
            Some(offer) = incoming.recv() => {
                relays.spawn(async move { report(relay_far(offer, remote).await) });
            }
        }
        while relays.try_join_next().is_some() {}
    }
}

async fn relay_far(offer: IncomingStream, remote: PathBuf) -> anyhow::Result<()> {
    let session = offer.session().clone();
    let remote = UnixStream::connect(&remote).await?;
    let stream = offer.accept().await?;
    pump(remote, stream, &session).await
}

/// Pumps until both directions have ended.
async fn pump(local: UnixStream, stream: Stream, session: &Session) -> anyhow::Result<()> {
    let (tell, ended) = oneshot::channel();
    let local = local.into_std()?.into();
    let _pump = Pump::start(session.runtime(), local, stream, move |end| drop(tell.send(end)));
    match ended.await? {
        PumpEnd::Finished => Ok(()),
        end => Err(end.into()),
    }
}
