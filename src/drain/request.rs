//! What an operator asks of a drain. What is outside its range cannot be written down.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::glob_matches;
use crate::migrate::Options;
use crate::ranged::read_within;

/// The most peers that one drain may use.
const TARGETS_MAX: usize = 32;
/// The most patterns in a selection.
const PATTERNS_MAX: usize = 256;
/// The most migrations at once that anybody can mean.
pub const AT_ONCE_MAX: usize = 64;

/// Where VMs may go: peers by their names in the configuration, the preferred one first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "Vec<String>", into = "Vec<String>")]
#[schemars(inline, extend("minItems" = 1, "maxItems" = TARGETS_MAX, "uniqueItems" = true))]
pub struct Targets(Vec<String>);

/// These are no targets.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetsError {
    #[error("a drain has 1 to {TARGETS_MAX} peers to move VMs to, not {0}")]
    Number(usize),
    #[error("peer \"{0}\" is named twice")]
    Twice(String),
}

impl TryFrom<Vec<String>> for Targets {
    type Error = TargetsError;

    fn try_from(names: Vec<String>) -> Result<Self, TargetsError> {
        if !(1..=TARGETS_MAX).contains(&names.len()) {
            return Err(TargetsError::Number(names.len()));
        }
        let twice = names.iter().enumerate().find(|(at, name)| names[..*at].contains(name));
        match twice {
            Some((_, name)) => Err(TargetsError::Twice(name.clone())),
            None => Ok(Self(names)),
        }
    }
}

impl From<Targets> for Vec<String> {
    fn from(targets: Targets) -> Self {
        targets.0
    }
}

impl Targets {
    pub fn names(&self) -> &[String] {
        &self.0
    }
}

/// How many VMs are moved at once: 1 to [`AT_ONCE_MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(into = "usize")]
pub struct AtOnce(usize);

/// Nobody means that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} VMs at once are outside 1–{AT_ONCE_MAX}")]
pub struct AtOnceError(usize);

read_within!(AtOnce: usize, 1, AT_ONCE_MAX as u64);

impl TryFrom<usize> for AtOnce {
    type Error = AtOnceError;

    fn try_from(number: usize) -> Result<Self, AtOnceError> {
        if (1..=AT_ONCE_MAX).contains(&number) { Ok(Self(number)) } else { Err(AtOnceError(number)) }
    }
}

impl From<AtOnce> for usize {
    fn from(at_once: AtOnce) -> Self {
        at_once.0
    }
}

/// Names of VMs, `*` for any run of characters.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "Vec<String>", into = "Vec<String>")]
#[schemars(inline, extend("maxItems" = PATTERNS_MAX))]
pub struct Patterns(Vec<String>);

/// More than anybody can mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} patterns are too many; at most {PATTERNS_MAX} select VMs")]
pub struct PatternsError(usize);

impl TryFrom<Vec<String>> for Patterns {
    type Error = PatternsError;

    fn try_from(patterns: Vec<String>) -> Result<Self, PatternsError> {
        if patterns.len() > PATTERNS_MAX { Err(PatternsError(patterns.len())) } else { Ok(Self(patterns)) }
    }
}

impl From<Patterns> for Vec<String> {
    fn from(patterns: Patterns) -> Self {
        patterns.0
    }
}

impl Patterns {
    fn match_any(&self, vm: &str) -> bool {
        self.0.iter().any(|pattern| glob_matches(pattern, vm))
    }
}

/// What is to go where: `POST /v1/drain`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "DrainRequest")]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Peers by their names in the configuration, the preferred one first, none twice.
    pub to: Targets,
    /// Which VMs go; all without one.
    #[serde(default)]
    pub vms: Patterns,
    /// Which of them stay.
    #[serde(default)]
    pub except: Patterns,
    /// How many at once; the configuration's number if left out.
    #[serde(default)]
    pub at_once: Option<AtOnce>,
    /// How each of them is moved.
    #[serde(default)]
    pub options: Options,
}

impl Request {
    /// Whether a VM is to go.
    pub fn selects(&self, vm: &str) -> bool {
        (self.vms.0.is_empty() || self.vms.match_any(vm)) && !self.except.match_any(vm)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_outside_its_range_is_no_request() {
        let read = |value| serde_json::from_value::<Request>(value).map_err(|e| e.to_string());
        assert!(read(json!({"to": ["bravo"]})).is_ok());
        for (value, words) in [
            (json!({"to": []}), "1 to 32 peers"),
            (json!({"to": ["bravo", "charlie", "bravo"]}), "\"bravo\" is named twice"),
            (json!({"to": ["bravo"], "at_once": 0}), "integer `0`, expected a whole number from 1 to 64"),
            (json!({"to": ["bravo"], "at_once": 65}), "integer `65`, expected"),
            (json!({"to": ["bravo"], "vms": vec!["x"; 257]}), "257 patterns"),
            (json!({"to": ["bravo"], "vm": ["x"]}), "unknown field"),
        ] {
            let error = read(value.clone()).unwrap_err();
            assert!(error.contains(words), "{value}: {error}");
        }
    }

    #[test]
    fn a_selection_is_patterns_less_exceptions() {
        let request = |vms: &[&str], except: &[&str]| -> Request {
            serde_json::from_value(json!({"to": ["bravo"], "vms": vms, "except": except})).unwrap()
        };
        let all = ["db1", "web1", "web2"];
        let selected = |request: Request| all.map(|vm| request.selects(vm));
        assert_eq!(selected(request(&[], &[])), [true, true, true]);
        assert_eq!(selected(request(&["web*"], &[])), [false, true, true]);
        assert_eq!(selected(request(&["web*", "db1"], &["*2"])), [true, true, false]);
        assert_eq!(selected(request(&[], &["*"])), [false, false, false]);
    }
}
