//! Domains that are moved by libvirt through the tunnel, proved from outside: the guest's count, the bytes on
//! the destination's disks, and what was on the wire.

use anyhow::{Context, Result, ensure};

use crate::agents::{Agents, code};
use crate::bed::{Domain, Hosts, QEMU_USER};
use crate::support::agent::PORT;
use crate::support::{Capture, Version, VmSpec, Way, with_lab};

pub(crate) fn spec() -> VmSpec {
    VmSpec { rate: 200, ..VmSpec::new("web1", Version::V72) }
}

/// Moves it from alpha to bravo with these options, and proves it.
pub(crate) fn moves(name: &str, options: &[&str]) -> Result<()> {
    moves_as(name, QEMU_USER, options)
}

/// The same with QEMUs of that user. An agent that is not root can only use the sockets of its own group.
pub(crate) fn moves_as(name: &str, qemu_user: &str, options: &[&str]) -> Result<()> {
    with_lab(name, |lab| {
        let hosts = Hosts::start(lab, qemu_user)?;
        let domain = Domain::boot(lab, &hosts, &spec())?;
        let agents = match qemu_user {
            "root" => Agents::start_as_root(lab, &hosts)?,
            _ => Agents::start(lab, &hosts)?,
        };
        let capture = Capture::start(&hosts.net, "wire")?;
        let outcome = agents.migrate(options)?;
        code(&outcome, 0)?;
        let marker = spec().marker;
        let traffic = capture.finish(&[marker.as_bytes()])?;
        ensure!(traffic.destination_ports() == [PORT].into(), "{:?}", traffic.connections);
        ensure!(traffic.connections.len() == 1, "{:?}", traffic.connections);
        ensure!(traffic.seen == [0], "the guest's marker was on the wire in clear");
        ensure!(hosts.net.refused_packets()? == 0, "something else was tried");
        domain.proves_move(Way::ToBravo)?;
        let all = agents.migrations()?;
        let migration = all.first().context("the agent has forgotten it")?;
        ensure!(migration["ended"] == "moved", "{migration}");
        agents.are_clean()
    })
}

#[test]
fn a_domain_moves_with_its_disks_through_one_port() -> Result<()> {
    moves("a_domain_moves_with_its_disks_through_one_port", &["--p2p", "--copy-storage-all"])
}
