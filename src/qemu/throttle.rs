//! A disk whose guest is slowed down: its device, what limits it, and the way back.

use super::client::Qmp;
use super::commands::{
    BlockSetIoThrottle, IoThrottle, QueryBlockstats, QueryIoThrottle, ThrottledDrive, ThrottledNode,
};
use super::error::QmpError;
use serde::{Deserialize, Serialize};

/// A device as it was before its guest's writes were limited.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unthrottled {
    /// The device's id or path.
    pub device: String,
    /// Its group while the limit is ours.
    pub group: String,
    pub before: IoThrottle,
}

/// The device of a disk, by its node, and its limits now.
pub async fn io_throttle(qmp: &Qmp, node_name: &str) -> Result<Option<(String, IoThrottle)>, QmpError> {
    let drives = qmp.execute(QueryIoThrottle).await?.into_iter();
    let mut found = drives.filter_map(|drive| Some((drive.qdev, drive.inserted?)));
    let is_it = |(device, node): &(String, ThrottledNode)| !device.is_empty() && node.node_name == node_name;
    Ok(found.find(is_it).map(|(device, node)| (device, node.limits)))
}

/// What the guest has written to a device, in bytes.
pub async fn written_bytes(qmp: &Qmp, device: &str) -> Result<Option<u64>, QmpError> {
    let stats = qmp.execute(QueryBlockstats).await?;
    Ok(stats.iter().find(|of| of.qdev == device).map(|of| of.stats.wr_bytes))
}

impl Unthrottled {
    /// What puts the limits back; none where somebody has given the device a group of his own since.
    pub(super) fn back(&self, drives: Vec<ThrottledDrive>) -> Option<BlockSetIoThrottle> {
        let drive = drives.into_iter().find(|drive| drive.qdev == self.device)?;
        let is_ours = drive.inserted?.limits.group.as_ref() == Some(&self.group);
        is_ours.then(|| BlockSetIoThrottle { id: self.device.clone(), limits: self.before.clone() })
    }
}
