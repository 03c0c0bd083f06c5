//! What libvirt does by itself, without an agent, where it is said that something is not vmferry's doing.

use std::fs;

use anyhow::{Result, ensure};

use crate::bed::{Domain, Hosts, Libvirt, QEMU_USER, virsh, virsh_start};
use crate::postcopy::{POSTCOPY, full};
use crate::scene::SLOW_MBIT;
use crate::support::process::{LONG, SHORT, run, wait_for};
use crate::support::{Host, Way, with_lab};

/// libvirt's own port for TCP, and the one that is chosen for RAM.
const RPC_PORT: u16 = 16509;
const RAM_PORT: u16 = 49200;

/// Starts libvirt's daemon anew, so that it listens on the network.
pub(crate) fn listen(host: &Host) -> Result<()> {
    fs::write(host.dir.join("libvirtd.words"), "--listen")?;
    let script = "printf '%s\\n' 'listen_tcp = 1' 'auth_tcp = \"none\"' 'listen_tls = 0' \
                  >>/etc/libvirt/libvirtd.conf && kill $(cat /run/libvirtd.pid)";
    run(host.command("bash").arg("-c").arg(script), SHORT)?;
    wait_for("libvirtd to listen", SHORT, || Ok(host.listening_ports()?.contains(&RPC_PORT).then_some(())))
}

fn libvirtd(host: &Host) -> Result<String> {
    run(host.command("cat").arg("/run/libvirtd.pid"), SHORT)
}

/// libvirt 11.2 and 11.3 read through a null pointer in `qemuMigrationDstPrepareResume`; mended in 11.4.
#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn libvirt_11_3_dies_at_the_destination_when_a_post_copy_is_resumed() -> Result<()> {
    with_lab("libvirt_11_3_dies_at_the_destination_when_a_post_copy_is_resumed", |lab| {
        let hosts = Hosts::start_of(lab, QEMU_USER, [Libvirt::V11; 2])?;
        let (alpha, bravo) = (&hosts.net.alpha, &hosts.net.bravo);
        listen(bravo)?;
        let domain = Domain::boot(lab, &hosts, &full())?;
        hosts.net.limit_mbit(SLOW_MBIT)?;
        let ram = format!("--migrateuri=tcp://{}:{RAM_PORT}", bravo.v4);
        let rpc = format!("qemu+tcp://{}/system", bravo.v4);
        let words = [&["migrate", "--live", &ram, "web1", &rpc], &POSTCOPY[..]].concat();
        let run = virsh_start(alpha, &words)?;
        wait_for("RAM on its way", LONG, || {
            let has_ram = alpha.tcp_connections()?.iter().any(|c| c.peer_port == RAM_PORT);
            Ok(has_ram.then_some(()))
        })?;
        domain.turn_to_post_copy(Way::ToBravo)?;
        ensure!(bravo.reset_tcp(RAM_PORT)?, "RAM is no longer on its way");
        ensure!(run.wait(LONG)?.code != 0, "libvirt has not noticed");
        let reasons = domain.reasons(Way::ToBravo)?;
        ensure!(reasons == ["paused (post-copy failed)", "running (post-copy failed)"], "{reasons:?}");
        hosts.net.no_limit()?;
        let before = libvirtd(bravo)?;
        let words = ["migrate", "--live", "--p2p", "--postcopy", "--postcopy-resume", &ram, "web1", &rpc];
        let said = virsh(alpha, &words)?;
        ensure!(said.code != 0 && said.stderr.contains("client socket is closed"), "{said:?}");
        let again =
            wait_for("another libvirtd", SHORT, || Ok(Some(libvirtd(bravo)?).filter(|now| *now != before)));
        again.map(drop)
    })
}
