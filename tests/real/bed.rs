//! The test bed tested: each proof that other tests rely on can succeed, and fails when it should.

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use crate::support::net::Way;
use crate::support::process::{LONG, SHORT, run, run_any, start, wait_for};
use crate::support::{Capture, DiskFormat, Host, Lab, Net, Version, Vm, VmSpec, proof, with_lab};
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

const PORT: u16 = 9907;

fn guest_proves_its_writes(version: Version) -> Result<()> {
    with_lab("guest_proves_its_writes", |lab| {
        let net = lab.two_hosts()?;
        let spec = VmSpec { dirty_mib: 4, ..VmSpec::new("web1", version) };
        let vm = Vm::define(&lab.paths, &net.alpha, &spec)?;
        vm.boot()?;
        ensure!(vm.qmp()?.status()? == "running");
        proof::qemu_is_clean(&mut vm.qmp()?)?;
        vm.wait_count(spec.blocks / 8)?;
        ensure!(proof::disks_whole(&vm).is_err(), "the disks of a running guest were judged");
        vm.quit()?;
        proof::disks_whole(&vm)?;
        damage(&vm, spec.marker.as_bytes())?;
        ensure!(proof::disks_whole(&vm).is_err(), "a damaged disk was found whole");
        Ok(())
    })
}

/// The marker is in the first block; one of its bytes changes, then the whole block goes.
fn damage(vm: &Vm, marker: &[u8]) -> Result<()> {
    let disk = OpenOptions::new().read(true).write(true).open(vm.disk(0))?;
    let at = {
        let mut all = Vec::new();
        (&disk).read_to_end(&mut all)?;
        all.windows(marker.len()).position(|w| w == marker).context("no marker on the disk")? as u64
    };
    let verdict = |what: &str| -> Result<crate::support::vm::DiskVerdict> {
        vm.verify(0, &vm.disk(0)).context(what.to_owned())
    };
    disk.write_all_at(b"X", at)?;
    let torn = verdict("after a changed byte")?;
    ensure!(torn.bad == 1 && !torn.ok, "{torn:?}");
    disk.write_all_at(&[0; 4096], at & !4095)?;
    let lost = verdict("after a lost block")?;
    ensure!(lost.bad == 0 && lost.lost == 1 && !lost.ok, "{lost:?}");
    Ok(())
}

#[test]
fn guest_proves_its_writes_on_qemu_7_2() -> Result<()> {
    guest_proves_its_writes(Version::V72)
}

#[test]
fn guest_proves_its_writes_on_qemu_10() -> Result<()> {
    guest_proves_its_writes(Version::V10)
}

#[test]
fn a_destination_waits_and_is_started_only_once() -> Result<()> {
    with_lab("a_destination_waits_and_is_started_only_once", |lab| {
        let net = lab.two_hosts()?;
        let vm = Vm::define(&lab.paths, &net.bravo, &VmSpec::new("web1", Version::V10))?;
        vm.start_incoming()?;
        ensure!(vm.qmp()?.status()? == "inmigrate");
        let again = run_any(&mut net.bravo.command(vm.start_script()), SHORT)?;
        ensure!(again.code == 1 && again.stderr.contains("still running"), "{again:?}");
        vm.kill()?;
        vm.start_incoming()?;
        ensure!(vm.starts() == 2, "{} starts", vm.starts());
        vm.kill()
    })
}

#[test]
fn disks_are_compared_by_content() -> Result<()> {
    with_lab("disks_are_compared_by_content", |lab| {
        let net = lab.two_hosts()?;
        let raw = VmSpec { disks: vec![DiskFormat::Raw], ..VmSpec::new("web1", Version::V10) };
        let qcow2 = VmSpec { disks: vec![DiskFormat::Qcow2], ..raw.clone() };
        let source = Vm::define(&lab.paths, &net.alpha, &raw)?;
        let destination = Vm::define(&lab.paths, &net.bravo, &qcow2)?;
        let compare =
            || proof::same_content(&lab.paths, &source.disk(0), "raw", &destination.disk(0), "qcow2");
        compare()?;
        OpenOptions::new().write(true).open(source.disk(0))?.write_all_at(b"x", 12_345)?;
        ensure!(compare().is_err(), "a changed byte went unnoticed");
        let copies = proof::HandoverCopies::define(&destination)?;
        ensure!(
            copies.same_as_source(&lab.paths, &source, &destination).is_err(),
            "a hook that was not called"
        );
        run(&mut net.bravo.command(copies.hook()), SHORT)?;
        ensure!(
            copies.same_as_source(&lab.paths, &source, &destination).is_err(),
            "a changed byte went unnoticed"
        );
        OpenOptions::new().write(true).open(source.disk(0))?.write_all_at(b"\0", 12_345)?;
        copies.same_as_source(&lab.paths, &source, &destination)?;
        destination.create_disk(0, 65)?;
        ensure!(compare().is_err(), "another size went unnoticed");
        Ok(())
    })
}

/// What does not arrive within this never does.
const NEVER: Duration = Duration::from_secs(2);

/// Sends `bytes` from one host to the other and back, over a new connection to `port`; each way takes no longer than
/// `within`.
fn echo((client, server): (&Host, &Host), port: u16, bytes: &[u8], within: Duration) -> Result<()> {
    ensure!(client.name != server.name);
    let listener = server.inside(|| TcpListener::bind(("::", port)))?;
    let address = (server.v4.parse::<std::net::Ipv4Addr>()?, port).into();
    let mut stream = client.inside(|| TcpStream::connect_timeout(&address, within))?;
    let (mut accepted, _) = listener.accept()?;
    for end in [&stream, &accepted] {
        end.set_read_timeout(Some(within))?;
    }
    let (mut there, mut back) = (vec![0; bytes.len()], vec![0; bytes.len()]);
    stream.write_all(bytes)?;
    accepted.read_exact(&mut there)?;
    accepted.write_all(&there)?;
    stream.read_exact(&mut back)?;
    ensure!(back == bytes, "other bytes came back");
    Ok(())
}

#[test]
fn the_wall_lets_one_port_through_in_one_way() -> Result<()> {
    with_lab("the_wall_lets_one_port_through_in_one_way", |lab| {
        let net = lab.two_hosts()?;
        let (to_bravo, to_alpha) = ((&net.alpha, &net.bravo), (&net.bravo, &net.alpha));
        echo(to_alpha, 4000, b"no wall yet", SHORT)?;
        net.only_port(PORT, &[Way::ToBravo])?;
        echo(to_bravo, PORT, b"through the door", SHORT)?;
        ensure!(net.refused_packets()? == 0, "the wall refused what it should let in");
        ensure!(echo(to_bravo, 4000, b"another port", NEVER).is_err());
        ensure!(echo(to_alpha, PORT, b"the other way", NEVER).is_err());
        ensure!(net.refused_packets()? > 0, "nothing was refused");
        net.only_port(PORT, &[Way::ToBravo, Way::ToAlpha])?;
        echo(to_alpha, PORT, b"the other way, now open", SHORT)
    })
}

#[test]
fn the_link_can_be_cut_and_restored() -> Result<()> {
    with_lab("the_link_can_be_cut_and_restored", |lab| {
        let net = lab.two_hosts()?;
        let try_it = |within| echo((&net.alpha, &net.bravo), PORT, b"hello", within);
        try_it(SHORT)?;
        for break_it in
            [Net::cut, |net: &Net| net.drop_way(Way::ToAlpha), |net: &Net| net.reset_connections(PORT)]
        {
            break_it(&net)?;
            ensure!(try_it(NEVER).is_err(), "a broken link carried bytes");
            net.restore()?;
            try_it(SHORT)?;
        }
        net.pull_cable()?;
        ensure!(try_it(NEVER).is_err(), "a pulled cable carried bytes");
        net.plug_cable()?;
        wait_for("the link to carry bytes again", SHORT, || Ok(try_it(NEVER).ok()))?;
        let addresses = run(net.alpha.command("ip").args(["-6", "addr"]), SHORT)?;
        ensure!(addresses.contains(&net.alpha.v6), "the IPv6 address is gone: {addresses}");
        net.limit_mbit(100)?;
        try_it(SHORT)?;
        net.no_limit()
    })
}

#[test]
fn the_capture_sees_what_crosses_the_link() -> Result<()> {
    const MARKER: &[u8] = b"a marker of over twenty-four bytes";
    with_lab("the_capture_sees_what_crosses_the_link", |lab| {
        let net = lab.two_hosts()?;
        let capture = Capture::start(&net, "nothing")?;
        let nothing = capture.finish(&[MARKER])?;
        ensure!(nothing.connections.is_empty() && nothing.bytes() == 0 && nothing.seen == [0], "{nothing:?}");

        let capture = Capture::start(&net, "something")?;
        let half = MARKER.len() / 2;
        echo((&net.alpha, &net.bravo), PORT, MARKER, SHORT)?;
        send_in_two(&net, &MARKER[..half], &MARKER[half..])?;
        let traffic = capture.finish(&[MARKER, b"never sent"])?;
        ensure!(traffic.connections.len() == 2, "{traffic:?}");
        ensure!(
            traffic.destination_ports().into_iter().eq([PORT, 4000])
                || traffic.destination_ports().into_iter().eq([4000, PORT]),
            "{traffic:?}"
        );
        ensure!(traffic.seen == [3, 0], "twice in whole and once in two packets: {traffic:?}");
        ensure!(
            traffic.bytes() == 3 * MARKER.len() as u64 && traffic.other_packets.is_empty(),
            "{traffic:?}"
        );
        Ok(())
    })
}

/// The second part is sent when the first has arrived, so they are two packets.
fn send_in_two(net: &Net, first: &[u8], second: &[u8]) -> Result<()> {
    let listener = net.bravo.inside(|| TcpListener::bind(("::", 4000)))?;
    let address = (net.bravo.v6.parse::<std::net::Ipv6Addr>()?, 4000).into();
    let mut stream = net.alpha.inside(|| TcpStream::connect_timeout(&address, SHORT))?;
    let (mut accepted, _) = listener.accept()?;
    accepted.set_read_timeout(Some(SHORT))?;
    for part in [first, second] {
        stream.write_all(part)?;
        accepted.read_exact(&mut vec![0; part.len()])?;
    }
    Ok(())
}

#[test]
fn the_janitor_cleans_up_after_a_dead_lab() -> Result<()> {
    let (dir, namespace, pid) = {
        let mut lab = Lab::open("the_janitor_cleans_up_after_a_dead_lab")?;
        let net = lab.two_hosts()?;
        let vm = Vm::define(&lab.paths, &net.bravo, &VmSpec::new("web1", Version::V10))?;
        vm.start_incoming()?;
        let pid = vm.pid().context("no QEMU")?;
        lab.pass();
        (lab.dir().to_owned(), net.alpha.namespace().to_owned(), pid)
    };
    ensure!(!dir.exists(), "{} is still there", dir.display());
    let names = run(std::process::Command::new("ip").args(["netns", "list"]), SHORT)?;
    ensure!(!names.contains(&namespace), "{names}");
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    ensure!(!String::from_utf8_lossy(&command).contains("web1"), "QEMU {pid} still runs");
    Ok(())
}

#[test]
fn a_program_that_is_late_is_killed() -> Result<()> {
    let mut late = start(std::process::Command::new("sh").args(["-c", "echo so far; exec sleep 1000"]))?;
    wait_for("its first words", SHORT, || Ok(late.stdout()?.contains("so far").then_some(())))?;
    let late = late.wait(Duration::from_secs(1));
    let Err(error) = late else { anyhow::bail!("{late:?}") };
    ensure!(format!("{error:#}").contains("so far"), "{error:#}");
    let killed = start(std::process::Command::new("sleep").arg("1000"))?;
    killed.signal(Signal::SIGTERM)?;
    ensure!(killed.wait(LONG)?.code == 128 + 15);
    Ok(())
}
