//! Taking everything of a migration out of a QEMU again. Each step ignores what is gone already;
//! what can't be cleaned is listed, and the later steps are tried all the same. Works by asking, not
//! by events, so that an agent which has just started can do it.
//!
//! A QEMU that lives and does not answer is slow, not dead: half a clean-up would leave its guest in
//! a state that nobody wants. So it is waited for, for long, and a step whose connection was lost is
//! made again, which each of them allows.

use super::client::{Command, Qmp};
use super::commands::{
    BlockDirtyBitmapRemove, BlockExportDel, BlockExportRemoveMode, BlockJobCancel, BlockdevDel,
    CapabilityStatus, Closefd, JobDismiss, MigrateCancel, MigrateSetCapabilities, MigrateSetParameters,
    MigrationParameters, NbdServerStop, QueryBlockExports, QueryIoThrottle, QueryJobs, QueryMigrate,
    QueryMigrateCapabilities, QueryMigrateParameters, QueryStatus,
};
use super::error::QmpError;
use super::process::Life;
use super::states::RunState;
use super::throttle::Unthrottled;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// How long a clean-up waits in all for a QEMU that lives and does not answer.
const CLEANUP_PATIENCE: Duration = Duration::from_secs(300);

/// The same for a QEMU of which it is not known whether it lives.
const UNKNOWN_PATIENCE: Duration = Duration::from_secs(60);

/// What each step gets although that time is over: QEMU may answer again.
const LAST_CHANCE: Duration = Duration::from_secs(1);

/// Between two words in the log on a QEMU that is waited for.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// How long a cancelled migration or job may take to end, and a node to be released.
const END_DEADLINE: Duration = Duration::from_secs(60);

/// How often is asked whether it has.
const ASK_EVERY: Duration = Duration::from_millis(20);

/// What a migration may have left in the source's QEMU.
#[derive(Debug, Clone, Default)]
pub struct SourceLeftovers {
    /// The migration under way is ours, or may be: it is cancelled.
    pub migration: bool,
    /// Jobs that were or may have been started.
    pub jobs: Vec<String>,
    /// Nodes that were or may have been added.
    pub nodes: Vec<String>,
    /// Exports that were or may have been added, for reading what changed.
    pub exports: Vec<String>,
    /// We have or may have started the NBD server for them.
    pub nbd_server: bool,
    /// Dirty bitmaps that were or may have been added: node and name.
    pub bitmaps: Vec<(String, String)>,
    /// Devices to which the guest's writes are or may be limited.
    pub throttled: Vec<Unthrottled>,
    /// Every descriptor name ever used.
    pub fdnames: Vec<String>,
    /// The capabilities as they were; empty to leave them.
    pub capabilities_before: Vec<CapabilityStatus>,
    /// The parameters as they were.
    pub parameters_before: Option<MigrationParameters>,
}

/// What a migration may have left in the destination's QEMU.
#[derive(Debug, Clone, Default)]
pub struct DestinationLeftovers {
    /// We have or may have started the NBD server.
    pub nbd_server: bool,
    /// Exports that were or may have been added.
    pub exports: Vec<String>,
    /// Every descriptor name ever used.
    pub fdnames: Vec<String>,
    /// The capabilities as they were; empty to leave them.
    pub capabilities_before: Vec<CapabilityStatus>,
    /// The parameters as they were.
    pub parameters_before: Option<MigrationParameters>,
}

/// Something that a clean-up deals with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the sentences say it")]
pub enum Remainder {
    #[error("the migration under way")]
    Migration,
    #[error("job {0}")]
    Job(String),
    #[error("node {0}")]
    Node(String),
    #[error("descriptor {0}")]
    FdName(String),
    #[error("the migration capabilities as they were before")]
    Capabilities,
    #[error("the migration parameters as they were before")]
    Parameters,
    #[error("export {0}")]
    Export(String),
    #[error("the NBD server")]
    NbdServer,
    #[error("dirty bitmap {0}")]
    Bitmap(String),
    #[error("the limit of the guest's writes to {0}")]
    Throttle(String),
}

#[derive(Debug, thiserror::Error)]
#[error("could not clean up {what}")]
pub struct NotCleaned {
    pub what: Remainder,
    pub source: QmpError,
}

/// How a clean-up went.
#[derive(Debug, Default)]
pub struct CleanupReport {
    /// What could not be cleaned, in the order of the steps.
    pub left: Vec<NotCleaned>,
    /// What the guest does now; `None` if it could not be asked.
    ///
    /// A guest that was paused by somebody when its migration was cancelled before switchover is
    /// `postmigrate` on QEMU 7.2, not `paused`: QEMU then refuses to migrate it again until it
    /// has been continued once (10.0 puts the former state back).
    pub guest: Option<RunState>,
}

impl CleanupReport {
    /// Everything is gone.
    pub fn is_clean(&self) -> bool {
        self.left.is_empty()
    }

    /// The connection broke, so nothing is known: QEMU may have exited, and then all is gone.
    pub fn is_connection_lost(&self) -> bool {
        self.left.iter().any(|entry| entry.source.is_over())
    }

    /// QEMU did not answer at all, to its end: the guest may be in any state.
    pub fn is_unanswered(&self) -> bool {
        self.guest.is_none() && self.left.iter().any(|entry| entry.source.is_deadline())
    }

    fn note(&mut self, what: Remainder, result: Result<(), QmpError>) {
        if let Err(source) = result {
            tracing::warn!(%what, error = %source, "could not clean up");
            self.left.push(NotCleaned { what, source });
        }
    }
}

/// Cleans the source. The caller has cut its ends of all streams before, else a job may not end.
///
/// A guest that was paused for the switchover goes on by the cancelled migration. The guest is
/// not touched otherwise; after a completed migration it stays as it is.
pub async fn source_cleanup(qmp: &Qmp, what: &SourceLeftovers) -> CleanupReport {
    let (mut report, qmp) = (CleanupReport::default(), &Patient::new(qmp));
    if what.migration {
        report.note(Remainder::Migration, end_migration(qmp).await);
    }
    for throttled in &what.throttled {
        report.note(Remainder::Throttle(throttled.device.clone()), end_throttle(qmp, throttled).await);
    }
    for job in &what.jobs {
        report.note(Remainder::Job(job.clone()), end_job(qmp, job).await);
    }
    for node in &what.nodes {
        report.note(Remainder::Node(node.clone()), delete_node(qmp, node).await);
    }
    clean_tracking(qmp, what, &mut report).await;
    close_fds(qmp, &what.fdnames, &mut report).await;
    restore(qmp, &what.capabilities_before, what.parameters_before.as_ref(), &mut report).await;
    report.guest = guest(qmp).await;
    report
}

async fn end_throttle(qmp: &Patient<'_>, throttled: &Unthrottled) -> Result<(), QmpError> {
    match throttled.back(step(qmp, QueryIoThrottle).await?) {
        Some(back) => step(qmp, back).await.map(drop),
        None => Ok(()),
    }
}

/// Puts limits of what the guest writes back as they were, where they are ours still.
pub async fn unthrottle(qmp: &Qmp, throttled: &Unthrottled) -> Result<(), QmpError> {
    end_throttle(&Patient::new(qmp), throttled).await
}

/// What follows a disk's changes: exports first, which use their bitmaps.
async fn clean_tracking(qmp: &Patient<'_>, what: &SourceLeftovers, report: &mut CleanupReport) {
    for export in &what.exports {
        report.note(Remainder::Export(export.clone()), end_export(qmp, export).await);
    }
    if what.nbd_server {
        report.note(Remainder::NbdServer, stop_nbd_server(qmp).await);
    }
    for (node, name) in &what.bitmaps {
        report.note(Remainder::Bitmap(name.clone()), end_bitmap(qmp, node, name).await);
    }
}

/// Removes a dirty bitmap, if it is there.
pub async fn delete_bitmap(qmp: &Qmp, node: &str, name: &str) -> Result<(), QmpError> {
    end_bitmap(&Patient::new(qmp), node, name).await
}

async fn end_bitmap(qmp: &Patient<'_>, node: &str, name: &str) -> Result<(), QmpError> {
    let remove = BlockDirtyBitmapRemove { node: node.to_owned(), name: name.to_owned() };
    tolerate(step(qmp, remove).await, QmpError::is_not_found_bitmap)
}

/// Cleans the destination. The caller has closed its NBD connections that never finished their
/// handshake before: QEMU 7.2 hangs otherwise. If `migrate-incoming` was accepted the process
/// is used up, clean or not.
///
/// A server that carries exports of somebody else's is left running.
pub async fn destination_cleanup(qmp: &Qmp, what: &DestinationLeftovers) -> CleanupReport {
    let (mut report, qmp) = (CleanupReport::default(), &Patient::new(qmp));
    for export in &what.exports {
        report.note(Remainder::Export(export.clone()), end_export(qmp, export).await);
    }
    if what.nbd_server {
        report.note(Remainder::NbdServer, stop_nbd_server(qmp).await);
    }
    close_fds(qmp, &what.fdnames, &mut report).await;
    // One that has begun its migration does not allow it, and is used up.
    if !step(qmp, QueryMigrate).await.is_ok_and(|info| info.status.is_live()) {
        restore(qmp, &what.capabilities_before, what.parameters_before.as_ref(), &mut report).await;
    }
    report.guest = guest(qmp).await;
    report
}

/// Puts migration settings back as they were; of capabilities none to leave them.
pub async fn restore_migration_settings(
    qmp: &Qmp,
    capabilities: &[CapabilityStatus],
    parameters: &MigrationParameters,
) -> Result<(), QmpError> {
    let qmp = &Patient::new(qmp);
    restore_capabilities(qmp, capabilities).await?;
    restore_parameters(qmp, parameters).await
}

async fn restore(
    qmp: &Patient<'_>,
    capabilities: &[CapabilityStatus],
    parameters: Option<&MigrationParameters>,
    report: &mut CleanupReport,
) {
    report.note(Remainder::Capabilities, restore_capabilities(qmp, capabilities).await);
    if let Some(before) = parameters {
        report.note(Remainder::Parameters, restore_parameters(qmp, before).await);
    }
}

async fn guest(qmp: &Patient<'_>) -> Option<RunState> {
    let status = step(qmp, QueryStatus).await;
    status.ok().map(|info| info.status)
}

/// A QEMU that is cleaned up, and until when it is waited for.
struct Patient<'a> {
    qmp: &'a Qmp,
    until: Instant,
}

impl<'a> Patient<'a> {
    fn new(qmp: &'a Qmp) -> Self {
        let patience = match qmp.process().life() {
            Life::Unknown => UNKNOWN_PATIENCE,
            _ => CLEANUP_PATIENCE,
        };
        Self { qmp, until: Instant::now() + patience }
    }

    fn rest(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now()).max(LAST_CHANCE)
    }
}

/// Executes a command that may be repeated.
async fn step<C: Command>(patient: &Patient<'_>, command: C) -> Result<C::Return, QmpError> {
    tell_while(patient.qmp.execute_until_answered_within(command, patient.rest()), C::NAME).await
}

/// Says now and then what is waited for.
async fn tell_while<T>(work: impl Future<Output = T>, name: &str) -> T {
    let since = Instant::now();
    let mut work = std::pin::pin!(work);
    loop {
        match timeout(TELL_EVERY, &mut work).await {
            Ok(done) => return done,
            Err(_) => {
                let seconds = since.elapsed().as_secs();
                tracing::warn!(command = name, seconds, "QEMU does not answer; the clean-up waits for it");
            }
        }
    }
}

/// Forgives an error that means "already gone".
fn tolerate<T>(result: Result<T, QmpError>, gone: fn(&QmpError) -> bool) -> Result<(), QmpError> {
    match result {
        Err(error) if !gone(&error) => Err(error),
        _ => Ok(()),
    }
}

/// The end of a wait for something that QEMU does by itself.
struct Wait {
    what: &'static str,
    until: Instant,
}

impl Wait {
    fn new(what: &'static str) -> Self {
        Self { what, until: Instant::now() + END_DEADLINE }
    }

    /// Waits before the next question; fails when there has been time enough.
    async fn pause(&self) -> Result<(), QmpError> {
        if Instant::now() >= self.until {
            return Err(QmpError::Deadline { name: self.what, after: END_DEADLINE, sent: true });
        }
        sleep(ASK_EVERY).await;
        Ok(())
    }
}

async fn end_migration(qmp: &Patient<'_>) -> Result<(), QmpError> {
    if !step(qmp, QueryMigrate).await?.status.is_live() {
        return Ok(());
    }
    step(qmp, MigrateCancel).await?;
    let wait = Wait::new("migrate_cancel");
    while step(qmp, QueryMigrate).await?.status.is_live() {
        wait.pause().await?;
    }
    Ok(())
}

async fn end_job(qmp: &Patient<'_>, id: &str) -> Result<(), QmpError> {
    match is_job_over(qmp, id).await? {
        None => return Ok(()),
        Some(true) => {}
        Some(false) => {
            let cancel = BlockJobCancel { device: id.to_owned(), force: true };
            tolerate(step(qmp, cancel).await, QmpError::is_job_past_that)?;
        }
    }
    let wait = Wait::new("block-job-cancel");
    while is_job_over(qmp, id).await? == Some(false) {
        wait.pause().await?;
    }
    let dismiss = JobDismiss { id: id.to_owned() };
    tolerate(step(qmp, dismiss).await, QmpError::is_not_found_job)
}

/// `None`: there is no such job.
async fn is_job_over(qmp: &Patient<'_>, id: &str) -> Result<Option<bool>, QmpError> {
    let jobs = step(qmp, QueryJobs).await?;
    let job = jobs.iter().find(|job| job.id == id);
    Ok(job.map(|job| job.status.is_over()))
}

/// A job that has just been dismissed may hold its node for a moment.
async fn delete_node(qmp: &Patient<'_>, node_name: &str) -> Result<(), QmpError> {
    let wait = Wait::new("blockdev-del");
    loop {
        let delete = BlockdevDel { node_name: node_name.to_owned() };
        match step(qmp, delete).await {
            Err(error) if error.is_node_in_use() => wait.pause().await.map_err(|_| error)?,
            result => return tolerate(result, QmpError::is_not_found_node),
        }
    }
}

async fn close_fds(qmp: &Patient<'_>, fdnames: &[String], report: &mut CleanupReport) {
    for fdname in fdnames {
        let close = Closefd { fdname: fdname.clone() };
        let result = tolerate(step(qmp, close).await, QmpError::is_not_found_fd);
        report.note(Remainder::FdName(fdname.clone()), result);
    }
}

async fn restore_capabilities(qmp: &Patient<'_>, before: &[CapabilityStatus]) -> Result<(), QmpError> {
    if before.is_empty() {
        return Ok(());
    }
    let now = step(qmp, QueryMigrateCapabilities).await?;
    let capabilities: Vec<_> = before.iter().filter(|wanted| !now.contains(wanted)).cloned().collect();
    if capabilities.is_empty() {
        return Ok(());
    }
    step(qmp, MigrateSetCapabilities { capabilities }).await.map(drop)
}

async fn restore_parameters(qmp: &Patient<'_>, before: &MigrationParameters) -> Result<(), QmpError> {
    let now = step(qmp, QueryMigrateParameters).await?;
    let back = before.differing_from(&now);
    if back == MigrationParameters::default() {
        return Ok(());
    }
    step(qmp, MigrateSetParameters(back)).await.map(drop)
}

/// Deletes an export, if it is there, and waits until its clients' requests are over.
pub async fn delete_export(qmp: &Qmp, id: &str) -> Result<(), QmpError> {
    end_export(&Patient::new(qmp), id).await
}

async fn end_export(qmp: &Patient<'_>, id: &str) -> Result<(), QmpError> {
    let delete = BlockExportDel { id: id.to_owned(), mode: BlockExportRemoveMode::Hard };
    tolerate(step(qmp, delete).await, QmpError::is_not_found_export)?;
    let wait = Wait::new("block-export-del");
    while step(qmp, QueryBlockExports).await?.iter().any(|export| export.id == id) {
        wait.pause().await?;
    }
    Ok(())
}

async fn stop_nbd_server(qmp: &Patient<'_>) -> Result<(), QmpError> {
    let exports = step(qmp, QueryBlockExports).await?;
    if exports.iter().any(|export| export.kind == "nbd") {
        return Ok(());
    }
    tolerate(step(qmp, NbdServerStop).await, QmpError::is_nbd_server_not_running)
}
