//! What is found of a host, and what it takes to know it.

use serde::Serialize;

/// What was found of one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    Ok,
    Warning,
    Failed,
    /// It could not be looked at.
    Unknown,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub what: String,
    pub state: State,
    pub text: String,
    /// What to do about it; none where all is well.
    pub remedy: Option<String>,
}

impl Finding {
    pub fn ok(what: impl Into<String>, text: impl Into<String>) -> Self {
        Self { what: what.into(), state: State::Ok, text: text.into(), remedy: None }
    }

    pub fn warning(what: impl Into<String>, text: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { state: State::Warning, remedy: Some(remedy.into()), ..Self::ok(what, text) }
    }

    pub fn failed(what: impl Into<String>, text: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { state: State::Failed, remedy: Some(remedy.into()), ..Self::ok(what, text) }
    }

    pub fn unknown(what: impl Into<String>, text: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { state: State::Unknown, remedy: Some(remedy.into()), ..Self::ok(what, text) }
    }
}

/// The agent that answers on this host, as far as it is of interest here.
#[derive(Debug, Clone)]
pub struct RunningAgent {
    pub pid: Option<i32>,
}
