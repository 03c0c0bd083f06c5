//! libvirt's own connection by the user's SSH, and only that: RAM and disks go through the tunnel all the same.
//! The sshd is one of tests/setup/relays.sh, with keys made for the occasion.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};

use crate::agents::{Agents, code};
use crate::bed::{Domain, Hosts, QEMU_USER};
use crate::moves::spec;
use crate::support::agent::PORT;
use crate::support::process::{Running, SHORT, run, start, wait_for};
use crate::support::vm::write_script;
use crate::support::{Capture, Host, Lab, Way, with_lab};

const SSH_PORT: u16 = 7022;

/// An sshd at bravo, and at alpha a command that libvirt calls instead of ssh.
fn ssh(lab: &Lab, alpha: &Host, bravo: &Host) -> Result<(Running, String)> {
    let relays = lab.paths.libvirt("libvirt")?.join("relays/bin");
    ensure!(relays.join("sshd").exists(), "{} is missing: run tests/setup/relays.sh", relays.display());
    let file = |name: &str| lab.dir().join(name).display().to_string();
    for key in ["host", "client"] {
        let words = ["-q", "-t", "ed25519", "-N", "", "-f", &file(key)];
        run(Command::new(relays.join("ssh-keygen")).args(words), SHORT)?;
    }
    let host_key = fs::read_to_string(file("host.pub"))?;
    fs::write(file("known"), format!("bravo {host_key}"))?;
    let user = "getent passwd sshd >/dev/null || echo sshd:x:64057:65534::/run/sshd:/usr/sbin/nologin >>/etc/passwd\n\
                install -d -m 0755 /run/sshd";
    run(bravo.command("sh").args(["-c", user]), SHORT)?;
    let config = format!(
        "ListenAddress {}:{SSH_PORT}\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\nUsePAM no\nStrictModes no\n\
         PermitRootLogin yes\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n",
        bravo.v4,
        file("host"),
        file("client.pub")
    );
    fs::write(file("sshd.conf"), config)?;
    let sshd = start(bravo.command(relays.join("sshd")).args(["-D", "-e", "-f", &file("sshd.conf")]))?;
    wait_for("sshd", SHORT, || Ok(bravo.listening_ports()?.contains(&SSH_PORT).then_some(())))?;
    let ssh = relays.join("ssh");
    let command = format!(
        "#!/bin/sh\nexec {} -F none -o BatchMode=yes -o IdentitiesOnly=yes -i {} -o UserKnownHostsFile={} \
         -o HostKeyAlias=bravo \"$@\"\n",
        ssh.display(),
        file("client"),
        file("known")
    );
    let wrapper = alpha.dir.join("ssh");
    write_script(Path::new(&wrapper), &command)?;
    let uri = format!("qemu+ssh://root@{}:{SSH_PORT}/system?command={}", bravo.v4, wrapper.display());
    Ok((sshd, uri))
}

#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn the_users_own_ssh_carries_libvirts_connection_and_nothing_else() -> Result<()> {
    with_lab("the_users_own_ssh_carries_libvirts_connection_and_nothing_else", |lab| {
        let hosts = Hosts::start(lab, QEMU_USER)?;
        let domain = Domain::boot(lab, &hosts, &spec())?;
        let agents = Agents::start_open(lab, &hosts)?;
        let (_sshd, uri) = ssh(lab, &hosts.net.alpha, &hosts.net.bravo)?;
        let capture = Capture::start(&hosts.net, "wire")?;
        let outcome = agents.migrate(&["--p2p", "--copy-storage-all", "--dest-uri", &uri])?;
        code(&outcome, 0)?;
        let traffic = capture.finish(&[spec().marker.as_bytes()])?;
        ensure!(traffic.destination_ports() == [PORT, SSH_PORT].into(), "{:?}", traffic.connections);
        ensure!(traffic.connections.len() == 2 && traffic.seen == [0], "{traffic:?}");
        let migration = &agents.migrations()?[0];
        ensure!(migration["channels"]["rpc"].is_null() && migration["ended"] == "moved", "{migration}");
        domain.proves_move(Way::ToBravo)?;
        agents.are_clean()
    })
}
