//! `[forward.NAME]` and `[target.NAME]`: local sockets that are carried to a peer, and what peers may be
//! connected to here.

mod name;
mod socket;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::peer::PeerConfig;
use crate::rate::{self, Rate};
use crate::weight::Weight;

pub use name::{NameError, TARGET_BYTES_MAX, TargetName, TargetPattern};
pub use socket::{LocalSocket, SOCKET_PATH_BYTES_MAX, SocketError};

/// What stands for the matched part of a name in a target's socket.
const PART: &str = "{}";

/// A socket of this host whose connections are carried to a target of a peer.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForwardConfig {
    /// Where programs of this host connect: a unix socket's absolute path, or a loopback address.
    pub listen: LocalSocket,
    /// The peer, as in `[peer.NAME]`.
    pub to: String,
    /// The target's name at the peer; the forwarding's own name if it is left out.
    pub target: Option<TargetName>,
    /// Its part of what is sent to the peer, among other forwardings and migrations.
    #[serde(default)]
    pub weight: Weight,
    /// What its connections together may send in a second.
    #[serde(default, deserialize_with = "rate::from_text")]
    pub limit: Option<Rate>,
    /// Goes before everything that is not, within a bounded share: for little that is waited for.
    #[serde(default)]
    pub urgent: bool,
    /// Owner of a unix socket, by name or number; the agent's user if it is left out.
    pub owner: Option<String>,
    /// Its group.
    pub group: Option<String>,
    /// Its mode.
    #[serde(default)]
    pub mode: SocketMode,
}

/// What peers may be connected to on this host, under a name.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetConfig {
    /// The socket. Where the name has a `*`, `{}` in it is what that stands for.
    pub connect: String,
    /// The peers that may use it, as in `[peer.NAME]`; none by default.
    #[serde(default)]
    pub from: Vec<String>,
}

/// A unix socket's mode, as text in octal: `"0660"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(inline, extend("pattern" = "^0?[0-7]{3}$"))]
pub struct SocketMode(u32);

/// Not a mode.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is no mode; write it in octal, as in \"0660\"")]
pub struct ModeError(String);

impl SocketMode {
    /// Its bits.
    pub fn bits(self) -> u32 {
        self.0
    }
}

impl Default for SocketMode {
    fn default() -> Self {
        Self(0o600)
    }
}

impl TryFrom<String> for SocketMode {
    type Error = ModeError;

    fn try_from(text: String) -> Result<Self, ModeError> {
        let is_octal = (3..=4).contains(&text.len()) && text.chars().all(|c| c.is_digit(8));
        let bits = u32::from_str_radix(&text, 8).ok().filter(|bits| is_octal && *bits <= 0o777);
        bits.map(Self).ok_or(ModeError(text))
    }
}

impl From<SocketMode> for String {
    fn from(mode: SocketMode) -> Self {
        format!("{:04o}", mode.0)
    }
}

impl ForwardConfig {
    pub(super) fn check(
        &self,
        name: &str,
        peers: &BTreeMap<String, PeerConfig>,
    ) -> Result<(), (String, String)> {
        let key = |field: &str| format!("forward.{name}.{field}");
        if name.parse::<TargetName>().is_err() {
            return Err((format!("forward.{name}"), NameError.to_string().replace("target", "forwarding")));
        }
        if !peers.contains_key(&self.to) {
            return Err((key("to"), format!("there is no [peer.{}]", self.to)));
        }
        if matches!(self.listen, LocalSocket::Tcp(_)) && (self.owner.is_some() || self.group.is_some()) {
            return Err((key("listen"), "only a unix socket has `owner` and `group`".into()));
        }
        Ok(())
    }
}

impl TargetConfig {
    /// The socket, with `part` in its place.
    pub fn socket(&self, part: &str) -> Result<LocalSocket, SocketError> {
        self.connect.replace(PART, part).parse()
    }

    pub(super) fn check(
        &self,
        name: &str,
        peers: &BTreeMap<String, PeerConfig>,
    ) -> Result<(), (String, String)> {
        let Some(pattern) = TargetPattern::parse(name) else {
            return Err((format!("target.\"{name}\""), format!("{NameError}, but for one `*`")));
        };
        let key = |field: &str| format!("target.\"{name}\".{field}");
        let parts = self.connect.matches(PART).count();
        match pattern.has_part() {
            true if parts != 1 => {
                let problem = "write {} once, where the part of the name goes that `*` stands for";
                return Err((key("connect"), problem.into()));
            }
            false if parts != 0 => {
                return Err((key("connect"), "has {}, but the target's name has no `*`".into()));
            }
            _ => {}
        }
        self.socket("x").map_err(|e| (key("connect"), e.to_string()))?;
        match self.from.iter().find(|peer| !peers.contains_key(*peer)) {
            Some(unknown) => Err((key("from"), format!("there is no [peer.{unknown}]"))),
            None => Ok(()),
        }
    }
}

/// Whether two forwardings would listen at the same place.
pub(super) fn check_all(forwards: &BTreeMap<String, ForwardConfig>) -> Result<(), (String, String)> {
    let mut seen: Vec<(&str, &LocalSocket)> = Vec::new();
    for (name, forward) in forwards {
        if let Some((other, _)) = seen.iter().find(|(_, listen)| **listen == forward.listen) {
            let problem = format!("forwarding {other} listens there already");
            return Err((format!("forward.{name}.listen"), problem));
        }
        seen.push((name, &forward.listen));
    }
    Ok(())
}
