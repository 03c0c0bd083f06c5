//! Forwardings and targets as they are shown.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::spec::Spec;
use super::tally::{Side, Totals};

/// A forwarding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForwardingStatus {
    /// Its number, which it keeps over restarts of the agent that it survives.
    pub id: Uuid,
    /// Its name in the configuration; none of one that was added.
    pub name: Option<String>,
    /// What it is.
    pub spec: Spec,
    /// It accepts connections.
    pub is_listening: bool,
    /// A unix socket's file is still the one that the agent made. If it is not, programs connect to
    /// somebody else, past the forwarding.
    pub is_intact: bool,
    /// Connections now.
    pub open: usize,
    /// What has become of all of them. `opened` is how many streams were seen.
    pub totals: Totals,
}

/// A target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetStatus {
    /// Its name; one of the configuration may have a `*`.
    pub name: String,
    /// Its socket; with `{}` where the name has a `*`.
    pub connect: String,
    /// Who may use it: names in the configuration, or of a granted one the peer's identity.
    pub from: Vec<String>,
    /// For how many seconds a granted one may still be used.
    pub granted_for_s: Option<u64>,
    /// Connections now.
    pub open: usize,
    /// What has become of all of them.
    pub totals: Totals,
}

/// What the metrics show, by side and label.
pub type Figures = BTreeMap<(Side, String), (usize, Totals)>;
