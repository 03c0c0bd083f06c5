//! What is found before a migration, in words that lead to the remedy.
//!
//! `vmferry check` prints these; a migration that meets a problem has changed nothing yet.

use std::collections::BTreeSet;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use crate::error_chain::chain;

/// An enumeration that can list itself.
macro_rules! kinds {
    ($(#[$meta:meta])* pub enum $name:ident { $($(#[$doc:meta])* $variant:ident,)+ }) => {
        $(#[$meta])*
        pub enum $name { $($(#[$doc])* $variant,)+ }

        impl $name {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant),+];
        }
    };
}

kinds! {
    /// Kinds of problems; scripts may rely on their names.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
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
        /// A device has its id at another place at the destination.
        DiskAddress,
        /// It cannot be told which of the destination's disks is the source's.
        DiskUnpaired,
        /// Two of the guest's devices write to one storage.
        DiskShared,
        /// Both hosts have one file or block device open.
        SameImage,
        /// Both hosts seem to use one network export, network file or block device.
        SameStorage,
        /// What is written to a disk is gone when its QEMU ends.
        DiskTemporary,
        /// The guest's flushes would be ignored.
        DiskCache,
        /// Somebody else has a disk exported.
        DiskExported,
        /// A device whose contents lie outside of QEMU.
        DeviceData,
        /// A device whose guest writes go around QEMU.
        DiskPassthrough,
        /// Dirty bitmaps do not go along.
        BitmapsDropped,
        /// Snapshots inside of images do not go along.
        SnapshotsDropped,
        /// Backing files become part of the destination's image.
        BackingMerged,
        /// Read-only disks are not copied.
        NotCopied,
        /// What is to be copied does not fit at the destination.
        NoRoom,
        /// A thin disk may become a thick one, which does not fit.
        ThinBecomesThick,
        /// More disks than can be copied.
        TooManyDisks,
        /// The agent or a QEMU may not open as many files as the migration needs.
        TooFewDescriptors,
        /// Something could not be looked at.
        NotSeen,
        /// No such peer in the configuration.
        PeerUnknown,
        /// The peer cannot be reached.
        PeerUnreachable,
        /// The peer or we do not trust the other's certificate.
        PeerNotTrusted,
        /// The peer does not permit us to send this VM.
        NotPermitted,
        /// The source's QEMU says that this guest cannot be migrated.
        MigrationBlocked,
        /// The source's QEMU refused a trial migration.
        MigrationRefused,
        /// Migration capabilities or parameters were left on.
        MigrationSettings,
        /// The machine types differ.
        MachineType,
        /// One side runs by KVM, the other does not.
        Accelerator,
        /// The RAM differs.
        Memory,
        /// The numbers of processors differ, or how they are arranged.
        CpuCount,
        /// The processors' models or features differ.
        Cpu,
        /// A device is only on one side, or at another address, or another one.
        Device,
        /// A device is set up in another way.
        DeviceSettings,
        /// Anything else, and a kind that only a newer version knows.
        #[serde(other)]
        Other,
    }
}

impl ProblemKind {
    /// Whether it may be gone by itself a little later.
    #[must_use]
    pub fn may_pass(self) -> bool {
        match self {
            Self::QemuUnreachable
            | Self::Busy
            | Self::TargetNotWaiting
            | Self::PeerUnreachable
            | Self::DiskExported
            | Self::NoRoom => true,
            Self::VmUnknown
            | Self::SourceState
            | Self::QemuTooOld
            | Self::DiskMissing
            | Self::DiskTooSmall
            | Self::DiskTooLarge
            | Self::DiskReadOnly
            | Self::DiskFormat
            | Self::DiskAddress
            | Self::DiskUnpaired
            | Self::DiskShared
            | Self::SameImage
            | Self::SameStorage
            | Self::DiskTemporary
            | Self::DiskCache
            | Self::DeviceData
            | Self::DiskPassthrough
            | Self::BitmapsDropped
            | Self::SnapshotsDropped
            | Self::BackingMerged
            | Self::NotCopied
            | Self::ThinBecomesThick
            | Self::TooManyDisks
            | Self::TooFewDescriptors
            | Self::NotSeen
            | Self::PeerUnknown
            | Self::PeerNotTrusted
            | Self::NotPermitted
            | Self::MigrationBlocked
            | Self::MigrationRefused
            | Self::MigrationSettings
            | Self::MachineType
            | Self::Accelerator
            | Self::Memory
            | Self::CpuCount
            | Self::Cpu
            | Self::Device
            | Self::DeviceSettings
            | Self::Other => false,
        }
    }

    /// Whether an operator may accept a problem of this kind by its name: only a human can know
    /// that it does no harm.
    #[must_use]
    pub fn may_be_accepted(self) -> bool {
        matches!(
            self,
            // The image may lie on storage that is encrypted below QEMU.
            Self::DiskFormat
            // Two storages may go by one name: copies of a volume, servers of one name.
            | Self::SameStorage
            // The same data may be at the destination already.
            | Self::DeviceData
            // An image may occupy more than there is in it.
            | Self::NoRoom
            // The guest may not use what the destination's processor or device lacks.
            | Self::Cpu
            | Self::DeviceSettings
        )
    }
}

/// How much a finding weighs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// The migration is refused.
    #[default]
    Problem,
    /// It is said, and the migration goes on.
    Warning,
    /// It is worth knowing; nothing has to be done about it.
    Note,
}

/// One thing that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// Its kind.
    pub kind: ProblemKind,
    /// How much it weighs. An agent that does not say knows only problems.
    #[serde(default)]
    pub severity: Severity,
    /// What is wrong, naming the object.
    pub text: String,
    /// What to do about it.
    pub remedy: String,
}

impl Problem {
    /// A finding for which a migration is refused.
    pub fn new(kind: ProblemKind, text: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { kind, severity: Severity::Problem, text: text.into(), remedy: remedy.into() }
    }

    /// A finding that is said, and does not keep the migration from going on.
    pub fn warning(kind: ProblemKind, text: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::new(kind, text, remedy) }
    }

    /// A finding that is worth knowing.
    pub fn note(kind: ProblemKind, text: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { severity: Severity::Note, ..Self::new(kind, text, remedy) }
    }

    /// Whether a migration is refused for it.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        self.severity == Severity::Problem
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.text, self.remedy)
    }
}

/// A kind of problem that an operator may accept by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "ProblemKind", into = "ProblemKind")]
pub struct Accepted(ProblemKind);

/// The kind cannot be accepted, or there is none of that name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no kind of problem that can be accepted; docs/check.md lists those that can")]
pub struct NotAcceptable;

impl TryFrom<ProblemKind> for Accepted {
    type Error = NotAcceptable;

    fn try_from(kind: ProblemKind) -> Result<Self, NotAcceptable> {
        if kind.may_be_accepted() { Ok(Self(kind)) } else { Err(NotAcceptable) }
    }
}

impl From<Accepted> for ProblemKind {
    fn from(accepted: Accepted) -> Self {
        accepted.0
    }
}

impl FromStr for Accepted {
    type Err = NotAcceptable;

    fn from_str(name: &str) -> Result<Self, NotAcceptable> {
        let kind =
            ProblemKind::deserialize(serde::de::value::StrDeserializer::<serde::de::value::Error>::new(name));
        kind.map_err(|_| NotAcceptable)?.try_into()
    }
}

/// What an operator has decided beforehand about findings.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Warnings are refusals.
    #[serde(default)]
    pub strict: bool,
    /// Problems of these kinds are warnings, also where warnings are refusals.
    #[serde(default)]
    pub accept: BTreeSet<Accepted>,
}

impl Policy {
    /// The findings as they weigh under this policy.
    #[must_use]
    pub fn applied(&self, mut findings: Vec<Problem>) -> Vec<Problem> {
        for finding in &mut findings {
            let accepted = self.accept.contains(&Accepted(finding.kind));
            finding.severity = match finding.severity {
                Severity::Problem if accepted => Severity::Warning,
                Severity::Warning if self.strict && !accepted => Severity::Problem,
                severity => severity,
            };
        }
        findings
    }

    /// What is only to be said.
    ///
    /// # Errors
    /// The findings for which a migration is refused, if there are any.
    pub fn judge(&self, findings: Vec<Problem>) -> Result<Vec<Problem>, Vec<Problem>> {
        let (refusals, others): (Vec<_>, Vec<_>) =
            self.applied(findings).into_iter().partition(Problem::is_refusal);
        if refusals.is_empty() { Ok(others) } else { Err(refusals) }
    }
}

/// Adds findings to a migration's notes; a further try finds the same again.
pub(crate) fn note(findings: Vec<Problem>, notes: &mut Vec<String>) {
    for finding in findings {
        let words = match finding.severity {
            Severity::Note => finding.text,
            _ => format!("warning: {finding}"),
        };
        if !notes.contains(&words) {
            notes.push(words);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn severities(policy: &Policy) -> Vec<Severity> {
        let findings = vec![
            Problem::new(ProblemKind::DiskFormat, "", ""),
            Problem::new(ProblemKind::DiskMissing, "", ""),
            Problem::warning(ProblemKind::Other, "", ""),
            Problem::note(ProblemKind::Other, "", ""),
        ];
        policy.applied(findings).into_iter().map(|f| f.severity).collect()
    }

    #[test]
    fn what_is_accepted_is_a_warning_and_what_is_strict_a_refusal() {
        use Severity::{Note, Problem, Warning};
        let accept = BTreeSet::from(["disk-format".parse().unwrap()]);
        assert_eq!(severities(&Policy::default()), [Problem, Problem, Warning, Note]);
        assert_eq!(
            severities(&Policy { strict: true, ..Policy::default() }),
            [Problem, Problem, Problem, Note]
        );
        assert_eq!(
            severities(&Policy { strict: false, accept: accept.clone() }),
            [Warning, Problem, Warning, Note]
        );
        assert_eq!(severities(&Policy { strict: true, accept }), [Warning, Problem, Problem, Note]);
    }

    #[test]
    fn every_kind_is_described() {
        let described: serde_json::Value =
            serde_json::from_str(include_str!("../../api/openapi.json")).unwrap();
        let schemas = &described["components"]["schemas"];
        let name = |kind: &ProblemKind| serde_json::to_value(kind).unwrap();
        let all: Vec<_> = ProblemKind::ALL.iter().map(name).collect();
        assert_eq!(schemas["Problem"]["properties"]["kind"]["enum"], serde_json::json!(all));
        let accepted = ProblemKind::ALL.iter().filter(|kind| kind.may_be_accepted());
        let accepted: Vec<_> = accepted.map(name).collect();
        assert_eq!(schemas["Accept"]["items"]["enum"], serde_json::json!(accepted));
        let page = include_str!("../../../docs/check.md");
        let missing: Vec<_> = all
            .iter()
            .filter_map(|name| name.as_str())
            .filter(|name| *name != "other" && !page.contains(&format!("`{name}`")))
            .collect();
        assert!(missing.is_empty(), "docs/check.md has no {missing:?}");
    }

    #[test]
    fn only_what_a_human_can_judge_is_accepted_and_newer_kinds_are_read() {
        assert_eq!("disk-missing".parse::<Accepted>(), Err(NotAcceptable));
        assert_eq!("other".parse::<Accepted>(), Err(NotAcceptable));
        assert_eq!("nonsense".parse::<Accepted>(), Err(NotAcceptable));
        let newer: Problem =
            serde_json::from_str(r#"{"kind":"of-tomorrow","text":"t","remedy":"r"}"#).unwrap();
        assert_eq!((newer.kind, newer.severity), (ProblemKind::Other, Severity::Problem));
    }
}
