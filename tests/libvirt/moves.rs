//! Domains that are moved by libvirt through the tunnel, proved from outside: the guest's count, the bytes on
//! the destination's disks, and what was on the wire.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::agents::{Agents, code};
use crate::bed::{Domain, Hosts, Libvirt, QEMU_USER};
use crate::support::agent::PORT;
use crate::support::{Capture, Version, VmSpec, Way, with_lab};
use crate::told::have_moved;

pub(crate) fn spec() -> VmSpec {
    VmSpec { rate: 200, ..VmSpec::new("web1", Version::V72) }
}

/// Moves it from alpha to bravo with these options, and proves it.
pub(crate) fn moves(name: &str, options: &[&str]) -> Result<()> {
    moves_as(name, QEMU_USER, [Libvirt::V9; 2], options)
}

/// The same with QEMUs of that user, and with these libvirts. An agent that is not root can only use the
/// sockets of its own group.
pub(crate) fn moves_as(name: &str, qemu_user: &str, libvirts: [Libvirt; 2], options: &[&str]) -> Result<()> {
    with_lab(name, |lab| {
        let hosts = Hosts::start_of(lab, qemu_user, libvirts)?;
        let domain = Domain::boot(lab, &hosts, &spec())?;
        let agents = match qemu_user {
            "root" => Agents::start_as_root(lab, &hosts)?,
            _ => Agents::start(lab, &hosts)?,
        };
        let capture = Capture::start(&hosts.net, "wire")?;
        let outcome = agents.migrate(&[options, &["--json"]].concat())?;
        code(&outcome, 0)?;
        lines_end(&outcome.stdout, "web1", Some("moved"))?;
        ensure!(proves_wire(capture, &hosts)? == 1, "more than one connection");
        domain.proves_move(Way::ToBravo)?;
        have_moved(&agents.alpha, "source", 1)?;
        have_moved(&agents.bravo, "destination", 1)?;
        agents.are_clean()
    })
}

/// That `--json` has printed lines of the one schema, of which the last alone says that it is, and that the
/// domain has moved; with that result, where there is one.
///
/// # Errors
/// It is not so.
pub(crate) fn lines_end(printed: &str, domain: &str, result: Option<&str>) -> Result<()> {
    let lines = printed.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>()?;
    let (last, before) = lines.split_last().context("it has printed nothing")?;
    ensure!(last["last"] == true && last["ended"] == "moved", "{last}");
    ensure!(last["result"].as_str() == result, "{last}");
    ensure!(!before.is_empty() && before.iter().all(|line| line["last"] == false), "{printed}");
    ensure!(lines.iter().all(|line| line["schema"] == 1 && line["domain"] == domain), "{printed}");
    Ok(())
}

/// That all that was on the wire were connections to the one port, that nothing else was tried, and that no
/// guest's marker was seen. How many connections there were.
///
/// # Errors
/// It is not so.
pub(crate) fn proves_wire(capture: Capture, hosts: &Hosts) -> Result<usize> {
    // What all guests of the tests have in theirs.
    let marker = b"vmferry-marker-of-guest-";
    let traffic = capture.finish(&[marker])?;
    ensure!(traffic.destination_ports() == [PORT].into(), "{:?}", traffic.connections);
    ensure!(traffic.seen == [0], "a guest's marker was on the wire in clear");
    ensure!(hosts.net.refused_packets()? == 0, "something else was tried");
    Ok(traffic.connections.len())
}

#[test]
fn a_domain_moves_with_its_disks_through_one_port() -> Result<()> {
    moves("a_domain_moves_with_its_disks_through_one_port", &["--p2p", "--copy-storage-all"])
}
