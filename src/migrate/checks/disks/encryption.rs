//! What is encrypted at the source and would lie, or cross a network, in clear at the destination: by QEMU, by the hosts
//! below QEMU, on the way to a storage. What nobody can tell is said as such, and never taken for yes or no.

use super::images::{is_nothing, written};
use crate::migrate::model::problem::{Problem, ProblemKind};
use crate::migrate::protocol::message::{DiskPlace, DiskSpec};
use crate::qemu::{Disk, Encryption, HostEncryption, Image, Transit};

/// Of a disk that is copied.
pub(super) fn findings(want: &DiskSpec, have: &Disk) -> impl Iterator<Item = Problem> {
    let lies = weaker(want, have).or_else(|| in_clear(want, have));
    lies.into_iter().chain(in_transit(want, have))
}

/// Whether the destination's host encrypts all that is written to this disk.
pub(super) fn host_encryption(have: &Disk) -> HostEncryption {
    // Of what QEMU does not tell nothing is known.
    match have.images.is_empty() {
        true => HostEncryption::Unknown,
        false => HostEncryption::of_parts(images(have).map(Image::host_encryption)),
    }
}

/// Images that something of what is written ends up in.
fn images(have: &Disk) -> impl Iterator<Item = &Image> {
    written(have).filter(|image| !is_nothing(image))
}

fn weaker(want: &DiskSpec, have: &Disk) -> Option<Problem> {
    let told = want.place.as_ref().map(|place| place.encryption).unwrap_or_default();
    let wanted = if want.format == "luks" { Encryption::Luks } else { told };
    if have.protection >= wanted {
        return None;
    }
    let how = match have.protection {
        Encryption::None => format!("in clear as {}", have.format),
        weaker => format!("as {}, {}", have.format, weaker.name()),
    };
    Some(Problem::new(
        ProblemKind::DiskFormat,
        format!(
            "disk {} is {} at the source and would lie {how} at the destination",
            want.name,
            wanted.name()
        ),
        "create it with luks at the destination (format luks, or qcow2 with encrypt.format=luks)",
    ))
}

/// What the source's host encrypts below QEMU, or may encrypt, lies readable where neither QEMU nor the host does so.
fn in_clear(want: &DiskSpec, have: &Disk) -> Option<Problem> {
    let place = want.place.as_ref().filter(|_| have.protection == Encryption::None)?;
    let there = host_encryption(have);
    if there == HostEncryption::Yes || !(place.host_encrypts || place.host_encryption_unknown) {
        return None;
    }
    let name = &want.name;
    let image = images(have).find(|image| image.host_encryption() == there);
    let on = image.map_or("an image that QEMU does not tell", |image| image.filename.as_str());
    let text = match (place.host_encrypts, there) {
        (true, HostEncryption::No) => format!(
            "what the source's host encrypts below disk {name} would lie in clear at the destination, on {on}"
        ),
        (true, _) => format!(
            "what the source's host encrypts below disk {name} may lie in clear at the destination: whether the host \
             there encrypts what is below {on} is not known"
        ),
        (false, HostEncryption::No) => format!(
            "what lies below disk {name} would lie in clear at the destination, on {on}, and whether the source's host \
             encrypts it is not known"
        ),
        (false, _) => format!(
            "whether the source's host encrypts what lies below disk {name} is not known, nor whether the \
             destination's does, on {on}"
        ),
    };
    let remedy = match place.host_encrypts {
        true => {
            "put it on an encrypted device there, or create it with luks; accept it only if what is below it encrypts \
                 by itself"
        }
        false => {
            "if it is encrypted at the source, put it on an encrypted device there, or create it with luks"
        }
    };
    // What is surely secret goes only where it surely stays so, or where an operator says so. Of two hosts that both
    // cannot tell (the same network storage, ZFS) nothing speaks against either.
    Some(match (place.host_encrypts, there) {
        (true, _) => Problem::new(ProblemKind::DiskFormat, text, remedy),
        (false, HostEncryption::No) => Problem::warning(ProblemKind::DiskFormat, text, remedy),
        (false, _) => Problem::note(ProblemKind::DiskFormat, text, remedy),
    })
}

/// What the source's QEMU sends to its storage by TLS or SSH, and the destination's would send as it is.
fn in_transit(want: &DiskSpec, have: &Disk) -> Option<Problem> {
    let is_encrypted = |place: &DiskPlace| place.encrypted_in_transit && have.protection == Encryption::None;
    want.place.as_ref().filter(|place| is_encrypted(place))?;
    let of = |transit| images(have).find(|image| image.transit == transit);
    let name = &want.name;
    // It tells the credentials that it has, but not of every node whether it uses them.
    let by = "the source's QEMU has an encrypted connection, or credentials for one, to what lies below";
    let remedy = "give the block node there TLS (`tls-creds`), or an image of its own host, or create it with luks; \
                  accept it only if that network is encrypted by itself, or nobody else is on it";
    if let Some(image) = of(Transit::InClear) {
        let text = format!(
            "{by} disk {name}; the destination's would send it over the network in clear, to {}",
            image.filename
        );
        return Some(Problem::new(ProblemKind::DiskFormat, text, remedy));
    }
    let image = of(Transit::Unknown).or_else(|| of(Transit::Untold))?;
    let text = format!(
        "{by} disk {name}; whether the destination's is encrypted is not known: it goes to {}",
        image.filename
    );
    Some(Problem::warning(ProblemKind::DiskFormat, text, remedy))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::migrate::checks::disks::sample::{have, image, want};
    use crate::migrate::model::problem::Severity;
    use crate::qemu::OnHost;

    const NONE: Encryption = Encryption::None;

    fn on(encryption: HostEncryption) -> Image {
        Image { on_host: Some(OnHost { used: None, encryption }), ..image(&[]) }
    }

    fn there(images: Vec<Image>, protection: Encryption) -> Disk {
        Disk { images, protection, ..have("disk0", 1024, "raw") }
    }

    fn offer(change: impl FnOnce(&mut DiskPlace)) -> DiskSpec {
        let mut offer = want("disk0", 1024, "raw");
        change(offer.place.as_mut().unwrap());
        offer
    }

    fn found(offer: &DiskSpec, disk: &Disk) -> Vec<(Severity, String)> {
        findings(offer, disk)
            .map(|p| {
                assert_eq!(p.kind, ProblemKind::DiskFormat, "{p}");
                (p.severity, p.text)
            })
            .collect()
    }

    fn weights(offer: &DiskSpec, disk: &Disk) -> Vec<Severity> {
        found(offer, disk).into_iter().map(|(severity, _)| severity).collect()
    }

    #[test]
    fn what_the_host_encrypts_below_qemu_does_not_land_in_clear() {
        use HostEncryption::{No, Unknown, Yes};
        let encrypted = offer(|place| place.host_encrypts = true);
        let unknown = offer(|place| place.host_encryption_unknown = true);
        let clear = offer(|_| {});
        for (source, destination, expected) in [
            (&clear, No, None),
            (&clear, Unknown, None),
            (&encrypted, Yes, None),
            (
                &encrypted,
                No,
                Some((Severity::Problem, "would lie in clear at the destination, on /srv/disk.raw")),
            ),
            (&encrypted, Unknown, Some((Severity::Problem, "may lie in clear at the destination"))),
            (&unknown, Yes, None),
            (&unknown, No, Some((Severity::Warning, "whether the source's host encrypts it is not known"))),
            (&unknown, Unknown, Some((Severity::Note, "is not known, nor whether the destination's does"))),
        ] {
            let said = found(source, &there(vec![on(destination)], NONE));
            let place = source.place.as_ref().unwrap();
            assert_eq!(said.len(), usize::from(expected.is_some()), "{place:?} {destination:?}: {said:?}");
            for ((severity, text), (weight, words)) in said.into_iter().zip(expected) {
                assert_eq!(severity, weight, "{text}");
                assert!(text.contains(words) && text.contains("disk0"), "{text}");
            }
            assert_eq!(weights(source, &there(vec![on(destination)], Encryption::Luks)), []);
        }
    }

    #[test]
    fn what_is_not_seen_at_the_destination_is_not_encrypted_for_that() {
        let encrypted = offer(|place| place.host_encrypts = true);
        let yes = || on(HostEncryption::Yes);
        assert_eq!(weights(&encrypted, &there(vec![image(&[])], NONE)), [Severity::Problem]);
        assert_eq!(weights(&encrypted, &there(vec![yes(), image(&[])], NONE)), [Severity::Problem]);
        assert_eq!(
            weights(&encrypted, &there(vec![image(&[]), on(HostEncryption::No)], NONE)),
            [Severity::Problem]
        );
        assert_eq!(weights(&encrypted, &there(Vec::new(), NONE)), [Severity::Problem]);
        // Nothing is written to what lies below its image.
        let backing = Image { backing: true, read_only: true, ..on(HostEncryption::No) };
        assert_eq!(weights(&encrypted, &there(vec![yes(), backing], NONE)), []);
        let nothing = Image { driver: "null-co".into(), ..image(&[]) };
        assert_eq!(weights(&encrypted, &there(vec![nothing], NONE)), []);
    }

    #[test]
    fn an_older_agents_offer_is_judged_by_what_it_says() {
        let old = DiskSpec { place: None, ..want("disk0", 1024, "raw") };
        assert_eq!(weights(&old, &there(vec![on(HostEncryption::No)], NONE)), []);
        let luks = DiskSpec { place: None, ..want("disk0", 1024, "luks") };
        assert_eq!(weights(&luks, &there(vec![on(HostEncryption::No)], NONE)), [Severity::Problem]);
    }

    #[test]
    fn what_crosses_a_network_encrypted_does_not_cross_another_in_clear() {
        let by_tls = offer(|place| place.encrypted_in_transit = true);
        let clear = offer(|_| {});
        let via = |transit| {
            let remote =
                Image { driver: "nbd".into(), filename: "nbd://store/web1".into(), transit, ..image(&[]) };
            there(vec![remote], NONE)
        };
        assert_eq!(weights(&by_tls, &via(Transit::InClear)), [Severity::Problem]);
        assert_eq!(weights(&by_tls, &via(Transit::Unknown)), [Severity::Warning]);
        assert_eq!(weights(&by_tls, &via(Transit::Untold)), [Severity::Warning]);
        assert_eq!(weights(&by_tls, &via(Transit::Encrypted)), []);
        assert_eq!(weights(&by_tls, &via(Transit::None)), []);
        assert_eq!(weights(&clear, &via(Transit::InClear)), []);
        let luks = Disk { protection: Encryption::Luks, ..via(Transit::InClear) };
        assert_eq!(weights(&by_tls, &luks), []);
        let said = found(&by_tls, &via(Transit::InClear)).remove(0).1;
        assert!(said.contains("in clear, to nbd://store/web1") && said.contains("disk0"), "{said}");
        // Both are said: where it lies, and how it gets there.
        let both = offer(|place| (place.encrypted_in_transit, place.host_encryption_unknown) = (true, true));
        assert_eq!(weights(&both, &via(Transit::InClear)), [Severity::Note, Severity::Problem]);
    }
}
