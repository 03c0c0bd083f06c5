//! vmferry's own data path with the two faces of `tls_copy.rs`: one session over one TLS
//! connection, a stream and a pump for each local connection. What an agent does with QEMU's
//! sockets, without QEMU.

mod relay;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::{Parser, Subcommand};
use relay::{CONGESTION, Credentials, FAR, ready, report};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use vmferry::mux::{Class, Config, Open, WEIGHT_DEFAULT, purpose};
use vmferry::net::connect::{Endpoint, listen};
use vmferry::net::pool::Pool;
use vmferry::net::pump::{Pump, PumpEnd};
use vmferry::net::session::{IncomingStream, Session};
use vmferry::net::stream::Stream;

/// As the agent's default.
const DEAD_PEER: Duration = Duration::from_secs(5);
/// Streams that the peer has opened and that nobody has looked at yet.
const INCOMING_MAX: usize = 64;

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    end: End,
}

#[derive(Subcommand)]
enum End {
    Near {
        #[arg(long)]
        local: PathBuf,
        #[arg(long)]
        peer: SocketAddr,
        /// The first local connection becomes an urgent stream, as requests between agents are.
        #[arg(long)]
        urgent_first: bool,
        #[command(flatten)]
        credentials: Credentials,
    },
    Far {
        #[arg(long)]
        remote: PathBuf,
        #[command(flatten)]
        credentials: Credentials,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    match Cli::parse().end {
        End::Near { local, peer, urgent_first, credentials } => {
            near(local, peer, urgent_first, &credentials).await
        }
        End::Far { remote, credentials } => far(remote, &credentials).await,
    }
}

/// The agent's pool of sessions, and what the peer opens in them.
fn pool(credentials: &Credentials) -> anyhow::Result<(Pool, mpsc::Receiver<IncomingStream>)> {
    let endpoint = Endpoint::new(credentials.load()?, Config::default(), DEAD_PEER)?;
    let (offers, incoming) = mpsc::channel(INCOMING_MAX);
    let (started, _) = mpsc::unbounded_channel();
    Ok((Pool::new(endpoint.with_congestion(CONGESTION), offers, started), incoming))
}

async fn near(
    local: PathBuf,
    peer: SocketAddr,
    urgent_first: bool,
    credentials: &Credentials,
) -> anyhow::Result<()> {
    let (pool, _unwanted) = pool(credentials)?;
    let session = pool.session(&FAR.parse()?, Some(&peer.to_string())).await?;
    let listener = UnixListener::bind(&local).context("can't listen on the local socket")?;
    ready("")?;
    let mut relays = JoinSet::new();
    let mut class = if urgent_first { Class::Urgent } else { Class::Bulk };
    loop {
        let (socket, _) = listener.accept().await?;
        let session = session.clone();
        let of = std::mem::replace(&mut class, Class::Bulk);
        relays.spawn(async move { report(relay_near(socket, session, of).await) });
        while relays.try_join_next().is_some() {}
    }
}

async fn relay_near(local: UnixStream, session: Session, class: Class) -> anyhow::Result<()> {
    let purpose = match class {
        Class::Urgent => purpose::QMP,
        Class::Bulk => purpose::NBD,
    };
    let open = Open { purpose, class, weight: WEIGHT_DEFAULT, migration: [0; 16], channel: 0 };
    let stream = session.open(open).await?;
    pump(local, stream, &session).await
}

async fn far(remote: PathBuf, credentials: &Credentials) -> anyhow::Result<()> {
    let (pool, mut incoming) = pool(credentials)?;
    let listener = listen("127.0.0.1:0".parse()?)?;
    ready(&listener.local_addr()?.to_string())?;
    let (tcp, _) = listener.accept().await?;
    let session = pool.accept(tcp, |_| true).await?;
    let mut relays = JoinSet::new();
    loop {
        tokio::select! {
            Some(offer) = incoming.recv() => {
                let (remote, session) = (remote.clone(), session.clone());
                relays.spawn(async move { report(relay_far(offer, remote, session).await) });
            }
            end = session.ended() => anyhow::bail!("the session ended: {}", end.cause),
        }
        while relays.try_join_next().is_some() {}
    }
}

async fn relay_far(offer: IncomingStream, remote: PathBuf, session: Session) -> anyhow::Result<()> {
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
