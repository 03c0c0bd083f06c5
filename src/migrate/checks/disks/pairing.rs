//! Which of the destination's disks is which of the source's: as QEMU's own migration stream pairs two
//! devices, by where they are plugged in, and by their ids, which must not contradict that. Never by
//! the order of options, nor by a name that QEMU has made of it.

use super::images::list;
use crate::migrate::model::problem::{Problem, ProblemKind};
use crate::migrate::protocol::message::DiskSpec;
use crate::qemu::Disk;

/// The offered disks with the destination's, as far as they can be told.
#[derive(Debug)]
pub(crate) struct Pairs<'a> {
    pub(crate) pairs: Vec<(&'a DiskSpec, &'a Disk)>,
    /// Why others have none.
    pub(crate) problems: Vec<Problem>,
}

impl<'a> Pairs<'a> {
    /// The destination's disk for one that the source has offered under this name.
    pub(crate) fn of(&self, name: &str) -> Option<&'a Disk> {
        self.pairs.iter().find(|(want, _)| want.name == name).map(|(_, have)| *have)
    }
}

/// Pairs all that were offered.
pub(crate) fn pair<'a>(offered: &'a [DiskSpec], present: &'a [Disk]) -> Pairs<'a> {
    let present: Vec<&Disk> = present.iter().filter(|disk| !disk.firmware).collect();
    let (mut pairs, mut problems, mut moved): (Vec<(&DiskSpec, &Disk)>, _, Vec<Problem>) =
        (Vec::new(), Vec::new(), Vec::new());
    for want in offered {
        match find(want, &present) {
            Ok(have) if pairs.iter().any(|(_, taken)| std::ptr::eq(*taken, have)) => {
                problems.push(unpaired(want, &[have]));
            }
            Ok(have) => match elsewhere(want, have) {
                Some(problem) => moved.push(problem),
                None => pairs.push((want, have)),
            },
            Err(problem) => problems.push(problem),
        }
    }
    // A device that is missing moves those after it: that comes first.
    if problems.is_empty() {
        problems = moved;
    }
    Pairs { pairs, problems }
}

fn find<'a>(want: &DiskSpec, present: &[&'a Disk]) -> Result<&'a Disk, Problem> {
    let Some(place) = &want.place else { return by_old_name(want, present) };
    let with = |which: &dyn Fn(&Disk) -> bool| -> Vec<&'a Disk> {
        present.iter().copied().filter(|disk| which(disk)).collect()
    };
    let same_id = |disk: &Disk| place.id.is_some() && disk.id == place.id;
    let same_address = |disk: &Disk| place.address.is_some() && disk.address == place.address;
    let both = with(&|disk| same_id(disk) && same_address(disk));
    // A device that bears another id is another device, wherever it is.
    let by_address = with(&|disk| same_address(disk) && (disk.id.is_none() || place.id.is_none()));
    match (&both[..], &with(&same_id)[..], &by_address[..]) {
        ([one], _, _) | ([], [one], []) | ([], [], [one]) => Ok(one),
        ([], [], []) if place.id.is_none() && place.address.is_none() => Err(unpaired(want, present)),
        ([], [], []) => Err(missing(want, present)),
        (both, by_id, by_address) => Err(unpaired(want, &[both, by_id, by_address].concat())),
    }
}

/// For a source whose agent tells names only. Of those, only a name that is an id means something.
fn by_old_name<'a>(want: &DiskSpec, present: &[&'a Disk]) -> Result<&'a Disk, Problem> {
    let named: Vec<&Disk> = present.iter().copied().filter(|disk| disk.name == want.name).collect();
    match &named[..] {
        [one] if one.id.is_some() => Ok(one),
        [] => Err(missing(want, present)),
        _ => Err(unpaired(want, &named)),
    }
}

fn missing(want: &DiskSpec, present: &[&Disk]) -> Problem {
    let names = list(present.iter().map(|disk| disk.name.as_str()));
    let found = if names.is_empty() { "no disk at all".into() } else { names };
    let at = want.place.as_ref().and_then(|place| place.address.as_ref());
    let at = at.map_or_else(String::new, |address| format!(" (at {address} at the source)"));
    Problem::new(
        ProblemKind::DiskMissing,
        format!("disk {}{at} is missing at the destination, whose QEMU has {found}", want.name),
        "give the destination's QEMU the same devices at the same bus addresses, with the same ids as the source's",
    )
}

fn elsewhere(want: &DiskSpec, have: &Disk) -> Option<Problem> {
    let (here, there) = (want.place.as_ref()?.address.as_ref()?, have.address.as_ref()?);
    if here == there {
        return None;
    }
    Some(Problem::new(
        ProblemKind::DiskAddress,
        format!("disk {} is at {here} at the source and at {there} at the destination", want.name),
        "give its device the same bus address (`addr`, `bus`, `scsi-id`, `lun`) on both sides",
    ))
}

fn unpaired(want: &DiskSpec, candidates: &[&Disk]) -> Problem {
    let names = list(candidates.iter().map(|disk| disk.name.as_str()));
    let text = format!(
        "it cannot be told which of the destination's disks is the source's disk {}: it may be {}",
        want.name,
        if names.is_empty() { "none of them" } else { &names }
    );
    let remedy = "give each disk's device an `id`, the same on both sides";
    Problem::new(ProblemKind::DiskUnpaired, text, remedy)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::migrate::checks::disks::sample;
    use crate::migrate::protocol::message::DiskPlace;

    fn want(name: &str, id: Option<&str>, address: Option<&str>) -> DiskSpec {
        let place =
            DiskPlace { id: id.map(Into::into), address: address.map(Into::into), ..DiskPlace::default() };
        DiskSpec { place: Some(place), ..sample::want(name, 1, "raw") }
    }

    fn have(node: &str, id: Option<&str>, address: Option<&str>) -> Disk {
        Disk { id: id.map(Into::into), address: address.map(Into::into), ..sample::have(node, 1, "raw") }
    }

    fn paired(offered: &[DiskSpec], present: &[Disk]) -> Result<Vec<String>, Vec<ProblemKind>> {
        let pairs = pair(offered, present);
        match pairs.problems.is_empty() {
            true => Ok(pairs.pairs.iter().map(|(_, have)| have.node_name.clone()).collect()),
            false => Err(pairs.problems.iter().map(|p| p.kind).collect()),
        }
    }

    #[test]
    fn without_ids_the_bus_address_pairs_and_not_the_order() {
        let offered = [want("a", None, Some("05.0")), want("b", None, Some("06.0"))];
        let present = [have("x", None, Some("06.0")), have("y", None, Some("05.0"))];
        assert_eq!(paired(&offered, &present).unwrap(), ["y", "x"]);
        let elsewhere = [have("x", None, Some("06.0")), have("y", None, Some("07.0"))];
        assert_eq!(paired(&offered, &elsewhere), Err(vec![ProblemKind::DiskMissing]));
    }

    #[test]
    fn an_id_pairs_unless_the_address_contradicts() {
        let offered = [want("a", Some("a"), Some("05.0"))];
        assert_eq!(paired(&offered, &[have("x", Some("a"), Some("05.0"))]).unwrap(), ["x"]);
        assert_eq!(paired(&offered, &[have("x", Some("a"), None)]).unwrap(), ["x"]);
        assert_eq!(paired(&offered, &[have("x", None, Some("05.0"))]).unwrap(), ["x"]);
        let moved = have("x", Some("a"), Some("06.0"));
        assert_eq!(paired(&offered, std::slice::from_ref(&moved)), Err(vec![ProblemKind::DiskAddress]));
        let other = have("y", Some("b"), Some("05.0"));
        assert_eq!(paired(&offered, &[other]), Err(vec![ProblemKind::DiskMissing]));
        let nameless = have("y", None, Some("05.0"));
        assert_eq!(paired(&offered, &[moved, nameless]), Err(vec![ProblemKind::DiskUnpaired]));
    }

    #[test]
    fn what_has_neither_is_refused_by_name() {
        let offered = [want("usb", None, None)];
        assert_eq!(paired(&offered, &[have("x", None, None)]), Err(vec![ProblemKind::DiskUnpaired]));
        let one = have("x", Some("a"), None);
        let twice = [want("a", Some("a"), None), want("b", Some("a"), None)];
        assert_eq!(paired(&twice, &[one]), Err(vec![ProblemKind::DiskUnpaired]));
    }

    #[test]
    fn an_older_source_is_believed_where_its_name_is_an_id() {
        let old = DiskSpec { place: None, ..sample::want("disk0", 1, "raw") };
        assert_eq!(
            paired(std::slice::from_ref(&old), &[have("disk0", Some("disk0"), Some("05.0"))]).unwrap(),
            ["disk0"]
        );
        assert_eq!(paired(&[old], &[have("disk0", None, None)]), Err(vec![ProblemKind::DiskUnpaired]));
    }

    #[test]
    fn flash_is_nobodys_pair() {
        let flash = Disk { firmware: true, ..have("x", Some("a"), None) };
        assert_eq!(paired(&[want("a", Some("a"), None)], &[flash]), Err(vec![ProblemKind::DiskMissing]));
    }
}
