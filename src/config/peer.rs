//! `[peer.NAME]`: another agent, which VMs it may send, and which it may be sent.

use serde::Deserialize;

use crate::net::identity::Identity;
use crate::rate::{self, Rate};
use crate::size::Size;

/// The port that agents listen on unless told otherwise.
pub const DEFAULT_PORT: u16 = 9907;

/// Most lanes that a peer may have; each may hold as much memory as a session.
pub const LANES_MAX: usize = 8;

/// Most VMs that a peer may have on their way here.
pub(super) const AT_ONCE_MAX: usize = 256;

/// Another agent.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerConfig {
    /// The subject alternative name in its certificate, in whatever case. Its address proves nothing.
    pub identity: Identity,
    /// `host:port` to dial. A peer without one can only come to us.
    pub address: Option<String>,
    /// VMs that this peer may send to us: names, `*` matches any run of characters.
    /// Empty, the default, permits none.
    #[serde(default)]
    pub receive: Vec<String>,
    /// How many VMs this peer may have on their way to us at once.
    #[serde(default = "at_once")]
    pub receive_at_once: usize,
    /// The largest VM that it may send: what its disks have together, as the guest sees them. No limit by default;
    /// the disks that wait here must have these sizes anyway.
    #[serde(default)]
    pub receive_size: Option<Size>,
    /// What the streams of one migration may bring here in all. No limit by default: a guest may write its disks
    /// many times over while they are copied.
    #[serde(default)]
    pub receive_bytes: Option<Size>,
    /// What this peer may send to us in a second, over everything. No limit by default. A peer that could send more is
    /// given credit for so much; one that sends more without it loses its session.
    #[serde(default, deserialize_with = "rate::from_text")]
    pub receive_rate: Option<Rate>,
    /// VMs, and domains of libvirt, of this host that its operators may move to this peer: patterns as in `receive`.
    /// Empty, the default, permits none.
    #[serde(default)]
    pub send: Vec<String>,
    /// Domains that this peer's libvirt may move to us through the tunnel; none by default.
    #[serde(default)]
    pub libvirt: Vec<String>,
    /// This peer may reach our libvirt through the tunnel, to move those domains: it may do everything with
    /// it then, as by SSH as root.
    #[serde(default)]
    pub libvirt_rpc: bool,
    /// What may be sent to this peer in a second, over all migrations: `"100MiB/s"`. None for no
    /// limit. `vmferry limit --peer` changes it until the agent stops.
    #[serde(default, deserialize_with = "rate::from_text")]
    pub limit: Option<Rate>,
    /// Connections that the streams to and from this peer are spread over, 1 to 8: for links that are
    /// faster than one core can encrypt. Both sides should have the same; a peer refuses more than
    /// twice its own number and two, and then there are fewer.
    #[serde(default = "one")]
    pub lanes: usize,
}

impl PeerConfig {
    pub(super) fn check(&self, name: &str) -> Result<(), (String, String)> {
        if let Some(address) = &self.address {
            let port = address.rsplit_once(':').and_then(|(_, p)| p.parse::<u16>().ok());
            if port.is_none_or(|p| p == 0) {
                let problem = format!("\"{address}\" is not host:port, as in \"10.0.0.2:{DEFAULT_PORT}\"");
                return Err((format!("peer.{name}.address"), problem));
            }
        }
        if !(1..=AT_ONCE_MAX).contains(&self.receive_at_once) {
            let problem = format!("{} is outside 1–{AT_ONCE_MAX}", self.receive_at_once);
            return Err((format!("peer.{name}.receive_at_once"), problem));
        }
        if !(1..=LANES_MAX).contains(&self.lanes) {
            let problem = format!("{} is outside 1–{LANES_MAX}", self.lanes);
            return Err((format!("peer.{name}.lanes"), problem));
        }
        Ok(())
    }
}

fn at_once() -> usize {
    16
}

fn one() -> usize {
    1
}

/// Whether `name` matches `pattern`, in which `*` stands for any run of characters.
pub fn glob_matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.len() >= last.len() && rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs() {
        for (pattern, name, expected) in [
            ("web*", "web1", true),
            ("web*", "db1", false),
            ("*", "anything", true),
            ("web1", "web1", true),
            ("web1", "web10", false),
            ("*-prod-*", "a-prod-b", true),
            ("ab*ba", "aba", false),
            ("", "x", false),
        ] {
            assert_eq!(glob_matches(pattern, name), expected, "{pattern} against {name}");
        }
    }
}
