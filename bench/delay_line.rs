//! A delay line: datagrams of either end reach the other after a fixed time, in order, none lost.
//! The kernel that this was made for has no netem. Must not know what the datagrams hold.

use std::io;
use std::net::UdpSocket;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};

/// The port of VXLAN.
const PORT: u16 = 4789;
/// Largest UDP datagram.
const DATAGRAM_MAX: usize = 65_507;
/// What may wait in the kernel while both cores are busy with others.
const SOCKET_BUFFER_BYTES: usize = 64 << 20;

/// A datagram and when it is due.
type Delayed = (Instant, Vec<u8>);

/// Starts a line between 10.78.1.2 and 10.78.2.2, which send to .1 of their networks. The sockets
/// stay in the network namespace of the caller, the threads until the program ends; they sleep when
/// nothing comes.
pub(crate) fn start(delay: Duration) -> io::Result<()> {
    let [one, two] = [socket("10.78.1.1")?, socket("10.78.2.1")?];
    direct(one.try_clone()?, two.try_clone()?, "10.78.2.2", delay)?;
    direct(two, one, "10.78.1.2", delay)
}

fn socket(address: &str) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((address, PORT))?;
    setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BUFFER_BYTES)?;
    setsockopt(&socket, sockopt::SndBufForce, &SOCKET_BUFFER_BYTES)?;
    Ok(socket)
}

/// One thread receives, another sends what is due. Buffers go round between them.
fn direct(from: UdpSocket, to: UdpSocket, target: &'static str, delay: Duration) -> io::Result<()> {
    let (delayed, due) = mpsc::channel();
    let (used, free) = mpsc::channel();
    thread::Builder::new().name("line-in".into()).spawn(move || receive(&from, delay, &delayed, &free))?;
    thread::Builder::new().name("line-out".into()).spawn(move || send(&to, target, &due, &used))?;
    Ok(())
}

fn receive(from: &UdpSocket, delay: Duration, delayed: &Sender<Delayed>, free: &Receiver<Vec<u8>>) {
    loop {
        let mut datagram = free.try_recv().unwrap_or_default();
        datagram.resize(DATAGRAM_MAX, 0);
        match from.recv(&mut datagram) {
            Ok(n) => datagram.truncate(n),
            // An ICMP answer to what was sent; the next one may come through.
            Err(_) => continue,
        }
        if delayed.send((Instant::now() + delay, datagram)).is_err() {
            return;
        }
    }
}

fn send(to: &UdpSocket, target: &str, due: &Receiver<Delayed>, used: &Sender<Vec<u8>>) {
    while let Ok((at, datagram)) = due.recv() {
        thread::sleep(at.saturating_duration_since(Instant::now()));
        let _ = to.send_to(&datagram, (target, PORT));
        if used.send(datagram).is_err() {
            return;
        }
    }
}
