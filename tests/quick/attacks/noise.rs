//! What a flood leaves in the log: a word for each cause and address, and numbers for the rest.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};

use socket2::{Domain, Socket, Type};

use super::victim::Victim;
use crate::rig::{PATIENCE, soon};

fn connect_from(address: IpAddr, to: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((address, 0)).into()).unwrap();
    socket.connect(&to.into()).unwrap();
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// What is no TLS, from a few addresses, a thousand times.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_connections_are_told_once_for_each_cause_and_address_and_counted() {
    const EACH: usize = 250;
    let victim = Victim::start();
    let to = victim.address;
    let flood = (2..6u8).map(|last| {
        tokio::task::spawn_blocking(move || {
            for _ in 0..EACH {
                let mut stream = connect_from(IpAddr::from([127, 0, 0, last]), to);
                let _ = stream.write_all(b"GET / HTTP/1.1\r\nHost: alpha\r\n\r\n");
                let _ = stream.shutdown(std::net::Shutdown::Write);
                let _ = stream.read_to_end(&mut Vec::new());
            }
        })
    });
    for one in flood.collect::<Vec<_>>() {
        soon("the flood", one).await.unwrap();
    }
    let counted = || victim.metric("vmferry_connect_failures_total{direction=\"in\",reason=\"garbage\"}");
    crate::rig::until("all to be counted", || counted() >= 4.0 * EACH as f64).await;
    let told: Vec<_> = victim.log().into_iter().filter(|line| line.contains("was refused")).collect();
    assert_eq!(told.len(), 4, "{told:#?}");
}
