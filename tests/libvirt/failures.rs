//! What becomes of a domain and of both hosts when something goes wrong: the guest runs on, nothing is left, and
//! a further try works.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::agents::{Agents, code};
use crate::bed::{Domain, Hosts, QEMU_USER, virsh};
use crate::moves::spec;
use crate::support::agent::PORT;
use crate::support::process::{LONG, SHORT, start, wait_for};
use crate::support::{Capture, Lab, VmferryRun, Way, with_lab};

const COPY: [&str; 2] = ["--p2p", "--copy-storage-all"];

struct Scene {
    hosts: Hosts,
    domain: Domain,
    agents: Agents,
}

impl Scene {
    fn set(lab: &Lab) -> Result<Self> {
        let hosts = Hosts::start(lab, QEMU_USER)?;
        let domain = Domain::boot(lab, &hosts, &spec())?;
        let agents = Agents::start(lab, &hosts)?;
        Ok(Self { hosts, domain, agents })
    }

    /// Begins a move that takes a while, and returns when its disks are on their way.
    fn slow_move(&self) -> Result<VmferryRun> {
        self.hosts.net.limit_mbit(40)?;
        let run = self.agents.migrate_start(&COPY)?;
        self.wait_copying()?;
        Ok(run)
    }

    /// Both disks are on their way: a QEMU gives an NBD client up that does not greet within 10 s.
    fn wait_copying(&self) -> Result<()> {
        let is_copying = |m: &Value| {
            let nbd = &m["channels"]["nbd"];
            let is_greeted = nbd["open"].as_u64() == Some(2);
            m["stage"] == "under_way"
                && is_greeted
                && nbd["sent_bytes"].as_u64().is_some_and(|b| b > 4_000_000)
        };
        self.agents.wait_migration("disks on their way", is_copying).map(drop)
    }

    /// The guest runs on here, nothing is left anywhere, and a further try moves it.
    fn proves_another_try(&self) -> Result<()> {
        self.hosts.net.no_limit()?;
        self.domain.proves_stay(Way::ToBravo)?;
        self.agents.are_clean()?;
        code(&self.agents.migrate(&COPY)?, 0)?;
        self.domain.proves_move(Way::ToBravo)?;
        self.agents.are_clean()
    }

    /// Lets a slow move go on, which must end well.
    fn arrives(&self, run: VmferryRun) -> Result<()> {
        self.hosts.net.no_limit()?;
        code(&run.wait(LONG)?, 0)?;
        self.domain.proves_move(Way::ToBravo)?;
        self.agents.are_clean()
    }
}

#[test]
#[ignore = "of the matrix that takes some 10 minutes: make libvirt"]
fn ctrl_c_has_libvirt_abort_it() -> Result<()> {
    with_lab("ctrl_c_has_libvirt_abort_it", |lab| {
        let scene = Scene::set(lab)?;
        let run = scene.slow_move()?;
        run.signal(Signal::SIGINT)?;
        let outcome = run.wait(LONG)?;
        code(&outcome, 1)?;
        ensure!(outcome.stderr.contains("libvirt has it here: running"), "{outcome:?}");
        scene.proves_another_try()
    })
}

/// virsh goes on without it, and so does libvirt; the sockets are taken away when they are done.
#[test]
#[ignore = "of the matrix that takes some 10 minutes: make libvirt"]
fn a_command_line_that_is_killed_leaves_nothing() -> Result<()> {
    with_lab("a_command_line_that_is_killed_leaves_nothing", |lab| {
        let scene = Scene::set(lab)?;
        let run = scene.slow_move()?;
        run.signal(Signal::SIGKILL)?;
        scene.hosts.net.no_limit()?;
        wait_for("libvirt to move it", LONG, || {
            Ok((scene.domain.state_there(Way::ToBravo)? == "running").then_some(()))
        })?;
        scene.domain.proves_move(Way::ToBravo)?;
        scene.agents.are_clean()
    })
}

#[test]
#[ignore = "of the matrix that takes some 10 minutes: make libvirt"]
fn an_agent_that_crashes_takes_away_what_it_had_made() -> Result<()> {
    with_lab("an_agent_that_crashes_takes_away_what_it_had_made", |lab| {
        let mut scene = Scene::set(lab)?;
        let run = scene.slow_move()?;
        scene.agents.bravo.kill()?;
        scene.agents.bravo.restart()?;
        let outcome = run.wait(LONG)?;
        code(&outcome, 1)?;
        ensure!(outcome.stderr.contains("libvirt: "), "{outcome:?}");
        let run = scene.slow_move()?;
        scene.agents.alpha.kill()?;
        scene.agents.alpha.restart()?;
        let outcome = run.wait(LONG)?;
        ensure!(outcome.code == 1, "{outcome:?}");
        scene.proves_another_try()
    })
}

/// A restart of both agents in the middle is a pause for libvirt.
#[test]
#[ignore = "of the matrix that takes some 10 minutes: make libvirt"]
fn agents_are_restarted_under_it() -> Result<()> {
    with_lab("agents_are_restarted_under_it", |lab| {
        let mut scene = Scene::set(lab)?;
        let run = scene.slow_move()?;
        scene.agents.alpha.take_over()?;
        scene.agents.bravo.take_over()?;
        scene.arrives(run)
    })
}

/// The connection is lost for 10 s and reset again and again; libvirt hears of neither.
#[test]
#[ignore = "of the matrix that takes some 10 minutes: make libvirt"]
fn a_lost_connection_is_a_pause() -> Result<()> {
    with_lab("a_lost_connection_is_a_pause", |lab| {
        let scene = Scene::set(lab)?;
        let run = scene.slow_move()?;
        scene.hosts.net.cut()?;
        std::thread::sleep(std::time::Duration::from_secs(10));
        scene.hosts.net.restore()?;
        for _ in 0..5 {
            scene.domain.wait_more(Way::ToBravo, 100)?;
            scene.hosts.net.bravo.reset_tcp(PORT)?;
        }
        scene.arrives(run)
    })
}

/// Nothing moves any more and libvirt does not notice: vmferry cuts, aborts, and says so.
#[test]
#[ignore = "of the matrix that takes some 10 minutes: make libvirt"]
fn what_stands_still_is_given_up() -> Result<()> {
    with_lab("what_stands_still_is_given_up", |lab| {
        let scene = Scene::set(lab)?;
        scene.hosts.net.limit_mbit(40)?;
        let run = scene.agents.migrate_start(&["--p2p", "--copy-storage-all", "--stall", "10"])?;
        scene.wait_copying()?;
        scene.hosts.net.cut()?;
        let outcome = run.wait(LONG)?;
        code(&outcome, 1)?;
        ensure!(outcome.stderr.contains("nothing has moved for 10 s"), "{outcome:?}");
        ensure!(outcome.stderr.contains("the connection to bravo was lost"), "{outcome:?}");
        scene.hosts.net.restore()?;
        scene.proves_another_try()
    })
}

/// A virsh that sends the RAM by a port of the destination's: the domain moves, and the command says how.
#[test]
#[ignore = "of the matrix that takes some 10 minutes: make libvirt"]
fn what_goes_past_the_tunnel_is_noticed() -> Result<()> {
    with_lab("what_goes_past_the_tunnel_is_noticed", |lab| {
        let scene = Scene::set(lab)?;
        // The wall is opened for this once.
        for host in [&scene.hosts.net.alpha, &scene.hosts.net.bravo] {
            crate::support::process::run(host.command("nft").args(["flush", "ruleset"]), SHORT)?;
        }
        let folder = scene.hosts.net.alpha.dir.join("bin");
        fs::create_dir(&folder)?;
        let script =
            "#!/bin/bash\nexec /usr/bin/virsh \"${@/#--migrateuri=*/--migrateuri=tcp://10.77.0.2}\"\n";
        fs::write(folder.join("virsh"), script)?;
        fs::set_permissions(folder.join("virsh"), fs::Permissions::from_mode(0o755))?;
        let capture = Capture::start(&scene.hosts.net, "wire")?;
        let words = ["libvirt", "migrate", "web1", "--to", "bravo", "--live", "--p2p", "--copy-storage-all"];
        let mut command = scene.agents.alpha.command(&words);
        command.env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", folder.display()));
        let outcome = start(&mut command)?.wait(LONG)?;
        let traffic = capture.finish(&[])?;
        ensure!(
            traffic.destination_ports().len() == 2,
            "the RAM took no way of its own: {:?}",
            traffic.connections
        );
        code(&outcome, 3)?;
        ensure!(outcome.stderr.contains("of 1 connections for RAM 0 went through the tunnel"), "{outcome:?}");
        let metrics = scene.agents.alpha.metrics()?;
        let counted =
            metrics.find("vmferry_libvirt_migrations_total", &[("role", "source"), ("result", "bypassed")]);
        ensure!(counted == Some(1.0), "{counted:?}");
        scene.domain.proves_move(Way::ToBravo)?;
        scene.agents.are_clean()
    })
}

/// Both hosts see one folder: that is refused before virsh runs.
#[test]
#[ignore = "of the matrix that takes some 10 minutes: make libvirt"]
fn a_shared_folder_is_refused() -> Result<()> {
    with_lab("a_shared_folder_is_refused", |lab| {
        let scene = Scene::set(lab)?;
        let shared = lab.dir().join("shared");
        fs::create_dir(&shared)?;
        std::os::unix::fs::chown(&shared, Some(crate::agents::USER), Some(crate::agents::USER))?;
        for host in [&scene.hosts.net.alpha, &scene.hosts.net.bravo] {
            let there = crate::agents::FOLDER;
            crate::support::process::run(host.command("mkdir").args(["-p", there]), SHORT)?;
            crate::support::process::run(host.command("mount").arg("--bind").arg(&shared).arg(there), SHORT)?;
        }
        let outcome = scene.agents.migrate(&COPY)?;
        code(&outcome, 2)?;
        ensure!(outcome.stderr.contains("both hosts share it"), "{outcome:?}");
        scene.domain.proves_stay(Way::ToBravo)?;
        scene.agents.are_clean()
    })
}

/// `check` finds what would be refused, `--print` gives a line that works, and `end` takes its sockets away.
#[test]
#[ignore = "of the matrix that takes some 10 minutes: make libvirt"]
fn a_printed_line_is_run_by_hand() -> Result<()> {
    with_lab("a_printed_line_is_run_by_hand", |lab| {
        let scene = Scene::set(lab)?;
        let check = ["libvirt", "check", "web1", "--to", "bravo", "--copy-storage-all"];
        code(&scene.agents.alpha.vmferry(&check)?, 0)?;
        let outcome = scene.agents.alpha.vmferry(&["libvirt", "check", "db1", "--to", "bravo"])?;
        code(&outcome, 1)?;
        ensure!(outcome.stdout.contains("does not permit"), "{outcome:?}");
        let outcome = scene.agents.migrate(&["--p2p", "--copy-storage-all", "--print"])?;
        code(&outcome, 0)?;
        let line = outcome.stdout.trim().strip_prefix("virsh -c qemu:///system ").unwrap_or_default();
        let words: Vec<String> = line.split(' ').map(|word| word.trim_matches('\'').to_owned()).collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let said = virsh(&scene.hosts.net.alpha, &words)?;
        ensure!(said.code == 0, "{said:?}");
        scene.domain.proves_move(Way::ToBravo)?;
        let migration = scene.agents.wait_migration("its record", |m| m["stage"] == "under_way")?;
        let id = migration["id"].as_str().unwrap_or_default().to_owned();
        code(&scene.agents.alpha.vmferry(&["libvirt", "end", &id])?, 0)?;
        scene.agents.are_clean()
    })
}
