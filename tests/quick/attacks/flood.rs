//! Floods of connections by who proves nothing, from the address that honest peers come from, over a path of
//! 50 ms: every honest handshake comes about.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use vmferry::mux::Code;

use super::victim::{Attacker, Victim, tls};
use crate::rig::{LATE, soon};

/// A relay at which everything takes its time, each way.
async fn slow_road(target: SocketAddr, one_way: Duration) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            tokio::spawn(async move {
                let Ok(far) = TcpStream::connect(target).await else { return };
                let (near, far) = (near.into_split(), far.into_split());
                tokio::join!(carry(near.0, far.1, one_way), carry(far.0, near.1, one_way));
            });
        }
    });
    address
}

async fn carry(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    takes: Duration,
) {
    let (sender, mut under_way) = mpsc::unbounded_channel();
    let read = async move {
        loop {
            let mut bytes = vec![0; 16 * 1024];
            let n = from.read(&mut bytes).await.unwrap_or(0);
            bytes.truncate(n);
            if sender.send((Instant::now() + takes, bytes)).is_err() || n == 0 {
                return;
            }
        }
    };
    let write = async move {
        while let Some((at, bytes)) = under_way.recv().await {
            sleep_until(at).await;
            if bytes.is_empty() || to.write_all(&bytes).await.is_err() {
                return;
            }
        }
    };
    tokio::join!(read, write);
}

/// A whole ClientHello of somebody who never goes on.
pub(super) fn client_hello(victim: &Victim) -> Vec<u8> {
    let config = Arc::clone(&tls(&victim.pki(), "mallory").client);
    let name = ServerName::try_from("alpha").unwrap();
    let mut client = rustls::ClientConnection::new(config, name).unwrap();
    let mut hello = Vec::new();
    client.write_tls(&mut hello).unwrap();
    hello
}

/// A flood that is under way.
struct Flood {
    stop: AtomicBool,
    made: AtomicUsize,
    per_second: AtomicU32,
}

/// Connects so many times a second until it is told to stop, says `what`, and holds on. What a busy machine has
/// kept it from is not made up for: that would be a burst, and another attack.
fn flood(to: SocketAddr, per_second: u32, what: Vec<u8>) -> Arc<Flood> {
    let (stop, made) = (AtomicBool::new(false), AtomicUsize::new(0));
    let flood = Arc::new(Flood { stop, made, per_second: AtomicU32::new(per_second) });
    let own = Arc::clone(&flood);
    std::thread::spawn(move || {
        // So many that the agent, not this end, lets go of them.
        let mut held = std::collections::VecDeque::new();
        let mut due = std::time::Instant::now();
        while !own.stop.load(Relaxed) {
            let now = std::time::Instant::now();
            if due <= now {
                let each = Duration::from_secs(1) / own.per_second.load(Relaxed);
                due = (due + each).max(now - Duration::from_millis(5));
                if let Ok(mut stream) = std::net::TcpStream::connect(to) {
                    let _ = stream.write_all(&what);
                    held.push_back(stream);
                    own.made.fetch_add(1, Relaxed);
                }
                if held.len() > 300 {
                    held.pop_front();
                }
            } else {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    });
    flood
}

/// Places of one network among those that have said nothing whole, and among those that have (src/net/pool.rs).
const SILENT_PLACES: usize = 384;
const SPEAKING_PLACES: usize = 192;

/// `places`: what one network has of the room that is flooded. While an honest handshake lasts, the flood's rate makes
/// fewer connections than that, unless the machine is so busy that the handshake takes several times the path's time, or
/// longer than it may: then nothing is promised, and another one is made, beside half as many until there are few.
async fn all_come_through(per_second: u32, places: usize, what: impl FnOnce(&Victim) -> Vec<u8>) {
    const HONEST: usize = 24;
    const FEW: u32 = 100;
    let victim = Victim::start();
    let road = slow_road(victim.address, Duration::from_millis(25)).await;
    let flood = flood(victim.address, per_second, what(&victim));
    let made = || flood.made.load(Relaxed);
    let honest = Attacker::new(&victim, "bravo");
    let alpha = "alpha".parse().unwrap();
    let mut failed = Vec::new();
    let (mut came, mut not_promised) = (0, 0);
    soon("honest handshakes", async {
        while came < HONEST || made() < 1500 {
            let (before, begun) = (made(), Instant::now());
            match honest.pool.session(&alpha, Some(&road.to_string())).await {
                Ok(session) => {
                    came += 1;
                    session.close(Code::Shutdown, "the next one is dialed anew");
                    session.ended().await;
                }
                Err(_) if made() - before >= places || begun.elapsed() > LATE => {
                    not_promised += 1;
                    let fewer = (flood.per_second.load(Relaxed) / 2).max(FEW);
                    flood.per_second.store(fewer, Relaxed);
                }
                Err(error) => failed.push(vmferry::error_chain::chain(&error)),
            }
        }
    })
    .await;
    flood.stop.store(true, Relaxed);
    println!("{came} honest handshakes beside {} connections, {not_promised} that were too slow", made());
    assert_eq!(failed, Vec::<String>::new(), "beside {came} honest handshakes");
    // And the log has not been flooded.
    let told = victim.log().iter().filter(|line| line.contains("was refused")).count();
    assert!(told <= 4 * victim.told_at_most(), "{told} refusals told");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_says_nothing_pushes_no_honest_handshake_out() {
    all_come_through(2000, SILENT_PLACES, |_| Vec::new()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_says_half_a_hello_pushes_no_honest_handshake_out() {
    all_come_through(700, SILENT_PLACES, |victim| {
        let hello = client_hello(victim);
        hello[..hello.len() / 2].to_vec()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_says_a_hello_and_stops_pushes_no_honest_handshake_out() {
    all_come_through(700, SPEAKING_PLACES, client_hello).await;
}
