//! A forwarding as a value: where it listens, and where its connections go.

use serde::{Deserialize, Serialize};

use crate::config::{ForwardConfig, LocalSocket, NameError, SocketMode, TargetName};
use crate::rate::Rate;
use crate::weight::Weight;

/// What a forwarding is to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Where programs of this host connect.
    pub listen: LocalSocket,
    /// The peer, by its name in the configuration.
    pub to: String,
    /// The target's name there.
    pub target: TargetName,
    /// Its part of what is sent to the peer.
    pub weight: Weight,
    /// What its connections together may send in a second.
    pub limit_bytes_per_s: Option<Rate>,
    /// Goes before everything that is not, within a bounded share.
    pub urgent: bool,
    /// Owner of a unix socket, by name or number.
    pub owner: Option<String>,
    /// Its group.
    pub group: Option<String>,
    /// Its mode.
    pub mode: SocketMode,
}

/// A change of what a forwarding may send. What is none stays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ShareChange {
    /// Within: none for no limit.
    pub limit_bytes_per_s: Option<Option<Rate>>,
    pub weight: Option<Weight>,
}

impl ShareChange {
    /// A later change counts more.
    pub(super) fn add(&mut self, later: Self) {
        self.limit_bytes_per_s = later.limit_bytes_per_s.or(self.limit_bytes_per_s);
        self.weight = later.weight.or(self.weight);
    }

    pub(super) fn applied_to(self, spec: Spec) -> Spec {
        Spec {
            limit_bytes_per_s: self.limit_bytes_per_s.unwrap_or(spec.limit_bytes_per_s),
            weight: self.weight.unwrap_or(spec.weight),
            ..spec
        }
    }
}

impl Spec {
    /// With nothing but what it needs: a socket for the agent's user alone.
    pub fn new(listen: LocalSocket, to: &str, target: TargetName) -> Self {
        Self {
            listen,
            to: to.to_owned(),
            target,
            weight: Weight::default(),
            limit_bytes_per_s: None,
            urgent: false,
            owner: None,
            group: None,
            mode: SocketMode::default(),
        }
    }

    /// Of `[forward.NAME]`.
    pub fn configured(name: &str, config: &ForwardConfig) -> Result<Self, NameError> {
        let target = config.target.clone().map_or_else(|| name.parse(), Ok)?;
        Ok(Self {
            weight: config.weight,
            limit_bytes_per_s: config.limit,
            urgent: config.urgent,
            owner: config.owner.clone(),
            group: config.group.clone(),
            mode: config.mode,
            ..Self::new(config.listen.clone(), &config.to, target)
        })
    }
}
