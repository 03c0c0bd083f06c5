//! The settings of QEMU's migration: all capabilities and all parameters that could change what a
//! migration is, stated whole on both sides, because another tool may have left some of them on.
//! What was there before is in the journal, and comes back.

use crate::migrate::journal::{Journal, JournalError, Past, Undo};
use crate::migrate::model::problem::{Problem, ProblemKind};
use crate::qemu::{
    BitmapNode, CapabilityStatus, MigrateSetCapabilities, MigrateSetParameters, MigrationParameters, Qmp,
    QmpError, QueryMigrateCapabilities, QueryMigrateParameters, restore_migration_settings,
};

/// QEMU's own limit for the RAM stream; the session limits, not QEMU.
const MAX_BANDWIDTH_BYTES_PER_S: u64 = 1 << 40;

/// The settings of one QEMU at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings {
    pub(crate) capabilities: Vec<CapabilityStatus>,
    pub(crate) parameters: MigrationParameters,
}

impl Settings {
    /// As they are now.
    pub(crate) async fn ask(qmp: &Qmp) -> Result<Self, QmpError> {
        let capabilities = qmp.execute(QueryMigrateCapabilities).await?;
        let parameters = qmp.execute(QueryMigrateParameters).await?;
        Ok(Self { capabilities, parameters })
    }

    /// Turns `on` on and everything else off that these know, and states all parameters.
    pub(crate) async fn state(
        &self,
        qmp: &Qmp,
        on: &[&str],
        downtime_limit_ms: Option<u64>,
    ) -> Result<(), QmpError> {
        // The capabilities first: some of them forbid values of parameters.
        qmp.execute_until_answered(MigrateSetCapabilities::exactly(on, &self.capabilities)).await?;
        qmp.execute_until_answered(MigrateSetParameters(self.stated(downtime_limit_ms))).await?;
        Ok(())
    }

    /// Has these dirty bitmaps go along, or be taken in; after [`state`](Self::state).
    pub(crate) async fn map_bitmaps(qmp: &Qmp, bitmaps: Vec<BitmapNode>) -> Result<(), QmpError> {
        let mapped =
            MigrationParameters { block_bitmap_mapping: Some(bitmaps), ..MigrationParameters::default() };
        qmp.execute_until_answered(MigrateSetParameters(mapped)).await.map(drop)
    }

    /// Puts back what differs by now.
    pub(crate) async fn restore(&self, qmp: &Qmp) -> Result<(), QmpError> {
        restore_migration_settings(qmp, &self.capabilities, &self.parameters).await
    }

    fn stated(&self, downtime_limit_ms: Option<u64>) -> MigrationParameters {
        let stated = MigrationParameters {
            max_bandwidth: Some(MAX_BANDWIDTH_BYTES_PER_S),
            downtime_limit: downtime_limit_ms,
            ..ordinary()
        };
        stated.known_to(&self.parameters)
    }

    /// What would change a migration if it stayed: names with their values.
    fn foreign(&self) -> Vec<String> {
        let on = self.capabilities.iter().filter(|c| c.state && !HARMLESS.contains(&c.capability.as_str()));
        let mut foreign: Vec<String> = on.map(|c| c.capability.clone()).collect();
        let mut parameters = self.parameters.differing_from(&ordinary());
        parameters.downtime_limit = None;
        // It says nothing while the capability is off, and cannot be taken back.
        parameters.block_bitmap_mapping = None;
        // Left by an older version of vmferry.
        parameters.max_bandwidth = parameters.max_bandwidth.filter(|&b| b != MAX_BANDWIDTH_BYTES_PER_S);
        // Newer QEMUs' default, which is the same with a single channel.
        parameters.zero_page_detection = parameters.zero_page_detection.filter(|who| who != "multifd");
        if let Ok(serde_json::Value::Object(parameters)) = serde_json::to_value(parameters) {
            foreign.extend(parameters.into_iter().map(|(name, value)| format!("{name}={value}")));
        }
        foreign
    }

    /// Whether nothing stands here that could change the outcome of a trial.
    pub(crate) fn is_ordinary(&self) -> bool {
        let how = MigrationParameters { max_bandwidth: None, ..self.parameters.clone() };
        Self { parameters: how, capabilities: self.capabilities.clone() }.foreign().is_empty()
    }

    /// What another tool has left on, for people.
    pub(crate) fn note(&self, side: &str) -> Option<Problem> {
        let foreign = self.foreign();
        if foreign.is_empty() {
            return None;
        }
        let text = format!(
            "the {side}'s QEMU has migration settings of somebody else's: {}. They are set aside for the \
             migration",
            foreign.join(", ")
        );
        let remedy = "nothing has to be done: they come back where that QEMU stays";
        Some(Problem::note(ProblemKind::MigrationSettings, text, remedy))
    }
}

/// The settings as they were before a migration, if it has changed them.
pub(crate) fn before(past: &Past) -> Option<Settings> {
    past.undo.iter().find_map(|undo| match undo {
        Undo::MigrationSettings { capabilities, parameters } => {
            Some(Settings { capabilities: capabilities.clone(), parameters: parameters.clone() })
        }
        _ => None,
    })
}

/// The settings as they were before this migration; on disk before any of them is changed.
pub(crate) async fn remember<E>(qmp: &Qmp, journal: &mut Journal) -> Result<Settings, E>
where
    E: From<QmpError> + From<JournalError>,
{
    if let Some(before) = before(journal.past()) {
        return Ok(before);
    }
    let Settings { capabilities, parameters } = Settings::ask(qmp).await?;
    let undo = Undo::MigrationSettings { capabilities: capabilities.clone(), parameters: parameters.clone() };
    journal.will_make(undo)?;
    Ok(Settings { capabilities, parameters })
}

/// What vmferry turns on itself; `auto-converge` changes only how fast the guest is, and `zero-blocks` nothing
/// but for disks that go in band.
const HARMLESS: [&str; 5] =
    ["events", "return-path", "pause-before-switchover", "auto-converge", "zero-blocks"];

/// QEMU's own defaults, as far as another value could change a migration.
fn ordinary() -> MigrationParameters {
    let text = |text: &str| Some(text.to_owned());
    MigrationParameters {
        max_bandwidth: Some(128 << 20),
        downtime_limit: Some(300),
        avail_switchover_bandwidth: Some(0),
        max_postcopy_bandwidth: Some(0),
        cpu_throttle_initial: Some(20),
        cpu_throttle_increment: Some(10),
        cpu_throttle_tailslow: Some(false),
        max_cpu_throttle: Some(99),
        throttle_trigger_threshold: Some(50),
        tls_creds: text(""),
        tls_hostname: text(""),
        tls_authz: text(""),
        multifd_compression: text("none"),
        mode: text("normal"),
        direct_io: Some(false),
        zero_page_detection: text("legacy"),
        block_incremental: Some(false),
        block_bitmap_mapping: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(on: &[&str], parameters: MigrationParameters) -> Settings {
        let known = ["events", "multifd", "x-ignore-shared", "return-path"];
        let capability =
            |name: &&str| CapabilityStatus { capability: (*name).to_owned(), state: on.contains(name) };
        Settings { capabilities: known.iter().map(capability).collect(), parameters }
    }

    #[test]
    fn what_is_not_ours_is_named_and_what_is_ordinary_is_not() {
        let mine = settings(&["events", "return-path"], MigrationParameters::default());
        assert!(mine.is_ordinary());
        let theirs = MigrationParameters {
            tls_creds: Some("tls0".into()),
            max_bandwidth: Some(1),
            downtime_limit: Some(9),
            zero_page_detection: Some("legacy".into()),
            ..MigrationParameters::default()
        };
        let theirs = settings(&["multifd", "events"], theirs);
        assert_eq!(theirs.foreign(), ["multifd", "max-bandwidth=1", "tls-creds=\"tls0\""]);
    }

    #[test]
    fn only_what_a_qemu_knows_is_stated() {
        let known = MigrationParameters { tls_creds: Some("x".into()), ..MigrationParameters::default() };
        let stated = settings(&[], known).stated(Some(7));
        let expected =
            MigrationParameters { tls_creds: Some(String::new()), ..MigrationParameters::default() };
        assert_eq!(stated, expected);
        let all = MigrateSetCapabilities::exactly(&["events"], &settings(&["multifd"], stated).capabilities);
        let states: Vec<_> = all.capabilities.iter().map(|c| c.state).collect();
        assert_eq!(states, [true, false, false, false]);
    }
}
