//! A road between two agents: a relay of bytes that can be cut, blocked in one or both
//! directions, and led elsewhere. It knows nothing of what passes.

#![allow(clippy::unwrap_used, dead_code, unreachable_pub)]

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What passes a road on which only little things pass: a handshake, a PING.
const SMALL_BYTES: usize = 4096;

/// What the road does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Lets everything pass.
    Open,
    /// Lets nothing pass, and says nothing: new connections come about and get no answer.
    Hole,
    /// Lets pass only what goes to the far side.
    UpOnly,
    /// Lets pass only what comes from the far side.
    DownOnly,
    /// Lets pass what is small, and of a connection that has tried more nothing any more: what a path
    /// is like that drops full-size packets.
    Small,
    /// Resets the near side's connections; the far side hears nothing.
    ResetNear,
    /// Resets the far side's connections; the near side hears nothing.
    ResetFar,
}

/// The road; clones are the same one.
#[derive(Clone)]
pub struct Road {
    address: SocketAddr,
    target: Arc<Mutex<SocketAddr>>,
    bytes: Arc<AtomicU64>,
    state: watch::Sender<(State, u64)>,
}

impl Road {
    pub async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let road = Self {
            address: listener.local_addr().unwrap(),
            target: Arc::new(Mutex::new(target)),
            bytes: Arc::default(),
            state: watch::Sender::new((State::Open, 0)),
        };
        tokio::spawn(road.clone().accept(listener));
        road
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where new connections go.
    pub fn lead_to(&self, target: SocketAddr) {
        *self.target.lock().unwrap() = target;
    }

    pub fn set(&self, state: State) {
        self.state.send_modify(|now| now.0 = state);
    }

    /// Resets all connections, at both sides.
    pub fn reset(&self) {
        self.state.send_modify(|now| now.1 += 1);
    }

    /// Bytes that have passed so far, both ways.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }

    /// Waits until so many have passed.
    pub async fn passed(&self, bytes: u64) {
        while self.bytes() < bytes {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    async fn accept(self, listener: TcpListener) {
        while let Ok((near, _)) = listener.accept().await {
            tokio::spawn(self.clone().carry(near));
        }
    }

    async fn carry(self, near: TcpStream) {
        let mut state = self.state.subscribe();
        let begun = state.borrow_and_update().1;
        let may_pass = |now: &(State, u64)| matches!(now.0, State::Open | State::Small) || now.1 != begun;
        if state.wait_for(may_pass).await.is_err() {
            return;
        }
        let target = *self.target.lock().unwrap();
        let Ok(far) = TcpStream::connect(target).await else { return reset(&near) };
        for tcp in [&near, &far] {
            tcp.set_nodelay(true).unwrap();
        }
        // Kept here as well: what is dropped is closed in order, and that would be a word.
        let kept = [SockRef::from(&near).try_clone().unwrap(), SockRef::from(&far).try_clone().unwrap()];
        let (near_in, near_out) = near.into_split();
        let (far_in, far_out) = far.into_split();
        let up = tokio::spawn(self.clone().pass(near_in, far_out, State::UpOnly));
        let down = tokio::spawn(self.clone().pass(far_in, near_out, State::DownOnly));
        let cut = state
            .wait_for(|(state, resets)| {
                *resets != begun || matches!(state, State::ResetNear | State::ResetFar)
            })
            .await
            .map_or(State::Open, |now| now.0);
        up.abort();
        down.abort();
        let [near, far] = kept;
        let ends: &[&socket2::Socket] = match cut {
            State::ResetNear => &[&near],
            State::ResetFar => &[&far],
            _ => &[&near, &far],
        };
        for end in ends {
            let _ = end.set_linger(Some(Duration::ZERO));
        }
        let _ = (up.await, down.await);
        match cut {
            State::ResetNear => {
                drop(near);
                std::mem::forget(far);
            }
            State::ResetFar => {
                drop(far);
                std::mem::forget(near);
            }
            _ => drop((near, far)),
        }
    }

    /// Passes bytes on while the road is open for them.
    async fn pass(self, mut from: OwnedReadHalf, mut to: OwnedWriteHalf, this_way_only: State) {
        let mut state = self.state.subscribe();
        let mut buffer = vec![0; 1 << 16];
        loop {
            let Ok(n) = from.read(&mut buffer).await else { return std::future::pending().await };
            let passes = |state: State| match state {
                State::Open => true,
                State::Small => n <= SMALL_BYTES,
                state => state == this_way_only,
            };
            if state.wait_for(|now| passes(now.0)).await.is_err() || n == 0 {
                let _ = to.shutdown().await;
                return std::future::pending().await;
            }
            self.bytes.fetch_add(n as u64, Relaxed);
            if to.write_all(&buffer[..n]).await.is_err() {
                return std::future::pending().await;
            }
        }
    }
}

fn reset(tcp: &TcpStream) {
    let _ = SockRef::from(tcp).set_linger(Some(Duration::ZERO));
}
