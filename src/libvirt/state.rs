//! A migration of libvirt's as a value: what the local API shows, and what a restarted agent finds again.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::ranged::Within;

/// Which end of it this host is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "LibvirtRole")]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Source,
    Destination,
}

impl Role {
    /// As in a metric's label.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// One of the sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Channel {
    /// libvirt's own connection.
    Rpc,
    Ram,
    /// The disks.
    Nbd,
}

impl Channel {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Rpc, Self::Ram, Self::Nbd];

    /// Its socket's name in the folder.
    #[must_use]
    pub fn file(self) -> &'static str {
        match self {
            Self::Rpc => "libvirt.sock",
            Self::Ram => "ram.sock",
            Self::Nbd => "nbd.sock",
        }
    }

    /// As people call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Rpc => "rpc",
            Self::Ram => "ram",
            Self::Nbd => "nbd",
        }
    }

    /// Its socket in a folder.
    #[must_use]
    pub fn socket(self, folder: &Path) -> PathBuf {
        folder.join(self.file())
    }
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "LibvirtStage")]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// The sockets are there, and nobody has used them yet.
    Prepared,
    /// Something is connected, or was.
    UnderWay,
    Ended,
}

impl Stage {
    /// As in the API.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Prepared => "prepared",
            Self::UnderWay => "under way",
            Self::Ended => "ended",
        }
    }
}

/// What has gone through one of the sockets.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "LibvirtMoved")]
pub struct Moved {
    /// Connections so far.
    pub connections: u64,
    /// Of those, open now.
    pub open: u64,
    /// Connections that came to nothing.
    pub failed: u64,
    /// From programs of this host.
    pub sent_bytes: u64,
    /// To programs of this host.
    pub received_bytes: u64,
    /// Another program has put a socket of its own in the place of the agent's.
    pub replaced: bool,
}

/// What has gone through each of them. `rpc` is none where libvirt's connection takes another way.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "LibvirtChannels")]
pub struct Channels {
    /// libvirt's own connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rpc: Option<Moved>,
    pub ram: Moved,
    /// The disks.
    pub nbd: Moved,
}

impl Channels {
    /// All that there are, with their names.
    pub fn all(&self) -> impl Iterator<Item = (Channel, &Moved)> {
        let rpc = self.rpc.iter().map(|moved| (Channel::Rpc, moved));
        rpc.chain([(Channel::Ram, &self.ram), (Channel::Nbd, &self.nbd)])
    }

    pub(super) fn of(&mut self, channel: Channel) -> &mut Moved {
        match channel {
            Channel::Rpc => self.rpc.get_or_insert_default(),
            Channel::Ram => &mut self.ram,
            Channel::Nbd => &mut self.nbd,
        }
    }

    /// Bytes in both directions, of all.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.all().map(|(_, moved)| moved.sent_bytes.saturating_add(moved.received_bytes)).sum()
    }

    /// Connections that are open now.
    #[must_use]
    pub fn open(&self) -> u64 {
        self.all().map(|(_, moved)| moved.open).sum()
    }

    /// Whether anybody has ever connected.
    #[must_use]
    pub fn is_used(&self) -> bool {
        self.all().any(|(_, moved)| moved.connections + moved.failed > 0)
    }
}

/// How it ended, as far as vmferry was told or knows; at the destination by the source's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "LibvirtEnd")]
#[serde(rename_all = "snake_case")]
pub enum Ended {
    /// virsh said so.
    Moved,
    /// virsh said so.
    Failed,
    /// virsh said that it moved, but something of it did not go through the tunnel.
    Bypassed,
    /// Nobody said: its command line is gone, or its time was over.
    Unknown,
}

impl Ended {
    /// All of them, as labels of a metric.
    pub const ALL: [Self; 4] = [Self::Moved, Self::Failed, Self::Bypassed, Self::Unknown];

    /// As in a metric's label.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Moved => "moved",
            Self::Failed => "failed",
            Self::Bypassed => "bypassed",
            Self::Unknown => "unknown",
        }
    }
}

/// What must have gone through the tunnel if nothing went past it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
// Requests hold it to its fields, answers do not.
#[schemars(inline)]
#[serde(deny_unknown_fields)]
pub struct Expected {
    /// Connections for RAM.
    pub ram: u64,
    /// Connections for disks.
    pub nbd: u64,
}

impl Expected {
    /// What did not, in words.
    #[must_use]
    pub fn missed(&self, channels: &Channels) -> Vec<String> {
        let mut missed = Vec::new();
        for (channel, _) in channels.all().filter(|(_, moved)| moved.replaced) {
            missed.push(format!(
                "another program had put its own {} in the place of vmferry's, so what it took did not go through the tunnel",
                channel.file()
            ));
        }
        for (what, expected, moved) in [("RAM", self.ram, &channels.ram), ("disks", self.nbd, &channels.nbd)]
        {
            if moved.connections < expected {
                missed.push(format!(
                    "of {expected} connections for {what} {} went through the tunnel: the others took another way, and what was                      on it in clear is not known",
                    moved.connections
                ));
            }
        }
        missed
    }
}

/// What its command line knows at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "LibvirtTold")]
#[serde(rename_all = "snake_case")]
pub enum Told {
    /// It moved.
    Moved(Expected),
    /// It did not move.
    Failed,
    /// Whether it did is not known.
    Unknown,
}

/// For how long sockets may be kept without anybody who follows the migration: a week.
pub(super) const HOLD_S_MAX: u64 = 7 * 24 * 60 * 60;

pub type HoldSeconds = Within<0, HOLD_S_MAX>;

/// What is asked of the source's agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "LibvirtRequest")]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The domain's name, or its names: at the source, and at the destination if that is another.
    pub domain: String,
    /// Its name at the destination, if that is another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub renamed: Option<String>,
    /// The peer.
    pub to: String,
    /// libvirt's own connection goes through the tunnel, too.
    pub rpc: bool,
    /// Kept for this long without anybody who follows it; else it ends soon after its last follower.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold_s: Option<HoldSeconds>,
    /// What must go through if nothing goes past the tunnel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected: Option<Expected>,
}

impl Request {
    /// The name at the destination.
    #[must_use]
    pub fn there(&self) -> &str {
        self.renamed.as_deref().unwrap_or(&self.domain)
    }
}

/// A migration of libvirt's, as this host has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "LibvirtMigration")]
pub struct State {
    pub id: Uuid,
    /// The domain's name on this host.
    pub domain: String,
    /// This host's part.
    pub role: Role,
    /// The other host's identity.
    pub peer: String,
    /// With the sockets; the same on both hosts.
    pub folder: PathBuf,
    /// How far it is.
    pub stage: Stage,
    /// In RFC 3339.
    #[serde(with = "time::serde::rfc3339")]
    #[schemars(with = "String", extend("format" = "date-time"))]
    pub began_at: OffsetDateTime,
    /// What has gone through each of the sockets.
    pub channels: Channels,
    /// What must have gone through at its end; of a source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected: Option<Expected>,
    /// Why connections came to nothing, or are about to: what libvirt does not say.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub causes: Vec<String>,
    /// Bypassed: libvirt moved it, and something did not go through the tunnel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<Ended>,
    /// What could not be taken away, on either host.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_went_past_the_tunnel_is_told_apart() {
        let through = |connections| Moved { connections, ..Moved::default() };
        let expected = Expected { ram: 1, nbd: 2 };
        let whole = Channels { rpc: None, ram: through(1), nbd: through(2) };
        assert_eq!(expected.missed(&whole), Vec::<String>::new());
        let more = Channels { nbd: through(3), ..whole.clone() };
        assert_eq!(expected.missed(&more), Vec::<String>::new(), "QEMU connects again after a cut");
        let no_ram = Channels { ram: through(0), ..whole.clone() };
        assert!(expected.missed(&no_ram)[0].starts_with("of 1 connections for RAM 0"));
        let one_disk = Channels { nbd: through(1), ..whole.clone() };
        assert!(expected.missed(&one_disk)[0].starts_with("of 2 connections for disks 1"));
        let replaced = Channels { ram: Moved { replaced: true, ..through(1) }, ..whole };
        assert!(expected.missed(&replaced)[0].contains("its own ram.sock"));
    }
}
