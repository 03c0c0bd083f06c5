//! What vmferry is measured against: a pair of relays that copy each local connection over a
//! connection of its own, through TLS or in clear. Same cipher suites, same certificates, same
//! socket options as vmferry; no frames, no streams, no replay.
//!
//! ```text
//! far  --remote SOCKET --listen ADDRESS --tls DIR     TCP (TLS) → unix socket; prints "ready ADDRESS"
//! near --local SOCKET --peer ADDRESS --tls DIR        unix socket → TCP (TLS); prints "ready"
//! ```
//!
//! Every contender of the benchmark is a program with these two faces.

mod ends;
mod relay;

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, Parser};
use ends::{Cli, End};
use relay::{CONGESTION, Credentials, FAR, ready, report};
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional_with_sizes};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::task::JoinSet;
use vmferry::net::handshake::{HANDSHAKE_DEADLINE, accept, connect};
use vmferry::net::identity::Identity;
use vmferry::net::tls::Tls;

#[derive(Args, Clone)]
struct How {
    #[command(flatten)]
    credentials: Credentials,
    /// No TLS at all.
    #[arg(long)]
    clear: bool,
    /// Bytes of each copy buffer.
    #[arg(long, default_value_t = 64 * 1024)]
    buffer: usize,
}

impl How {
    async fn copy<A, B>(&self, mut a: A, mut b: B) -> anyhow::Result<()>
    where
        A: AsyncRead + AsyncWrite + Unpin,
        B: AsyncRead + AsyncWrite + Unpin,
    {
        copy_bidirectional_with_sizes(&mut a, &mut b, self.buffer, self.buffer).await?;
        Ok(())
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    match Cli::<How>::parse().end {
        End::Near { local, peer, how } => near(local, peer, how).await,
        End::Far { remote, listen, how } => far(remote, listen, how).await,
    }
}

async fn near(local: PathBuf, peer: SocketAddr, how: How) -> anyhow::Result<()> {
    let tls = how.credentials.load()?;
    let listener = UnixListener::bind(&local).context("can't listen on the local socket")?;
    ready("")?;
    let mut relays = JoinSet::new();
    loop {
        let (socket, _) = listener.accept().await?;
        let (tls, how) = (tls.clone(), how.clone());
        relays.spawn(async move { report(relay_near(socket, peer, tls, how).await) });
        while relays.try_join_next().is_some() {}
    }
}

async fn relay_near(local: UnixStream, peer: SocketAddr, tls: Tls, how: How) -> anyhow::Result<()> {
    let tcp = TcpStream::connect(peer).await?;
    socket_options(socket2::SockRef::from(&tcp));
    if how.clear {
        return how.copy(local, tcp).await;
    }
    let far: Identity = FAR.parse()?;
    let stream = connect(&tls, tcp, &far, HANDSHAKE_DEADLINE).await?;
    how.copy(local, stream).await
}

async fn far(remote: PathBuf, listen: SocketAddr, how: How) -> anyhow::Result<()> {
    let tls = how.credentials.load()?;
    let listener = TcpListener::bind(listen).await?;
    socket_options(socket2::SockRef::from(&listener));
    ready(&listener.local_addr()?.to_string())?;
    let mut relays = JoinSet::new();
    loop {
        let (tcp, _) = listener.accept().await?;
        let (remote, tls, how) = (remote.clone(), tls.clone(), how.clone());
        relays.spawn(async move { report(relay_far(tcp, remote, tls, how).await) });
        while relays.try_join_next().is_some() {}
    }
}

async fn relay_far(tcp: TcpStream, remote: PathBuf, tls: Tls, how: How) -> anyhow::Result<()> {
    tcp.set_nodelay(true)?;
    if how.clear {
        return how.copy(tcp, UnixStream::connect(&remote).await?).await;
    }
    let (stream, _) = accept(&tls, tcp, HANDSHAKE_DEADLINE).await?;
    how.copy(stream, UnixStream::connect(&remote).await?).await
}

/// As vmferry sets them. An accepted socket inherits the listener's congestion control.
fn socket_options(socket: socket2::SockRef<'_>) {
    if let Err(error) = socket.set_tcp_congestion(CONGESTION.as_bytes()) {
        eprintln!("{CONGESTION} is not to be had ({error}); the system's default is measured");
    }
    if let Err(error) = socket.set_tcp_nodelay(true) {
        eprintln!("TCP_NODELAY: {error}");
    }
}
