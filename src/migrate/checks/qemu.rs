//! What a QEMU of either side must be able to do, and must not be doing.

use crate::migrate::model::problem::{Problem, ProblemKind};
use crate::migrate::model::role::Role;
use crate::qemu::{Abilities, Qmp, QmpError, QueryBlockJobs, QueryJobs, QueryMigrate};

/// What a QEMU of either side must be able to do.
pub(crate) fn abilities_missing(abilities: &Abilities, side: Role) -> Vec<Problem> {
    let source = side == Role::Source;
    let needs = [
        ("pause-before-switchover", abilities.capability("pause-before-switchover") || !source),
        ("return-path", abilities.capability("return-path")),
        ("migration events", abilities.capability("events")),
        ("migrate-incoming", abilities.migrate_incoming || source),
    ];
    let lacking = needs.into_iter().filter(|(_, present)| !present);
    lacking
        .map(|(what, _)| {
            let text = format!("the {}'s QEMU has no {what}", side.name());
            Problem::new(ProblemKind::QemuTooOld, text, "use QEMU 5.2 or newer on both hosts")
        })
        .collect()
}

/// What a QEMU of either side lacks to have disks copied by streams of their own.
pub(crate) fn nbd_missing(abilities: &Abilities, side: Role) -> Option<Problem> {
    let needs: &[_] = match side {
        Role::Source => &[
            ("`blockdev-mirror` with a job that keeps its error", abilities.blockdev_mirror),
            ("the block driver `nbd`", abilities.nbd_driver),
        ],
        Role::Destination => &[
            ("`nbd-server-start` on a passed descriptor", abilities.nbd_server_fd),
            ("`block-export-add`", abilities.block_export_add),
        ],
    };
    let lacking: Vec<_> = needs.iter().filter(|(_, present)| !present).map(|(what, _)| *what).collect();
    if lacking.is_empty() {
        return None;
    }
    let text = format!("the {}'s QEMU has no usable NBD: it lacks {}", side.name(), lacking.join(" and "));
    Some(Problem::new(ProblemKind::NoNbd, text, "use QEMU 5.2 or newer on both hosts, built with NBD"))
}

/// Block jobs and migrations under way.
pub(crate) async fn busy(qmp: &Qmp, name: &str) -> Result<Vec<Problem>, QmpError> {
    let mut problems = Vec::new();
    let block_jobs = qmp.execute(QueryBlockJobs).await?;
    let mut jobs: Vec<String> = block_jobs.into_iter().map(|j| format!("{} {}", j.kind, j.device)).collect();
    if jobs.is_empty() {
        jobs.extend(qmp.execute(QueryJobs).await?.into_iter().map(|j| format!("{} {}", j.kind, j.id)));
    }
    if !jobs.is_empty() {
        let text = format!("VM {name} has an active block job: {}", jobs.join(", "));
        problems.push(Problem::new(
            ProblemKind::Busy,
            text,
            "let it finish, or end it with `block-job-cancel`",
        ));
    }
    let migration = qmp.execute(QueryMigrate).await?.status;
    if migration.is_live() {
        let text = format!("VM {name} already has a migration in state {migration}");
        problems.push(Problem::new(
            ProblemKind::Busy,
            text,
            "let it finish, or end it with `migrate_cancel`",
        ));
    }
    Ok(problems)
}
