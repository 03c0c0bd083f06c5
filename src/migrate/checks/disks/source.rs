//! What the source finds in its own QEMU: what is attached to the disks, and contents that nobody
//! copies.

use super::images::{list, written};
use super::{bitmaps, incremental, sharing, unknown_names};
use crate::migrate::model::disk_choice::is_copyable;
use crate::migrate::model::in_band::InBand;
use crate::migrate::model::options::Options;
use crate::migrate::model::plan;
use crate::migrate::model::problem::{Problem, ProblemKind};
use crate::qemu::{Contents, Disk, Outside, Qmp, QmpError, block_exports, names, outside};

/// Everything that speaks against moving a guest with these disks, and what will not go along.
pub(crate) async fn source_findings(
    qmp: &Qmp,
    disks: &[Disk],
    options: &Options,
) -> Result<Vec<Problem>, QmpError> {
    let mut problems: Vec<Problem> = outside(qmp).await?.iter().map(not_moved).collect();
    problems.extend(sharing::within(disks, "source"));
    problems.extend(exported(qmp, disks, "source").await?);
    problems.extend(attached(disks, options));
    problems.extend(unknown_names(disks, &options.disks));
    problems.extend(incremental::source_findings(disks, options));
    Ok(problems)
}

fn not_moved(device: &Outside) -> Problem {
    let Outside { name, device, contents } = device;
    let of_source = format!("device {name} ({device}) of the source");
    let cannot = |what: &str| format!("{of_source} cannot be moved: {what}");
    match contents {
        Contents::Disk => Problem::new(
            ProblemKind::DeviceData,
            cannot("the contents of its disk lie outside of QEMU, and nobody copies them"),
            "attach the disk as a block device of QEMU; accept it only if the destination's device has the same \
             contents, and nobody writes to them from now on",
        ),
        Contents::Folder => Problem::new(
            ProblemKind::DeviceData,
            cannot("it shows the guest a folder of the host, which nobody copies"),
            "remove it from the guest; accept it only if the destination's folder has the same contents, and \
             QEMU can move the device",
        ),
        Contents::HostDevice => Problem::new(
            ProblemKind::DiskPassthrough,
            cannot(
                "the guest's writes go to a device of the host without QEMU knowing of them, so a copy would miss some",
            ),
            "attach the disk as `scsi-hd`",
        ),
        Contents::HostUsb => Problem::new(
            ProblemKind::DeviceData,
            format!(
                "{of_source} is a USB device of the host, which QEMU moves as if it were at the destination: the guest \
                 loses it, what is on it stays at the source, and what has the same address or number there is plugged in \
                 instead"
            ),
            "take it out of the guest before (`device_del`); accept it only if the guest can do without it, or has one \
             like it at the destination (a dongle)",
        ),
        Contents::RedirectedUsb => Problem::new(
            ProblemKind::DeviceData,
            format!(
                "{of_source} is a USB device at the other end of a connection of its QEMU's, which does not go along: the \
                 guest loses it, unless the destination's QEMU has the same connection when the guest comes"
            ),
            "take it out of the guest before; accept it only if the guest can do without it",
        ),
    }
}

/// Exports of these disks that are not this migration's.
pub(crate) async fn exported(qmp: &Qmp, disks: &[Disk], side: &str) -> Result<Vec<Problem>, QmpError> {
    let exports = block_exports(qmp).await?;
    let mut problems = Vec::new();
    for disk in disks {
        let node = |name: &str| disk.layers.iter().find(|layer| layer.node_name == name);
        let of_disk = exports.iter().filter_map(|export| Some((export, node(&export.node_name)?)));
        for (export, layer) in of_disk {
            let writable = layer.written_by_others || !disk.layers_known;
            let (id, kind, name) = (&export.id, &export.kind, &disk.name);
            let ours = if names::is_ours(id) {
                ", a left-over of vmferry's, which the agent closes when it starts"
            } else {
                ""
            };
            let text = format!("disk {name} is exported at the {side} ({kind} export {id}{ours})");
            problems.push(match writable || side != "source" {
                true => Problem::new(
                    ProblemKind::DiskExported,
                    format!("{text}, and may be written to by others than the guest"),
                    "end the export with `block-export-del`, once nobody uses it: QEMU does not hand over a disk \
                     that others write to",
                ),
                false => Problem::warning(
                    ProblemKind::DiskExported,
                    format!("{text}; whoever reads it will not see the guest's writes after the move"),
                    "let the reader finish, and end the export with `block-export-del`",
                ),
            });
        }
    }
    Ok(problems)
}

fn attached(disks: &[Disk], options: &Options) -> Vec<Problem> {
    let copied = || disks.iter().filter(|disk| is_copyable(disk) && options.disks.takes(&disk.name));
    let mut problems: Vec<_> =
        disks.iter().filter(|disk| is_copyable(disk)).flat_map(bitmaps_in_use).collect();
    for disk in copied() {
        problems.extend(bitmaps::source_findings(disk, options.in_band.is_some()));
        problems.extend(temporary(disk));
        problems.extend(snapshots_dropped(disk));
        let is_left = plan::base(disk, options.incremental.as_ref()).is_some();
        if !is_left && options.in_band != Some(InBand::Inc) {
            problems.extend(backing_merged(disk));
        }
    }
    problems.extend(copied().filter(|disk| disk.shareable).map(shareable));
    let unknown: Vec<&str> = copied().filter(|d| !d.layers_known).map(|d| d.name.as_str()).collect();
    if !unknown.is_empty() {
        let text = format!("the source's QEMU does not tell what lies below {}", list(unknown));
        let remedy = "look for encryption and for data files below their formats and filters yourself";
        problems.push(Problem::warning(ProblemKind::NotSeen, text, remedy));
    }
    problems
}

fn bitmaps_in_use(disk: &Disk) -> Option<Problem> {
    let busy = bitmaps::of_others(disk).map(|(_, bitmap)| bitmap).filter(|b| b.busy && b.persistent);
    let busy = list(busy.map(|b| b.name.as_str()));
    if busy.is_empty() {
        return None;
    }
    Some(Problem::new(
        ProblemKind::Busy,
        format!(
            "dirty bitmaps of the source's disk {} are in use: {busy}. QEMU would end itself, and with it the guest, \
             when it closes the image",
            disk.name
        ),
        "let the backup finish, or end its export or job",
    ))
}

/// A copy is the guest's alone.
fn shareable(disk: &Disk) -> Problem {
    let name = &disk.name;
    Problem::new(
        ProblemKind::DiskShareable,
        format!(
            "the source's disk {name} is set up to be written to by other VMs as well (`share-rw=on`): what they write \
             would not be copied, and from the move on the guest would have another disk than they"
        ),
        format!(
            "if both hosts have it on one storage, leave it where it is (`--except-disk {name}`); accept it only if no \
             other VM uses it"
        ),
    )
}

fn temporary(disk: &Disk) -> Option<Problem> {
    let image = written(disk).find(|image| image.temporary)?;
    Some(Problem::warning(
        ProblemKind::DiskTemporary,
        format!(
            "what the guest has written to disk {} lies in a file at the source that is gone when QEMU ends ({}); \
             at the destination it is kept",
            disk.name, image.filename
        ),
        "with `-snapshot`, do not move the guest if its writes are to be thrown away",
    ))
}

fn snapshots_dropped(disk: &Disk) -> Option<Problem> {
    let snapshots = list(disk.layers.iter().flat_map(|layer| &layer.snapshots).map(String::as_str));
    if snapshots.is_empty() {
        return None;
    }
    Some(Problem::warning(
        ProblemKind::SnapshotsDropped,
        format!(
            "snapshots inside the image of the source's disk {} are not carried to the destination: {snapshots}",
            disk.name
        ),
        "keep the source's image for as long as they are needed",
    ))
}

fn backing_merged(disk: &Disk) -> Option<Problem> {
    let backing = disk.images.iter().filter(|image| image.backing && !image.temporary).count();
    if backing == 0 {
        return None;
    }
    let text = format!(
        "the source's disk {} stands on backing files ({backing}): their contents become part of the destination's \
         own image",
        disk.name
    );
    Some(Problem::note(
        ProblemKind::BackingMerged,
        text,
        "nothing has to be done; `--incremental` leaves them",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_of_the_host_are_told_by_what_becomes_of_them() {
        let told = |contents| {
            let device = Outside { name: "stick".into(), device: "usb-host".into(), contents };
            let problem = not_moved(&device);
            assert!(problem.is_refusal() && problem.text.contains("stick (usb-host)"), "{problem}");
            problem
        };
        let host = told(Contents::HostUsb);
        assert!(
            host.kind.may_be_accepted() && host.text.contains("as if it were at the destination"),
            "{host}"
        );
        let redirected = told(Contents::RedirectedUsb);
        assert!(redirected.kind.may_be_accepted() && redirected.text.contains("connection"), "{redirected}");
        for moved in [&host, &redirected] {
            assert!(!moved.text.contains("cannot be moved"), "QEMU does move it: {moved}");
        }
        assert!(!told(Contents::HostDevice).kind.may_be_accepted());
        assert!(told(Contents::Folder).text.contains("cannot be moved: it shows"));
    }
}
