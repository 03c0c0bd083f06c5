//! What the destination finds when it compares the offered disks with those of its QEMU.

use super::images::{list, written};
use super::{
    DISKS_MAX, bitmaps, cache, encryption, flash, incremental, left_out, pair, room, sharing, source,
};
use crate::migrate::model::problem::{Problem, ProblemKind, Severity};
use crate::migrate::protocol::message::{DiskSpec, Offer};
use crate::qemu::{Disk, Qmp, QmpError, QueryMigrateCapabilities, nbd_server_runs};

/// Everything that speaks against copying these disks to that QEMU.
pub(crate) async fn destination_findings(
    qmp: &Qmp,
    offer: &Offer,
    present: &[Disk],
) -> Result<Vec<Problem>, QmpError> {
    let mut problems = disk_problems(&offer.disks, present);
    problems.extend(flash::findings(&offer.flash, present));
    if offer.compared().next().is_some() {
        problems.retain(|p| p.kind != ProblemKind::NotCopied || p.severity != Severity::Note);
        problems.extend(read_only(offer, present));
    }
    if offer.disks.iter().any(|disk| disk.bitmaps.is_some()) {
        let known = qmp.execute(QueryMigrateCapabilities).await?;
        let knows = known.iter().any(|known| known.capability == bitmaps::CAPABILITY);
        problems.extend(bitmaps::destination_findings(&offer.disks, present, knows));
    }
    problems.extend(source::exported(qmp, present, "destination").await?);
    let told = problems.iter().any(|problem| problem.kind == ProblemKind::DiskExported);
    if !told && offer.in_band.is_none() && nbd_server_runs(qmp).await? {
        let text = format!("the destination's QEMU of VM {} has an NBD server already", offer.vm);
        let remedy = "end it there with `nbd-server-stop`, if nobody needs it: a QEMU has one only";
        problems.push(Problem::new(ProblemKind::DiskExported, text, remedy));
    }
    Ok(problems)
}

/// The same, by what is known of both sides. Pure.
pub(crate) fn disk_problems(offered: &[DiskSpec], present: &[Disk]) -> Vec<Problem> {
    if offered.len() > DISKS_MAX {
        let text = format!("{} disks are more than the {DISKS_MAX} that one migration copies", offered.len());
        return vec![Problem::new(ProblemKind::TooManyDisks, text, "move some of them off the VM first")];
    }
    let paired = pair(offered, present);
    let mut problems = sharing::between(offered, present, &paired.pairs);
    let is_all_paired = paired.problems.is_empty();
    problems.extend(paired.problems);
    problems.extend(sharing::within(present, "destination"));
    let pairs = paired.pairs;
    if is_all_paired {
        problems.extend(not_offered(&pairs, present));
        problems.extend(media(&pairs, present));
    }
    problems.extend(pairs.iter().flat_map(|(want, have)| mismatch(want, have)));
    problems.extend(room::problems(&pairs));
    problems.extend(sharing::unknown(&pairs));
    problems.extend(not_copied(&pairs));
    problems.extend(left_out::findings(&pairs));
    problems.extend(incremental::destination_findings(&pairs));
    problems
}

/// Media that the guest would find in drives that are empty at the source.
fn media(pairs: &[(&DiskSpec, &Disk)], present: &[Disk]) -> Option<Problem> {
    let is_paired = |disk: &Disk| pairs.iter().any(|(_, have)| std::ptr::eq(*have, disk));
    let added =
        present.iter().filter(|disk| disk.removable && disk.read_only && !disk.firmware && !is_paired(disk));
    let names = list(added.map(|disk| disk.name.as_str()));
    if names.is_empty() {
        return None;
    }
    let text = format!("drives that are empty at the source have a medium at the destination: {names}");
    let remedy = "take it out there (`eject`), if the guest is not to find it: it may even boot from it";
    Some(Problem::warning(ProblemKind::NotCopied, text, remedy))
}

/// The guest would find what its image holds by chance.
fn not_offered<'a>(
    pairs: &'a [(&DiskSpec, &Disk)],
    present: &'a [Disk],
) -> impl Iterator<Item = Problem> + 'a {
    let is_paired = |disk: &Disk| pairs.iter().any(|(_, have)| std::ptr::eq(*have, disk));
    let others = present.iter().filter(move |disk| !disk.firmware && !disk.read_only && !is_paired(disk));
    others.map(|disk| {
        Problem::new(
            ProblemKind::DiskUnpaired,
            format!(
                "disk {} of the destination's QEMU is none of the source's: nothing is copied to it, and the guest \
                 would find what its image holds",
                disk.name
            ),
            "give both QEMUs the same disks, or make this one read-only",
        )
    })
}

fn mismatch(want: &DiskSpec, have: &Disk) -> Vec<Problem> {
    let mut problems: Vec<Problem> = size(want, have).into_iter().collect();
    if want.read_only {
        if !have.read_only {
            problems.push(Problem::new(
                ProblemKind::DiskReadOnly,
                format!(
                    "disk {} is read-only at the source, so it is not copied, and not so at the destination",
                    want.name
                ),
                "make its block device read-only there as well",
            ));
        }
        return problems;
    }
    if have.read_only {
        let remedy = match have.is_cd_rom() {
            // To an older agent there it is a disk.
            true => "it is a CD-ROM: open its medium read-only at the source",
            false => "remove read-only from its block device there",
        };
        let text = format!("disk {} is read-only at the destination", want.name);
        problems.push(Problem::new(ProblemKind::DiskReadOnly, text, remedy));
    }
    if want.is_copied() {
        problems.extend(encryption::findings(want, have));
    }
    problems.extend(cache::findings(want, have));
    let used = written(have).find_map(|image| Some((image, image.on_host.as_ref()?.used.as_ref()?)));
    if let Some((image, how)) = used.filter(|_| want.is_copied()) {
        let name = &want.name;
        problems.push(Problem::new(
            ProblemKind::DiskInUse,
            format!(
                "disk {name} would be written over something of the destination's host: it lies on {}, and {how}",
                image.filename
            ),
            "give the destination's QEMU another image or device, if this one was not meant; else unmount it there",
        ));
    }
    if let Some(image) = written(have).find(|image| image.temporary) {
        problems.push(Problem::new(
            ProblemKind::DiskTemporary,
            format!(
                "what is written to disk {} at the destination goes to a temporary file ({}) and is gone when its \
                 QEMU ends",
                want.name, image.filename
            ),
            "start the destination's QEMU without `-snapshot` and `snapshot=on`, on an image that is there",
        ));
    }
    problems
}

fn size(want: &DiskSpec, have: &Disk) -> Option<Problem> {
    let (name, wanted, found) = (&want.name, want.virtual_size, have.virtual_size);
    if found == wanted {
        return None;
    }
    let kind = if found < wanted { ProblemKind::DiskTooSmall } else { ProblemKind::DiskTooLarge };
    if want.read_only {
        let text = format!(
            "disk {name} is read-only and has {wanted} bytes at the source, {found} at the destination"
        );
        return Some(Problem::warning(kind, text, "give the destination's QEMU the same medium"));
    }
    Some(match kind {
        ProblemKind::DiskTooSmall => Problem::new(
            kind,
            format!("disk {name} has {found} bytes at the destination and needs {wanted}"),
            format!("`qemu-img resize` it there to {wanted} bytes, or make the device under it as large"),
        ),
        _ => Problem::new(
            kind,
            format!("disk {name} has {found} bytes at the destination, the source's has {wanted}"),
            format!(
                "on a larger device give its raw node `size={wanted}` there, else create the image anew with {wanted} \
                 bytes: the guest's disk must not change its size while it runs"
            ),
        ),
    })
}

/// Of disks that are compared instead of copied.
fn read_only(offer: &Offer, present: &[Disk]) -> Vec<Problem> {
    let pairs = pair(&offer.disks, present);
    let differs = offer.compared().filter_map(|want| {
        let have = pairs.of(&want.name).filter(|have| have.virtual_size != want.virtual_size)?;
        let text = format!(
            "the read-only disk {} has {} bytes at the source and {} at the destination",
            want.name, want.virtual_size, have.virtual_size
        );
        let remedy =
            "give the destination a copy of the source's, or move the VM without `--compare-read-only`";
        Some(Problem::new(ProblemKind::ReadOnlyDiffers, text, remedy))
    });
    differs.collect()
}

fn not_copied(pairs: &[(&DiskSpec, &Disk)]) -> Option<Problem> {
    let names: Vec<&str> =
        pairs.iter().filter(|(want, _)| want.read_only).map(|(want, _)| want.name.as_str()).collect();
    if names.is_empty() {
        return None;
    }
    let text = format!(
        "read-only at the source, therefore neither copied nor compared with what the destination has: {}",
        list(names)
    );
    Some(Problem::note(
        ProblemKind::NotCopied,
        text,
        "make sure that the destination has the same contents, or have them compared (`--compare-read-only`)",
    ))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::migrate::checks::disks::sample::{have, image, want};
    use crate::qemu::{Encryption, HostEncryption, Image, OnHost};

    fn kinds(offered: &DiskSpec, present: &[Disk]) -> Vec<ProblemKind> {
        let found = disk_problems(std::slice::from_ref(offered), present);
        found.into_iter().filter(|p| p.kind != ProblemKind::NotSeen).map(|p| p.kind).collect()
    }

    #[test]
    fn encryption_is_asked_for_what_is_copied_alone() {
        let mut offer = want("disk0", 1024, "raw");
        offer.place.as_mut().unwrap().host_encrypts = true;
        let on_host = Some(OnHost { used: None, encryption: HostEncryption::No });
        let disk = Disk { images: vec![Image { on_host, ..image(&[]) }], ..have("disk0", 1024, "raw") };
        assert_eq!(kinds(&offer, std::slice::from_ref(&disk)), [ProblemKind::DiskFormat]);
        let left_out = DiskSpec { left_out: true, ..offer };
        assert!(!kinds(&left_out, &[disk]).contains(&ProblemKind::DiskFormat));
    }

    #[test]
    fn each_mismatch_is_found_and_a_match_is_not() {
        let raw = want("disk0", 1024, "raw");
        assert_eq!(kinds(&raw, &[have("disk0", 1024, "qcow2")]), []);
        assert_eq!(kinds(&raw, &[have("disk1", 1024, "raw")]), [ProblemKind::DiskMissing]);
        assert_eq!(kinds(&raw, &[have("disk0", 1023, "raw")]), [ProblemKind::DiskTooSmall]);
        assert_eq!(kinds(&raw, &[have("disk0", 1025, "raw")]), [ProblemKind::DiskTooLarge]);
        let locked = Disk { read_only: true, ..have("disk0", 1024, "raw") };
        assert_eq!(kinds(&raw, &[locked]), [ProblemKind::DiskReadOnly]);
        let hasty = Disk { no_flush: true, ..have("disk0", 1024, "raw") };
        assert_eq!(kinds(&raw, &[hasty]), [ProblemKind::DiskCache]);
        let temporary = Image { temporary: true, ..image(&[]) };
        let on = |image| Disk { images: vec![image], ..have("disk0", 1024, "raw") };
        assert_eq!(kinds(&raw, &[on(temporary)]), [ProblemKind::DiskTemporary]);
        let used = Some("loop3 is mounted there at /srv".to_owned());
        let mounted = on(Image { on_host: Some(OnHost { used, ..OnHost::default() }), ..image(&[]) });
        assert_eq!(kinds(&raw, std::slice::from_ref(&mounted)), [ProblemKind::DiskInUse]);
        let left_out = DiskSpec { left_out: true, ..raw.clone() };
        assert!(!kinds(&left_out, &[mounted]).contains(&ProblemKind::DiskInUse));
    }

    #[test]
    fn weaker_encryption_is_found_by_what_protects_and_not_by_the_top_driver() {
        let offer = |encryption| {
            let mut offer = want("disk0", 1, "throttle");
            offer.place.as_mut().unwrap().encryption = encryption;
            offer
        };
        let disk = |protection| Disk { protection, ..have("disk0", 1, "throttle") };
        for (source, destination, found) in [
            (Encryption::Luks, Encryption::None, true),
            (Encryption::Luks, Encryption::Aes, true),
            (Encryption::Aes, Encryption::None, true),
            (Encryption::Luks, Encryption::Luks, false),
            (Encryption::Aes, Encryption::Luks, false),
            (Encryption::None, Encryption::None, false),
        ] {
            let expected: &[ProblemKind] = if found { &[ProblemKind::DiskFormat] } else { &[] };
            assert_eq!(kinds(&offer(source), &[disk(destination)]), expected, "{source:?} {destination:?}");
        }
        let old = DiskSpec { place: None, ..want("disk0", 1, "luks") };
        assert_eq!(kinds(&old, &[disk(Encryption::None)]), [ProblemKind::DiskFormat]);
    }

    #[test]
    fn read_only_disks_must_be_there_and_are_said_not_to_be_compared() {
        let iso = DiskSpec { read_only: true, ..want("cd0", 10, "raw") };
        let has_iso = |size| Disk { read_only: true, ..have("cd0", size, "raw") };
        assert_eq!(kinds(&iso, &[]), [ProblemKind::DiskMissing]);
        assert_eq!(kinds(&iso, &[has_iso(10)]), [ProblemKind::NotCopied]);
        let of_older = DiskSpec { read_only: false, ..iso.clone() };
        let in_drive = Disk { device: "scsi-cd".into(), ..has_iso(10) };
        let found = disk_problems(&[of_older], &[in_drive]);
        assert!(found.iter().any(|p| p.is_refusal() && p.remedy.contains("at the source")), "{found:?}");
        let other = disk_problems(std::slice::from_ref(&iso), &[has_iso(11)]);
        assert!(other.iter().all(|p| !p.is_refusal()), "{other:?}");
        assert!(other.iter().any(|p| p.kind == ProblemKind::DiskTooLarge));
    }

    /// Whatever a source says, no guest starts on an image that the migration had nothing to do with.
    #[test]
    fn no_writable_disk_of_the_destination_is_left_as_it_is() {
        let stale = have("disk1", 1024, "raw");
        let found = |offered: &[DiskSpec], present: &[Disk]| -> Vec<ProblemKind> {
            let found = disk_problems(offered, present);
            found.into_iter().filter(Problem::is_refusal).map(|p| p.kind).collect()
        };
        let offered = want("disk0", 1024, "raw");
        assert_eq!(found(&[], std::slice::from_ref(&stale)), [ProblemKind::DiskUnpaired]);
        let both = [have("disk0", 1024, "raw"), stale.clone()];
        assert_eq!(found(std::slice::from_ref(&offered), &both), [ProblemKind::DiskUnpaired]);
        // A disk that is said to be read-only is not copied.
        let said = DiskSpec { read_only: true, ..offered };
        assert_eq!(found(&[said], &both[..1]), [ProblemKind::DiskReadOnly]);
        let flash = Disk { firmware: true, ..stale.clone() };
        assert_eq!(found(&[], &[flash, Disk { read_only: true, ..stale }]), []);
    }

    #[test]
    fn more_disks_than_can_be_copied_are_refused() {
        let many: Vec<_> = (0..=DISKS_MAX).map(|n| want(&n.to_string(), 1, "raw")).collect();
        assert_eq!(disk_problems(&many, &[])[0].kind, ProblemKind::TooManyDisks);
    }
}
