//! Dirty bitmaps that somebody keeps on the disks: those that QEMU's stream can carry go along, behind the RAM. Of the
//! others it is said that they stay. Which go is agreed on before anything is copied: QEMU gives the whole migration up
//! for a bitmap that the destination has already, and drops all of them for one that it does not expect.

use std::collections::{BTreeMap, BTreeSet};

use super::images::list;
use super::pair;
use crate::migrate::model::problem::{Problem, ProblemKind};
use crate::migrate::protocol::message::{DiskSpec, OfferedBitmap, OfferedBitmaps};
use crate::qemu::{Bitmap, BitmapAlias, BitmapNode, BitmapTransform, Disk, Layer, names};

/// Of one disk.
const BITMAPS_MAX: usize = 64;
/// QEMU's limit for a name in its stream.
const NAME_BYTES_MAX: usize = 255;
/// The migration capability.
pub(crate) const CAPABILITY: &str = "dirty-bitmaps";
/// The format that keeps them.
const FORMAT: &str = "qcow2";

/// Those that are not this migration's, with the layers that they are on.
pub(super) fn of_others(disk: &Disk) -> impl Iterator<Item = (&Layer, &Bitmap)> {
    let written = disk.layers.iter().filter(|layer| !layer.backing);
    let all = written.flat_map(|layer| layer.bitmaps.iter().map(move |bitmap| (layer, bitmap)));
    all.filter(|(_, bitmap)| !names::is_ours(&bitmap.name))
}

/// Those that can go along.
pub(super) fn offered(disk: &Disk) -> Option<OfferedBitmaps> {
    let bitmaps: Vec<OfferedBitmap> = of_others(disk)
        .filter(|(layer, bitmap)| hindrance(disk, layer, bitmap).is_none())
        .map(|(_, bitmap)| OfferedBitmap { name: bitmap.name.clone(), persistent: bitmap.persistent })
        .take(BITMAPS_MAX)
        .collect();
    (!bitmaps.is_empty()).then(|| OfferedBitmaps { node: alias(disk), bitmaps })
}

/// As QEMU calls the node without being told.
fn alias(disk: &Disk) -> String {
    let has_drive = !disk.drive.is_empty() && disk.drive.len() <= NAME_BYTES_MAX;
    let is_root = disk.image_node == disk.node_name;
    if has_drive && is_root { disk.drive.clone() } else { disk.image_node.clone() }
}

/// Why one cannot go along.
fn hindrance(disk: &Disk, layer: &Layer, bitmap: &Bitmap) -> Option<&'static str> {
    if bitmap.inconsistent {
        Some("is worthless, because it was not stored when its image was closed")
    } else if bitmap.busy {
        Some("is in use")
    } else if layer.node_name != disk.image_node {
        Some("is not on the disk's topmost image")
    } else if bitmap.name.len() > NAME_BYTES_MAX {
        Some("has too long a name")
    } else {
        None
    }
}

/// Those that the source cannot send, or does not beside disks inside its RAM stream.
pub(super) fn source_findings(disk: &Disk, in_band: bool) -> Option<Problem> {
    let in_band = in_band.then_some("does not go along with disks inside the RAM stream");
    let stay: Vec<String> = of_others(disk)
        .filter_map(|(layer, bitmap)| {
            Some(format!("{} {}", bitmap.name, hindrance(disk, layer, bitmap).or(in_band)?))
        })
        .collect();
    let more = of_others(disk).count().saturating_sub(stay.len() + BITMAPS_MAX);
    let more = (more > 0).then(|| format!("{more} are more than {BITMAPS_MAX}"));
    let stay = list(stay.iter().map(String::as_str).chain(more.as_deref()));
    (!stay.is_empty()).then(|| dropped(&disk.name, &stay))
}

/// That some stay, with their names and why.
pub(crate) fn dropped(disk: &str, which: &str) -> Problem {
    let text =
        format!("dirty bitmaps of the source's disk {disk} are not carried to the destination: {which}");
    Problem::warning(ProblemKind::BitmapsDropped, text, "the next backup there has to be a full one")
}

/// The names of those that are offered; what is said if the destination does not know of them.
pub(crate) fn unknown_there(disks: &[DiskSpec]) -> Vec<Problem> {
    let offered = disks.iter().filter_map(|disk| Some((disk, disk.bitmaps.as_ref()?)));
    let said = offered.map(|(disk, offered)| {
        let names = list(offered.bitmaps.iter().map(|bitmap| bitmap.name.as_str()));
        dropped(&disk.name, &format!("{names}. The agent there does not take them in"))
    });
    said.collect()
}

/// Which of the offered ones a disk of the destination takes in, and why not the others.
fn judged<'a>(want: &'a DiskSpec, have: &Disk) -> (Vec<&'a OfferedBitmap>, Vec<String>) {
    let (mut taken, mut left, mut seen) = (Vec::new(), Vec::new(), BTreeSet::new());
    let Some(offered) = want.bitmaps.as_ref().filter(|_| want.is_copied()) else { return (taken, left) };
    let is_legal = |name: &str| (1..=NAME_BYTES_MAX).contains(&name.len());
    for bitmap in offered.bitmaps.iter().take(BITMAPS_MAX) {
        let name = &bitmap.name;
        if !is_legal(name) || !is_legal(&offered.node) || names::is_ours(name) || !seen.insert(name) {
            left.push(format!("{name} has no name that can be taken in"));
        } else if have.layers.iter().flat_map(|layer| &layer.bitmaps).any(|known| known.name == *name) {
            left.push(format!("the destination's image has one named {name} already"));
        } else {
            taken.push(bitmap);
        }
    }
    (taken, left)
}

fn is_stored(have: &Disk) -> bool {
    have.layers.iter().any(|layer| layer.node_name == have.image_node && layer.driver == FORMAT)
}

/// What the destination finds. `knows`: its QEMU can take them in.
pub(super) fn destination_findings(offered: &[DiskSpec], present: &[Disk], knows: bool) -> Vec<Problem> {
    let paired = pair(offered, present);
    let mut problems = Vec::new();
    for (want, have) in &paired.pairs {
        let (mut taken, mut left) = judged(want, have);
        if !knows {
            left.extend(
                taken.drain(..).map(|bitmap| format!("the QEMU there cannot take {} in", bitmap.name)),
            );
        }
        if !left.is_empty() {
            problems.push(dropped(&want.name, &list(left.iter().map(String::as_str))));
        }
        let forgotten = taken.iter().filter(|bitmap| bitmap.persistent && !is_stored(have));
        let forgotten = list(forgotten.map(|bitmap| bitmap.name.as_str()));
        if !forgotten.is_empty() {
            let text = format!(
                "dirty bitmaps of disk {} are not stored in the destination's image, which is no qcow2, and are gone \
                 when its QEMU ends: {forgotten}",
                want.name
            );
            problems.push(Problem::warning(ProblemKind::BitmapsDropped, text, "make it qcow2 there"));
        }
        if !taken.is_empty() {
            let names = list(taken.iter().map(|bitmap| bitmap.name.as_str()));
            let text = format!("dirty bitmaps of disk {} go along with the guest: {names}", want.name);
            problems.push(Problem::note(ProblemKind::BitmapsCarried, text, "nothing has to be done"));
        }
    }
    problems
}

/// Those that the destination takes in, by disk.
pub(crate) fn accepted(offered: &[DiskSpec], present: &[Disk]) -> BTreeMap<String, Vec<String>> {
    let paired = pair(offered, present);
    let taken = paired.pairs.iter().map(|(want, have)| {
        let names = judged(want, have).0.into_iter().map(|bitmap| bitmap.name.clone()).collect::<Vec<_>>();
        (want.name.clone(), names)
    });
    taken.filter(|(_, names)| !names.is_empty()).collect()
}

/// Leaves of what a destination says it takes in what it was offered, each once.
pub(crate) fn keep_offered(accepted: &mut BTreeMap<String, Vec<String>>, offered: &[DiskSpec]) {
    accepted.retain(|disk, names| {
        let spec = offered.iter().find(|spec| spec.name == *disk);
        let bitmaps = spec.and_then(|spec| spec.bitmaps.as_ref()).map_or(&[][..], |of| &of.bitmaps);
        let mut left: BTreeSet<&str> = bitmaps.iter().map(|bitmap| bitmap.name.as_str()).collect();
        names.retain(|name| left.remove(name.as_str()));
        !names.is_empty()
    });
}

/// What the source's QEMU is told: of those that the destination takes in, what can still go along. And what it has been
/// said of that it goes along, and does not.
pub(crate) fn to_send(
    disks: &[Disk],
    accepted: &BTreeMap<String, Vec<String>>,
) -> (Vec<BitmapNode>, Vec<Problem>) {
    let (mut nodes, mut problems) = (Vec::new(), Vec::new());
    for (name, wanted) in accepted {
        let disk = disks.iter().find(|disk| disk.name == *name);
        let (mut bitmaps, mut stay) = (Vec::new(), Vec::new());
        for bitmap in wanted {
            match disk.map_or(Some("is gone"), |disk| hindrance_now(disk, bitmap)) {
                None => bitmaps.push(named(bitmap, None)),
                Some(why) => stay.push(format!("{bitmap} {why}")),
            }
        }
        if let Some(disk) = disk.filter(|_| !bitmaps.is_empty()) {
            nodes.push(BitmapNode { node_name: disk.image_node.clone(), alias: alias(disk), bitmaps });
        }
        if !stay.is_empty() {
            problems.push(dropped(name, &list(stay.iter().map(String::as_str))));
        }
    }
    (nodes, problems)
}

/// Why one that could go along cannot any more.
fn hindrance_now(disk: &Disk, name: &str) -> Option<&'static str> {
    let mut why = Some("is gone");
    for (layer, bitmap) in of_others(disk).filter(|(_, bitmap)| bitmap.name == name) {
        why = hindrance(disk, layer, bitmap);
        if why.is_none() {
            break;
        }
    }
    why
}

/// What the destination's QEMU is told.
pub(crate) fn to_receive(
    offered: &[DiskSpec],
    present: &[Disk],
    accepted: &BTreeMap<String, Vec<String>>,
) -> Vec<BitmapNode> {
    let paired = pair(offered, present);
    let node = |(want, have): &(&DiskSpec, &Disk)| {
        let (names, offered) = (accepted.get(&want.name)?, want.bitmaps.as_ref()?);
        let transform = (!is_stored(have)).then_some(BitmapTransform { persistent: Some(false) });
        let bitmaps = names.iter().map(|name| named(name, transform)).collect();
        Some(BitmapNode { node_name: have.image_node.clone(), alias: offered.node.clone(), bitmaps })
    };
    paired.pairs.iter().filter_map(node).collect()
}

fn named(name: &str, transform: Option<BitmapTransform>) -> BitmapAlias {
    BitmapAlias { name: name.to_owned(), alias: name.to_owned(), transform }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migrate::checks::disks::sample::{have, want};

    fn bitmap(name: &str) -> Bitmap {
        Bitmap { name: name.into(), busy: false, persistent: true, inconsistent: false }
    }

    fn with(bitmaps: Vec<Bitmap>, format: &str) -> Disk {
        let layer = Layer {
            node_name: "n".into(),
            driver: format.into(),
            backing: false,
            is_leaf: false,
            read_only: false,
            written_by_others: false,
            encryption: Default::default(),
            filename: String::new(),
            actual_size: None,
            bitmaps,
            snapshots: Vec::new(),
        };
        let image_node = "n".into();
        Disk { image_node, layers: vec![layer], ..have("disk0", 1, format) }
    }

    fn offer(disk: &Disk) -> Vec<DiskSpec> {
        vec![DiskSpec { bitmaps: offered(disk), ..want("disk0", 1, "qcow2") }]
    }

    fn kinds(problems: &[Problem]) -> Vec<ProblemKind> {
        problems.iter().map(|problem| problem.kind).collect()
    }

    #[test]
    fn what_can_go_along_is_offered_and_what_cannot_is_named() {
        let busy = Bitmap { busy: true, ..bitmap("busy") };
        let lost = Bitmap { inconsistent: true, ..bitmap("lost") };
        let ours = bitmap(&names::bitmap("7", 'a'));
        let disk = with(vec![bitmap("nightly"), busy, lost, ours], "qcow2");
        let names: Vec<_> =
            offered(&disk).into_iter().flat_map(|o| o.bitmaps).map(|bitmap| bitmap.name).collect();
        assert_eq!(names, ["nightly"]);
        let said = source_findings(&disk, false).map(|problem| problem.text).unwrap_or_default();
        assert!(said.contains("busy is in use, lost is worthless") && !said.contains("vmferry"), "{said}");
        let nightly = with(vec![bitmap("nightly")], "qcow2");
        assert_eq!(source_findings(&nightly, false), None);
        assert!(
            source_findings(&nightly, true).is_some(),
            "none goes along with disks inside the RAM stream"
        );
        assert_eq!(offered(&with(Vec::new(), "qcow2")), None);
        let filtered = Disk { image_node: "below".into(), ..disk };
        assert_eq!(offered(&filtered), None, "it is on a filter");
    }

    #[test]
    fn only_what_the_destination_has_not_is_taken_in() {
        use ProblemKind::{BitmapsCarried, BitmapsDropped};
        let wanted = offer(&with(vec![bitmap("nightly"), bitmap("weekly")], "qcow2"));
        let found =
            |have: &Disk, knows| kinds(&destination_findings(&wanted, std::slice::from_ref(have), knows));
        let empty = with(Vec::new(), "qcow2");
        assert_eq!(found(&empty, true), [BitmapsCarried]);
        assert_eq!(found(&empty, false), [BitmapsDropped]);
        let raw = with(Vec::new(), "raw");
        assert_eq!(found(&raw, true), [BitmapsDropped, BitmapsCarried], "nothing stores them");
        let stale = with(vec![bitmap("weekly")], "qcow2");
        assert_eq!(found(&stale, true), [BitmapsDropped, BitmapsCarried]);
        let agreed = accepted(&wanted, std::slice::from_ref(&stale));
        assert_eq!(agreed["disk0"], ["nightly"]);
        let (sent, lost) = to_send(&[with(vec![bitmap("nightly"), bitmap("weekly")], "qcow2")], &agreed);
        assert_eq!(lost, []);
        let taken = to_receive(&wanted, &[raw], &agreed);
        let of = |nodes: &[BitmapNode]| {
            let aliases =
                |node: &BitmapNode| node.bitmaps.iter().map(|b| b.alias.clone()).collect::<Vec<_>>();
            nodes.iter().map(|node| (node.alias.clone(), aliases(node))).collect::<Vec<_>>()
        };
        assert_eq!(of(&sent), of(&taken), "both sides call them by the same names");
        assert_eq!(taken[0].bitmaps[0].transform, Some(BitmapTransform { persistent: Some(false) }));
    }

    #[test]
    fn what_was_to_go_along_and_does_not_is_told_with_why() {
        let names = ["busy", "gone", "nightly"].map(String::from).to_vec();
        let accepted =
            BTreeMap::from([("disk0".to_owned(), names), ("disk9".to_owned(), vec!["b".to_owned()])]);
        let busy = Bitmap { busy: true, ..bitmap("busy") };
        let (sent, lost) = to_send(&[with(vec![busy.clone(), bitmap("nightly")], "qcow2")], &accepted);
        assert_eq!((sent.len(), sent[0].bitmaps.len()), (1, 1));
        assert_eq!(sent[0].bitmaps[0].name, "nightly");
        assert_eq!(kinds(&lost), [ProblemKind::BitmapsDropped; 2]);
        assert!(
            lost[0].text.ends_with("disk0 are not carried to the destination: busy is in use, gone is gone"),
            "{lost:?}"
        );
        assert!(lost[1].text.contains("disk9") && lost[1].text.ends_with("b is gone"), "{lost:?}");
        // Whatever else has been added since.
        let many = (0..2 * BITMAPS_MAX).map(|n| bitmap(&n.to_string())).chain([bitmap("nightly")]).collect();
        let only = BTreeMap::from([("disk0".to_owned(), vec!["nightly".to_owned()])]);
        let (sent, lost) = to_send(&[with(many, "qcow2")], &only);
        assert_eq!((sent.len(), lost.len()), (1, 0));
        let (sent, lost) = to_send(&[with(vec![busy], "qcow2")], &BTreeMap::new());
        assert_eq!((sent, lost), (Vec::new(), Vec::new()), "nothing was said of it");
    }

    #[test]
    fn a_destination_takes_in_what_it_was_offered_and_no_more() {
        let offered = offer(&with(vec![bitmap("nightly"), bitmap("weekly")], "qcow2"));
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let mut said = BTreeMap::from([
            ("disk0".to_owned(), names(&["weekly", "weekly", "\u{1b}[2J"])),
            ("disk9".to_owned(), names(&["nightly"])),
        ]);
        keep_offered(&mut said, &offered);
        assert_eq!(said, BTreeMap::from([("disk0".to_owned(), names(&["weekly"]))]));
    }

    #[test]
    fn nothing_that_a_peer_says_is_taken_for_a_bitmap_of_ours_or_twice() {
        let names = ["x", "x", "", &"y".repeat(256), &names::bitmap("7", 'a')];
        let bitmaps = names.iter().map(|name| OfferedBitmap { name: (*name).into(), persistent: false });
        let offered = OfferedBitmaps { node: "n".into(), bitmaps: bitmaps.collect() };
        let wanted = [DiskSpec { bitmaps: Some(offered.clone()), ..want("disk0", 1, "qcow2") }];
        assert_eq!(accepted(&wanted, &[with(Vec::new(), "qcow2")])["disk0"], ["x"]);
        let nameless = OfferedBitmaps { node: String::new(), ..offered };
        let wanted = [DiskSpec { bitmaps: Some(nameless), ..want("disk0", 1, "qcow2") }];
        assert!(accepted(&wanted, &[with(Vec::new(), "qcow2")]).is_empty());
    }
}
