//! Limits of what the guest reads and writes, by device.

use super::{Empty, commands, plain_commands};
use serde::{Deserialize, Serialize};

plain_commands! {
    /// The guest's disks and drives, of which only their limits are looked at.
    QueryIoThrottle = "query-block" -> Vec<ThrottledDrive>;
    /// What the guest has read and written.
    QueryBlockstats = "query-blockstats" -> Vec<BlockStats>;
}

commands! {
    BlockSetIoThrottle = "block_set_io_throttle" -> Empty;
}

/// What a guest's device may do in a second; 0 is no limit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct IoThrottle {
    pub bps: u64,
    pub bps_rd: u64,
    pub bps_wr: u64,
    pub iops: u64,
    pub iops_rd: u64,
    pub iops_wr: u64,
    #[serde(flatten)]
    pub bursts: IoBursts,
    /// Devices of one group have their limits in common.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
}

/// For how long it may do more.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs, reason = "QEMU's names, which say it")]
pub struct IoBursts {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bps_max: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bps_rd_max: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bps_wr_max: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops_max: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops_rd_max: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops_wr_max: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bps_max_length: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bps_rd_max_length: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bps_wr_max_length: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops_max_length: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops_rd_max_length: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops_wr_max_length: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops_size: Option<u64>,
}

impl IoThrottle {
    /// The same with so few bytes of writes, in a group of its own: other devices keep their limits.
    #[must_use]
    pub fn with_writes(&self, bytes_per_s: u64, group: &str) -> Self {
        let mut limited = Self { group: Some(group.to_owned()), ..self.clone() };
        if let Some(reads) = self.bps.checked_sub(bytes_per_s).filter(|reads| *reads > 0) {
            // A limit of both and one of writes exclude each other.
            (limited.bps, limited.bps_rd) = (0, reads);
        }
        let bursts = &mut limited.bursts;
        (bursts.bps_max, bursts.bps_max_length) = (None, None);
        (bursts.bps_wr_max, bursts.bps_wr_max_length) = (None, None);
        if limited.bps == 0 {
            limited.bps_wr = bytes_per_s;
        }
        limited
    }
}

/// Sets a device's limits.
#[derive(Debug, Clone, Serialize)]
pub struct BlockSetIoThrottle {
    /// The device's id or path.
    pub id: String,
    #[serde(flatten)]
    pub limits: IoThrottle,
}

/// A drive and its limits.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct ThrottledDrive {
    /// The id or the path of the guest's device.
    #[serde(default)]
    pub qdev: String,
    /// The medium; none in an empty drive.
    pub inserted: Option<ThrottledNode>,
}

/// What a drive has in it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct ThrottledNode {
    #[serde(rename = "node-name", default)]
    pub node_name: String,
    #[serde(flatten)]
    pub limits: IoThrottle,
}

/// What was read from and written to a drive.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct BlockStats {
    /// The id or the path of the guest's device.
    #[serde(default)]
    pub qdev: String,
    pub stats: BlockDeviceStats,
}

/// Of these only what the guest has written is looked at.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct BlockDeviceStats {
    #[serde(default)]
    pub wr_bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_are_limited_and_everything_else_stays() {
        let with = |limits: IoThrottle| limits.with_writes(100, "g");
        let group = || Some("g".to_owned());
        let none = with(IoThrottle::default());
        assert_eq!(none, IoThrottle { bps_wr: 100, group: group(), ..IoThrottle::default() });
        let theirs = IoThrottle {
            bps: 1000,
            iops_rd: 7,
            bursts: IoBursts { bps_max: Some(5000), iops_rd_max: Some(9), ..IoBursts::default() },
            group: Some("all".into()),
            ..IoThrottle::default()
        };
        let limited = with(theirs.clone());
        assert_eq!((limited.bps, limited.bps_rd, limited.bps_wr, limited.iops_rd), (0, 900, 100, 7));
        assert_eq!(
            (limited.bursts.bps_max, limited.bursts.iops_rd_max, limited.group),
            (None, Some(9), group())
        );
        let little = with(IoThrottle { bps: 80, ..theirs });
        assert_eq!((little.bps, little.bps_wr), (80, 0), "what is stricter already stays");
    }
}
