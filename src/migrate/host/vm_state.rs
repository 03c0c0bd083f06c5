//! What a virtual machine's QEMU on this host is doing, for an operator who wants to know who runs
//! the VM and who does not. Looks and changes nothing. A monitor serves one client, so one that belongs
//! to a migration is not asked, and a migration that begins does not wait for a look. Knows nothing of
//! what the other host has: the same VM may run there as well.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use super::known_vms;
use super::reservations::Holder;
use crate::migrate::host::Host;
use crate::migrate::model::problem::{Problem, ProblemKind, chain};
use crate::qemu::{MigrationStatus, Qmp, QmpError, QueryMigrate, QueryStatus, RunState};

/// How long one QEMU may take to answer.
const LOOK_DEADLINE: Duration = Duration::from_secs(2);
/// How long all of them may take.
const ALL_DEADLINE: Duration = Duration::from_secs(5);
/// Monitors that are asked at once.
const AT_ONCE: usize = 32;

/// What a QEMU has of its guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Here {
    Runs,
    /// It has the guest, which does not run: paused, shut down, stopped by an error.
    Holds,
    /// It has a guest that has never run.
    NotBegun,
    /// It waits for a migration, and has no guest.
    Waits,
    /// A migration is coming in that is not one of this agent.
    Receives,
    /// The one migration that it waited for has failed; it has no guest.
    Spent,
    /// Its guest has been moved away.
    GivenAway,
    /// Nobody listens at its monitor.
    NoQemu,
    /// It belongs to a migration or a check of this agent, and was not asked.
    InMigration,
    /// It could not be asked.
    Unknown,
}

impl Here {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Runs,
        Self::Holds,
        Self::NotBegun,
        Self::Waits,
        Self::Receives,
        Self::Spent,
        Self::GivenAway,
        Self::NoQemu,
        Self::InMigration,
        Self::Unknown,
    ];

    /// A label for metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Runs => "runs",
            Self::Holds => "holds",
            Self::NotBegun => "not_begun",
            Self::Waits => "waits",
            Self::Receives => "receives",
            Self::Spent => "spent",
            Self::GivenAway => "given_away",
            Self::NoQemu => "no_qemu",
            Self::InMigration => "in_migration",
            Self::Unknown => "unknown",
        }
    }

    /// What QEMU's own words mean. A state that this build does not know counts as that of a QEMU with
    /// a guest: that is the careful reading.
    pub(crate) fn of(state: &RunState, migration: &MigrationStatus) -> Self {
        match (state, migration) {
            (RunState::InMigrate, MigrationStatus::None) => Self::Waits,
            (RunState::InMigrate, migration) if migration.is_live() => Self::Receives,
            (RunState::InMigrate, _) => Self::Spent,
            (RunState::PostMigrate, _) => Self::GivenAway,
            (RunState::Prelaunch, _) => Self::NotBegun,
            (RunState::Running, _) => Self::Runs,
            _ => Self::Holds,
        }
    }
}

/// One virtual machine on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmState {
    /// Its name in the configuration.
    pub vm: String,
    /// What its QEMU has of the guest.
    pub here: Here,
    /// QEMU's own word for its state, if it was asked.
    #[serde(default)]
    pub qemu_state: Option<String>,
    /// The migration that it belongs to.
    #[serde(default)]
    pub migration: Option<Uuid>,
    /// Why it could not be asked.
    #[serde(default)]
    pub cause: Option<String>,
}

/// Looks at every VM that is known here.
pub async fn look(host: &Arc<Host>) -> Vec<VmState> {
    let until = Instant::now() + ALL_DEADLINE;
    let known = known_vms::names(&host.config).into_iter();
    let vms: Vec<_> = known.filter_map(|name| Some((host.config.vm(&name)?.qmp, name))).collect();
    let looks = vms.into_iter().map(|(qmp, name)| look_at(Arc::clone(host), name, qmp, until));
    stream::iter(looks).buffered(AT_ONCE).collect().await
}

/// What the disks of a VM have together that its guest can write to; none if its QEMU does not say.
pub async fn disk_bytes(host: &Host, vm: &str) -> Option<u64> {
    let monitor = &host.config.vm(vm)?.qmp;
    let looking = host.reservations.begin_look(vm).ok()?;
    let asked = async {
        let (qmp, _events) = Qmp::connect(monitor, LOOK_DEADLINE).await.ok()?;
        let disks = crate::qemu::disks(&qmp).await.ok()?;
        Some(disks.iter().filter(|disk| !disk.read_only).map(|disk| disk.virtual_size).sum())
    };
    tokio::select! {
        biased;
        _ = looking.taken() => None,
        asked = tokio::time::timeout(LOOK_DEADLINE, asked) => asked.ok().flatten(),
    }
}

async fn look_at(host: Arc<Host>, name: String, monitor: PathBuf, until: Instant) -> VmState {
    let state = |here| VmState { vm: name.clone(), here, qemu_state: None, migration: None, cause: None };
    let in_migration = |id| VmState { migration: Some(id), ..state(Here::InMigration) };
    let unknown = |cause: String| VmState { cause: Some(cause), ..state(Here::Unknown) };
    let taken = |holder| match holder {
        Holder::Migration(id) => in_migration(id),
        Holder::Task(_) => state(Here::InMigration),
    };
    let looking = match host.reservations.begin_look(&name) {
        Ok(looking) => looking,
        Err(holder) => return taken(holder),
    };
    let until = until.min(Instant::now() + LOOK_DEADLINE);
    let asked = tokio::select! {
        biased;
        holder = looking.taken() => return holder.map_or_else(|| state(Here::InMigration), taken),
        asked = timeout_at(until, ask(&monitor)) => asked,
    };
    match asked {
        Ok(Ok((run, migration))) => {
            VmState { qemu_state: Some(run.to_string()), ..state(Here::of(&run, &migration)) }
        }
        Ok(Err(e)) if e.is_not_listening() => state(Here::NoQemu),
        Ok(Err(e)) => unknown(chain(&e)),
        Err(_) => unknown("its monitor has another client, or QEMU is slow to answer".into()),
    }
}

async fn ask(monitor: &Path) -> Result<(RunState, MigrationStatus), QmpError> {
    let (qmp, _events) = Qmp::connect(monitor, LOOK_DEADLINE).await?;
    let migration = qmp.execute_within(QueryMigrate, LOOK_DEADLINE).await?.status;
    let state = qmp.execute_within(QueryStatus, LOOK_DEADLINE).await?.status;
    Ok((state, migration))
}

/// Why the QEMU at the destination is not one that waits for this VM, and what to do; `None` when it
/// is one. Nothing that has, or may have, a guest is to be ended on our word.
pub(crate) fn not_waiting(vm: &str, state: &RunState, migration: &MigrationStatus) -> Option<Problem> {
    let fresh = "start it anew with `-incoming defer -S`";
    let (what, remedy) = match Here::of(state, migration) {
        Here::Waits => return None,
        Here::Spent => (
            "has taken part in a migration already, which failed",
            format!("end it, for it has no guest, and {fresh}: a QEMU takes one migration only"),
        ),
        Here::Receives => (
            "is being sent a guest by somebody else",
            "wait for that migration, or find out whose it is; do not end that QEMU meanwhile".into(),
        ),
        Here::GivenAway => (
            "is one whose guest has been moved away",
            format!("make sure that the VM runs where it was moved to; then end this QEMU and {fresh}"),
        ),
        Here::NotBegun => (
            "was started without `-incoming`, and its guest has not run yet",
            format!("if nobody is about to run that guest there, end that QEMU and {fresh}"),
        ),
        _ => (
            "has a guest; whether it is the same VM, started a second time, is not known",
            "do not end it before you know on which host the right one runs: `vmferry status` on both \
             shows what each QEMU has. A QEMU that is to receive a VM is started with `-incoming defer -S`"
                .into(),
        ),
    };
    let text = format!(
        "the destination's QEMU of VM {vm} does not wait for a migration: it {what} (state {state}, migration {migration})"
    );
    Some(Problem::new(ProblemKind::TargetNotWaiting, text, remedy))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_told_to_end_a_qemu_that_may_have_a_guest() {
        let states = "debug inmigrate internal-error io-error paused postmigrate prelaunch finish-migrate \
                      restore-vm running save-vm shutdown suspended watchdog guest-panicked colo of-tomorrow";
        let migrations = "none setup cancelling cancelled active completed failed device of-tomorrow";
        for state in states.split_whitespace() {
            for migration in migrations.split_whitespace() {
                let (run, status) = (state.to_owned().into(), migration.to_owned().into());
                let Some(problem) = not_waiting("web1", &run, &status) else {
                    assert_eq!((state, migration), ("inmigrate", "none"));
                    continue;
                };
                let without_guest = ["inmigrate", "postmigrate", "prelaunch"].contains(&state);
                let ends = problem.remedy.contains("end it, ")
                    || problem.remedy.contains("end this QEMU")
                    || problem.remedy.contains("end that QEMU and");
                assert!(!ends || without_guest, "{state}, {migration}: {problem}");
                assert!(
                    problem.text.contains(&format!("(state {state}, migration {migration})")),
                    "{problem}"
                );
            }
        }
        let running = not_waiting("web1", &RunState::Running, &MigrationStatus::None).unwrap();
        assert!(running.remedy.starts_with("do not end it"), "{running}");
    }
}
