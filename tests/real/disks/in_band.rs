//! `--in-band`: disks inside QEMU's own stream, as QEMU 7.2 has it and 10 has not.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::machine::{Machine, Place, blockdev, device, raw};
use super::{Stage, moves, tells};
use crate::faults::Migration;
use crate::faults::proxy::Proxy;
use crate::support::agent::PORT;
use crate::support::proof;
use crate::support::{Capture, DiskFormat, Lab, Pair, Traffic, Version, Vm, VmSpec, Way, with_lab};

const VM: &str = "web1";
/// The guest's writes are live and yet leave the other side air.
const RATE: u64 = 400;

fn spec() -> VmSpec {
    VmSpec { drives: true, rate: RATE, blocks: 512, ..VmSpec::new(VM, Version::V72) }
}

/// So that disks and RAM are under way for long enough to be looked at.
const SLOW: [&str; 3] = ["--in-band", "--limit", "256KiB/s"];

/// Whether some of the disks has crossed. QEMU reads far ahead of what it sends, so that the first disk may have been
/// gone over before the first byte is counted: those bytes are the second's then.
fn crosses(p: &Value) -> bool {
    let disks = p["disks"].as_array().into_iter().flatten();
    disks.filter_map(|disk| disk["stream_bytes"].as_u64()).sum::<u64>() > 0
}

/// When some of its disks has crossed it is cancelled, then the destination's QEMU is killed; then it moves while
/// the guest writes, and both agents are replaced on the way.
#[test]
#[ignore = "make disks"]
fn a_guest_that_writes_moves_with_its_disks_in_band() -> Result<()> {
    with_lab("a_guest_that_writes_moves_with_its_disks_in_band", |lab| {
        let on_bravo = VmSpec { disks: vec![DiskFormat::Qcow2, DiskFormat::Raw], ..spec() };
        let (mut pair, guest) = Pair::with_guest(lab, &spec(), &on_bravo)?;
        guest.alpha.wait_more(200)?;
        let capture = Capture::start(&pair.net, "failed")?;
        let slow = Migration::begin(&pair.alpha, VM, "bravo", &SLOW)?;
        slow.reach(&pair.alpha.socket(), "precopy", crosses)?;
        slow.cancel(&pair.alpha)?;
        let last = slow.ended(&pair.alpha)?;
        ensure!(last["outcome"]["cancelled"] == true, "{last}");
        runs_on(&guest.alpha, &last)?;
        guest.bravo.wait_ended()?;

        let broken = Migration::begin(&pair.alpha, VM, "bravo", &SLOW)?;
        broken.reach(&pair.alpha.socket(), "precopy", crosses)?;
        guest.bravo.kill()?;
        runs_on(&guest.alpha, &broken.ended(&pair.alpha)?)?;

        let traffic = capture.finish(&[spec().marker.as_bytes()])?;
        ensure!(traffic.connections.len() == 1, "{traffic:?}");
        only_our_port(&traffic)?;

        // Each new process dials anew.
        let capture = Capture::start(&pair.net, "moved")?;
        let moved = Migration::begin(&pair.alpha, VM, "bravo", &SLOW)?;
        moved.reach(&pair.alpha.socket(), "precopy", crosses)?;
        pair.alpha.take_over()?;
        pair.bravo.take_over()?;
        let lifted = pair.alpha.vmferry(&["limit", VM, "--rate", "none"])?;
        ensure!(lifted.code == 0, "{lifted:?}");
        let last = moved.ended(&pair.alpha)?;
        ensure!(last["outcome"]["result"] == "moved", "{last}");
        ensure!(last["notes"].to_string().contains("inside QEMU's own stream (blk)"), "{last}");
        pair.proves_move(&guest, Way::ToBravo)?;
        ensure!(guest.bravo.qmp()?.status()? == "running");
        let traffic = capture.finish(&[spec().marker.as_bytes()])?;
        only_our_port(&traffic)?;
        Ok(())
    })
}

/// To one port, and nothing of the guest's in clear.
fn only_our_port(traffic: &Traffic) -> Result<()> {
    let is_ours = traffic.destination_ports().iter().eq([&PORT]) && traffic.other_packets.is_empty();
    ensure!(is_ours && traffic.seen == [0], "{traffic:?}");
    Ok(())
}

fn runs_on(source: &Vm, last: &Value) -> Result<()> {
    ensure!(last["outcome"]["result"] == "failed" && last["outcome"]["leftovers"] == json!([]), "{last}");
    ensure!(source.qmp()?.status()? == "running", "the guest was to run on");
    proof::qemu_is_clean(&mut source.qmp()?)?;
    source.wait_more(200)?;
    Ok(())
}

/// A drive of that name with the image of that name.
fn drive(place: &Place, name: &str, format: &str, image: &str) -> Vec<String> {
    let file = place.file(image);
    let words = format!("if=none,id={name},format={format},cache=none,file={}", file.display());
    let device = device(&format!("virtio-blk-pci,id=disk0,addr=5,drive={name}"));
    [["-drive".to_owned(), words], device].concat()
}

/// What one side is made of, and its QEMU.
type Side = (Version, fn(&Place) -> Result<Vec<String>>);
/// A name, both sides, what else is asked for, and words of the refusal.
type Case = (&'static str, Side, Side, &'static [&'static str], &'static [&'static str]);

fn plain(place: &Place) -> Result<Vec<String>> {
    place.image("raw", "", "0.raw")?;
    Ok(drive(place, "d0", "raw", "0.raw"))
}

fn other_name(place: &Place) -> Result<Vec<String>> {
    place.image("raw", "", "0.raw")?;
    Ok(drive(place, "d1", "raw", "0.raw"))
}

fn odd_size(place: &Place) -> Result<Vec<String>> {
    place.create("raw", "", "0.raw", (4 << 20) + 512)?;
    Ok(drive(place, "d0", "raw", "0.raw"))
}

fn node(place: &Place) -> Result<Vec<String>> {
    let file = place.image("raw", "", "0.raw")?;
    Ok([blockdev(&raw("vda", &file)), device("virtio-blk-pci,id=disk0,addr=5,drive=vda")].concat())
}

fn with_spare(place: &Place) -> Result<Vec<String>> {
    let spare = place.image("raw", "", "spare.raw")?;
    Ok([blockdev(&raw("spare", &spare)).to_vec(), plain(place)?].concat())
}

#[test]
#[ignore = "make disks"]
fn what_cannot_cross_in_band_is_refused_by_name() -> Result<()> {
    use Version::{V10, V72};
    let cases: [Case; 8] = [
        ("old", (V10, plain), (V72, plain), &[], &["the source's QEMU (10.", "9.1 has removed it"]),
        ("new", (V72, plain), (V10, plain), &[], &["the destination's QEMU (10.", "9.1 has removed it"]),
        ("node", (V72, node), (V72, plain), &[], &["disk disk0", "`-blockdev`"]),
        ("there", (V72, plain), (V72, node), &[], &["disk disk0", "drive d0", "no drive, but a `-blockdev`"]),
        ("name", (V72, plain), (V72, other_name), &[], &["disk disk0", "drive d0", "drive d1"]),
        ("size", (V72, odd_size), (V72, odd_size), &[], &["disk disk0", "4194816 bytes", "1 MiB"]),
        ("spare", (V72, with_spare), (V72, plain), &[], &["spare", "no drive's"]),
        ("order", (V72, plain), (V72, plain), &["--retry", "1"], &["--retry"]),
    ];
    let names: Vec<&str> = cases.iter().map(|(name, ..)| *name).collect();
    with_lab("what_cannot_cross_in_band_is_refused_by_name", |lab| {
        let stage = Stage::set_up(lab, &names)?;
        cases.iter().try_for_each(|case| is_refused(&stage, lab, case))
    })
}

fn is_refused(stage: &Stage, lab: &Lab, (name, source, target, options, words): &Case) -> Result<()> {
    let [mut here, mut there] = stage.places(lab, name, source.0)?;
    (here.version, there.version) = (source.0, target.0);
    let at_source = here.start(&(source.1)(&here)?, false)?;
    let at_target = there.start(&(target.1)(&there)?, true)?;
    let before = [at_source.snapshot()?, at_target.snapshot()?];
    let is_as_before = || -> Result<()> {
        ensure!([at_source.snapshot()?, at_target.snapshot()?] == before, "{name}: something was changed");
        Ok(())
    };
    if options.is_empty() {
        let (code, found) = stage.check(name, &["--in-band"])?;
        ensure!(code == 1, "{name}: check gave {code}: {found:?}");
        tells(&found, "not-in-band", "problem", words).context(*name)?;
        is_as_before()?;
    }
    let how = if options.is_empty() { "--in-band" } else { "--in-band=inc" };
    let (code, last) = stage.migrate(name, &[&[how], *options].concat())?;
    ensure!(code == 1 && last["outcome"]["leftovers"] == json!([]), "{name}: {last}");
    let told = last["outcome"]["problems"].as_array().cloned().unwrap_or_default();
    tells(&told, "not-in-band", "problem", words).context(*name)?;
    is_as_before()
}

/// QEMU 11 on either side has it no more; asked for it is refused, and where there is no NBD for both reasons.
pub(crate) fn is_refused_on_qemu_11(name: &str) -> Result<()> {
    use Version::{V11, V72};
    let cases: [Case; 2] = [
        ("old", (V11, plain), (V72, plain), &[], &["the source's QEMU (11.", "9.1 has removed it"]),
        ("new", (V72, plain), (V11, plain), &[], &["the destination's QEMU (11.", "9.1 has removed it"]),
    ];
    with_lab(name, |lab| {
        let stage = Stage::set_up(lab, &["old", "new", "none"])?;
        cases.iter().try_for_each(|case| is_refused(&stage, lab, case))?;
        let none = Lacking::begin(&stage, lab, "none", V11, plain, "destination", &OF_SERVER)?;
        let not_in_band: (&str, &[&str]) = ("not-in-band", &["QEMU (11.", "9.1 has removed it"]);
        none.is_refused(&stage, "none", &[], &[NO_SERVER, not_in_band])
    })
}

/// Above copies of one base: only what lies above it crosses.
#[test]
#[ignore = "make disks"]
fn what_lies_above_a_base_crosses_in_band() -> Result<()> {
    with_lab("what_lies_above_a_base_crosses_in_band", |lab| {
        let stage = Stage::set_up(lab, &["above"])?;
        let [source, target] = stage.places(lab, "above", Version::V72)?;
        let mib = 32;
        for place in [&source, &target] {
            let base = place.create("qcow2", "", "base.qcow2", mib << 20)?;
            place.io(
                &format!("driver=qcow2,file.filename={}", base.display()),
                &format!("write -P 5 0 {mib}M"),
            )?;
            let options = format!("backing_file={},backing_fmt=qcow2", base.display());
            place.create("qcow2", &options, "top.qcow2", mib << 20)?;
        }
        let top = |place: &Place| format!("driver=qcow2,file.filename={}", place.file("top.qcow2").display());
        source.io(&top(&source), "write -P 7 1M 64k")?;
        let at_source = source.start(&drive(&source, "d0", "qcow2", "top.qcow2"), false)?;
        let at_target = target.start(&drive(&target, "d0", "qcow2", "top.qcow2"), true)?;
        let (code, found) = stage.check("above", &["--in-band=inc"])?;
        ensure!(code == 1, "{found:?}");
        tells(&found, "base-not-compared", "problem", &["disk disk0"])?;
        let merges = |found: &[Value]| found.iter().any(|one| one["kind"] == "backing-merged");
        ensure!(!merges(&found) && merges(&stage.check("above", &["--in-band"])?.1), "{found:?}");
        let accepted = ["--in-band=inc", "--accept", "base-not-compared"];
        let (code, found) = stage.check("above", &accepted)?;
        ensure!(code == 0, "{found:?}");
        let last = moves(&stage, "above", at_source, at_target, &accepted)?;
        let crossed = last["ram"]["stream_bytes"].as_u64().unwrap_or_default()
            + last["disks"][0]["stream_bytes"].as_u64().unwrap_or_default();
        ensure!(crossed < mib << 19, "{last}");
        for range in ["-P 5 0 1M", "-P 7 1M 64k", "-P 5 1088k 2M", "-P 5 4M 28M"] {
            target.io(&top(&target), &format!("read {range}"))?;
        }
        Ok(())
    })
}

/// What a QEMU without an NBD server does not have.
const OF_SERVER: [&str; 4] =
    ["nbd-server-start", "nbd-server-stop", "block-export-add", "query-block-exports"];

/// How the lack of it is told.
const NO_SERVER: (&str, &[&str]) = ("no-nbd", &["destination's", "`nbd-server-start`", "`block-export-add`"]);

/// A pair of QEMUs with a disk of which some was written to, and a proxy that hides words of one of them.
struct Lacking {
    at_source: Machine,
    at_target: Machine,
    target: Place,
    proxy: Proxy,
}

impl Lacking {
    fn begin(
        stage: &Stage,
        lab: &Lab,
        name: &str,
        version: Version,
        disk: fn(&Place) -> Result<Vec<String>>,
        side: &str,
        words: &[&'static str],
    ) -> Result<Self> {
        let [source, target] = stage.places(lab, name, version)?;
        let at_source = disk(&source)?;
        source.io(&image(&source), "write -P 9 1M 64k")?;
        let at_source = source.start(&at_source, false)?;
        let at_target = target.start(&disk(&target)?, true)?;
        let hidden = if side == "source" { &source } else { &target };
        let proxy = Proxy::hiding(&hidden.file("agent.qmp"), words)?;
        Ok(Self { at_source, at_target, target, proxy })
    }

    /// Refused by both for these reasons, and nothing was changed.
    fn is_refused(
        &self,
        stage: &Stage,
        name: &str,
        options: &[&str],
        reasons: &[(&str, &[&str])],
    ) -> Result<()> {
        let before = [self.at_source.snapshot()?, self.at_target.snapshot()?];
        let (code, found) = stage.check(name, options)?;
        ensure!(code == 1, "{name} {options:?}: check gave {code}: {found:?}");
        let (code, last) = stage.migrate(name, options)?;
        ensure!(code == 1 && last["outcome"]["leftovers"] == json!([]), "{name} {options:?}: {last}");
        let told = last["outcome"]["problems"].as_array().cloned().unwrap_or_default();
        for (kind, words) in reasons {
            tells(&found, kind, "problem", words).with_context(|| format!("check {name} {options:?}"))?;
            tells(&told, kind, "problem", words).with_context(|| format!("migrate {name} {options:?}"))?;
        }
        ensure!(
            [self.at_source.snapshot()?, self.at_target.snapshot()?] == before,
            "{name}: something was changed"
        );
        Ok(())
    }

    /// Said by `check` and the dry run, and moved so.
    fn moves_in_band(self, stage: &Stage, name: &str, words: &[&str], more: &[&str]) -> Result<()> {
        let words = [words, &["inside QEMU's own stream"]].concat();
        let (code, found) = stage.check(name, &[])?;
        ensure!(code == 0, "{found:?}");
        tells(&found, "no-nbd", "warning", &words)?;
        let outcome = stage.alpha.vmferry(&["migrate", name, "--to", "bravo", "--dry-run"])?;
        let says = |text: &str| words.iter().all(|word| text.contains(word));
        ensure!(outcome.code == 0 && says(&outcome.stdout), "{outcome:?}");
        let last = moves(stage, name, self.at_source, self.at_target, more)?;
        ensure!(says(&last["notes"].to_string()), "{last}");
        drop(self.proxy);
        self.target.io(&image(&self.target), "read -P 9 1M 64k")
    }
}

fn image(place: &Place) -> String {
    format!("driver=raw,file.filename={}", place.file("0.raw").display())
}

#[test]
#[ignore = "make disks"]
fn disks_go_in_band_where_there_is_no_usable_nbd() -> Result<()> {
    use Version::{V10, V72};
    with_lab("disks_go_in_band_where_there_is_no_usable_nbd", |lab| {
        let stage = Stage::set_up(lab, &["there", "here", "node", "new"])?;
        let there = Lacking::begin(&stage, lab, "there", V72, plain, "destination", &OF_SERVER)?;
        there.is_refused(&stage, "there", &["--never-in-band"], &[NO_SERVER])?;
        there.is_refused(&stage, "there", &["--strict"], &[NO_SERVER])?;
        there.is_refused(&stage, "there", &["--verify"], &[NO_SERVER, ("not-in-band", &["--verify"])])?;
        there.moves_in_band(&stage, "there", NO_SERVER.1, &[])?;

        let here = Lacking::begin(&stage, lab, "here", V72, plain, "source", &["blockdev-mirror", "nbd"])?;
        let words = ["source's", "`blockdev-mirror`", "`nbd`"];
        // Behind a proxy nobody sees a QEMU end.
        here.moves_in_band(&stage, "here", &words, &["--keep-source"])?;

        let node = Lacking::begin(&stage, lab, "node", V72, node, "destination", &OF_SERVER)?;
        node.is_refused(&stage, "node", &[], &[NO_SERVER, ("not-in-band", &["disk disk0", "`-blockdev`"])])?;
        let new = Lacking::begin(&stage, lab, "new", V10, plain, "destination", &OF_SERVER)?;
        new.is_refused(
            &stage,
            "new",
            &[],
            &[NO_SERVER, ("not-in-band", &["QEMU (10.", "9.1 has removed it"])],
        )
    })
}
