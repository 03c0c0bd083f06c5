//! Reaching a peer that may have several addresses, of which some may be dead: all are tried, each
//! a moment after the one before and without waiting for its end, and the first on which the peer
//! proves itself is taken (after RFC 8305). Knows no HELLO, and no peer: an etcd has addresses, too.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::connect_error::ConnectError;
use crate::error_chain::chain;

/// How long the resolver may take.
const RESOLVE_DEADLINE: Duration = Duration::from_secs(5);
/// How long an address is alone before the next one is tried beside it (RFC 8305 §5).
const STAGGER: Duration = Duration::from_millis(250);
/// Most addresses of a name that are tried.
const ADDRESSES_MAX: usize = 16;

/// The addresses of `name`, which is `host:port`; those of both families in turn (RFC 8305 §4).
pub(crate) async fn resolve(name: &str) -> Result<Vec<SocketAddr>, ConnectError> {
    let failed = |source| ConnectError::Resolve { address: name.to_owned(), source };
    let found = match timeout(RESOLVE_DEADLINE, tokio::net::lookup_host(name)).await {
        Ok(found) => found.map_err(failed)?,
        Err(_) => return Err(failed(io::ErrorKind::TimedOut.into())),
    };
    let addresses = in_turn(found.collect());
    if addresses.is_empty() {
        return Err(failed(io::ErrorKind::NotFound.into()));
    }
    Ok(addresses)
}

/// The resolver's order, but with the families in turn: a family that leads nowhere is left soon.
fn in_turn(found: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let first_is_v6 = found.first().is_some_and(SocketAddr::is_ipv6);
    let (first, second): (Vec<_>, Vec<_>) = found.into_iter().partition(|a| a.is_ipv6() == first_is_v6);
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    let mut all: Vec<SocketAddr> = Vec::new();
    loop {
        let pair = [first.next(), second.next()];
        if pair.iter().all(Option::is_none) {
            break;
        }
        for address in pair.into_iter().flatten() {
            if !all.contains(&address) {
                all.push(address);
            }
        }
    }
    all.truncate(ADDRESSES_MAX);
    all
}

pub(crate) async fn tcp(address: SocketAddr, deadline: Duration) -> Result<TcpStream, ConnectError> {
    let connected = timeout(deadline, TcpStream::connect(address)).await;
    let connected = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    connected.map_err(|source| ConnectError::Connect { address: address.to_string(), source })
}

/// Runs `attempt` on each address until one succeeds; those that are under way then are dropped.
/// Errors: of a single address its own error; of several the one that says most, or what became of each.
pub(crate) async fn first_of<T, A: Future<Output = Result<T, ConnectError>>>(
    name: &str,
    addresses: Vec<SocketAddr>,
    attempt: impl Fn(SocketAddr) -> A,
) -> Result<T, ConnectError> {
    let mut waiting = addresses.into_iter();
    let mut under_way = FuturesUnordered::new();
    let mut failures: Vec<ConnectError> = Vec::new();
    loop {
        if let Some(address) = waiting.next() {
            under_way.push(attempt(address));
        }
        let more = waiting.len() > 0;
        tokio::select! {
            biased;
            Some(done) = under_way.next() => match done {
                Ok(connected) => return Ok(connected),
                Err(e) => failures.push(e),
            },
            () = sleep(STAGGER), if more => {}
            else => return Err(joined(name, failures)),
        }
    }
}

/// What is said of several addresses that all failed: that a peer was there and refused says more
/// than that nobody was.
fn joined(name: &str, mut failures: Vec<ConnectError>) -> ConnectError {
    let is_silence = |e: &ConnectError| matches!(e, ConnectError::Connect { .. });
    if let Some(at) = failures.iter().position(|e| !is_silence(e)) {
        return failures.swap_remove(at);
    }
    let last = match failures.pop() {
        Some(ConnectError::Connect { address, source }) => (address, source),
        _ => (name.to_owned(), io::ErrorKind::NotFound.into()),
    };
    if failures.is_empty() {
        return ConnectError::Connect { address: name.to_owned(), source: last.1 };
    }
    let kind = last.1.kind();
    failures.push(ConnectError::Connect { address: last.0, source: last.1 });
    let each = failures.iter().filter_map(|e| match e {
        ConnectError::Connect { address, source } => Some(format!("{address}: {}", chain(source))),
        _ => None,
    });
    let source = io::Error::new(kind, each.collect::<Vec<_>>().join("; "));
    ConnectError::Connect { address: name.to_owned(), source }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    fn addresses(words: &[&str]) -> Vec<SocketAddr> {
        words.iter().map(|w| w.parse().unwrap()).collect()
    }

    #[test]
    fn the_families_take_turns_and_their_number_is_bounded() {
        let found = addresses(&["[::1]:1", "[::2]:1", "[::1]:1", "1.1.1.1:1", "2.2.2.2:1", "3.3.3.3:1"]);
        let expected = addresses(&["[::1]:1", "1.1.1.1:1", "[::2]:1", "2.2.2.2:1", "3.3.3.3:1"]);
        assert_eq!(in_turn(found), expected);
        let many = (1..100).map(|port| SocketAddr::from(([127, 0, 0, 1], port))).collect();
        assert_eq!(in_turn(many).len(), ADDRESSES_MAX);
    }

    fn refused(address: SocketAddr) -> ConnectError {
        let source = io::ErrorKind::ConnectionRefused.into();
        ConnectError::Connect { address: address.to_string(), source }
    }

    #[tokio::test]
    async fn a_silent_address_keeps_no_other_from_being_tried() {
        let all = addresses(&["1.1.1.1:1", "2.2.2.2:1", "3.3.3.3:1", "4.4.4.4:1"]);
        let tried = Mutex::new(Vec::new());
        let got = first_of("h:1", all.clone(), |address| {
            tried.lock().unwrap().push(address);
            let all = &all;
            async move {
                match all.iter().position(|a| *a == address) {
                    Some(2) => Ok(address),
                    Some(1) => Err(refused(address)),
                    _ => std::future::pending().await,
                }
            }
        });
        assert_eq!(got.await.unwrap(), all[2]);
        assert_eq!(*tried.lock().unwrap(), all[..3], "the fourth was not needed");
    }

    #[tokio::test]
    async fn when_all_fail_each_is_named_or_the_one_that_says_most() {
        let all = addresses(&["1.1.1.1:1", "2.2.2.2:1"]);
        let fail = |address| async move { Err::<(), _>(refused(address)) };
        let e = first_of("h:1", all.clone(), fail).await.unwrap_err();
        let said = chain(&e);
        assert!(
            said.contains("to h:1;") && said.contains("1.1.1.1:1: ") && said.contains("2.2.2.2:1: "),
            "{said}"
        );
        let e = first_of("h:1", all, |address| async move {
            Err::<(), _>(if address.ip().to_string() == "1.1.1.1" {
                ConnectError::Gone
            } else {
                refused(address)
            })
        });
        assert!(matches!(e.await.unwrap_err(), ConnectError::Gone));
        let alone = first_of("h:1", addresses(&["1.1.1.1:1"]), fail).await.unwrap_err();
        let said = chain(&alone);
        assert!(said.contains("to h:1;") && !said.contains("1.1.1.1"), "{said}");
    }
}
