//! What stands in the way of a migration, in words that lead to the remedy.
//!
//! `vmferry check` prints these; a migration that meets one has changed nothing yet.

use serde::{Deserialize, Serialize};

pub use crate::words::chain;

/// Kinds of problems; scripts may rely on their names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProblemKind {
    /// No such VM in the configuration of that side.
    VmUnknown,
    /// The VM's monitor does not answer.
    QemuUnreachable,
    /// The source's guest is in a state that cannot be moved.
    SourceState,
    /// A block job or migration is under way.
    Busy,
    /// QEMU lacks something that is needed.
    QemuTooOld,
    /// The destination's QEMU does not wait for a migration.
    TargetNotWaiting,
    /// A disk is missing at the destination.
    DiskMissing,
    /// A disk is smaller at the destination.
    DiskTooSmall,
    /// A disk is larger at the destination.
    DiskTooLarge,
    /// A disk cannot be written at the destination.
    DiskReadOnly,
    /// A disk would lose its encryption.
    DiskFormat,
    /// No such peer in the configuration.
    PeerUnknown,
    /// The peer cannot be reached.
    PeerUnreachable,
    /// The peer or we do not trust the other's certificate.
    PeerNotTrusted,
    /// The peer does not permit us to send this VM.
    NotPermitted,
    /// Anything else.
    Other,
}

impl ProblemKind {
    /// Whether it may be gone by itself a little later.
    #[must_use]
    pub fn may_pass(self) -> bool {
        match self {
            Self::QemuUnreachable | Self::Busy | Self::TargetNotWaiting | Self::PeerUnreachable => true,
            Self::VmUnknown
            | Self::SourceState
            | Self::QemuTooOld
            | Self::DiskMissing
            | Self::DiskTooSmall
            | Self::DiskTooLarge
            | Self::DiskReadOnly
            | Self::DiskFormat
            | Self::PeerUnknown
            | Self::PeerNotTrusted
            | Self::NotPermitted
            | Self::Other => false,
        }
    }
}

/// One thing that stands in the way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// Its kind.
    pub kind: ProblemKind,
    /// What is wrong, naming the object.
    pub text: String,
    /// What to do about it.
    pub remedy: String,
}

impl Problem {
    /// A problem.
    pub fn new(kind: ProblemKind, text: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { kind, text: text.into(), remedy: remedy.into() }
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.text, self.remedy)
    }
}
