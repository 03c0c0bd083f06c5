//! Names of targets: what a peer may say, and the patterns of the configuration that it is held against.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Longest name, in bytes: as long as an OPEN can carry.
pub const TARGET_BYTES_MAX: usize = 128;

/// A target's name: 1 to [`TARGET_BYTES_MAX`] letters, digits, `-`, `_` or `.`, not beginning with `.`.
/// So a part of it is one step of a path, and neither hidden nor `..`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(inline, extend("maxLength" = TARGET_BYTES_MAX, "pattern" = "^[A-Za-z0-9_-][A-Za-z0-9._-]*$"))]
pub struct TargetName(String);

/// Not a target's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "a target's name is 1–{TARGET_BYTES_MAX} letters, digits, '-', '_' or '.', and does not begin with '.'"
)]
pub struct NameError;

/// Whether `word` may be a step of a path.
fn is_step(word: &str) -> bool {
    let legal = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    (1..=TARGET_BYTES_MAX).contains(&word.len()) && !word.starts_with('.') && word.chars().all(legal)
}

impl TargetName {
    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TargetName {
    type Err = NameError;

    fn from_str(name: &str) -> Result<Self, NameError> {
        if is_step(name) { Ok(Self(name.to_owned())) } else { Err(NameError) }
    }
}

impl TryFrom<String> for TargetName {
    type Error = NameError;

    fn try_from(name: String) -> Result<Self, NameError> {
        name.parse()
    }
}

impl From<TargetName> for String {
    fn from(name: TargetName) -> Self {
        name.0
    }
}

impl fmt::Display for TargetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A target's name in the configuration, in which one `*` may stand for a part of the name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct TargetPattern<'a> {
    before: &'a str,
    /// None without a `*`.
    after: Option<&'a str>,
}

impl<'a> TargetPattern<'a> {
    /// A pattern; none if no name could match it.
    pub fn parse(text: &'a str) -> Option<Self> {
        // The name with the shortest part.
        text.replacen('*', "x", 1).parse::<TargetName>().ok()?;
        Some(match text.split_once('*') {
            None => Self { before: text, after: None },
            Some((before, after)) => Self { before, after: Some(after) },
        })
    }

    /// Whether it has a `*`.
    pub fn has_part(&self) -> bool {
        self.after.is_some()
    }

    /// How much of a name it says: of several that match, the one that says most counts.
    pub fn said(&self) -> (bool, usize) {
        (self.after.is_none(), self.before.len() + self.after.unwrap_or_default().len())
    }

    /// What the `*` stands for in `name`; empty for a pattern without one, none if it does not match.
    pub fn part_of<'n>(&self, name: &'n TargetName) -> Option<&'n str> {
        let rest = name.as_str().strip_prefix(self.before)?;
        match self.after {
            None => rest.is_empty().then_some(rest),
            Some(after) => rest.strip_suffix(after).filter(|part| is_step(part)),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_step_of_a_path() {
        for good in ["vnc", "vnc-web1", "a", "A.b_c-9", "a..b", "-", &"x".repeat(128)] {
            assert!(good.parse::<TargetName>().is_ok(), "{good}");
        }
        let long = "x".repeat(129);
        let bad = ["", ".", "..", ".x", "a/b", "/", "a b", "a\0b", "a\nb", "ä", "*", "{}", "a\u{7f}", &long];
        for bad in bad {
            assert!(bad.parse::<TargetName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_a_star_stands_for_is_one_step_of_a_path_too() {
        let part = |pattern: &str, name: &str| {
            let name: TargetName = name.parse().unwrap();
            TargetPattern::parse(pattern).unwrap().part_of(&name).map(str::to_owned)
        };
        assert_eq!(part("vnc-*", "vnc-web1").as_deref(), Some("web1"));
        assert_eq!(part("*", "web1").as_deref(), Some("web1"));
        assert_eq!(part("*-49152", "a-49152").as_deref(), Some("a"));
        assert_eq!(part("vnc", "vnc").as_deref(), Some(""));
        for (pattern, name) in [
            ("vnc-*", "vnc-"),
            ("vnc-*", "vnc-.x"),
            ("vnc-*", "vnc-.."),
            ("vnc-*", "vn"),
            ("ab*ba", "aba"),
            ("vnc", "vnc1"),
        ] {
            assert_eq!(part(pattern, name), None, "{pattern} {name}");
        }
        for bad in ["", "a*b*", ".*", "a/*", "**", "a *"] {
            assert_eq!(TargetPattern::parse(bad), None, "{bad}");
        }
    }
}
