//! `make demo`: two hosts in network namespaces, a firewall that passes one port one way, a real
//! guest under a real QEMU that writes all the time, moved by vmferry as a user would move it, and
//! then proved, without asking vmferry, to have arrived whole and unread. Ends with 0 only if
//! every proof holds. `--keep` leaves both hosts up; `--end` ends what was left so.

mod report;
mod show;
#[path = "../support/mod.rs"]
mod support;

use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use report::Report;
use show::{Show, bytes, count};
use support::agent::PORT;
use support::lab::{end_lab, labs};
use support::net::Way;
use support::proof::{self, HandoverCopies};
use support::vm::{quoted, write_script};
use support::{Agent, AgentSpec, Capture, Credentials, Lab, Net, Traffic, Version, Vm, VmEntry, VmSpec};

const VM: &str = "web1";
const DISK_MIB: u32 = 256;
/// 64 MiB of each disk are written over and over.
const BLOCKS: u64 = 16 * 1024;
/// Blocks per second on each disk: busy, and yet leaves the two cores of a small machine air.
const RATE: u64 = 400;
const DIRTY_MIB: u32 = 8;
const MOVE_WITHIN: Duration = Duration::from_secs(300);

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let done = match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => demo(false),
        ["--keep"] => demo(true),
        ["--end"] => end_kept().map(|()| true),
        _ => Err(anyhow::anyhow!("usage: demo [--keep | --end]")),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Everything that takes part in the move.
struct Stage {
    net: Net,
    source: Vm,
    destination: Vm,
    copies: HandoverCopies,
    alpha: Agent,
    bravo: Agent,
    /// Descriptors that the agents have open before anything moves.
    idle: [usize; 2],
}

fn demo(keep: bool) -> Result<bool> {
    let mut show = Show::new();
    let mut lab = Lab::open("demo")?;
    let played = play(&mut lab, &mut show, keep);
    if played.is_ok() && show.all_held() {
        lab.pass();
    }
    // Takes everything away, and shows the logs first if something failed.
    drop(lab);
    show.finish();
    // Why a step failed has been said on its line.
    Ok(played.is_ok() && show.all_held())
}

fn play(lab: &mut Lab, show: &mut Show, keep: bool) -> Result<()> {
    show.title("vmferry moves a running guest, with its disks, through one encrypted port");
    let stage = set_up(lab, show)?;
    let capture = Capture::start(&stage.net, "link")?;
    show.title(&format!("$ vmferry migrate {VM} --to bravo --keep-source"));
    move_guest(show, &stage)?;
    show.title("What can be proved without asking vmferry");
    let traffic = capture.finish(&[stage.source.spec.marker.as_bytes()])?;
    prove_guest(lab, show, &stage);
    prove_wire(show, &stage, &traffic);
    prove_clean(show, &stage);
    show.title("What vmferry says of it");
    summary(show, &stage, &traffic);
    if keep { leave(lab, show, stage) } else { Ok(()) }
}

fn set_up(lab: &Lab, show: &mut Show) -> Result<Stage> {
    let net = show.step("two hosts, one link", || {
        let net = lab.two_hosts()?;
        let text = format!("alpha {} and bravo {}", net.alpha.v4, net.bravo.v4);
        Ok((net, text))
    })?;
    show.step("firewall", || {
        net.only_port(PORT, &[Way::ToBravo])?;
        Ok(((), format!("passes TCP to port {PORT} from alpha to bravo, and nothing else")))
    })?;
    let spec = VmSpec {
        disk_mib: DISK_MIB,
        blocks: BLOCKS,
        rate: RATE,
        dirty_mib: DIRTY_MIB,
        ..VmSpec::new(VM, Version::V10)
    };
    let source = Vm::define(&lab.paths, &net.alpha, &spec)?;
    let destination = Vm::define(&lab.paths, &net.bravo, &spec)?;
    let copies = HandoverCopies::define(&destination)?;
    show.step("a guest on alpha", || boot(&source))?;
    let create = show.step("its disks on bravo", || {
        Ok((destination.without_disks()?, "none yet: bravo's agent makes them".to_owned()))
    })?;
    show.step("control experiment", || control(&net, &source))?;
    let credentials = show.step("certificates", || {
        let credentials = Credentials::create(&lab.paths, lab.dir())?;
        Ok((credentials, "an authority of our own, one identity for each host".to_owned()))
    })?;
    let (alpha, bravo) = show.step("an agent on each host", || {
        let on_alpha = AgentSpec::default().peer(&net.bravo).vm(VmEntry::of(&source));
        let on_bravo =
            AgentSpec::default().peer(&net.alpha).vm(VmEntry::of(&destination).with_hook(copies.hook()));
        let on_bravo = AgentSpec { end_lines: create, ..on_bravo };
        let alpha = Agent::start(&lab.paths, &net.alpha, &on_alpha, &credentials.issue("alpha")?)?;
        let bravo = Agent::start(&lab.paths, &net.bravo, &on_bravo, &credentials.issue("bravo")?)?;
        Ok(((alpha, bravo), "both ready".to_owned()))
    })?;
    let idle = [alpha.open_descriptors()?, bravo.open_descriptors()?];
    Ok(Stage { net, source, destination, copies, alpha, bravo, idle })
}

fn boot(source: &Vm) -> Result<((), String)> {
    source.boot()?;
    let version = source.qmp()?.query("query-version")?;
    let part = |name: &str| version["qemu"][name].to_string();
    let text = format!(
        "{VM}: QEMU {}.{}.{}, {} MiB RAM, a raw and a qcow2 disk of {DISK_MIB} MiB,",
        part("major"),
        part("minor"),
        part("micro"),
        source.spec.memory_mib
    );
    Ok(((), format!("{text}\n   {:<26}writes {RATE} numbered 4 KiB blocks a second to each disk", "")))
}

/// The proof that nothing is readable on the wire is worth something only if it would find it: the
/// guest's own disk, sent in clear through the same link, door and capture.
fn control(net: &Net, source: &Vm) -> Result<((), String)> {
    source.wait_count(200)?;
    let capture = Capture::start(net, "control")?;
    let sent = send_in_clear(net, source)?;
    let traffic = capture.finish(&[source.spec.marker.as_bytes()])?;
    let seen = traffic.seen[0];
    ensure!(seen > 0, "the marker was not found in {sent} bytes sent in clear");
    ensure!(
        traffic.connections.len() == 1,
        "one connection was made, {} were seen",
        traffic.connections.len()
    );
    Ok(((), format!("disk bytes sent in clear: the guest's marker found {} times", count(seen))))
}

fn send_in_clear(net: &Net, source: &Vm) -> Result<u64> {
    const PART_BYTES: u64 = 32 << 20;
    let mut disk = std::fs::File::open(source.disk(0))?.take(PART_BYTES);
    let listener = net.bravo.inside(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)))?;
    let address = SocketAddr::new(net.bravo.v4.parse()?, PORT);
    let mut stream = net.alpha.inside(|| TcpStream::connect_timeout(&address, Duration::from_secs(5)))?;
    let (mut accepted, _) = listener.accept()?;
    accepted.set_read_timeout(Some(Duration::from_secs(10)))?;
    let sent = std::thread::scope(|scope| {
        let reader = scope.spawn(move || std::io::copy(&mut accepted, &mut std::io::sink()));
        let sent = std::io::copy(&mut disk, &mut stream);
        drop(stream);
        (sent, reader.join())
    });
    let received = sent.1.map_err(|_| anyhow::anyhow!("the reader panicked"))??;
    let sent = sent.0?;
    ensure!(sent == received, "sent {sent} bytes, received {received}");
    Ok(sent)
}

/// With the command line's own progress, on this terminal.
fn move_guest(show: &Show, stage: &Stage) -> Result<()> {
    let mut child = stage.alpha.command(&["migrate", VM, "--to", "bravo", "--keep-source"]).spawn()?;
    let ended = support::process::wait_for("vmferry migrate", MOVE_WITHIN, || Ok(child.try_wait()?));
    let status = ended.inspect_err(|_| {
        let _ = child.kill();
        let _ = child.wait();
    })?;
    if !status.success() {
        show.plain("");
        bail!("vmferry migrate ended with {status}");
    }
    Ok(())
}

fn prove_guest(lab: &Lab, show: &mut Show, stage: &Stage) {
    let (source, destination) = (&stage.source, &stage.destination);
    show.prove("the guest went on", || {
        let c = proof::guest_continued(source, destination)?;
        Ok(format!(
            "counted to {} on alpha, on from {} on bravo",
            count(c.source_last),
            count(c.destination_first)
        ))
    });
    show.prove("it runs once", || {
        let (old, new) = (source.qmp()?.status()?, destination.qmp()?.status()?);
        ensure!(old == "postmigrate" && new == "running", "alpha: {old}, bravo: {new}");
        Ok("alpha's QEMU has given it up, bravo's runs it".to_owned())
    });
    show.prove("disks at the hand-over", || {
        stage.copies.same_as_source(&lab.paths, source, destination)?;
        Ok("both identical on alpha and bravo, by content".to_owned())
    });
    show.prove("no write lost", || {
        destination.qmp()?.query("stop")?;
        proof::disks_whole(destination)?;
        destination.qmp()?.query("cont")?;
        Ok(format!(
            "the last {} numbers on each disk: none missing, none torn",
            count(BLOCKS.min(destination.console()?.last().unwrap_or(0)))
        ))
    });
}

fn prove_wire(show: &mut Show, stage: &Stage, traffic: &Traffic) {
    show.prove("connections on the wire", || {
        let (connections, ports) = (traffic.connections.len(), traffic.destination_ports());
        ensure!(connections == 1, "{connections} TCP connections: {:?}", traffic.connections);
        ensure!(ports.iter().eq([&PORT]), "to ports {ports:?}");
        ensure!(
            traffic.other_packets.is_empty(),
            "and other packets, by protocol: {:?}",
            traffic.other_packets
        );
        Ok(format!("one, to one port ({PORT})"))
    });
    show.prove("refused by the firewall", || {
        let refused = stage.net.refused_packets()?;
        ensure!(refused == 0, "{refused} packets");
        Ok("nothing: nothing else was tried".to_owned())
    });
    show.prove("marker on the wire", || {
        ensure!(traffic.seen == [0], "seen {} times in clear", traffic.seen[0]);
        ensure!(traffic.bytes() > 0, "nothing crossed the link");
        Ok(format!("not once in {}", bytes(traffic.bytes())))
    });
}

fn prove_clean(show: &mut Show, stage: &Stage) {
    show.prove("nothing left behind", || {
        proof::qemu_is_clean(&mut stage.source.qmp()?)?;
        proof::qemu_is_clean(&mut stage.destination.qmp()?)?;
        proof::agent_is_clean(&stage.alpha, stage.idle[0])?;
        proof::agent_is_clean(&stage.bravo, stage.idle[1])?;
        Ok("no job, export or node in QEMU, no descriptor or file of the agents".to_owned())
    });
}

fn summary(show: &mut Show, stage: &Stage, traffic: &Traffic) {
    show.prove("its report", || {
        let report = Report::of(&stage.alpha)?;
        ensure!(report.downtime_ms > 0 || report.total_ms > 0, "it has no times: {report:?}");
        let moved: u64 = report.streams.iter().map(|(_, bytes)| bytes).sum();
        ensure!(moved <= traffic.bytes(), "it reports {moved} bytes, {} crossed the link", traffic.bytes());
        let streams: Vec<String> =
            report.streams.iter().map(|(name, n)| format!("{name} {}", bytes(*n))).collect();
        let lines = [
            format!("{:.1} s in all", report.total_ms as f64 / 1000.0),
            format!("{} ms downtime", report.downtime_ms),
            streams.join(", "),
        ];
        Ok(lines.join(&format!("\n   {:<26}", "")))
    });
}

fn leave(lab: &Lab, show: &Show, stage: Stage) -> Result<()> {
    lab.keep()?;
    show.title("Both hosts stay up");
    for agent in [&stage.alpha, &stage.bravo] {
        let script = agent.host().dir.join("vmferry");
        let binary = quoted(&lab.paths.vmferry.display().to_string());
        let socket = quoted(&agent.socket().display().to_string());
        let namespace = agent.host().namespace();
        write_script(
            &script,
            &format!("#!/bin/sh\nexec ip netns exec {namespace} {binary} \"$@\" --socket {socket}\n"),
        )?;
        show.note(&format!("vmferry on {}", agent.host().name), &format!("{} list", script.display()));
        show.note(&format!("a shell on {}", agent.host().name), &format!("ip netns exec {namespace} bash"));
    }
    let console = stage.destination.dir().join("guest.serial");
    show.note("the guest's console", &format!("tail -f {}", console.display()));
    show.note("to end all of it", "make demo-end");
    stage.alpha.leave();
    stage.bravo.leave();
    Ok(())
}

fn end_kept() -> Result<()> {
    for dir in labs(true)? {
        end_lab(&dir).with_context(|| format!("ending {}", dir.display()))?;
        println!("ended {}", dir.display());
    }
    Ok(())
}
