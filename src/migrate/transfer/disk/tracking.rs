//! What one try knows of the disks for the next: which are followed by bitmaps, and whether that can be relied on.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::bitmaps::Bitmaps;
use crate::migrate::journal::Undo;
use crate::migrate::model::plan::CopiedDisk;
use crate::migrate::model::replica::SourceReplica;
use crate::migrate::protocol::message::DiskState;
use crate::qemu::{Qmp, QmpError, names};

/// A disk that is followed from try to try.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Followed {
    /// As it was when that began.
    pub(crate) disk: CopiedDisk,
    pub(crate) bitmaps: Bitmaps,
    /// Everything at the destination equals the source's but for what the bitmaps hold.
    pub(crate) in_step: bool,
    /// Why it is not, where the destination said so. What a try has doubted stays in doubt for the next, which the
    /// destination compares with that try alone.
    #[serde(default)]
    pub(crate) doubt: Option<String>,
}

impl Followed {
    pub(crate) fn new(disk: &CopiedDisk, bitmaps: Bitmaps, in_step: bool) -> Self {
        Self { disk: disk.clone(), bitmaps, in_step, doubt: None }
    }

    /// What changed since, at least; none where the whole disk would have to be copied.
    pub(crate) async fn changed_bytes(&self, disk: &CopiedDisk, qmp: &Qmp) -> Result<Option<u64>, QmpError> {
        let is_known = self.in_step && self.doubt.is_none() && self.disk.is_same_image(disk);
        if !is_known || self.bitmaps.doubt(qmp).await?.is_some() {
            return Ok(None);
        }
        Ok(self.bitmaps.ours(qmp).await?.iter().map(|bitmap| bitmap.count).max())
    }

    /// It has to be copied as a whole.
    pub(crate) fn is_doubted(&mut self, doubt: &str) {
        self.in_step = false;
        self.doubt.get_or_insert_with(|| doubt.to_owned());
    }
}

/// What one try knows for the next.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Tracking {
    pub(crate) disks: BTreeMap<String, Followed>,
    /// The last try that the destination had prepared.
    pub(crate) after: Option<Uuid>,
    /// The replica that these disks have at the destination, or are to have.
    #[serde(default)]
    pub(crate) replica: Option<SourceReplica>,
    /// Why nothing of it can be relied on.
    #[serde(default)]
    pub(crate) stale: Option<String>,
}

impl Tracking {
    /// Whether less than all has to be copied.
    pub(crate) fn has_whole(&self) -> bool {
        self.disks.values().any(|f| f.in_step)
    }

    /// Whether a further try could copy less, by what would go otherwise. A replica's bitmaps stay anyway.
    pub(crate) fn is_worth_keeping(&self) -> bool {
        self.disks.values().any(|f| f.in_step && !f.bitmaps.is_replicas())
    }

    /// What the destination says of the images since the try before.
    pub(crate) fn learn(&mut self, states: &[DiskState]) {
        for followed in self.disks.values_mut().filter(|followed| followed.in_step) {
            match states.iter().find(|state| state.disk == followed.disk.name) {
                None => {
                    followed.is_doubted("the destination does not say whether its image is as it was left")
                }
                Some(DiskState { doubt: Some(doubt), .. }) => followed.is_doubted(doubt),
                Some(_) => {}
            }
        }
    }

    /// A mirror has become ready: what is at the destination is worth keeping from now on.
    pub(crate) fn in_step(&mut self, job: &str) {
        let of_job = |(name, _): &(&String, &mut Followed)| names::job_id(name) == job;
        if let Some((_, followed)) = self.disks.iter_mut().find(of_job) {
            followed.in_step = true;
        }
    }

    /// What a journal must undo.
    pub(crate) fn undo(&self) -> Vec<Undo> {
        let followed = self.disks.values().filter(|f| !f.bitmaps.is_replicas());
        followed.flat_map(|f| f.bitmaps.undo()).collect()
    }
}
