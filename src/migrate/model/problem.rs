//! What is found before a migration, in words that lead to the remedy.
//!
//! `vmferry check` prints these; a migration that meets a problem has changed nothing yet.

use std::collections::BTreeSet;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
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
    /// Kinds of problems; scripts may rely on their names, and `docs/check.md` says what each means.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
    #[serde(rename_all = "kebab-case")]
    pub enum ProblemKind {
        VmUnknown,
        QemuUnreachable,
        SourceState,
        Busy,
        QemuTooOld,
        TargetNotWaiting,
        DiskMissing,
        DiskTooSmall,
        DiskTooLarge,
        DiskReadOnly,
        DiskFormat,
        DiskAddress,
        DiskUnpaired,
        DiskUnknown,
        DiskLeftOut,
        DiskShared,
        DiskShareable,
        SameImage,
        SameStorage,
        DiskInUse,
        DiskTemporary,
        DiskCache,
        DiskNotStored,
        DiskExported,
        DeviceData,
        DiskPassthrough,
        BitmapsDropped,
        BitmapsCarried,
        SnapshotsDropped,
        BackingMerged,
        NoBase,
        BaseKept,
        BaseDiffers,
        ReadOnlyDiffers,
        NotCopied,
        NotComparable,
        NotInBand,
        NoNbd,
        BaseNotCompared,
        NoRoom,
        ImageNotMade,
        ThinBecomesThick,
        TooManyDisks,
        TooFewDescriptors,
        NotSeen,
        PeerUnknown,
        PeerUnreachable,
        PeerNotTrusted,
        Draining,
        NotPermitted,
        NotSent,
        Witness,
        MigrationBlocked,
        MigrationRefused,
        MigrationSettings,
        Identity,
        MachineType,
        Accelerator,
        Memory,
        CpuCount,
        Cpu,
        Device,
        DeviceSettings,
        /// Anything else, and a kind that only a newer version knows.
        #[serde(other)]
        Other,
    }
}

impl ProblemKind {
    /// Whether it may be gone by itself a little later.
    pub fn may_pass(self) -> bool {
        matches!(
            self,
            Self::QemuUnreachable
                | Self::Busy
                | Self::TargetNotWaiting
                | Self::PeerUnreachable
                | Self::DiskExported
                | Self::NoRoom
                | Self::Witness
        )
    }

    /// As scripts know it.
    pub fn name(self) -> String {
        let value = serde_json::to_value(self).unwrap_or_default();
        value.as_str().unwrap_or_default().to_owned()
    }

    /// Whether an operator may accept a problem of this kind by its name: only a human can know
    /// that it does no harm.
    pub fn may_be_accepted(self) -> bool {
        matches!(
            self,
            // The image may lie on storage that is encrypted below QEMU.
            Self::DiskFormat
            // The destination's image may be the user's own care.
            | Self::DiskLeftOut
            // And so may be what it stands on.
            | Self::BaseNotCompared
            // Two storages may go by one name: copies of a volume, servers of one name.
            | Self::SameStorage
            // Nobody else may use it, although others may.
            | Self::DiskShareable
            // The same data may be at the destination already.
            | Self::DeviceData
            // What is built on a device may be out of use.
            | Self::DiskInUse
            // What a power cut takes may not be missed.
            | Self::DiskCache
            // A cluster's file system keeps the memories of its hosts in step.
            | Self::DiskNotStored
            // The guest may not care who it is.
            | Self::Identity
            // An image may occupy more than there is in it.
            | Self::NoRoom
            // The guest may not use what the destination's processor or device lacks.
            | Self::Cpu
            | Self::DeviceSettings
        )
    }
}

/// How much a finding weighs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    #[default]
    Problem,
    /// It is said, and the migration goes on.
    Warning,
    /// It is worth knowing; nothing has to be done about it.
    Note,
}

/// One thing that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Problem {
    /// For programs.
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

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no kind of problem that can be accepted; docs/check.md lists those that can")]
pub struct NotAcceptable;

impl JsonSchema for Accepted {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Accepted".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let kinds: Vec<_> = ProblemKind::ALL.iter().filter(|kind| kind.may_be_accepted()).collect();
        json_schema!({ "type": "string", "enum": kinds })
    }
}

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
#[serde(deny_unknown_fields)]
pub struct Policy {
    #[serde(default)]
    pub strict: bool,
    /// Problems of these kinds are warnings, also where warnings are refusals.
    #[serde(default)]
    pub accept: BTreeSet<Accepted>,
}

impl Policy {
    /// The findings as they weigh under this policy.
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
    /// Errors: the findings for which a migration is refused, if there are any.
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
        let page = include_str!("../../../docs/check.md");
        let names = ProblemKind::ALL.iter().map(|kind| kind.name());
        let missing: Vec<_> =
            names.filter(|name| name != "other" && !page.contains(&format!("`{name}`"))).collect();
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
