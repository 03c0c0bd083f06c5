//! Domains that are moved, and what came of them.

use anyhow::{Result, ensure};

use crate::bed::{Domain, Hosts, QEMU_USER, virsh};
use crate::support::{Version, VmSpec, Way, with_lab};

#[test]
fn a_domain_that_cannot_go_runs_on() -> Result<()> {
    with_lab("a_domain_that_cannot_go_runs_on", |lab| {
        let hosts = Hosts::start(lab, QEMU_USER)?;
        let domain = Domain::boot(lab, &hosts, &VmSpec { rate: 200, ..VmSpec::new("web1", Version::V72) })?;
        let said = virsh(
            &hosts.net.alpha,
            &["migrate", "--live", "--p2p", "--copy-storage-all", "web1", "qemu+tcp://10.77.0.2/system"],
        )?;
        ensure!(said.code != 0, "{said:?}");
        domain.proves_stay(Way::ToBravo)
    })
}
