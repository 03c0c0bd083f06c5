//! Disks that the guest can write to and that are not copied: the destination's QEMU must have the source's
//! storage, or the guest would find something else than it has written.

use std::collections::HashSet;

use super::images::is_nothing;
use crate::migrate::model::disk_choice::DiskChoice;
use crate::migrate::model::problem::{Problem, ProblemKind};
use crate::migrate::protocol::message::DiskSpec;
use crate::qemu::Disk;

/// Each of them, whether it is well or not: a source knows by that that the destination knows of them.
pub(super) fn findings(pairs: &[(&DiskSpec, &Disk)]) -> Vec<Problem> {
    let left_out = pairs.iter().filter(|(want, _)| want.left_out && !want.read_only);
    left_out.map(|(want, have)| finding(want, have)).collect()
}

fn finding(want: &DiskSpec, have: &Disk) -> Problem {
    let name = &want.name;
    let doubt = match one_storage(want, have) {
        Ok(key) => {
            let text = format!("disk {name} is not copied: both hosts use one storage (known as {key})");
            return Problem::note(ProblemKind::DiskLeftOut, text, "nothing has to be done");
        }
        Err(doubt) => doubt,
    };
    let text = format!(
        "disk {name} is not to be copied, and it is not known that both hosts use one storage: {doubt}. If they do \
         not, the guest finds other contents there than it has written"
    );
    let remedy = "copy it; accept it only if both hosts' QEMUs have one and the same storage, which the agents \
                  cannot see (a replicated volume, a LUN, a network file system)";
    Problem::new(ProblemKind::DiskLeftOut, text, remedy)
}

/// The name of the storage that both have, if everything that the destination has open is what the source has
/// open; else why that is not known.
fn one_storage<'a>(want: &'a DiskSpec, have: &Disk) -> Result<&'a str, String> {
    if want.format != have.format {
        return Err(format!("it is {} at the source and {} at the destination", want.format, have.format));
    }
    let place = want.place.as_ref().ok_or("the source's agent does not tell")?;
    let theirs: HashSet<&str> = place.storages.iter().map(|storage| storage.key.as_str()).collect();
    let mut images = have.images.iter().filter(|image| !is_nothing(image)).peekable();
    if theirs.is_empty() {
        return Err("the source's agent cannot see its image".into());
    }
    if !have.layers_known || images.peek().is_none() {
        return Err("the destination's agent cannot see its image".into());
    }
    for image in images {
        if image.keys.is_empty() {
            return Err(format!("the destination's agent cannot see {}", image.filename));
        }
        if !image.keys.iter().any(|key| theirs.contains(key.as_str())) {
            return Err(format!(
                "{} at the destination has another name than anything there",
                image.filename
            ));
        }
    }
    let written = place.storages.iter().find(|storage| storage.written);
    written.map(|storage| storage.key.as_str()).ok_or_else(|| "the source writes to none of it".into())
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
    use crate::migrate::protocol::message::{DiskPlace, Storage};

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
