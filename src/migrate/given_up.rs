//! Why the source's QEMU broke a switchover off, where it is its own doing: it could not give the
//! guest's disks up.
//!
//! QEMU 10 says so in its own way; 7.2 says nothing at all, and nothing also when the destination
//! has failed. So where it says nothing a further try is made once, and not again.

use super::failure::Failure;
use super::inventory::Inventory;
use super::meanwhile::Meanwhile;
use super::source::Source;
use crate::qemu::{MigrationStatus, Qmp, QueryBlockExports, QueryMigrate, names};

/// That QEMU can give the guest's disks up: asked in the pause, beside what is waited for anyway.
pub(super) async fn is_possible(qmp: &Qmp, planned: Option<&Inventory>) -> Result<(), Failure> {
    match planned {
        Some(planned) => planned.may_be_given_up(qmp).await?.map_or(Ok(()), |found| Err(found.into())),
        None => Ok(()),
    }
}

impl Source {
    /// QEMU's migration has failed with the mirrors finished and the guest at rest.
    pub(super) async fn broken_off(&self) -> Failure {
        let info = match self.query(QueryMigrate).await {
            Ok(info) => info,
            Err(failure) => return failure,
        };
        let sure = info.could_not_inactivate();
        if let (false, Some(error)) = (sure, info.error_desc) {
            return Failure::Ram { status: MigrationStatus::Failed, error };
        }
        let ours: Vec<String> = self.disks.iter().map(|disk| names::export_id(&disk.name)).collect();
        let exports = self.query(QueryBlockExports).await.unwrap_or_default();
        let others = exports.into_iter().filter(|export| !ours.contains(&export.id));
        Meanwhile::NotGivenUp {
            sure,
            again: self.request.retry.is_some(),
            exports: others.map(|export| format!("{} of node {}", export.id, export.node_name)).collect(),
        }
        .into()
    }
}
