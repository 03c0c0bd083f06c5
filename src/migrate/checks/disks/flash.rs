//! The firmware's flash, where UEFI keeps its variables: its contents go with the guest's state, and the destination's
//! QEMU writes them to its own file. Where it cannot, what the guest keeps there is gone when that QEMU ends.

use super::images::written;
use crate::migrate::model::problem::{Problem, ProblemKind};
use crate::migrate::protocol::message::FlashSpec;
use crate::qemu::Disk;

/// That of a machine.
pub(crate) fn offered(disks: &[Disk]) -> Vec<FlashSpec> {
    let flash = disks.iter().filter(|disk| disk.firmware);
    flash.map(|disk| FlashSpec { place: disk.qdev.clone(), kept: is_kept(disk) }).collect()
}

/// Whether what the guest writes there outlives QEMU.
fn is_kept(disk: &Disk) -> bool {
    !disk.read_only && !written(disk).any(|image| image.temporary)
}

/// Flash that the guest can write to at the source alone.
pub(super) fn findings(offered: &[FlashSpec], present: &[Disk]) -> Vec<Problem> {
    let kept = offered.iter().filter(|flash| flash.kept);
    let here = |flash: &&FlashSpec| present.iter().find(|disk| disk.firmware && disk.qdev == flash.place);
    let lost = kept.filter_map(|flash| here(&flash).filter(|disk| !is_kept(disk)));
    lost.map(|disk| {
        let (kind, why, remedy) = match disk.read_only {
            true => (ProblemKind::DiskReadOnly, "it is read-only there", "without `readonly=on`"),
            false => (ProblemKind::DiskTemporary, "it goes to a temporary file there", "without `snapshot=on`"),
        };
        let text = format!(
            "what the guest keeps in the firmware's flash {} (UEFI variables) would not be kept at the destination: \
             {why}",
            disk.qdev.strip_prefix("/machine/").unwrap_or(&disk.qdev)
        );
        Problem::new(kind, text, format!("start the destination's QEMU {remedy} for this flash"))
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migrate::checks::disks::sample::{have, image};
    use crate::qemu::Image;

    #[test]
    fn flash_that_would_not_be_kept_is_found() {
        let flash = |read_only, temporary| Disk {
            firmware: true,
            qdev: "/machine/system.flash1".into(),
            read_only,
            images: vec![Image { temporary, ..image(&[]) }],
            ..have("pflash1", 1, "raw")
        };
        let kinds = |source: Disk, here: Disk| -> Vec<ProblemKind> {
            findings(&offered(&[source]), &[here]).into_iter().map(|p| p.kind).collect()
        };
        assert_eq!(kinds(flash(false, false), flash(false, false)), []);
        assert_eq!(kinds(flash(false, false), flash(true, false)), [ProblemKind::DiskReadOnly]);
        assert_eq!(kinds(flash(false, false), flash(false, true)), [ProblemKind::DiskTemporary]);
        assert_eq!(kinds(flash(true, false), flash(true, false)), []);
        assert_eq!(kinds(flash(false, true), flash(true, false)), [], "it is not kept at the source either");
    }
}
