//! Disks that the guest can write to and that are not copied: the destination's QEMU must have the source's
//! storage, or the guest would find something else than it has written.

use super::images::{self, is_nothing};
use crate::migrate::model::disk_choice::DiskChoice;
use crate::migrate::model::problem::{Problem, ProblemKind};
use crate::migrate::protocol::message::{DiskSpec, Storage};
use crate::qemu::{Disk, Image};

/// Each of them, whether it is well or not: a source knows by that that the destination knows of them.
pub(super) fn findings(pairs: &[(&DiskSpec, &Disk)]) -> Vec<Problem> {
    let left_out = pairs.iter().filter(|(want, _)| want.left_out && !want.read_only);
    left_out.map(|(want, have)| finding(want, have)).collect()
}

/// Why a disk may not be left where it is.
enum Doubt {
    /// Whether both hosts use one storage is not known.
    Unknown(String),
    /// They do, and see other things in it.
    Other(String),
}

fn finding(want: &DiskSpec, have: &Disk) -> Problem {
    let name = &want.name;
    let (text, remedy) = match one_storage(want, have) {
        Ok(key) => {
            let text = format!("disk {name} is not copied: both hosts use one storage (known as {key})");
            return Problem::note(ProblemKind::DiskLeftOut, text, "nothing has to be done");
        }
        Err(Doubt::Unknown(why)) => (
            format!(
                "disk {name} is not to be copied, and it is not known that both hosts use one storage: {why}. If they \
                 do not, the guest finds other contents there than it has written"
            ),
            "copy it; accept it only if both hosts' QEMUs have one and the same storage, which the agents cannot see \
             (a replicated volume, a LUN, a network file system)",
        ),
        Err(Doubt::Other(why)) => (
            format!(
                "disk {name} is not to be copied, and the guest would find other contents at the destination than it \
                 has written: {why}"
            ),
            "start the destination's QEMU on the images that the source has now, in the same formats",
        ),
    };
    Problem::new(ProblemKind::DiskLeftOut, text, remedy)
}

/// The name of the storage that both have, if the destination's guest would see and write what the source's does.
fn one_storage<'a>(want: &'a DiskSpec, have: &Disk) -> Result<&'a str, Doubt> {
    let unknown = |why: &str| Err(Doubt::Unknown(why.to_owned()));
    if want.format != have.format {
        return unknown(&format!(
            "it is {} at the source and {} at the destination",
            want.format, have.format
        ));
    }
    let Some(place) = want.place.as_ref() else { return unknown("the source's agent does not tell") };
    let images = || have.images.iter().filter(|image| !is_nothing(image));
    if place.storages.is_empty() {
        return unknown("the source's agent cannot see its image");
    }
    if !have.layers_known || images().next().is_none() {
        return unknown("the destination's agent cannot see its image");
    }
    for image in images() {
        same_use(image, images::written(have).any(|other| std::ptr::eq(other, image)), &place.storages)?;
    }
    if let (Some(theirs), Some(here)) = (&place.layout, &have.layout)
        && theirs != here
    {
        let why = format!("it lies there as {theirs} at the source and as {here} at the destination");
        return Err(Doubt::Other(why));
    }
    let written = place.storages.iter().find(|storage| storage.written && is_sure(&storage.key));
    written.map_or_else(|| unknown("the source writes to none of it"), |storage| Ok(&storage.key))
}

/// Names that only may be those of one storage prove nothing.
fn is_sure(key: &str) -> bool {
    !key.starts_with("like:")
}

/// Whether the source has this image of the destination, and uses it in the same way. One that is written to is not what
/// the source only reads, since a snapshot has put an image above it.
fn same_use(image: &Image, is_written: bool, storages: &[Storage]) -> Result<(), Doubt> {
    let name = &image.filename;
    if image.keys.is_empty() {
        return Err(Doubt::Unknown(format!("the destination's agent cannot see {name}")));
    }
    let known = storages.iter().filter(|storage| is_sure(&storage.key) && image.keys.contains(&storage.key));
    let known: Vec<bool> = known.map(|storage| storage.written).collect();
    if known.contains(&is_written) {
        return Ok(());
    }
    Err(match (known.is_empty(), is_written) {
        (true, _) => {
            Doubt::Unknown(format!("{name} at the destination has another name than anything there"))
        }
        (false, true) => {
            Doubt::Other(format!("it would write to {name}, which only lies below its image at the source"))
        }
        (false, false) => {
            Doubt::Other(format!("it would only read {name}, which it writes to at the source"))
        }
    })
}

/// Names that the source has no disk for.
pub(crate) fn unknown(disks: &[Disk], choice: &DiskChoice) -> Vec<Problem> {
    let names: Vec<&str> = disks.iter().filter(|d| !d.firmware).map(|d| d.name.as_str()).collect();
    let problem = |name: &str| {
        let (why, remedy) = match disks.iter().any(|disk| disk.name == name) {
            true => (
                "cannot be written to by the guest, so it is never copied",
                "leave it out of `--disk`".into(),
            ),
            false => ("is none of the source's disks", format!("name one of these: {}", names.join(", "))),
        };
        Problem::new(ProblemKind::DiskUnknown, format!("disk {name} {why}"), remedy)
    };
    choice.unknown(disks).into_iter().map(problem).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migrate::checks::disks::sample::{have, image, want};
    use crate::migrate::model::problem::Severity;
    use crate::migrate::protocol::message::DiskPlace;

    fn left_out(keys: &[&str]) -> DiskSpec {
        let storage = |key: &&str| Storage { key: (*key).to_owned(), written: true };
        let place = DiskPlace { storages: keys.iter().map(storage).collect(), ..DiskPlace::default() };
        DiskSpec { left_out: true, place: Some(place), ..want("disk0", 1, "raw") }
    }

    #[test]
    fn only_one_storage_in_one_format_is_taken_for_it() {
        let severity = |want: &DiskSpec, have: &Disk| {
            let found = findings(&[(want, have)]);
            assert_eq!(found[0].kind, ProblemKind::DiskLeftOut);
            found[0].severity
        };
        let disk = |images| Disk { images, ..have("disk0", 1, "raw") };
        let shared = disk(vec![image(&["inode:b:1:2", "nfs:s:/x:2"])]);
        let ours = left_out(&["inode:a:9:2", "nfs:s:/x:2"]);
        assert_eq!(severity(&ours, &shared), Severity::Note);
        for other in [
            disk(vec![image(&["nfs:s:/x:3"])]),
            disk(vec![image(&["nfs:s:/x:2"]), image(&["nfs:s:/data:7"])]),
            disk(vec![image(&["nfs:s:/x:2"]), image(&[])]),
            disk(Vec::new()),
            Disk { layers_known: false, ..shared.clone() },
            Disk { format: "qcow2".into(), ..shared.clone() },
        ] {
            assert_eq!(severity(&ours, &other), Severity::Problem, "{other:?}");
        }
        let reads = Image { backing: true, read_only: true, ..image(&["nfs:s:/x:2"]) };
        assert_eq!(severity(&ours, &disk(vec![reads.clone()])), Severity::Problem, "it writes to it there");
        let mut above = left_out(&["nfs:s:/top:3", "nfs:s:/x:2"]);
        above.place.iter_mut().for_each(|place| place.storages[1].written = false);
        assert_eq!(severity(&above, &shared), Severity::Problem, "an image was put above it there");
        assert_eq!(severity(&above, &disk(vec![image(&["nfs:s:/top:3"]), reads])), Severity::Note);
        let laid = |layout: &str| Some(layout.to_owned());
        let mut seen = ours.clone();
        seen.place.iter_mut().for_each(|place| place.layout = laid("raw"));
        let here = |layout: &str| Disk { layout: laid(layout), ..shared.clone() };
        assert_eq!(severity(&seen, &here("raw")), Severity::Note);
        assert_eq!(severity(&seen, &here("raw from byte 512")), Severity::Problem);
        let alike = [left_out(&["like:gpfs:/x"]), ours.clone()];
        let there = disk(vec![image(&["like:gpfs:/x"])]);
        assert!(alike.iter().all(|want| severity(want, &there) == Severity::Problem), "a name may deceive");
        assert_eq!(severity(&left_out(&[]), &shared), Severity::Problem);
        assert_eq!(severity(&DiskSpec { place: None, ..ours }, &shared), Severity::Problem);
        assert_eq!(findings(&[(&want("disk0", 1, "raw"), &shared)]), []);
    }

    #[test]
    fn a_name_that_means_nothing_is_told_with_those_that_do() {
        let disks = [have("disk0", 1, "raw"), Disk { read_only: true, ..have("cd0", 1, "raw") }];
        let found = unknown(&disks, &DiskChoice::Only(vec!["disk9".into(), "cd0".into()]));
        assert!(found[0].remedy.contains("disk0") && found[1].text.contains("never copied"), "{found:?}");
    }
}
