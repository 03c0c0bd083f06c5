//! How a journal says that its migration has ended. Its words are the journal's own: they stay as they
//! are, whatever else comes to be told of an end.

use serde::{Deserialize, Serialize};

use crate::migrate::model::leftover::{Leftover, words};
use crate::migrate::model::phase::Phase;
use crate::migrate::model::problem::Problem;
use crate::migrate::model::progress::Outcome;

/// What an older agent reads of a replica that was brought into step.
const REPLICATED: &str = "a replica was brought into step; nothing was to be moved";

/// See [`super::Record::Ended`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "result")]
pub enum Ending {
    /// The guest is at the destination.
    Moved {
        /// What was left to clean up.
        leftovers: Vec<String>,
        /// The guest should run here and was not seen to; none where nothing was left, or by an older agent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        guest_stands: Option<bool>,
    },
    /// The guest is where it was.
    Failed {
        phase: Phase,
        /// The cause and its causes.
        cause: String,
        /// What would have to be mended first.
        #[serde(default)]
        problems: Vec<Problem>,
        /// Whether an operator asked for it.
        cancelled: bool,
        leftovers: Vec<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        guest_stands: Option<bool>,
        /// Nothing was to be moved: a replica was brought into step. Older agents read a failure, of which they do
        /// the same.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        replicated: bool,
    },
    /// Not written; read as it always was.
    Undecided { cause: String },
}

impl From<Outcome> for Ending {
    fn from(outcome: Outcome) -> Self {
        let stands = |left: &[Leftover]| {
            (!left.is_empty()).then(|| left.iter().any(|one| matches!(one, Leftover::Guest(_))))
        };
        match outcome {
            Outcome::Moved { leftovers } => {
                Self::Moved { guest_stands: stands(&leftovers), leftovers: words(leftovers) }
            }
            Outcome::Failed { phase, cause, problems, cancelled, leftovers } => {
                let (guest_stands, leftovers) = (stands(&leftovers), words(leftovers));
                let replicated = false;
                Self::Failed { phase, cause, problems, cancelled, leftovers, guest_stands, replicated }
            }
            Outcome::Replicated { leftovers } => Self::Failed {
                phase: Phase::Mirror,
                cause: REPLICATED.into(),
                problems: Vec::new(),
                cancelled: false,
                guest_stands: stands(&leftovers),
                leftovers: words(leftovers),
                replicated: true,
            },
            Outcome::Undecided { cause } => Self::Undecided { cause },
        }
    }
}

impl From<Ending> for Outcome {
    fn from(ending: Ending) -> Self {
        let others = |left: Vec<String>| left.into_iter().map(Leftover::from).collect();
        match ending {
            Ending::Moved { leftovers, .. } => Self::Moved { leftovers: others(leftovers) },
            Ending::Failed { replicated: true, leftovers, .. } => {
                Self::Replicated { leftovers: others(leftovers) }
            }
            Ending::Failed { phase, cause, problems, cancelled, leftovers, .. } => {
                Self::Failed { phase, cause, problems, cancelled, leftovers: others(leftovers) }
            }
            Ending::Undecided { cause } => Self::Undecided { cause },
        }
    }
}

impl Ending {
    /// What was left to clean up.
    pub(super) fn leftovers(&self) -> &[String] {
        match self {
            Self::Moved { leftovers, .. } | Self::Failed { leftovers, .. } => leftovers,
            Self::Undecided { .. } => &[],
        }
    }

    /// Whether the guest should run here and was not seen to. Older agents said so in words alone.
    pub(super) fn guest_stands(&self) -> bool {
        let (Self::Moved { guest_stands, .. } | Self::Failed { guest_stands, .. }) = self else {
            return false;
        };
        let said = || self.leftovers().iter().any(|left| left.to_lowercase().contains("start"));
        guest_stands.unwrap_or_else(said)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use super::super::Record;
    use super::*;

    #[test]
    fn an_end_is_written_as_ever_and_read_from_agents_that_knew_of_less() {
        let failed = |problems| Ending::Failed {
            phase: Phase::Device,
            cause: "the link".into(),
            problems,
            cancelled: false,
            leftovers: vec!["a node".into()],
            guest_stands: None,
            replicated: false,
        };
        let moved = r#"{"ended":{"result":"moved","leftovers":[]}}"#;
        let written = serde_json::to_string(&Record::Ended(Ending::Moved {
            leftovers: Vec::new(),
            guest_stands: None,
        }))
        .unwrap();
        assert_eq!(written, moved);
        let written = serde_json::to_string(&Record::Ended(failed(Vec::new()))).unwrap();
        assert_eq!(
            written,
            r#"{"ended":{"result":"failed","phase":"device","cause":"the link","problems":[],"cancelled":false,"leftovers":["a node"]}}"#
        );
        let older: Record = serde_json::from_str(&written.replace(r#""problems":[],"#, "")).unwrap();
        assert_eq!(older, Record::Ended(failed(Vec::new())));
    }
    #[test]
    fn what_is_left_is_told_by_its_kind_and_of_older_agents_by_its_words() {
        let ended = |left: Vec<Leftover>| {
            let line = serde_json::to_string(&Ending::from(Outcome::Moved { leftovers: left })).unwrap();
            (serde_json::from_str::<Ending>(&line).unwrap().guest_stands(), line)
        };
        let hook = "before_start failed".to_owned();
        assert!(!ended(vec![hook.clone().into()]).0);
        let (stands, line) = ended(vec![hook.into(), Leftover::Guest("the guest".into())]);
        assert!(stands && line.contains(r#""leftovers":["before_start failed","the guest"]"#), "{line}");
        let older = |left: &str| format!(r#"{{"result":"moved","leftovers":["{left}"]}}"#);
        let older = |left| serde_json::from_str::<Ending>(&older(left)).unwrap().guest_stands();
        assert!(older("it has ended: Start the VM here") && !older("job vmferry-vda"));
    }
}
