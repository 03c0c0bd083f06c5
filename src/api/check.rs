//! What `check` is asked, and what it and migrations find.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{Accepted, ProblemKind, Severity};
use crate::migrate::problem;

/// `POST /v1/check`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckRequest {
    pub vm: String,
    /// The destination's name in the agent's configuration.
    pub to: String,
    #[serde(default)]
    pub strict: bool,
    /// Kinds of problems that are only warnings.
    #[serde(default)]
    pub accept: BTreeSet<Accepted>,
}

/// The answer to [`CheckRequest`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CheckReport {
    /// What was found; the migration is refused if the severity of one of them is `problem`.
    pub problems: Vec<Problem>,
}

/// One thing that was found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Problem {
    pub kind: ProblemKind,
    /// How much it weighs. An agent that does not say knows only problems.
    #[serde(default)]
    pub severity: Severity,
    /// What is wrong, naming the object.
    pub text: String,
    /// What to do about it.
    pub remedy: String,
}

impl From<problem::Problem> for Problem {
    fn from(problem::Problem { kind, severity, text, remedy }: problem::Problem) -> Self {
        Self { kind, severity, text, remedy }
    }
}
