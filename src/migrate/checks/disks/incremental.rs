//! Disks of which only the topmost image is copied: both of them must stand on something. Whether that shows the
//! same on both hosts is seen before anything is copied (`source/bases.rs`).

use super::images::list;
use crate::migrate::model::disk_choice::is_copyable;
use crate::migrate::model::options::Options;
use crate::migrate::model::plan;
use crate::migrate::model::problem::{Problem, ProblemKind};
use crate::migrate::protocol::message::DiskSpec;
use crate::qemu::Disk;

/// The format that is written to at the destination: its zeroes hide what lies below.
const FORMAT: &str = "qcow2";

/// What the source finds: a disk that stands on nothing has nothing that could be left.
pub(super) fn source_findings(disks: &[Disk], options: &Options) -> Vec<Problem> {
    let Some(wanted) = &options.incremental else { return Vec::new() };
    let copied = |disk: &&Disk| is_copyable(disk) && options.disks.takes(&disk.name);
    let mut problems: Vec<Problem> = wanted
        .named()
        .filter(|name| !disks.iter().filter(copied).any(|disk| disk.name == **name))
        .map(|name| {
            let known = list(disks.iter().filter(copied).map(|disk| disk.name.as_str()));
            let text = format!("`--incremental` names {name}, which is none of the disks that are copied");
            Problem::new(ProblemKind::DiskUnknown, text, format!("name one of these: {known}"))
        })
        .collect();
    let asked: Vec<&Disk> = disks.iter().filter(copied).filter(|disk| wanted.takes(&disk.name)).collect();
    let (have, have_none): (Vec<_>, Vec<_>) =
        asked.into_iter().partition(|disk| plan::base(disk, Some(wanted)).is_some());
    let is_refused = have.is_empty() || wanted.named().next().is_some();
    problems.extend(have_none.into_iter().map(|disk| without(disk, is_refused)));
    problems
}

fn without(disk: &Disk, is_refused: bool) -> Problem {
    let Disk { name, format, .. } = disk;
    let text = match disk.layers_known {
        true => format!("the source's disk {name} is {format} and stands on no backing file"),
        false => format!("the source's QEMU does not tell what lies below disk {name}"),
    };
    match is_refused {
        true => Problem::new(
            ProblemKind::NoBase,
            format!("{text}: there is nothing that could be left out of its copy"),
            "copy it whole: move the VM without `--incremental`, or name other disks there",
        ),
        false => Problem::note(
            ProblemKind::NoBase,
            format!("{text}: it is copied whole"),
            "nothing has to be done",
        ),
    }
}

/// What the destination finds.
pub(super) fn destination_findings(pairs: &[(&DiskSpec, &Disk)]) -> Vec<Problem> {
    let asked = pairs.iter().filter(|(want, _)| want.incremental && want.is_copied());
    asked.map(|(want, have)| at_destination(want, have)).collect()
}

fn at_destination(want: &DiskSpec, have: &Disk) -> Problem {
    let name = &want.name;
    let why = match &have.base {
        Some(base) if base.top_format == FORMAT => {
            let text = format!(
                "of disk {name} only the topmost image is copied: whether what it stands on is the same on both \
                 hosts is seen before anything is copied"
            );
            return Problem::note(ProblemKind::BaseKept, text, "nothing has to be done");
        }
        Some(base) => format!("is {} there", base.top_format),
        None if !have.layers_known => "is not told by its QEMU".to_owned(),
        None => format!("is {} there and stands on no backing file", have.format),
    };
    Problem::new(
        ProblemKind::NoBase,
        format!("only the topmost image of disk {name} is to be copied, and the destination's {why}"),
        "make it there with `qemu-img create -f qcow2 -b BASE -F FORMAT`, on what the source's image stands on; or \
         give `[create]` a `backing` there",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migrate::checks::disks::sample::{have, want};
    use crate::migrate::model::incremental::Incremental;
    use crate::migrate::model::problem::Severity::{self, Note, Problem as Refusal};
    use crate::qemu::Base;

    fn based(name: &str, format: &str) -> Disk {
        let base = Base {
            top_node: name.into(),
            top_format: format.into(),
            node_name: "below".into(),
            virtual_size: 1,
        };
        Disk { base: Some(base), ..have(name, 1, format) }
    }

    fn found(problems: &[Problem]) -> Vec<(ProblemKind, Severity)> {
        problems.iter().map(|p| (p.kind, p.severity)).collect()
    }

    #[test]
    fn a_disk_that_stands_on_nothing_is_copied_whole_unless_it_was_named_or_is_all_there_is() {
        let disks = [based("disk0", "qcow2"), have("disk1", 1, "raw")];
        let only = |name: &str| Some(Incremental::Only([name.to_owned()].into()));
        let source = |disks: &[Disk], incremental| {
            found(&source_findings(disks, &Options { incremental, ..Options::default() }))
        };
        assert_eq!(source(&disks, None), []);
        assert_eq!(source(&disks, Some(Incremental::All)), [(ProblemKind::NoBase, Note)]);
        assert_eq!(source(&disks, only("disk0")), []);
        assert_eq!(source(&disks, only("disk1")), [(ProblemKind::NoBase, Refusal)]);
        assert_eq!(source(&disks, only("disk9")), [(ProblemKind::DiskUnknown, Refusal)]);
        assert_eq!(source(&disks[1..], Some(Incremental::All)), [(ProblemKind::NoBase, Refusal)]);
    }

    #[test]
    fn only_qcow2_on_something_takes_a_topmost_image() {
        let want = DiskSpec { incremental: true, ..want("disk0", 1, "qcow2") };
        let destination = |have: &Disk| found(&destination_findings(&[(&want, have)]));
        assert_eq!(destination(&based("disk0", "qcow2")), [(ProblemKind::BaseKept, Note)]);
        for bad in [based("disk0", "vmdk"), have("disk0", 1, "qcow2"), have("disk0", 1, "raw")] {
            assert_eq!(destination(&bad), [(ProblemKind::NoBase, Refusal)], "{bad:?}");
        }
        let whole = DiskSpec { incremental: false, ..want.clone() };
        assert_eq!(destination_findings(&[(&whole, &have("disk0", 1, "raw"))]), []);
    }
}
