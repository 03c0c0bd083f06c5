//! What a migration has been through.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{HeldUp, Migration};
use crate::migrate::timeline::{Entered, Sample, Timeline, Wait};

/// What a migration has been through: `GET /v1/migrations/{id}/timeline`. All times are milliseconds after its beginning.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Course {
    pub migration: Migration,
    pub phases: Vec<Entered>,
    /// Times in which nothing moved.
    pub waits: Vec<Wait>,
    /// When another process of the agent went on with it.
    pub restarts_ms: Vec<u64>,
    /// Phases, waits and restarts that are not among those above.
    pub left_out: u64,
    /// Names of the streams in `samples`.
    pub streams: Vec<String>,
    pub samples: Vec<Sample>,
    /// Milliseconds between two samples, about.
    pub sample_every_ms: u64,
    /// Milliseconds of copying by what held it up, at the source.
    #[serde(default)]
    pub held_up_ms: BTreeMap<HeldUp, u64>,
}

impl Course {
    pub fn new(migration: Migration, timeline: Timeline) -> Self {
        let held_up_ms = timeline.held_up_until(migration.elapsed_ms);
        let Timeline { phases, waits, restarts_ms, left_out, streams, samples, sample_every_ms, .. } =
            timeline;
        Self {
            migration,
            phases,
            waits,
            restarts_ms,
            left_out,
            streams,
            samples,
            sample_every_ms,
            held_up_ms,
        }
    }
}
