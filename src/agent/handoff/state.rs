//! What a process leaves to the next, as data: sessions, migrations, and what operators have set. The
//! descriptors go beside it. Knows neither how it is taken nor how it travels.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::agent::limits::LimitsSet;
use crate::agent::registry::Timelines;
use crate::forward::FrozenForwards;
use crate::metrics::{Counted, Counts};
use crate::migrate::FrozenMigrations;
use crate::net::frozen::FrozenSession;

/// The formats of what is left that this version reads, the newest first.
/// 2: streams may be compressed. 3: a migration has a witness, which must be asked before its guest runs.
pub(super) const FORMATS: [u32; 3] = [3, 2, 1];

/// The format that is written.
pub(super) fn format(has_a_witness: bool) -> u32 {
    if has_a_witness { 3 } else { 2 }
}

/// Everything but the descriptors.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct HandoffState {
    pub(super) format: u32,
    /// The version that wrote it, for people.
    pub(crate) version: String,
    pub(super) identity: String,
    /// Where its journals are. Of a version before, the same folder as ever.
    #[serde(default)]
    pub(super) state_dir: Option<PathBuf>,
    /// When it stopped, since this host's start, and how long its peers wait from then on. Of a version before, not known.
    #[serde(default)]
    pub(super) stopped: Option<Stopped>,
    /// The name of the process to its peers: the successor is the same agent to them.
    pub(crate) instance: [u8; 16],
    pub(super) sessions: Vec<FrozenSession>,
    pub(super) migrations: FrozenMigrations,
    /// Peers' limits that operators have set.
    #[serde(default)]
    pub(super) limits: LimitsSet,
    /// Of a version before there were any, none.
    #[serde(default)]
    pub(super) forwards: FrozenForwards,
    #[serde(default)]
    pub(crate) counts: Option<LeftCounts>,
    #[serde(default)]
    pub(crate) timelines: Timelines,
}

/// When a process stopped for the next one.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Stopped {
    since_boot: Duration,
    is_waited_for: Duration,
}

impl Stopped {
    /// Now.
    pub(super) fn now(is_waited_for: Duration) -> Self {
        Self { since_boot: since_boot(), is_waited_for }
    }

    /// For how long.
    pub(super) fn ago(self) -> Duration {
        since_boot().saturating_sub(self.since_boot)
    }

    /// Whether nobody waits any more.
    pub(super) fn is_too_long_ago(self) -> bool {
        self.ago() > self.is_waited_for
    }
}

/// Time that passes in a suspended host, too, and is nobody's to set.
fn since_boot() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::try_from(now).unwrap_or_default()
}

/// What the processes up to this one have counted.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct LeftCounts {
    pub(crate) counts: Counts,
    pub(crate) sessions: Counted,
}

impl HandoffState {
    pub(super) fn encode(&self) -> anyhow::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        ciborium::into_writer(self, &mut bytes).context("what is left cannot be encoded")?;
        Ok(bytes)
    }

    /// Reads what an earlier process has left.
    /// Errors: it is damaged, or of a format that this version does not know.
    pub(super) fn decode(bytes: &[u8]) -> anyhow::Result<Self> {
        /// What every format has.
        #[derive(Deserialize)]
        struct Head {
            format: u32,
            version: String,
        }
        let head: Head = ciborium::from_reader(bytes).context("what the process before left is damaged")?;
        if !FORMATS.contains(&head.format) {
            let (format, version) = (head.format, head.version);
            bail!("version {version} left it in format {format}, this one reads {FORMATS:?}");
        }
        ciborium::from_reader(bytes).context("what the process before left is damaged")
    }

    /// That an agent of this host with its journals in `state_dir` is the one to go on.
    /// Errors: it is another's, or its journals are elsewhere.
    pub(super) fn check_owner(&self, identity: &str, state_dir: &Path) -> anyhow::Result<()> {
        ensure!(
            self.identity == identity,
            "the process before was {}, and this is {identity} (`cert` in the configuration)",
            self.identity
        );
        let theirs = self.state_dir.as_deref().unwrap_or(state_dir);
        ensure!(
            theirs == state_dir,
            "the process before had its journals in {}, and this one has {} (`state_dir` in the configuration)",
            theirs.display(),
            state_dir.display()
        );
        Ok(())
    }

    /// Whether somebody waits for a process that goes on with it. Sessions alone are made anew.
    pub(crate) fn is_waited_for(&self) -> bool {
        !self.migrations.is_empty() || self.forwards.connections() > 0
    }

    /// In words.
    pub(crate) fn summary(&self) -> String {
        let (migrations, connections) = (self.migrations.len(), self.forwards.connections());
        let sessions = self.sessions.len();
        format!("{migrations} migrations and {connections} forwarded connections in {sessions} sessions")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use ciborium::Value;

    use super::*;

    fn left() -> HandoffState {
        HandoffState {
            format: format(false),
            version: "0".into(),
            identity: "alpha".into(),
            state_dir: Some("/var/lib/vmferry".into()),
            stopped: Some(Stopped::now(Duration::from_secs(60))),
            instance: [7; 16],
            sessions: Vec::new(),
            migrations: FrozenMigrations::default(),
            limits: LimitsSet::default(),
            forwards: FrozenForwards::default(),
            counts: None,
            timelines: Timelines::default(),
        }
    }

    /// Whatever an earlier version did not leave is empty.
    #[test]
    fn what_a_version_before_forwarding_has_left_is_read() {
        let whole: Value = ciborium::from_reader(&left().encode().unwrap()[..]).unwrap();
        let mut fields = whole.into_map().unwrap();
        let before = fields.len();
        fields.retain(|(key, _)| key.as_text() != Some("forwards"));
        assert_eq!(fields.len(), before - 1);
        let mut bytes = Vec::new();
        ciborium::into_writer(&Value::Map(fields), &mut bytes).unwrap();
        let read = HandoffState::decode(&bytes).unwrap();
        assert!(read.forwards.is_empty());
    }

    #[test]
    fn only_the_same_agent_goes_on() {
        let mut left = left();
        let own = Path::new("/var/lib/vmferry");
        assert!(left.check_owner("alpha", own).is_ok());
        let of_another = left.check_owner("bravo", own).unwrap_err().to_string();
        assert!(of_another.contains("was alpha, and this is bravo"), "{of_another}");
        let elsewhere = left.check_owner("alpha", Path::new("/srv")).unwrap_err().to_string();
        assert!(elsewhere.contains("in /var/lib/vmferry, and this one has /srv"), "{elsewhere}");
        // A version before does not say where.
        left.state_dir = None;
        assert!(left.check_owner("alpha", Path::new("/srv")).is_ok());
    }
}
