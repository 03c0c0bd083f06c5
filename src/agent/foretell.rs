//! What is to be expected of a migration: its guest looked at, the way to its destination tried.

use super::ping;
use super::running::Agent;
use crate::api::{Foretold, Options, PingRequest};
use crate::migrate::outlook;

/// What goes to a peer in a second, within its limit.
///
/// # Errors
/// Why that could not be measured, in words.
pub(super) async fn rate(agent: &Agent, peer: &str) -> Result<u64, String> {
    let config = agent.host.config.peers.get(peer).ok_or_else(|| format!("there is no peer {peer}"))?;
    let ping = ping::ping(&agent.host, peer, config, &PingRequest::default()).await;
    let probe = ping.reached.and_then(|reached| reached.probe);
    let cause = ping.cause.unwrap_or_else(|| format!("the way to {peer} could not be measured"));
    probe.map(|probe| probe.bytes_per_s).ok_or(cause)
}

/// What is to be expected of a migration at such a rate.
pub(super) async fn foretell(
    agent: &Agent,
    (vm, peer): (&str, &str),
    options: &Options,
    rate: Result<u64, String>,
) -> Foretold {
    let limit = options.limit_bytes_per_s.map(u64::from);
    let bytes_per_s = rate.as_ref().ok().map(|rate| limit.map_or(*rate, |limit| limit.min(*rate)));
    let guest = match outlook(&agent.host, vm, peer, options).await {
        Ok(guest) => guest,
        Err(cause) => return Foretold { bytes_per_s, cause: Some(cause), ..Foretold::default() },
    };
    let prediction = bytes_per_s.and_then(|rate| guest.predict(rate, options.downtime_limit_ms.into()));
    let unknown = || "QEMU does not say how much RAM the guest has, or how fast that changes".to_owned();
    let cause = prediction.is_none().then(|| rate.err().unwrap_or_else(unknown));
    Foretold { guest: Some(guest), bytes_per_s, prediction, cause }
}
