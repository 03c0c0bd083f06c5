//! How a journal says that its migration has ended. Its words are the journal's own: they stay as they
//! are, whatever else comes to be told of an end.

use serde::{Deserialize, Serialize};

use crate::migrate::model::phase::Phase;
use crate::migrate::model::problem::Problem;
use crate::migrate::model::progress::Outcome;

/// See [`super::Record::Ended`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "result")]
pub enum Ending {
    /// The guest is at the destination.
    Moved {
        /// What was left to clean up.
        leftovers: Vec<String>,
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
        /// What was left to clean up.
        leftovers: Vec<String>,
    },
    /// Not written; read as it always was.
    Undecided { cause: String },
}

impl From<Outcome> for Ending {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Moved { leftovers } => Self::Moved { leftovers },
            Outcome::Failed { phase, cause, problems, cancelled, leftovers } => {
                Self::Failed { phase, cause, problems, cancelled, leftovers }
            }
            Outcome::Undecided { cause } => Self::Undecided { cause },
        }
    }
}

impl From<Ending> for Outcome {
    fn from(ending: Ending) -> Self {
        match ending {
            Ending::Moved { leftovers } => Self::Moved { leftovers },
            Ending::Failed { phase, cause, problems, cancelled, leftovers } => {
                Self::Failed { phase, cause, problems, cancelled, leftovers }
            }
            Ending::Undecided { cause } => Self::Undecided { cause },
        }
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
        };
        let moved = r#"{"ended":{"result":"moved","leftovers":[]}}"#;
        let written = serde_json::to_string(&Record::Ended(Ending::Moved { leftovers: Vec::new() })).unwrap();
        assert_eq!(written, moved);
        let written = serde_json::to_string(&Record::Ended(failed(Vec::new()))).unwrap();
        assert_eq!(
            written,
            r#"{"ended":{"result":"failed","phase":"device","cause":"the link","problems":[],"cancelled":false,"leftovers":["a node"]}}"#
        );
        let older: Record = serde_json::from_str(&written.replace(r#""problems":[],"#, "")).unwrap();
        assert_eq!(older, Record::Ended(failed(Vec::new())));
    }
}
