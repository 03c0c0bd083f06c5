//! Four domains of libvirt's and a guest of vmferry's own, all moved at the same time through one session.

use anyhow::{Context, Result, ensure};

use crate::agents::{Agents, code};
use crate::bed::{Domain, Hosts, QEMU_USER};
use crate::moves::{lines_end, proves_wire};
use crate::scene::{COPY, SLOW_MBIT, calm, is_under_way};
use crate::support::process::{LONG, wait_for};
use crate::support::{Capture, Version, Vm, VmSpec, Way, proof, with_lab};
use crate::told::{have_moved, under_way};

const DOMAINS: [&str; 4] = ["web1", "web2", "web3", "web4"];

#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn four_domains_and_a_bare_qemu_share_one_connection() -> Result<()> {
    with_lab("four_domains_and_a_bare_qemu_share_one_connection", |lab| {
        let hosts = Hosts::start(lab, QEMU_USER)?;
        let mut domains = Vec::new();
        for name in DOMAINS {
            domains.push(Domain::boot(lab, &hosts, &VmSpec { name: name.into(), ..calm() })?);
        }
        let own = VmSpec { rate: calm().rate, ..VmSpec::new("db1", Version::V10) };
        let source = Vm::define(&lab.paths, &hosts.net.alpha, &own)?;
        let destination = Vm::define(&lab.paths, &hosts.net.bravo, &own)?;
        source.boot()?;
        let agents = Agents::start_beside(lab, &hosts, [&source, &destination])?;
        let capture = Capture::start(&hosts.net, "wire")?;
        // Until all are under way.
        hosts.net.limit_mbit(SLOW_MBIT)?;
        let mut runs = Vec::new();
        for name in DOMAINS {
            runs.push(agents.begin_move(Way::ToBravo, name, &COPY)?);
        }
        runs.push(agents.alpha.vmferry_start(&["migrate", "db1", "--to", "bravo"])?);
        wait_for("all five to be under way", LONG, || {
            let of_libvirt = agents.migrations()?.iter().filter(|m| is_under_way(m)).count();
            let all = agents.alpha.api("/v1/migrations")?;
            let own = all.as_array().context("no list")?.iter();
            let own = own
                .filter(|m| m["outcome"].is_null() && m["disks"].as_array().is_some_and(|d| !d.is_empty()));
            Ok((of_libvirt == DOMAINS.len() && own.count() == 1).then_some(()))
        })?;
        under_way(&agents.alpha, "source", &DOMAINS)?;
        under_way(&agents.bravo, "destination", &DOMAINS)?;
        let looks = [&agents.alpha, &agents.bravo];
        let looks = looks.map(|agent| agent.vmferry_start(&["watch", DOMAINS[3], "--json"]));
        // What is libvirt's is not cancelled here.
        let refused = agents.alpha.vmferry(&["cancel", DOMAINS[0]])?;
        code(&refused, 2)?;
        ensure!(refused.stderr.contains("virsh domjobabort web1"), "{refused:?}");
        hosts.net.no_limit()?;
        for run in runs {
            code(&run.wait(LONG)?, 0)?;
        }
        for look in looks {
            let seen = look?.wait(LONG)?;
            code(&seen, 0)?;
            lines_end(&seen.stdout, DOMAINS[3], None)?;
        }
        have_moved(&agents.alpha, "source", DOMAINS.len())?;
        have_moved(&agents.bravo, "destination", DOMAINS.len())?;
        ensure!(proves_wire(capture, &hosts)? == 1, "more than one connection");
        for domain in &domains {
            domain.proves_move(Way::ToBravo)?;
        }
        proof::guest_continued(&source, &destination)?;
        destination.quit()?;
        proof::disks_whole(&destination)?;
        agents.are_clean()
    })
}
