//! What keeps disks from crossing inside QEMU's own stream. QEMU (`migration/block.c`) takes every block back end
//! and every node of `-blockdev` that can be written to, calls each by the name of its `-drive`, sends it in
//! blocks of 1 MiB, and writes each to the destination's drive of that name, wherever it is plugged in.

use super::pair;
use crate::migrate::model::disk_choice::is_copyable;
use crate::migrate::model::in_band::InBand;
use crate::migrate::model::options::Options;
use crate::migrate::model::problem::{Problem, ProblemKind};
use crate::migrate::protocol::message::{DiskSpec, Offer};
use crate::qemu::{Abilities, Disk, Qmp, QmpError, QueryNamedBlockNodes};

/// QEMU's block. The destination's QEMU writes the last one whole, and fails at the end of a shorter disk.
const BLOCK_BYTES: u64 = 1 << 20;
/// A remedy, whoever has chosen to have the disks in band.
const OWN_STREAMS: &str =
    "have disks copied by streams of their own: without `--in-band`, by QEMUs that have NBD";
/// QEMU sends the length of a name in one byte.
const NAME_BYTES_MAX: usize = 255;

fn problem(text: String, remedy: &str) -> Problem {
    Problem::new(ProblemKind::NotInBand, text, remedy)
}

/// What else was asked for and cannot be had with it.
pub(crate) fn contradictions(how: InBand, options: &Options) -> Vec<Problem> {
    let asked = [
        ("--never-in-band", options.never_in_band, "it forbids just that"),
        ("--disk and --except-disk", !options.disks.is_all(), "QEMU sends every disk that it can write to"),
        ("--disks-at-once", options.disks_at_once.is_some(), "QEMU chooses the order"),
        ("--compare-read-only", options.compare_read_only, "the destination exports no disk"),
        ("--verify", options.verify.is_some(), "the disks are never equal before the guest is paused"),
        ("--incremental", options.incremental.is_some(), "`inc` is QEMU's way of it"),
        ("a replica", options.replicate, "it is copied by streams of its own"),
        ("--compress", options.compress, "what crosses is QEMU's own stream"),
        (
            "--retry",
            how == InBand::Inc && options.retry.tries() > 1,
            "after a failure something lies above the destination's backing files",
        ),
    ];
    let asked = asked.into_iter().filter(|(_, is_asked, _)| *is_asked);
    let told = asked.map(|(option, _, why)| {
        problem(
            format!("disks that go in band ({}) cannot have {option}: {why}", how.name()),
            "leave one of them out",
        )
    });
    told.collect()
}

/// Disks go in band without having been asked to where nothing but NBD's absence keeps them from streams of their
/// own: how it is done then, and what is said of it.
pub(crate) fn instead(found: &[Problem], options: &Options) -> Option<(Options, Problem)> {
    if options.never_in_band || options.in_band.is_some() {
        return None;
    }
    let mut refusals = found.iter().filter(|problem| problem.is_refusal());
    let first = refusals.next().filter(|first| first.kind == ProblemKind::NoNbd)?;
    if refusals.any(|other| other.kind != ProblemKind::NoNbd) {
        return None;
    }
    let how = InBand::Blk;
    let said = Problem::warning(
        ProblemKind::NoNbd,
        format!("{}; so the disks go inside QEMU's own stream, the old way ({})", first.text, how.name()),
        format!("{}; `--never-in-band` forbids the old way", first.remedy),
    );
    Some((Options { in_band: Some(how), ..options.clone() }, said))
}

/// What is found in the end, of what was found first and then for disks in band: where they do not go so either, both
/// reasons.
pub(crate) fn settled(found: Vec<Problem>, again: Vec<Problem>) -> Vec<Problem> {
    let is_of_nbd = |problem: &Problem| problem.kind == ProblemKind::NoNbd;
    if !again.iter().any(|problem| problem.is_refusal() && !is_of_nbd(problem)) {
        return again;
    }
    let why = found.into_iter().filter(|problem| is_of_nbd(problem) && problem.is_refusal());
    why.chain(again.into_iter().filter(|problem| !is_of_nbd(problem))).collect()
}

/// What the source finds in its own QEMU.
pub(crate) async fn source_findings(
    qmp: &Qmp,
    abilities: &Abilities,
    disks: &[Disk],
    how: InBand,
) -> Result<Vec<Problem>, QmpError> {
    if let Some(lacking) = lacking(abilities, "source") {
        return Ok(vec![lacking]);
    }
    let mut problems: Vec<Problem> = disks.iter().filter_map(|disk| not_taken(disk, how)).collect();
    let nodes = qmp.execute(QueryNamedBlockNodes { flat: true }).await?;
    let writable = nodes.iter().filter(|node| !node.ro).map(|node| node.node_name.as_str());
    problems.extend(stray(writable, disks));
    Ok(problems)
}

fn lacking(abilities: &Abilities, side: &str) -> Option<Problem> {
    if abilities.in_band() {
        return None;
    }
    let (major, minor, micro) = abilities.version;
    Some(problem(
        format!(
            "the {side}'s QEMU ({major}.{minor}.{micro}) cannot carry disks inside its own stream: QEMU 9.1 has \
             removed it, and some builds leave it out"
        ),
        OWN_STREAMS,
    ))
}

/// Why QEMU would not carry a disk so, or not so that it arrives.
fn not_taken(disk: &Disk, how: InBand) -> Option<Problem> {
    let name = &disk.name;
    if disk.read_only {
        // QEMU goes by the node.
        let is_sent = disk.layers.first().is_some_and(|top| !top.read_only);
        return is_sent.then(|| {
            problem(
                format!(
                    "the medium of CD-ROM {name} is not open read-only: QEMU would send it as a disk, and the destination's \
                     would end at it"
                ),
                "open it with `readonly=on`, or have disks copied by streams of their own: without `--in-band`, by QEMUs \
                 that have NBD",
            )
        });
    }
    if disk.drive.is_empty() {
        return Some(problem(
            format!("disk {name} of the source is a `-blockdev`: in its own stream QEMU has no name for it"),
            "start it with `-drive`, or have it copied by a stream of its own: without `--in-band`, by QEMUs that have NBD",
        ));
    }
    if disk.drive.len() > NAME_BYTES_MAX {
        return Some(problem(
            format!("the name of the drive of disk {name} is longer than QEMU can send"),
            "give it a shorter `id`",
        ));
    }
    if !is_copyable(disk) {
        return Some(problem(
            format!(
                "drive {} holds the machine's firmware and can be written to: QEMU would send it as a disk",
                disk.drive
            ),
            OWN_STREAMS,
        ));
    }
    if !disk.virtual_size.is_multiple_of(BLOCK_BYTES) {
        return Some(problem(
            format!(
                "disk {name} has {} bytes, no multiple of 1 MiB: the destination's QEMU would fail at its end",
                disk.virtual_size
            ),
            "enlarge it to a multiple of 1 MiB, or have it copied by a stream of its own: without `--in-band`, by QEMUs \
             that have NBD",
        ));
    }
    if how == InBand::Inc && !disk.backing && disk.format != "raw" {
        return Some(problem(
            format!(
                "disk {name} has no backing file: with `inc` QEMU leaves out what is not allocated in it, and the \
                 destination's image may hold something there"
            ),
            "use `--in-band=blk`",
        ));
    }
    None
}

/// Nodes that QEMU would send without a name: what `-blockdev` has made and no drive stands on.
fn stray<'a>(writable: impl Iterator<Item = &'a str>, disks: &[Disk]) -> Option<Problem> {
    let of_disk = |name: &str| {
        let mut layers = disks.iter().flat_map(|disk| &disk.layers);
        layers.any(|layer| !layer.backing && layer.node_name == name)
    };
    // QEMU has named the others by itself.
    let stray: Vec<&str> = writable.filter(|name| !name.starts_with('#') && !of_disk(name)).collect();
    if stray.is_empty() {
        return None;
    }
    Some(problem(
        format!(
            "the source's QEMU has block nodes that can be written to and are no drive's: {}. It would send them, \
             and the destination's would not know where to",
            stray.join(", ")
        ),
        "take them out with `blockdev-del`, or open them read-only",
    ))
}

/// What the destination finds.
pub(crate) fn destination_findings(
    how: InBand,
    abilities: &Abilities,
    offer: &Offer,
    present: &[Disk],
) -> Vec<Problem> {
    if let Some(lacking) = lacking(abilities, "destination") {
        return vec![lacking];
    }
    let pairs = pair(&offer.disks, present).pairs;
    let copied = || pairs.iter().filter(|(want, _)| want.is_copied());
    let mut problems: Vec<Problem> = copied().filter_map(|(want, have)| other_drive(want, have)).collect();
    if how == InBand::Inc {
        problems.extend(copied().filter_map(|(want, have)| base(want, have)));
    }
    problems
}

/// It would be written to another disk, or to none.
fn other_drive(want: &DiskSpec, have: &Disk) -> Option<Problem> {
    let theirs = want.place.as_ref().and_then(|place| place.drive.as_deref()).unwrap_or_default();
    if !theirs.is_empty() && theirs == have.drive {
        return None;
    }
    let here = match have.drive.as_str() {
        "" => "no drive, but a `-blockdev`".to_owned(),
        name => format!("drive {name}"),
    };
    let there = if theirs.is_empty() { "no drive".to_owned() } else { format!("drive {theirs}") };
    Some(problem(
        format!(
            "disk {} is {there} at the source and {here} at the destination: QEMU's own stream finds it by that name",
            want.name
        ),
        "start the destination's QEMU with `-drive` and the same `id`",
    ))
}

/// Of what lies above a backing file nothing shows that it can stand on the one that is there.
fn base(want: &DiskSpec, have: &Disk) -> Option<Problem> {
    let has_base = want.place.as_ref().is_some_and(|place| place.backing);
    let text = match (has_base, have.backing) {
        (false, _) => return None,
        (true, false) => {
            return Some(problem(
                format!(
                    "disk {} stands on a backing file at the source and on none at the destination",
                    want.name
                ),
                "create its image there above the same backing file, or use `--in-band=blk`",
            ));
        }
        (true, true) => format!(
            "only what lies above the backing file of disk {} crosses. That the destination's backing file has the \
             same contents, and that its image above it is empty, is not looked at",
            want.name
        ),
    };
    let remedy = "use `--in-band=blk`; accept it only if you know both: the guest finds other contents else";
    Some(Problem::new(ProblemKind::BaseNotCompared, text, remedy))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::migrate::checks::disks::sample::{have, want};
    use crate::qemu::Layer;

    fn drive(name: &str) -> Disk {
        Disk { drive: name.into(), ..have("disk0", 4 << 20, "raw") }
    }

    fn layer(name: &str, backing: bool) -> Layer {
        Layer {
            node_name: name.into(),
            driver: "file".into(),
            backing,
            is_leaf: true,
            read_only: false,
            written_by_others: false,
            encryption: crate::qemu::Encryption::None,
            filename: String::new(),
            actual_size: None,
            bitmaps: Vec::new(),
            snapshots: Vec::new(),
        }
    }

    #[test]
    fn what_qemu_does_not_carry_is_named() {
        let said = |disk: &Disk, how| not_taken(disk, how).map(|p| p.text).unwrap_or_default();
        assert_eq!(said(&drive("d0"), InBand::Blk), "");
        assert_eq!(said(&drive("d0"), InBand::Inc), "", "QEMU reads the whole of a raw image");
        assert!(said(&drive(""), InBand::Blk).contains("`-blockdev`"));
        assert!(said(&drive(&"x".repeat(256)), InBand::Blk).contains("longer"));
        assert!(said(&Disk { firmware: true, ..drive("pflash1") }, InBand::Blk).contains("firmware"));
        let odd = Disk { virtual_size: (4 << 20) + 512, ..drive("d0") };
        assert!(said(&odd, InBand::Blk).contains("no multiple"));
        let fixed = Disk { read_only: true, ..odd };
        assert_eq!(said(&fixed, InBand::Blk), "", "it is not sent");
        let cd = |read_only| Disk { layers: vec![Layer { read_only, ..layer("n", false) }], ..fixed.clone() };
        assert_eq!(said(&cd(true), InBand::Blk), "");
        assert!(said(&cd(false), InBand::Blk).contains("not open read-only"));
        let thin = Disk { format: "qcow2".into(), ..drive("d0") };
        assert_eq!(said(&thin, InBand::Blk), "");
        assert!(said(&thin, InBand::Inc).contains("no backing file"));
        assert_eq!(said(&Disk { backing: true, ..thin }, InBand::Inc), "");
    }

    #[test]
    fn nodes_that_are_no_drives_are_found() {
        let disk = Disk { layers: vec![layer("top", false), layer("base", true)], ..drive("d0") };
        let found = |nodes: &[&str]| stray(nodes.iter().copied(), std::slice::from_ref(&disk));
        assert_eq!(found(&["top", "#block123"]), None);
        assert!(found(&["top", "spare"]).unwrap().text.contains("spare"));
        assert!(found(&["base"]).is_some(), "a backing file that is open for writing");
    }

    #[test]
    fn each_disk_has_to_have_the_same_drive_on_both_sides() {
        let offered = |name: &str| {
            let mut spec = want("disk0", 4 << 20, "raw");
            spec.place.as_mut().unwrap().drive = Some(name.into()).filter(|name: &String| !name.is_empty());
            spec
        };
        assert_eq!(other_drive(&offered("d0"), &drive("d0")), None);
        for (source, destination) in [("d0", "d1"), ("d0", ""), ("", "d0"), ("", "")] {
            let found = other_drive(&offered(source), &drive(destination));
            assert_eq!(found.unwrap().kind, ProblemKind::NotInBand, "{source:?} {destination:?}");
        }
    }

    #[test]
    fn what_stands_on_a_backing_file_needs_one_and_somebodys_word() {
        let mut spec = want("disk0", 4 << 20, "qcow2");
        assert_eq!(base(&spec, &drive("d0")), None);
        spec.place.as_mut().unwrap().backing = true;
        assert_eq!(base(&spec, &drive("d0")).unwrap().kind, ProblemKind::NotInBand);
        let above = Disk { backing: true, ..drive("d0") };
        let found = base(&spec, &above).unwrap();
        assert!(found.kind.may_be_accepted() && found.is_refusal());
    }

    #[test]
    fn disks_go_in_band_by_themselves_only_for_want_of_nbd() {
        let no_nbd = Problem::new(ProblemKind::NoNbd, "no server", "a newer one");
        let other = Problem::new(ProblemKind::DiskMissing, "", "");
        let said = Problem::warning(ProblemKind::BackingMerged, "", "");
        let options = Options { keep_source: true, ..Options::default() };
        let found = [said.clone(), no_nbd.clone()];
        let (chosen, warning) = instead(&found, &options).unwrap();
        assert_eq!((chosen.in_band, chosen.keep_source), (Some(InBand::Blk), true));
        assert!(!warning.is_refusal() && warning.text.starts_with("no server; so the disks go"));
        for found in [vec![], vec![said], vec![no_nbd.clone(), other.clone()], vec![other.clone()]] {
            assert!(instead(&found, &options).is_none(), "{found:?}");
        }
        for asked in [
            Options { never_in_band: true, ..Options::default() },
            Options { in_band: Some(InBand::Inc), ..Options::default() },
        ] {
            assert!(instead(&found, &asked).is_none(), "{asked:?}");
        }
        let settled = |again: &[Problem]| settled(found.to_vec(), again.to_vec());
        assert_eq!(settled(&[warning.clone(), other.clone()]), [no_nbd, other]);
        assert_eq!(settled(std::slice::from_ref(&warning)), [warning]);
    }

    #[test]
    fn other_wishes_are_refused_by_name() {
        let options = Options { compress: true, retry: 1.try_into().unwrap(), ..Options::default() };
        let told = |how| contradictions(how, &options).into_iter().map(|p| p.text).collect::<String>();
        assert!(told(InBand::Blk).contains("--compress") && !told(InBand::Blk).contains("--retry"));
        assert!(told(InBand::Inc).contains("--retry"));
        assert_eq!(contradictions(InBand::Inc, &Options::default()), []);
    }
}
