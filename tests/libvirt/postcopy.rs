//! Post-copy: the guest runs at the destination while RAM of it is still at the source. Interrupted, it stands
//! on both hosts, and goes on with `--postcopy-resume`.
//!
//! QEMU 7.2 needs the system call userfaultfd(2), which only root has where `vm.unprivileged_userfaultfd` is 0:
//! so in `matrix.rs` it is root's. QEMU 10 uses /dev/userfaultfd, which host.sh lets everybody open.

use anyhow::{Result, ensure};

use crate::agents::{End, code};
use crate::bed::Libvirt::{Newest, V11};
use crate::bed::QEMU_USER;
use crate::moves::{moves_as, proves_wire};
use crate::scene::{Phase, Scene, calm};
use crate::support::process::LONG;
use crate::support::{Capture, VmSpec, Way, with_lab};

pub(crate) const POSTCOPY: [&str; 3] = ["--p2p", "--copy-storage-all", "--postcopy"];

fn without_p2p() -> &'static [&'static str] {
    &POSTCOPY[1..]
}

/// A guest whose RAM takes the slow link of a scene half a minute, and is written once.
pub(crate) fn full() -> VmSpec {
    VmSpec { memory_mib: 256, dirty_mib: 100, dirty_rest_ms: 3_600_000, ..calm() }
}

#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn post_copy_without_roots_rights() -> Result<()> {
    let options = [&POSTCOPY[..], &["--postcopy-after-precopy"]].concat();
    moves_as("post_copy_without_roots_rights", QEMU_USER, [V11, V11], &options)
}

#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn post_copy_with_virsh_between() -> Result<()> {
    let options = [without_p2p(), &["--postcopy-after-precopy"]].concat();
    moves_as("post_copy_with_virsh_between", QEMU_USER, [V11, V11], &options)
}

/// An agent dies at the destination, and on the way back, with virsh between, at the source: the same command
/// with `--postcopy-resume` goes on.
#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn a_broken_post_copy_is_resumed_through_the_tunnel() -> Result<()> {
    with_lab("a_broken_post_copy_is_resumed_through_the_tunnel", |lab| {
        let mut scene = Scene::set_of(lab, [Newest; 2], &full())?;
        let capture = Capture::start(&scene.hosts.net, "wire")?;
        for (way, end, options) in
            [(Way::ToBravo, End::Destination, &POSTCOPY[..]), (Way::ToAlpha, End::Source, without_p2p())]
        {
            let run = scene.slow_move_to(way, options, Phase::Ram)?;
            scene.domain.turn_to_post_copy(way)?;
            let agent = scene.agents.of(way, end);
            agent.kill()?;
            agent.restart()?;
            let outcome = run.wait(LONG)?;
            code(&outcome, 4)?;
            ensure!(outcome.stderr.contains("--postcopy-resume"), "{outcome:?}");
            let reasons = scene.domain.reasons(way)?;
            ensure!(reasons == ["paused (post-copy failed)", "running (post-copy failed)"], "{reasons:?}");
            scene.hosts.net.no_limit()?;
            let resume = [options, &["--postcopy-resume"]].concat();
            code(&scene.agents.begin_move(way, "web1", &resume)?.wait(LONG)?, 0)?;
            scene.domain.goes_on(way)?;
            scene.agents.are_clean()?;
        }
        scene.domain.ends_whole(Way::ToAlpha)?;
        proves_wire(capture, &scene.hosts).map(drop)
    })
}
