//! More disks than anybody has. QEMU 10 tells of every job whenever one more is made, so that its events
//! grow with the square of the disks.

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::support::agent::PORT;
use crate::support::net::Way;
use crate::support::{
    Agent, AgentSpec, Credentials, DiskFormat, Host, Lab, Version, Vm, VmEntry, VmSpec, with_lab,
};

/// The guest of the bed with so many further disks of 1 MiB on one controller, each with its number in it.
fn define(lab: &Lab, host: &Host, version: Version, more: usize, filled: bool) -> Result<Vm> {
    let folder = host.dir.join("disks");
    std::fs::create_dir(&folder)?;
    let mut extra = vec!["-device".to_owned(), "virtio-scsi-pci,id=scsi".to_owned()];
    for number in 0..more {
        let path = folder.join(number.to_string());
        let text = if filled { format!("disk {number}\n").repeat(1000) } else { String::new() };
        std::fs::write(&path, text)?;
        std::fs::File::options().write(true).open(&path)?.set_len(1 << 20)?;
        let file = json!({"driver": "file", "filename": path, "discard": "unmap"});
        let node =
            json!({"driver": "raw", "node-name": format!("more{number}"), "discard": "unmap", "file": file});
        let (target, lun) = (number / 100, number % 100);
        let device =
            format!("scsi-hd,id=more-{number},bus=scsi.0,scsi-id={target},lun={lun},drive=more{number}");
        extra.extend(["-blockdev".to_owned(), node.to_string(), "-device".to_owned(), device]);
    }
    let spec = VmSpec {
        disks: vec![DiskFormat::Raw],
        disk_mib: 16,
        rate: 20,
        extra,
        ..VmSpec::new("web1", version)
    };
    Vm::define(&lab.paths, host, &spec)
}

fn many_disks_move(name: &str, version: Version, more: usize) -> Result<()> {
    with_lab(name, |lab| {
        let net = lab.two_hosts()?;
        net.only_port(PORT, &[Way::ToBravo])?;
        let source = define(lab, &net.alpha, version, more, true)?;
        let destination = define(lab, &net.bravo, version, more, false)?;
        source.boot()?;
        let credentials = Credentials::create(&lab.paths, lab.dir())?;
        let on_alpha = AgentSpec::default().peer(&net.bravo).vm(VmEntry::of(&source));
        let on_bravo = AgentSpec::default().peer(&net.alpha).vm(VmEntry::of(&destination));
        let alpha = Agent::start(&lab.paths, &net.alpha, &on_alpha, &credentials.issue("alpha")?)?;
        let _bravo = Agent::start(&lab.paths, &net.bravo, &on_bravo, &credentials.issue("bravo")?)?;
        let outcome = alpha.vmferry(&["migrate", "web1", "--to", "bravo"])?;
        ensure!(outcome.code == 0, "{outcome:?}");
        source.wait_ended()?;
        let mut qmp = destination.qmp()?;
        ensure!(qmp.status()? == "running");
        if version == Version::V10 {
            crate::support::proof::guest_continued(&source, &destination)?;
        }
        qmp.query("stop")?;
        for number in 0..more {
            let read = |host: &Host| std::fs::read(host.dir.join("disks").join(number.to_string()));
            let (here, there) = (read(&net.alpha)?, read(&net.bravo)?);
            ensure!(
                here.starts_with(format!("disk {number}\n").as_bytes()) && here == there,
                "disk {number}"
            );
        }
        destination.kill().context("the end")
    })
}

#[test]
fn so_many_disks_move_on_qemu_10() -> Result<()> {
    many_disks_move("so_many_disks_move_on_qemu_10", Version::V10, 103)
}

#[test]
fn as_many_disks_as_its_main_loop_allows_move_on_qemu_7_2() -> Result<()> {
    many_disks_move("as_many_disks_as_its_main_loop_allows_move_on_qemu_7_2", Version::V72, 45)
}
