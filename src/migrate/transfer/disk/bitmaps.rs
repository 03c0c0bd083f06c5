//! The two dirty bitmaps of a disk: one records while what the other has recorded is copied or compared.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::error::DeltaError;
use crate::migrate::journal::Undo;
use crate::qemu::{
    BlockDirtyBitmapAdd, BlockDirtyBitmapDisable, BlockDirtyBitmapMerge, BlockDirtyInfo, Qmp, QmpError,
    QueryNamedBlockNodes, delete_bitmap, names,
};

/// Of our bitmaps: not less than a mirror's, see `delta.rs`.
pub(super) const GRANULARITY_BYTES: u32 = 64 * 1024;

/// The bitmaps of one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Bitmaps {
    pub(crate) node: String,
    names: [String; 2],
}

impl Bitmaps {
    pub(crate) fn new(node: &str, migration: Uuid) -> Self {
        let id = migration.simple().to_string();
        Self { node: node.into(), names: ['a', 'b'].map(|which| names::bitmap(&id, which)) }
    }

    /// Others on the same node, which tell what was written since it was compared.
    pub(crate) fn compared(node: &str, migration: Uuid) -> Self {
        let id = migration.simple().to_string();
        Self { node: node.into(), names: ['a', 'b'].map(|which| names::compared(&id, which)) }
    }

    /// Those of a replica: they outlive each run of it, and its record tells of them, not a journal.
    pub(crate) fn replica(node: &str, replica: Uuid) -> Self {
        let id = replica.simple().to_string();
        Self { node: node.into(), names: ['a', 'b'].map(|which| names::replica(&id, which)) }
    }

    pub(super) fn names(&self) -> &[String; 2] {
        &self.names
    }

    pub(crate) fn is_replicas(&self) -> bool {
        self.names.iter().all(|name| names::is_replica(name))
    }

    /// Takes both away.
    pub(crate) async fn end(&self, qmp: &Qmp) -> Result<(), QmpError> {
        for name in &self.names {
            delete_bitmap(qmp, &self.node, name).await?;
        }
        Ok(())
    }

    pub(crate) fn undo(&self) -> [Undo; 2] {
        self.names.clone().map(|name| Undo::Bitmap { node: self.node.clone(), name })
    }

    /// Begins to record afresh.
    pub(crate) async fn begin(&self, qmp: &Qmp) -> Result<(), QmpError> {
        self.end(qmp).await?;
        self.add(qmp, &self.names[0]).await
    }

    /// Whether what is recorded can be relied on; if not, why.
    pub(crate) async fn doubt(&self, qmp: &Qmp) -> Result<Option<&'static str>, QmpError> {
        let ours = self.ours(qmp).await?;
        Ok(if !ours.iter().any(|b| b.recording) {
            Some("no bitmap records its changes any more")
        } else if ours.iter().any(|b| b.inconsistent) {
            Some("the bitmap of its changes is inconsistent")
        } else if ours.iter().any(|b| b.busy) {
            Some("something uses the bitmap of its changes")
        } else if ours.iter().any(|b| b.granularity < u64::from(GRANULARITY_BYTES)) {
            Some("the bitmap of its changes is not ours")
        } else {
            None
        })
    }

    /// What QEMU has of them.
    pub(super) async fn ours(&self, qmp: &Qmp) -> Result<Vec<BlockDirtyInfo>, QmpError> {
        let nodes = qmp.execute(QueryNamedBlockNodes { flat: true }).await?;
        let bitmaps = nodes.into_iter().filter(|n| n.node_name == self.node).flat_map(|n| n.dirty_bitmaps);
        Ok(bitmaps.filter(|b| self.names.contains(&b.name)).collect())
    }

    async fn add(&self, qmp: &Qmp, name: &str) -> Result<(), QmpError> {
        let (node, name) = (self.node.clone(), name.to_owned());
        qmp.execute(BlockDirtyBitmapAdd { node, name, granularity: GRANULARITY_BYTES }).await?;
        Ok(())
    }

    /// Whether one has stopped recording, by a [`Bitmaps::freeze`] before.
    pub(crate) async fn has_frozen(&self, qmp: &Qmp) -> Result<bool, QmpError> {
        Ok(self.ours(qmp).await?.iter().any(|b| !b.recording))
    }

    /// Has the other bitmap record from now on; what was recorded until now, and how much it is.
    pub(crate) async fn freeze(&self, qmp: &Qmp) -> Result<(String, u64), DeltaError> {
        let ours = self.ours(qmp).await?;
        let now = ours.iter().find(|b| b.recording).ok_or(DeltaError::NotRecorded)?.name.clone();
        // What a pass that failed has left.
        for left in ours.iter().filter(|b| b.name != now) {
            let merge = BlockDirtyBitmapMerge {
                node: self.node.clone(),
                target: now.clone(),
                bitmaps: vec![left.name.clone()],
            };
            qmp.execute(merge).await?;
            delete_bitmap(qmp, &self.node, &left.name).await?;
        }
        let next = if now == self.names[0] { &self.names[1] } else { &self.names[0] };
        self.add(qmp, next).await?;
        qmp.execute(BlockDirtyBitmapDisable { node: self.node.clone(), name: now.clone() }).await?;
        let frozen = self.ours(qmp).await?.into_iter().find(|b| b.name == now);
        Ok((now, frozen.ok_or(DeltaError::NotRecorded)?.count))
    }
}
