//! The end of QEMU's migration at the source: whose doing it is.
//!
//! QEMU says only that its migration has failed, and mostly that its channel did. What tells the
//! causes apart is which end of the RAM's stream ended first. The destination's, or the connection:
//! what failed is over there. QEMU's own: somebody cancelled it here, which QEMU does by closing its
//! end before it says so, or a disk's copy was lost. Nobody's end, and no reason: QEMU 7.2 could not give the guest's disks up in
//! the switchover, which 10.0 tells in its own way.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::failure::Failure;
use super::state::Source;
use crate::migrate::guest::inventory::Inventory;
use crate::migrate::model::label::Label;
use crate::migrate::model::meanwhile::Meanwhile;
use crate::migrate::model::phase::Phase;
use crate::migrate::transfer::streams::Streams;
use crate::net::pump::FirstEnd;
use crate::qemu::{EventKind, MigrationInfo, MigrationStatus, Qmp, QueryBlockExports, QueryMigrate, names};

/// QEMU's word comes over another socket than the end of its stream.
const END_SEEN_WITHIN: Duration = Duration::from_millis(700);
/// Between two looks at the stream.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// A QEMU that does not answer is not asked for long why it failed.
const ASKED_FOR: Duration = Duration::from_secs(5);

/// That QEMU can give the guest's disks up: asked in the pause, beside what is waited for anyway.
pub(crate) async fn is_possible(qmp: &Qmp, planned: Option<&Inventory>) -> Result<(), Failure> {
    match planned {
        Some(planned) => planned.may_be_given_up(qmp).await?.map_or(Ok(()), |found| Err(found.into())),
        None => Ok(()),
    }
}

/// QEMU's migration has failed: why, as far as can be told.
pub(crate) async fn ram_failed(source: &Source) -> Failure {
    let info = match timeout(ASKED_FOR, source.query(QueryMigrate)).await {
        Ok(Ok(info)) => info,
        Ok(Err(failure)) => return failure,
        Err(_) => MigrationInfo::default(),
    };
    let told = info.could_not_inactivate();
    let first = if told { None } else { first_end_of_ram(&source.copy.streams).await };
    let says_nothing = source.clock.phase == Phase::Device && info.error_desc.is_none();
    if told || (says_nothing && first != Some(FirstEnd::Stream)) {
        return Meanwhile::NotGivenUp { told, exports: exports_of_others(source).await }.into();
    }
    let error = info.error_desc.unwrap_or_default();
    let error = match (first, lost_disk(source)) {
        (Some(FirstEnd::Local), None) => return Meanwhile::MigrationCancelled { told: false }.into(),
        (_, None) => error,
        (_, Some(disk)) => format!("the stream of disk {disk} had ended before; {error}"),
    };
    Failure::Ram { status: MigrationStatus::Failed, error }
}

/// A disk whose stream has ended before its time. QEMU flushes all nodes in the pause, and ends its
/// migration by itself when the copy's cannot be flushed (10.0.2).
fn lost_disk(source: &Source) -> Option<&str> {
    if source.clock.phase != Phase::Precopy {
        return None;
    }
    let streams = &source.copy.streams;
    let mut names = source.copy.plan.disks.iter().map(|plan| &plan.disk.name);
    names.find(|name| streams.first_end(&Label::Disk((*name).clone())).is_some()).map(String::as_str)
}

async fn first_end_of_ram(streams: &Streams) -> Option<FirstEnd> {
    let until = Instant::now() + END_SEEN_WITHIN;
    loop {
        let first = streams.first_end(&Label::Ram);
        if first.is_some() || Instant::now() >= until {
            return first;
        }
        sleep(LOOK_EVERY).await;
    }
}

/// The same question, of a failure that was heard of before QEMU's word. `None`: it stands.
pub(crate) async fn is_our_qemus(source: &Source, failure: &Failure) -> Option<Failure> {
    let may_be = matches!(failure, Failure::Destination(_)) || failure.is_echo();
    if !may_be || source.copy.streams.first_end(&Label::Ram) != Some(FirstEnd::Local) {
        return None;
    }
    let info = timeout(ASKED_FOR, source.query(QueryMigrate)).await.ok()?.ok()?;
    let told = Meanwhile::told_by(&EventKind::Migration { status: info.status.clone() });
    match (told, info.status) {
        (Some(meanwhile), _) => Some(meanwhile.into()),
        (None, MigrationStatus::Failed) => match ram_failed(source).await {
            Failure::Meanwhile(meanwhile) => Some(meanwhile.into()),
            _ => None,
        },
        _ => None,
    }
}

async fn exports_of_others(source: &Source) -> Vec<String> {
    let ours: Vec<String> =
        source.copy.plan.disks.iter().map(|plan| names::export_id(&plan.disk.name)).collect();
    let exports = timeout(ASKED_FOR, source.query(QueryBlockExports)).await;
    let others = exports.ok().and_then(Result::ok).unwrap_or_default().into_iter();
    let others = others.filter(|export| !ours.contains(&export.id));
    others.map(|export| format!("{} of node {}", export.id, export.node_name)).collect()
}
