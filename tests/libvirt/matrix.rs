//! The long matrix of `make libvirt`: what issue and documentation promise of virsh's options, each by p2p and
//! with virsh between, and repetitions of what races elsewhere. Several options share a migration where none hides
//! another. Whether an option has reached QEMU is read in libvirt's log.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::agents::{Agents, code};
use crate::bed::{Domain, Hosts, Libvirt, QEMU_USER, Told, virsh_ok};
use crate::moves::{lines_end, moves, moves_as, proves_wire, spec};
use crate::support::process::{LONG, SHORT, run};
use crate::support::{Capture, Lab, Vm, Way, with_lab};

/// One migration by each form, and how it is judged.
struct Case {
    /// virsh's words, but for `--p2p`.
    options: &'static [&'static str],
    /// What the source's QEMU is told by libvirt.
    told: &'static [&'static str],
    /// Connections for RAM and for disks.
    connections: [u64; 2],
    /// The definition goes along, and leaves where it was.
    persists: bool,
    /// Whether the images are as they must be after a move this way.
    images: fn(&Domain, Way) -> Result<()>,
}

/// Moves a domain to bravo by p2p, and back with virsh between.
fn both_forms(name: &str, case: &Case, prepare: impl FnOnce(&Lab, [&Vm; 2]) -> Result<()>) -> Result<()> {
    with_lab(name, |lab| {
        let hosts = Hosts::start(lab, QEMU_USER)?;
        let domain = Domain::boot_with(lab, &hosts, &spec(), |disks| prepare(lab, disks))?;
        let agents = Agents::start(lab, &hosts)?;
        let capture = Capture::start(&hosts.net, "wire")?;
        for (way, form) in [(Way::ToBravo, &["--p2p", "--json"][..]), (Way::ToAlpha, &["--json"])] {
            let here = if way == Way::ToBravo { &hosts.net.alpha } else { &hosts.net.bravo };
            let told = Told::from_now(here)?;
            let outcome = agents.begin_move(way, "web1", &[form, case.options].concat())?.wait(LONG)?;
            code(&outcome, 0).with_context(|| format!("{way:?}"))?;
            lines_end(&outcome.stdout, "web1", Some("moved"))?;
            domain.goes_on(way)?;
            told.has(case.told)?;
            went(&agents.migrations_from(way)?, case)?;
            ensure!(domain.is_persistent_there(way)? == (case.persists || way == Way::ToAlpha), "{way:?}");
            ensure!(!case.persists || domain.state_here(way)? == "absent", "it is still defined: {way:?}");
            (case.images)(&domain, way)?;
            agents.are_clean()?;
        }
        ensure!(proves_wire(capture, &hosts)? == 1, "more than one connection");
        domain.ends_whole(Way::ToAlpha)
    })
}

/// That the last one that began there has moved, through so many connections.
fn went(migrations: &[Value], case: &Case) -> Result<()> {
    let last = migrations.iter().rfind(|m| m["role"] == "source").context("the agent has forgotten it")?;
    let of = |channel: &str| last["channels"][channel]["connections"].as_u64();
    let [ram, disks] = case.connections;
    ensure!(last["ended"] == "moved" && of("ram") == Some(ram) && of("nbd") == Some(disks), "{last}");
    Ok(())
}

/// Only the first disk is copied: the other is the same file on both hosts, as on a file system that they share,
/// which libvirt calls unsafe where it does not know it. The definition goes along.
#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn a_named_disk_goes_slowly_compressed_and_converging() -> Result<()> {
    let case = Case {
        options: &[
            "--copy-storage-all",
            "--migrate-disks",
            "vda",
            "--unsafe",
            "--persistent",
            "--undefinesource",
            "--change-protection",
            "--bandwidth",
            "30",
            "--auto-converge",
            "--auto-converge-initial",
            "30",
            "--auto-converge-increment",
            "15",
            "--compressed",
            "--comp-methods",
            "xbzrle",
            "--comp-xbzrle-cache",
            "16777216",
        ],
        told: &[
            "\"sync\":\"full\"",
            "\"speed\":31457280",
            "\"max-bandwidth\":31457280",
            "{\"capability\":\"auto-converge\",\"state\":true}",
            "\"cpu-throttle-initial\":30",
            "\"cpu-throttle-increment\":15",
            "{\"capability\":\"xbzrle\",\"state\":true}",
            "\"xbzrle-cache-size\":16777216",
        ],
        connections: [1, 1],
        persists: true,
        images: |_, _| Ok(()),
    };
    both_forms("a_named_disk_goes_slowly_compressed_and_converging", &case, |_, [alpha, bravo]| {
        fs::remove_file(bravo.disk(1))?;
        fs::hard_link(alpha.disk(1), bravo.disk(1)).context("cannot share a disk")
    })
}

/// Where the base has what no guest writes, and how much.
const BASE_FROM: u64 = 16 << 20;
const BASE_BYTES: u64 = 32 << 20;

/// The second disk stands on a base that both hosts have.
fn on_base(lab: &Lab, vms: [&Vm; 2]) -> Result<()> {
    let mut bytes = Vec::new();
    File::open("/dev/urandom")?.take(BASE_BYTES).read_to_end(&mut bytes)?;
    for vm in vms {
        let mut base = File::create(vm.dir().join("base.raw"))?;
        base.set_len(u64::from(vm.spec.disk_mib) << 20)?;
        base.seek(SeekFrom::Start(BASE_FROM))?;
        base.write_all(&bytes)?;
        fs::remove_file(vm.disk(1))?;
        // Relative to the image: libvirt's QEMU sees both below another path.
        let words = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw"];
        run(lab.paths.qemu_img().args(words).arg(vm.disk(1)), SHORT)?;
    }
    Ok(())
}

/// At a rate at which it takes longer than its time, after which virsh suspends the guest; at the destination it
/// goes on.
#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn what_the_base_lacks_goes_with_waiting_writes_and_in_parallel() -> Result<()> {
    let case = Case {
        options: &[
            "--copy-storage-inc",
            "--copy-storage-synchronous-writes",
            "--parallel",
            "4",
            "--abort-on-error",
            "--bandwidth",
            "6",
            "--timeout",
            "2",
            "--timeout-suspend",
        ],
        told: &[
            "\"sync\":\"top\"",
            "\"copy-mode\":\"write-blocking\"",
            "{\"capability\":\"multifd\",\"state\":true}",
            "\"multifd-channels\":4",
            "\"max-bandwidth\":6291456",
            "{\"execute\":\"stop\"",
        ],
        connections: [5, 2],
        persists: false,
        images: |domain, _| {
            let bytes = fs::metadata(domain.bravo.disk(1))?.blocks() * 512;
            ensure!(bytes < BASE_BYTES, "what the base has was copied: {bytes} bytes");
            Ok(())
        },
    };
    both_forms("what_the_base_lacks_goes_with_waiting_writes_and_in_parallel", &case, on_base)
}

/// Five RAM connections, of which QEMU 7.2 takes the first for the main one.
#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn ten_times_four_parallel_connections_come_in_order() -> Result<()> {
    for _ in 0..10 {
        moves(
            "ten_times_four_parallel_connections_come_in_order",
            &["--p2p", "--copy-storage-all", "--parallel", "4"],
        )?;
    }
    Ok(())
}

/// The destination's QEMU needs userfaultfd: here by being root's, and then the agent must be, too.
#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn post_copy() -> Result<()> {
    let options = ["--p2p", "--copy-storage-all", "--postcopy", "--postcopy-after-precopy"];
    moves_as("post_copy", "root", [Libvirt::V9; 2], &options)
}

/// Only the definition moves, of a domain that does not run: by p2p, and back with virsh between.
#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn a_definition_moves_offline() -> Result<()> {
    with_lab("a_definition_moves_offline", |lab| {
        let hosts = Hosts::start(lab, QEMU_USER)?;
        let domain = Domain::boot(lab, &hosts, &spec())?;
        virsh_ok(&hosts.net.alpha, &["destroy", &domain.name])?;
        let agents = Agents::start(lab, &hosts)?;
        let capture = Capture::start(&hosts.net, "wire")?;
        let words = ["libvirt", "migrate", "web1", "--offline", "--persistent", "--undefinesource", "--to"];
        code(&agents.alpha.vmferry(&[&words[..], &["bravo", "--p2p"]].concat())?, 0)?;
        ensure!(domain.state_here(Way::ToBravo)? == "absent", "it is still defined here");
        ensure!(domain.state_there(Way::ToBravo)? == "shut off", "it is not defined there");
        code(&agents.bravo.vmferry(&[&words[..], &["alpha"]].concat())?, 0)?;
        ensure!(domain.state_here(Way::ToAlpha)? == "absent", "it is still defined there");
        ensure!(domain.state_there(Way::ToAlpha)? == "shut off", "it is not defined here again");
        ensure!(proves_wire(capture, &hosts)? == 1, "more than one connection");
        agents.are_clean()
    })
}

/// libvirt's own connection takes another way, and comes to nothing behind the wall: what is asked for is not
/// replaced by what is at hand.
#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn without_a_permission_libvirts_own_connection_is_not_carried() -> Result<()> {
    with_lab("without_a_permission_libvirts_own_connection_is_not_carried", |lab| {
        let hosts = Hosts::start(lab, QEMU_USER)?;
        let domain = Domain::boot(lab, &hosts, &spec())?;
        let agents = Agents::start_with(lab, &hosts, "libvirt = [\"web*\"]\n")?;
        let outcome = agents.migrate(&["--p2p", "--copy-storage-all"])?;
        code(&outcome, 2)?;
        ensure!(outcome.stderr.contains("libvirt_rpc = true"), "{outcome:?}");
        domain.proves_stay(Way::ToBravo)?;
        agents.are_clean()
    })
}
