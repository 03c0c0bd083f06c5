//! Whether what is copied fits on the destination's file systems, as far as both agents see it.

use std::collections::BTreeMap;

use super::images::{list, written};
use crate::migrate::model::problem::{Problem, ProblemKind};
use crate::migrate::protocol::message::DiskSpec;
use crate::qemu::Disk;

/// One file system of the destination.
#[derive(Debug, Default)]
struct Room<'a> {
    /// Free, and what the images there occupy already, which is written over.
    available: u64,
    /// What the source's images occupy.
    needs: u64,
    /// What they need if their holes are filled.
    needs_thick: u64,
    disks: Vec<&'a str>,
    /// Those whose holes may be filled.
    thick: Vec<&'a str>,
    folder: String,
}

pub(crate) fn problems(pairs: &[(&DiskSpec, &Disk)]) -> Vec<Problem> {
    let mut rooms: BTreeMap<u64, Room<'_>> = BTreeMap::new();
    for (want, have) in pairs.iter().filter(|(want, _)| want.is_copied()) {
        // Data may lie in several files; it is the largest one that grows.
        let seen = written(have).filter_map(|image| image.seen.as_ref());
        let Some(seen) = seen.max_by_key(|seen| seen.allocated) else { continue };
        let Some(free) = seen.free else { continue };
        let Some(allocated) = want.place.as_ref().and_then(|place| place.allocated) else { continue };
        let room = rooms.entry(seen.device).or_default();
        if room.disks.is_empty() {
            room.available = free;
            let folder = seen.path.as_ref().and_then(|path| path.parent());
            room.folder = folder.map_or_else(String::new, |folder| format!(" of {}", folder.display()));
        }
        room.available = room.available.saturating_add(seen.allocated);
        room.needs = room.needs.saturating_add(allocated);
        let fills = fills_holes(have);
        let thick = if fills { want.virtual_size } else { allocated };
        room.needs_thick = room.needs_thick.saturating_add(thick);
        room.disks.push(&want.name);
        if fills && want.virtual_size > allocated {
            room.thick.push(&want.name);
        }
    }
    rooms.into_values().filter_map(|room| room.problem()).collect()
}

/// Whether zeroes that are written there may occupy room. A raw image keeps holes only with
/// `discard=unmap`, which QEMU does not tell; luks cannot; qcow2 has zero clusters.
fn fills_holes(disk: &Disk) -> bool {
    let layers = disk.layers.iter().filter(|layer| !layer.backing);
    !layers.clone().any(|layer| matches!(layer.driver.as_str(), "qcow2" | "qed" | "vmdk" | "vhdx"))
}

impl Room<'_> {
    fn problem(&self) -> Option<Problem> {
        let Self { available, needs, needs_thick, disks, thick, folder } = self;
        if needs > available {
            let text = format!(
                "the destination's file system{folder} has room for {available} bytes, and the images of {} occupy \
                 {needs} bytes at the source",
                list(disks.iter().copied())
            );
            let remedy =
                "make room there; accept it only if most of what the source's images occupy is zeroes";
            return Some(Problem::new(ProblemKind::NoRoom, text, remedy));
        }
        if needs_thick > available && !thick.is_empty() {
            let text = format!(
                "the destination's file system{folder} has room for {available} bytes. If holes are filled there, \
                 {} need {needs_thick} bytes; at the source they occupy {needs}",
                list(thick.iter().copied())
            );
            let remedy = "give the destination's block devices `discard=unmap` (the format and the file), unless \
                          they have it: QEMU does not tell";
            return Some(Problem::warning(ProblemKind::ThinBecomesThick, text, remedy));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migrate::checks::disks::sample;
    use crate::migrate::protocol::message::DiskPlace;
    use crate::qemu::{Image, Layer, Seen};

    const GIB: u64 = 1 << 30;

    fn want(name: &str, size: u64, allocated: u64) -> DiskSpec {
        let place = DiskPlace { allocated: Some(allocated), ..DiskPlace::default() };
        DiskSpec { place: Some(place), ..sample::want(name, size, "raw") }
    }

    fn have(name: &str, driver: &str, free: u64) -> Disk {
        let seen = Seen { path: None, device: 1, inode: 1, is_file: true, allocated: GIB, free: Some(free) };
        let layer = Layer {
            node_name: name.into(),
            driver: driver.into(),
            backing: false,
            is_leaf: false,
            read_only: false,
            written_by_others: false,
            encryption: crate::qemu::Encryption::None,
            filename: String::new(),
            actual_size: None,
            bitmaps: Vec::new(),
            snapshots: Vec::new(),
        };
        let image = Image { seen: Some(seen), ..sample::image(&[]) };
        Disk { images: vec![image], layers: vec![layer], ..sample::have(name, 1, driver) }
    }

    fn kinds(pairs: &[(&DiskSpec, &Disk)]) -> Vec<ProblemKind> {
        problems(pairs).into_iter().map(|p| p.kind).collect()
    }

    #[test]
    fn what_does_not_fit_together_is_a_problem_and_what_may_not_a_warning() {
        let (a, b) = (want("a", 100 * GIB, 5 * GIB), want("b", 100 * GIB, 4 * GIB));
        let (raw, other) = (have("a", "raw", 7 * GIB), have("b", "raw", 7 * GIB));
        assert_eq!(kinds(&[(&a, &raw)]), [ProblemKind::ThinBecomesThick]);
        // 7 free and twice 1 that is written over.
        assert_eq!(kinds(&[(&a, &raw), (&b, &other)]), [ProblemKind::ThinBecomesThick]);
        let b = want("b", 100 * GIB, 5 * GIB);
        assert_eq!(kinds(&[(&a, &raw), (&b, &other)]), [ProblemKind::NoRoom]);
        let qcow2 = have("a", "qcow2", 7 * GIB);
        assert_eq!(kinds(&[(&a, &qcow2)]), []);
        assert_eq!(kinds(&[(&a, &have("a", "raw", 99 * GIB))]), []);
        let unknown = DiskSpec { place: None, ..a };
        assert_eq!(kinds(&[(&unknown, &raw)]), []);
    }
}
