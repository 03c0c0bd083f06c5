//! One storage used twice: by two devices of a guest, or by both hosts.

use std::collections::HashMap;

use super::images::{is_nothing, list, written};
use crate::migrate::model::problem::{Problem, ProblemKind};
use crate::migrate::protocol::message::DiskSpec;
use crate::qemu::Disk;

/// Devices of one guest of which one writes to what another one uses as well.
pub(crate) fn within(disks: &[Disk], side: &str) -> Vec<Problem> {
    let mut users: HashMap<String, Vec<(&str, bool)>> = HashMap::new();
    for disk in disks {
        let mut uses: HashMap<String, bool> = HashMap::new();
        for layer in &disk.layers {
            let writes = !disk.read_only && !layer.read_only && !layer.backing;
            *uses.entry(format!("node {}", layer.node_name)).or_default() |= writes;
        }
        for image in disk.images.iter().filter(|image| !is_nothing(image)) {
            let writes = !disk.read_only && !image.read_only && !image.backing;
            let names = image.keys.iter().chain((!image.filename.is_empty()).then_some(&image.filename));
            for name in names {
                *uses.entry(name.clone()).or_default() |= writes;
            }
        }
        for (storage, writes) in uses {
            users.entry(storage).or_default().push((&disk.name, writes));
        }
    }
    let shared =
        users.into_values().filter(|users| users.len() > 1 && users.iter().any(|(_, writes)| *writes));
    let mut groups: Vec<String> = shared
        .map(|users| {
            let mut names: Vec<&str> = users.into_iter().map(|(name, _)| name).collect();
            names.sort_unstable();
            names.join(" and ")
        })
        .collect();
    groups.sort();
    groups.dedup();
    groups.into_iter().map(|names| shared_within(&names, side)).collect()
}

fn shared_within(names: &str, side: &str) -> Problem {
    Problem::new(
        ProblemKind::DiskShared,
        format!("the disks {names} are one and the same storage at the {side}, and it is written to"),
        "give each device a storage of its own, or one of them read-only: two copies of one storage that is \
         written to through both would differ",
    )
}

/// Storage that both hosts use: the destination would write over what the source still needs. A disk that is
/// not copied is to be on one.
pub(crate) fn between(offered: &[DiskSpec], present: &[Disk], pairs: &[(&DiskSpec, &Disk)]) -> Vec<Problem> {
    let mut theirs: HashMap<&str, (&str, bool)> = HashMap::new();
    for spec in offered {
        for storage in spec.place.iter().flat_map(|place| &place.storages) {
            let entry = theirs.entry(&storage.key).or_insert((&spec.name, false));
            entry.1 |= storage.written;
        }
    }
    let mut problems = Vec::new();
    for disk in present.iter().filter(|disk| !disk.firmware) {
        for image in &disk.images {
            let writes = written(disk).any(|other| std::ptr::eq(other, image));
            let same = image.keys.iter().find_map(|key| {
                theirs
                    .get(key.as_str())
                    .filter(|(name, written)| (*written || writes) && !is_left_out(name, disk, pairs))
                    .map(|(name, _)| (key, *name))
            });
            if let Some((key, name)) = same {
                problems.push(shared_between(name, &disk.name, &image.filename, key));
            }
        }
    }
    problems
}

/// Whether this is the disk of that name, which is not copied.
fn is_left_out(name: &str, disk: &Disk, pairs: &[(&DiskSpec, &Disk)]) -> bool {
    let pair = pairs.iter().find(|(_, have)| std::ptr::eq(*have, disk));
    pair.is_some_and(|(want, _)| want.name == name && want.left_out)
}

fn shared_between(source: &str, destination: &str, filename: &str, key: &str) -> Problem {
    let disks = match source == destination {
        true => format!("disk {source} of both hosts is"),
        false => format!("the source's disk {source} and the destination's disk {destination} are"),
    };
    // Within one kernel there is no doubt; a name on the network may be that of two things.
    let certain = key.starts_with("inode:") || key.starts_with("dev:");
    let (kind, seems) = match certain {
        true => (ProblemKind::SameImage, ""),
        false => (ProblemKind::SameStorage, ", as far as its name tells"),
    };
    Problem::new(
        kind,
        format!("{disks} one and the same storage{seems}: {filename} (known as {key})"),
        format!(
            "give the destination's QEMU an image of its own: the copy would write over the guest's only disk. If \
             both hosts are to share it, leave it where it is: `--except-disk {source}`"
        ),
    )
}

/// Disks of which nobody knows whether both hosts use one storage, or whether the destination's host uses what is
/// written over; and what else is not known of them.
pub(crate) fn unknown(pairs: &[(&DiskSpec, &Disk)]) -> Option<Problem> {
    let hidden = |disk: &Disk| {
        !disk.layers_known || written(disk).any(|image| image.keys.is_empty() && !is_nothing(image))
    };
    let hides = |spec: &DiskSpec| spec.place.as_ref().is_none_or(|place| place.hides_storage);
    let is_storage_hidden = |(want, have): &(&DiskSpec, &Disk)| hides(want) || hidden(have);
    // It is a file or device of that host, and nobody can tell which.
    let is_place_hidden = |(_, have): &(&DiskSpec, &Disk)| {
        written(have).any(|image| image.is_local() && image.on_host.is_none())
    };
    let copied = pairs.iter().filter(|(want, _)| want.is_copied());
    let unseen: Vec<_> = copied.filter(|pair| is_storage_hidden(pair) || is_place_hidden(pair)).collect();
    let any = |is_hidden: &dyn Fn(&(&DiskSpec, &Disk)) -> bool| unseen.iter().any(|pair| is_hidden(pair));
    let is_place_hidden = any(&is_place_hidden);
    let whether = [
        any(&is_storage_hidden).then_some("whether both hosts use the same storage"),
        is_place_hidden.then_some("whether the destination's host encrypts it"),
        is_place_hidden.then_some("whether that host uses it itself"),
    ];
    let whether: Vec<&str> = whether.into_iter().flatten().collect();
    let own = "make sure that each host has an image of its own";
    let (whether, remedy) = match &whether[..] {
        [one] => (format!("{one} is"), own.to_owned()),
        [others @ .., last] => (
            format!("{} and {last} are", list(others.iter().copied())),
            format!("{own}, which is encrypted where the source's is and used by nobody else"),
        ),
        [] => return None,
    };
    let names = list(unseen.iter().map(|(want, _)| want.name.as_str()));
    let text = format!("not both agents can see what lies below {names}: {whether} not known");
    Some(Problem::note(ProblemKind::NotSeen, text, remedy))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migrate::checks::disks::sample::{have, image, want};
    use crate::migrate::protocol::message::{DiskPlace, Storage};
    use crate::qemu::{Image, OnHost};

    fn disk(name: &str, image: Image) -> Disk {
        Disk { images: vec![image], ..have(name, 1, "raw") }
    }

    fn offer(name: &str, key: &str, written: bool) -> DiskSpec {
        let storages = vec![Storage { key: key.into(), written }];
        DiskSpec { place: Some(DiskPlace { storages, ..DiskPlace::default() }), ..want(name, 1, "raw") }
    }

    fn kinds(problems: &[Problem]) -> Vec<ProblemKind> {
        problems.iter().map(|p| p.kind).collect()
    }

    #[test]
    fn two_devices_on_one_storage_are_found_whatever_it_is_called() {
        let other_name = Image { filename: "/other".into(), ..image(&["inode:b:1:2"]) };
        let one = disk("a", image(&["inode:b:1:2"]));
        assert_eq!(
            kinds(&within(&[one.clone(), disk("b", other_name)], "source")),
            [ProblemKind::DiskShared]
        );
        let unseen = [disk("a", image(&[])), disk("b", image(&[]))];
        assert_eq!(within(&unseen, "source").len(), 1, "by the file's name");
        let readers = [Disk { read_only: true, ..one.clone() }, Disk { read_only: true, ..one.clone() }];
        assert_eq!(within(&readers, "source"), []);
        let backing = Image { backing: true, read_only: true, ..image(&["inode:b:1:2"]) };
        assert_eq!(within(&[disk("a", backing.clone()), disk("b", backing.clone())], "source"), []);
        assert_eq!(within(&[one, disk("b", backing)], "source").len(), 1, "one writes below the other");
    }

    #[test]
    fn one_storage_of_both_hosts_is_found_if_anybody_writes_to_it() {
        let there = disk("disk0", image(&["inode:b:1:2", "nfs:s:/x:2"]));
        let found = between(&[offer("disk0", "inode:b:1:2", true)], std::slice::from_ref(&there), &[]);
        assert_eq!(kinds(&found), [ProblemKind::SameImage]);
        let found = between(&[offer("disk1", "nfs:s:/x:2", false)], std::slice::from_ref(&there), &[]);
        assert_eq!(kinds(&found), [ProblemKind::SameStorage]);
        assert_eq!(between(&[offer("disk0", "inode:c:1:2", true)], std::slice::from_ref(&there), &[]), []);
        let base = Image { backing: true, read_only: true, ..image(&["nfs:s:/base:1"]) };
        assert_eq!(between(&[offer("disk0", "nfs:s:/base:1", false)], &[disk("disk0", base)], &[]), []);
        let both = |left_out| DiskSpec { left_out, ..offer("disk0", "inode:b:1:2", true) };
        let found = |want: &DiskSpec| {
            between(std::slice::from_ref(want), std::slice::from_ref(&there), &[(want, &there)]).len()
        };
        assert_eq!((found(&both(false)), found(&both(true))), (1, 0), "what is not copied may be shared");
        let other = DiskSpec { name: "disk1".into(), ..both(true) };
        let copied = offer("disk0", "inode:c:9:9", true);
        let crossed = between(&[other, copied.clone()], std::slice::from_ref(&there), &[(&copied, &there)]);
        assert_eq!(kinds(&crossed), [ProblemKind::SameImage], "another disk is copied onto it");
    }

    #[test]
    fn what_nobody_sees_is_said() {
        let looked_at = |keys: &[&str]| Image { on_host: Some(OnHost::default()), ..image(keys) };
        let (clear, unseen) = (disk("disk0", looked_at(&["inode:b:1:2"])), disk("disk0", image(&[])));
        let offered = offer("disk0", "inode:c:1:2", true);
        assert_eq!(unknown(&[(&offered, &clear)]), None);
        assert!(unknown(&[(&offered, &unseen)]).is_some_and(|note| note.text.contains("disk0")));
        let old = DiskSpec { place: None, ..offered };
        assert!(unknown(&[(&old, &clear)]).is_some());
        let nothing = Image { driver: "null-co".into(), ..image(&[]) };
        assert_eq!(unknown(&[(&offer("disk0", "x", true), &disk("disk0", nothing))]), None);
    }

    #[test]
    fn all_that_nobody_sees_is_named() {
        let storage = "whether both hosts use the same storage";
        let more = "whether the destination's host encrypts it and whether that host uses it itself";
        let looked_at = |keys: &[&str]| Image { on_host: Some(OnHost::default()), ..image(keys) };
        let remote = Image { driver: "nbd".into(), filename: "nbd://store/x".into(), ..image(&[]) };
        let want = offer("disk0", "inode:c:1:2", true);
        for (image, expected) in [
            (looked_at(&[]), format!("below disk0: {storage} is not known")),
            (remote, format!("below disk0: {storage} is not known")),
            (image(&[]), format!("below disk0: {storage}, {more} are not known")),
            (image(&["inode:b:1:2"]), format!("below disk0: {more} are not known")),
        ] {
            let note = unknown(&[(&want, &disk("disk0", image))]);
            assert!(note.as_ref().is_some_and(|note| note.text.ends_with(&expected)), "{note:?}");
        }
    }
}
