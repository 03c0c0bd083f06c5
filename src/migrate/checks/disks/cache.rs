//! What the guest believes to be kept, and a power cut at the destination would take: what it has flushed, and what it
//! need not flush at the source. And what it has written to a shared storage, and is not there yet.

use super::images::written;
use crate::migrate::model::problem::{Problem, ProblemKind};
use crate::migrate::protocol::message::{DiskPlace, DiskSpec};
use crate::qemu::Disk;

/// How a guest with a Linux takes a write cache, and flushes from then on.
const IN_THE_GUEST: &str = "have the guest turn the disk's write cache on before the move (Linux: `write back` into its `cache_type` in /sys)";

/// Of a disk that the guest can write to.
pub(super) fn findings(want: &DiskSpec, have: &Disk) -> impl Iterator<Item = Problem> {
    [unflushed(want, have), written_back(want, have), held_back(want, have)].into_iter().flatten()
}

/// What the guest has flushed at the source outlives a power cut; there it would not.
fn unflushed(want: &DiskSpec, have: &Disk) -> Option<Problem> {
    if !have.no_flush || want.place.as_ref().is_none_or(|place| place.no_flush) {
        return None;
    }
    let text = format!(
        "disk {} ignores the guest's flushes at the destination (cache=unsafe): a power cut there loses writes \
         that the guest believes to be safe",
        want.name
    );
    Some(Problem::warning(
        ProblemKind::DiskCache,
        text,
        "start the destination's QEMU without `cache.no-flush`",
    ))
}

/// A guest that was told that there is no write cache flushes nothing, for as long as it runs.
fn written_back(want: &DiskSpec, have: &Disk) -> Option<Problem> {
    let place = want.place.as_ref()?;
    if !place.write_through || place.no_flush {
        return None;
    }
    // Loading its state, QEMU takes a letter of the model's name for the mode (`ide_drive_post_load`: byte 85 of what
    // word 85 has), and mostly that is a blank, which means on. So of 7.2 and 10.
    let is_ide = have.device.starts_with("ide-");
    if have.write_through.is_some() && !is_ide {
        return None;
    }
    let name = &want.name;
    let (there, remedy) = match is_ide {
        true => (
            "QEMU turns an IDE disk's on when it loads the guest, whatever it was started with (7.2 and 10)",
            format!("{IN_THE_GUEST}, or give it the disk on another bus"),
        ),
        false => (
            "at the destination it has one",
            format!(
                "start the destination's QEMU with `write-cache=off` for the disk's device, a `-drive` with \
                 `cache=writethrough`; or {IN_THE_GUEST}"
            ),
        ),
    };
    let text = format!(
        "disk {name} has no write cache at the source, so its guest flushes nothing; {there}: a power cut there loses \
         writes that the guest believes to be safe"
    );
    Some(Problem::new(ProblemKind::DiskCache, text, remedy))
}

/// What is not copied has to be in the storage when the destination's guest reads it. QEMU's own flush, when it has
/// stopped the guest, is left out with `cache.no-flush` as the guest's are.
fn held_back(want: &DiskSpec, have: &Disk) -> Option<Problem> {
    let place = want.place.as_ref()?;
    if !want.left_out || !place.no_flush || place.stored || is_one_memory(place, have) {
        return None;
    }
    let text = format!(
        "disk {} is not to be copied, and what the guest has written to it may still be in the memory of the source's \
         host alone: QEMU forces none of it to the storage there (cache=unsafe), and the guest would find older contents \
         at the destination",
        want.name
    );
    let remedy = "copy it, or start the source's QEMU without `cache.no-flush`, or with `cache.direct=on` beside it; accept \
                  it only if the storage keeps both hosts' memory in step, as a cluster file system does";
    Some(Problem::new(ProblemKind::DiskNotStored, text, remedy))
}

/// Whether both QEMUs are on one kernel and use one file or device of it, so that each sees what the other has written.
/// A loop device has a memory of its own above that of its file.
fn is_one_memory(place: &DiskPlace, have: &Disk) -> bool {
    let is_device = |key: &str| key.starts_with("dev:");
    let has_device = place.storages.iter().any(|storage| is_device(&storage.key));
    let is_shared =
        |key: &String| place.storages.iter().any(|storage| storage.written && storage.key == *key);
    let mut images = written(have).peekable();
    images.peek().is_some()
        && images.all(|image| {
            let is_file = !has_device && !image.keys.iter().any(|key| is_device(key));
            let mut shared = image.keys.iter().filter(|key| is_shared(key));
            shared.any(|key| is_device(key) || (is_file && key.starts_with("inode:")))
        })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::migrate::checks::disks::offered;
    use crate::migrate::checks::disks::sample::{have, image, want};
    use crate::migrate::model::options::Options;
    use crate::migrate::model::problem::Severity;
    use crate::migrate::protocol::message::Storage;
    use crate::qemu::WriteThrough;

    fn severities(want: &DiskSpec, have: &Disk) -> Vec<Severity> {
        let found = findings(want, have).inspect(|p| {
            let is_held_back = p.text.contains("not to be copied");
            let kind = if is_held_back { ProblemKind::DiskNotStored } else { ProblemKind::DiskCache };
            assert_eq!(p.kind, kind, "{p}");
        });
        found.map(|p| p.severity).collect()
    }

    #[test]
    fn flushes_that_are_ignored_there_alone_are_said() {
        let mut raw = want("disk0", 1024, "raw");
        let hasty = Disk { no_flush: true, ..have("disk0", 1024, "raw") };
        assert_eq!(severities(&raw, &hasty), [Severity::Warning]);
        raw.place.as_mut().unwrap().no_flush = true;
        assert_eq!(severities(&raw, &hasty), []);
    }

    #[test]
    fn a_guest_that_flushes_nothing_comes_to_no_write_cache() {
        let cached = |device: &str| Disk { device: device.into(), ..have("disk0", 1024, "raw") };
        let through = |device: &str| Disk { write_through: Some(WriteThrough::Driver), ..cached(device) };
        let mut offer = want("disk0", 1024, "raw");
        for device in ["virtio-blk-device", "scsi-hd", "ide-hd"] {
            assert_eq!(severities(&offer, &cached(device)), [], "{device}: the guest flushes");
            assert_eq!(
                severities(&offer, &through(device)),
                [],
                "{device}: it flushes more than it needs to"
            );
        }
        offer.place.as_mut().unwrap().write_through = true;
        for device in ["virtio-blk-device", "scsi-hd", "sd-card", ""] {
            assert_eq!(severities(&offer, &cached(device)), [Severity::Problem], "{device}");
            assert_eq!(severities(&offer, &through(device)), [], "{device}");
        }
        for there in [cached("ide-hd"), through("ide-hd")] {
            let found: Vec<Problem> = findings(&offer, &there).collect();
            assert!(found[0].is_refusal() && found[0].text.contains("IDE"), "{found:?}");
        }
        let left_out = DiskSpec { left_out: true, ..offer.clone() };
        assert_eq!(
            severities(&left_out, &cached("scsi-hd")),
            [Severity::Problem],
            "it is as true of a shared disk"
        );
        // What is flushed there is lost all the same, and said as such.
        let unsafe_there = Disk { no_flush: true, ..through("scsi-hd") };
        assert_eq!(severities(&offer, &unsafe_there), [Severity::Warning]);
        offer.place.as_mut().unwrap().no_flush = true;
        assert_eq!(severities(&offer, &cached("scsi-hd")), [], "the source keeps nothing either");
        assert_eq!(severities(&DiskSpec { place: None, ..offer }, &cached("scsi-hd")), []);
    }

    #[test]
    fn what_is_not_forced_to_a_shared_storage_is_told_but_on_one_kernel() {
        let storage = |key: &str| Storage { key: key.into(), written: true };
        let offer = |keys: &[&str]| {
            let mut offer = DiskSpec { left_out: true, ..want("disk0", 1024, "raw") };
            let place = offer.place.as_mut().unwrap();
            (place.no_flush, place.storages) = (true, keys.iter().map(|key| storage(key)).collect());
            offer
        };
        let there = |keys: &[&str]| Disk { images: vec![image(keys)], ..have("disk0", 1024, "raw") };
        let (file, nfs, looped) = ("inode:b:1:2", "nfs:s:/x:2", "dev:b:7:0");
        for (here, keys) in [
            (vec![nfs], vec![nfs]),
            (vec!["inode:a:1:2", nfs], vec![file, nfs]),
            (vec![file, looped], vec![file]),
            (vec![file], vec![file, looped]),
            (vec![file], vec![]),
            (vec!["wwid:7", "dev:a:8:0"], vec!["wwid:7", "dev:b:8:0"]),
        ] {
            let found: Vec<Problem> = findings(&offer(&here), &there(&keys)).collect();
            assert!(found.len() == 1 && found[0].is_refusal(), "{here:?} {keys:?}: {found:?}");
            assert!(found[0].text.contains("older contents"), "{found:?}");
        }
        for keys in [vec![file], vec![file, nfs], vec![file, looped]] {
            assert_eq!(severities(&offer(&keys), &there(&keys)), [], "{keys:?}");
        }
        assert_eq!(
            severities(&offer(&[nfs]), &have("disk0", 1024, "raw")),
            [Severity::Problem],
            "nothing is seen"
        );
        let mut stored = offer(&[nfs]);
        stored.place.as_mut().unwrap().stored = true;
        assert_eq!(severities(&stored, &there(&[nfs])), [], "it went past the host's memory");
        let copied = DiskSpec { left_out: false, ..offer(&[nfs]) };
        assert_eq!(severities(&copied, &there(&[nfs])), []);
        let mut forced = offer(&[nfs]);
        forced.place.as_mut().unwrap().no_flush = false;
        assert_eq!(severities(&forced, &there(&[nfs])), []);
    }

    #[test]
    fn only_what_is_not_forced_is_offered_as_stored() {
        for (no_flush, held_back, stored) in [(false, false, false), (true, true, false), (true, false, true)]
        {
            let disk = Disk { no_flush, held_back, ..have("disk0", 1024, "raw") };
            let spec = offered(&[disk], &Options::default()).remove(0);
            assert_eq!(spec.place.unwrap().stored, stored, "{no_flush} {held_back}");
        }
    }

    #[test]
    fn only_what_qemu_does_not_bring_along_is_offered_and_an_older_agent_says_nothing() {
        let told = |write_through| {
            let disk = Disk { write_through, ..have("disk0", 1024, "raw") };
            let spec = offered(&[disk], &Options::default()).remove(0);
            (spec.place.as_ref().unwrap().write_through, serde_json::to_string(&spec).unwrap())
        };
        assert!(told(Some(WriteThrough::Here)).0);
        for other in [None, Some(WriteThrough::Driver)] {
            let (is_told, said) = told(other);
            assert!(!is_told && !said.contains("write_through"), "{other:?}: {said}");
        }
        let older: DiskSpec = serde_json::from_str(&told(None).1).unwrap();
        assert!(!older.place.unwrap().write_through);
        assert!(ProblemKind::DiskCache.may_be_accepted());
    }
}
