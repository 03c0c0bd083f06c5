//! The source's inventory: which devices and drives its machine had when the migration was planned.
//!
//! Whatever is plugged in, pulled out or exchanged after that is in no plan, and would arrive as
//! zeros or not at all. QEMU tells of a device that is gone and not of one that is new, so the two
//! lists are compared: before each phase that builds on the plan, and at last with the guest at rest.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::migrate::model::meanwhile::Meanwhile;
use crate::qemu::{
    BitmapNode, BlockDeviceInfo, BlockInfo, Qmp, QmpError, QomList, QueryBlock, QueryMigrateCapabilities,
    QueryMigrateParameters, QueryNamedBlockNodes, names,
};

/// Where QEMU keeps the devices that somebody asked for.
const FOLDERS: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

/// What a machine has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Inventory {
    /// Devices and their types, by name.
    devices: BTreeMap<String, String>,
    /// Drives by the guest's device.
    drives: BTreeMap<String, Option<Medium>>,
}

/// What is in a drive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Medium {
    node_name: String,
    /// Its image, as QEMU names it; below a filter another one may have been put in its place. None if an earlier
    /// version of the agent has recorded it.
    #[serde(default)]
    file: Option<String>,
    bytes: u64,
    read_only: bool,
}

impl Inventory {
    /// Of the machine as it is now.
    pub(crate) async fn of(qmp: &Qmp) -> Result<Self, QmpError> {
        Self::with(qmp, qmp.execute(QueryBlock).await?).await
    }

    async fn with(qmp: &Qmp, blocks: Vec<BlockInfo>) -> Result<Self, QmpError> {
        let mut devices = BTreeMap::new();
        for folder in FOLDERS {
            for child in qmp.execute(QomList { path: folder.to_owned() }).await? {
                if let Some(kind) = child.kind.strip_prefix("child<").and_then(|k| k.strip_suffix('>')) {
                    devices.insert(child.name, kind.to_owned());
                }
            }
        }
        Ok(Self { devices, drives: blocks.into_iter().map(drive).collect() })
    }

    /// What is no longer as it was, in words.
    fn changes(&self, now: &Self) -> Vec<String> {
        let mut changes = Vec::new();
        for (name, kind) in &now.devices {
            if self.devices.get(name) != Some(kind) {
                changes.push(format!("device {name} ({kind}) was plugged in"));
            }
        }
        for (name, kind) in &self.devices {
            if !now.devices.contains_key(name) {
                changes.push(format!("device {name} ({kind}) was pulled out"));
            }
        }
        for (name, before) in &self.drives {
            match (before, now.drives.get(name)) {
                (_, None) => changes.push(format!("drive {name} is gone")),
                (before, Some(after)) => changes.extend(exchanged(name, before.as_ref(), after.as_ref())),
            }
        }
        let new = now.drives.keys().filter(|name| !self.drives.contains_key(*name));
        changes.extend(new.map(|name| format!("drive {name} is new")));
        changes
    }

    /// That the machine is still the one of the plan.
    pub(crate) async fn unchanged(&self, qmp: &Qmp) -> Result<Option<Meanwhile>, QmpError> {
        let changes = self.changes(&Self::of(qmp).await?);
        Ok((!changes.is_empty()).then_some(Meanwhile::Changed { changes }))
    }

    /// The same at the switchover, with what would keep QEMU from giving its disks up: QEMU aborts,
    /// and the guest dies, when a bitmap that it has to store is in use. One that goes along is in use by the
    /// migration itself, and is not stored.
    pub(crate) async fn may_be_given_up(&self, qmp: &Qmp) -> Result<Option<Meanwhile>, QmpError> {
        let nodes = qmp.execute(QueryNamedBlockNodes { flat: true }).await?;
        if bitmaps_in_use(&nodes, &[]).next().is_some() {
            let sent = bitmaps_sent(qmp).await?;
            if let Some(meanwhile) = bitmaps_in_use(&nodes, &sent).next() {
                return Ok(Some(meanwhile));
            }
        }
        let changes = self.changes(&Self::of(qmp).await?);
        Ok((!changes.is_empty()).then_some(Meanwhile::Changed { changes }))
    }
}

fn name_of(block: &BlockInfo) -> String {
    if block.qdev.is_empty() { block.device.clone() } else { block.qdev.clone() }
}

fn drive(block: BlockInfo) -> (String, Option<Medium>) {
    let name = name_of(&block);
    let medium = block.inserted.map(|inserted| Medium {
        bytes: inserted.image.map_or(0, |image| image.virtual_size),
        file: Some(names::bounded(&inserted.file)),
        node_name: inserted.node_name,
        read_only: inserted.ro,
    });
    (name, medium)
}

fn exchanged(name: &str, before: Option<&Medium>, after: Option<&Medium>) -> Option<String> {
    match (before, after) {
        (None, None) => None,
        (None, Some(_)) => Some(format!("a medium was put into drive {name}")),
        (Some(_), None) => Some(format!("the medium of drive {name} was taken out")),
        (Some(before), Some(after)) if before.node_name != after.node_name => Some(format!(
            "drive {name} has another image: node {} instead of {}",
            after.node_name, before.node_name
        )),
        (Some(before), Some(after)) if before.file.is_some() && before.file != after.file => Some(format!(
            "drive {name} lies on {} instead of {}",
            after.file.as_deref().unwrap_or_default(),
            before.file.as_deref().unwrap_or_default()
        )),
        (Some(before), Some(after)) if before.bytes != after.bytes => {
            Some(format!("drive {name} has {} bytes instead of {}", after.bytes, before.bytes))
        }
        (Some(before), Some(after)) if before.read_only != after.read_only => Some(format!(
            "drive {name} can {} be written to",
            if after.read_only { "no longer" } else { "now" }
        )),
        _ => None,
    }
}

/// The dirty bitmaps that go along with the migration under way.
async fn bitmaps_sent(qmp: &Qmp) -> Result<Vec<BitmapNode>, QmpError> {
    let capabilities = qmp.execute(QueryMigrateCapabilities).await?;
    if !capabilities.iter().any(|known| known.capability == "dirty-bitmaps" && known.state) {
        return Ok(Vec::new());
    }
    Ok(qmp.execute(QueryMigrateParameters).await?.block_bitmap_mapping.unwrap_or_default())
}

/// Those that are stored and in use, but for those that go along. Below a filter, too: QEMU gives up all nodes.
fn bitmaps_in_use<'a>(
    nodes: &'a [BlockDeviceInfo],
    sent: &'a [BitmapNode],
) -> impl Iterator<Item = Meanwhile> + 'a {
    nodes.iter().filter(|node| !node.ro).flat_map(move |node| {
        let is_sent = move |name: &str| {
            let nodes = sent.iter().filter(move |sent| sent.node_name == node.node_name);
            nodes.flat_map(|sent| &sent.bitmaps).any(|bitmap| bitmap.name == name)
        };
        let in_use = node.dirty_bitmaps.iter().filter(|bitmap| bitmap.busy && bitmap.persistent);
        in_use.filter(move |bitmap| !is_sent(&bitmap.name)).map(|bitmap| Meanwhile::BitmapInUse {
            node: node.node_name.clone(),
            bitmap: bitmap.name.clone(),
        })
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use super::*;
    use crate::qemu::BitmapAlias;

    fn blocks(text: &str) -> Vec<BlockInfo> {
        serde_json::from_str(text).unwrap()
    }

    fn of(devices: &[(&str, &str)], text: &str) -> Inventory {
        Inventory {
            devices: devices.iter().map(|(name, kind)| ((*name).into(), (*kind).into())).collect(),
            drives: blocks(text).into_iter().map(drive).collect(),
        }
    }

    const DISK: &str = r#"[{"qdev":"disk0","inserted":{"node-name":"vda","image":{"virtual-size":64}}}]"#;

    #[test]
    fn whatever_was_plugged_pulled_or_exchanged_is_named() {
        let blk = ("disk0", "virtio-blk-pci");
        let before = of(&[blk], DISK);
        assert_eq!(before.changes(&before.clone()), Vec::<String>::new());
        let said = |devices: &[(&str, &str)], text: &str| before.changes(&of(devices, text)).join("; ");
        assert_eq!(
            said(&[blk, ("hot", "virtio-net-pci")], DISK),
            "device hot (virtio-net-pci) was plugged in"
        );
        assert_eq!(said(&[], DISK), "device disk0 (virtio-blk-pci) was pulled out");
        assert_eq!(said(&[("disk0", "nvme")], DISK), "device disk0 (nvme) was plugged in");
        assert_eq!(said(&[blk], "[]"), "drive disk0 is gone");
        let resized = DISK.replace("64", "65");
        assert_eq!(said(&[blk], &resized), "drive disk0 has 65 bytes instead of 64");
        let snapshot = DISK.replace("vda", "overlay");
        assert!(said(&[blk], &snapshot).contains("node overlay instead of vda"));
        let below = DISK.replace(r#""node-name""#, r#""file":"/srv/top.qcow2","node-name""#);
        assert_eq!(said(&[blk], &below), "drive disk0 lies on /srv/top.qcow2 instead of ");
        let ejected = r#"[{"qdev":"disk0"}]"#;
        assert_eq!(said(&[blk], ejected), "the medium of drive disk0 was taken out");
        assert_eq!(of(&[blk], ejected).changes(&before), ["a medium was put into drive disk0"]);
    }

    #[test]
    fn only_a_bitmap_that_is_stored_and_in_use_makes_qemu_abort() {
        let with = |busy: bool, persistent: bool, sent: &str| {
            let bitmaps = vec![BitmapAlias { name: sent.into(), alias: "b".into(), transform: None }];
            let sent = [BitmapNode { node_name: "n".into(), alias: "n".into(), bitmaps }];
            let bitmap = format!(
                r#"{{"name":"b","count":0,"granularity":65536,"busy":{busy},"persistent":{persistent}}}"#
            );
            let nodes = format!(r#"[{{"node-name":"n","dirty-bitmaps":[{bitmap}]}}]"#);
            bitmaps_in_use(&serde_json::from_str::<Vec<_>>(&nodes).unwrap(), &sent).next().is_some()
        };
        assert_eq!(
            [with(true, true, "c"), with(true, false, ""), with(false, true, "")],
            [true, false, false]
        );
        assert!(!with(true, true, "b"), "it goes along");
    }
}
