//! What a migration would do.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Problem;
use crate::migrate::prediction::{Outlook, Prediction};

/// The answer to `POST /v1/migrations/plan`, which takes what `POST /v1/migrations` takes.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct MigrationPlan {
    /// What was found; the migration would be refused if the severity of one of them is `problem`.
    pub problems: Vec<Problem>,
    /// None where it would be refused.
    pub foretold: Option<Foretold>,
}

/// What is to be expected of a migration, if its guest and the way go on as they are.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
pub struct Foretold {
    /// The guest as it is; none where it could not be looked at.
    pub guest: Option<Outlook>,
    /// What was measured to go to the destination in a second, within limits.
    pub bytes_per_s: Option<u64>,
    pub prediction: Option<Prediction>,
    /// Why there is none.
    pub cause: Option<String>,
}
