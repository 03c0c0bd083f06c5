//! What becomes of a domain and of both hosts when something goes wrong: the guest runs on, nothing is left, and
//! a further try works.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::agents::{Agents, code};
use crate::bed::{Domain, Hosts, QEMU_USER, virsh};
use crate::moves::spec;
use crate::scene::{COPY, Phase, Scene};
use crate::support::process::{LONG, Outcome, Running, SHORT, run, run_any, start, wait_for};
use crate::support::{Capture, Lab, Way, with_lab};

#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
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
#[ignore = "of the matrix that takes long: make libvirt"]
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

/// A restart of both agents in the middle is a pause for libvirt.
#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn agents_are_restarted_under_it() -> Result<()> {
    with_lab("agents_are_restarted_under_it", |lab| {
        let mut scene = Scene::set(lab)?;
        let run = scene.slow_move()?;
        scene.agents.alpha.take_over()?;
        scene.agents.bravo.take_over()?;
        scene.arrives(run)
    })
}

/// Nothing moves any more and libvirt does not notice: vmferry cuts, aborts, and says so.
#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn what_stands_still_is_given_up() -> Result<()> {
    with_lab("what_stands_still_is_given_up", |lab| {
        let scene = Scene::set(lab)?;
        let options = ["--p2p", "--copy-storage-all", "--stall", "10"];
        let run = scene.slow_move_to(Way::ToBravo, &options, Phase::Disks)?;
        scene.hosts.net.cut()?;
        let outcome = run.wait(LONG)?;
        code(&outcome, 1)?;
        ensure!(outcome.stderr.contains("nothing has moved for 10 s"), "{outcome:?}");
        ensure!(outcome.stderr.contains("the connection to bravo was lost"), "{outcome:?}");
        scene.hosts.net.restore()?;
        scene.proves_another_try()
    })
}

/// The wall is opened for this once.
fn open_the_wall(scene: &Scene) -> Result<()> {
    for host in [&scene.hosts.net.alpha, &scene.hosts.net.bravo] {
        run(host.command("nft").args(["flush", "ruleset"]), SHORT)?;
    }
    Ok(())
}

fn bypassed(scene: &Scene) -> Result<Option<f64>> {
    let labels = [("role", "source"), ("result", "bypassed")];
    Ok(scene.agents.alpha.metrics()?.find("vmferry_libvirt_migrations_total", &labels))
}

/// A virsh that sends RAM and disks by ports of the destination's: the domain moves, and the command says how.
#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn what_goes_past_the_tunnel_is_noticed() -> Result<()> {
    with_lab("what_goes_past_the_tunnel_is_noticed", |lab| {
        let scene = Scene::set(lab)?;
        open_the_wall(&scene)?;
        let folder = scene.hosts.net.alpha.dir.join("bin");
        fs::create_dir(&folder)?;
        let script = "#!/bin/bash\nset -- \"${@/#--migrateuri=*/--migrateuri=tcp://10.77.0.2}\"\n\
                      exec /usr/bin/virsh \"${@/#--disks-uri=*/--unsafe}\"\n";
        fs::write(folder.join("virsh"), script)?;
        fs::set_permissions(folder.join("virsh"), fs::Permissions::from_mode(0o755))?;
        let capture = Capture::start(&scene.hosts.net, "wire")?;
        let words = ["libvirt", "migrate", "web1", "--to", "bravo", "--live", "--p2p", "--copy-storage-all"];
        let mut command = scene.agents.alpha.command(&words);
        command.env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", folder.display()));
        let outcome = start(&mut command)?.wait(LONG)?;
        let traffic = capture.finish(&[])?;
        ensure!(
            traffic.destination_ports().len() == 3,
            "RAM and disks took no way of their own: {:?}",
            traffic.connections
        );
        code(&outcome, 3)?;
        ensure!(outcome.stderr.contains("of 1 connections for RAM 0 went through the tunnel"), "{outcome:?}");
        ensure!(outcome.stderr.contains("of 2 connections for disks 0 went"), "{outcome:?}");
        ensure!(bypassed(&scene)? == Some(1.0), "{:?}", bypassed(&scene)?);
        scene.domain.proves_move(Way::ToBravo)?;
        scene.agents.are_clean()
    })
}

/// A printed line: virsh's words, and the migration's id.
fn printed(scene: &Scene) -> Result<(Vec<String>, String)> {
    let outcome = scene.agents.migrate(&["--p2p", "--copy-storage-all", "--print"])?;
    code(&outcome, 0)?;
    let line = outcome.stdout.trim().strip_prefix("virsh -c qemu:///system ").context("no line for virsh")?;
    let words = line.split(' ').map(|word| word.trim_matches('\'').to_owned()).collect();
    let migration = scene.agents.wait_migration("its record", |m| m["stage"] == "prepared")?;
    Ok((words, migration["id"].as_str().unwrap_or_default().to_owned()))
}

fn by_hand(scene: &Scene, words: &[String]) -> Result<Outcome> {
    virsh(&scene.hosts.net.alpha, &words.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Another program's socket in the place of the one for libvirt's own connection, which it passes on.
fn another_program(lab: &Lab, scene: &Scene, words: &[String]) -> Result<Running> {
    let alpha = &scene.hosts.net.alpha;
    let socket = words.iter().find_map(|word| word.strip_prefix("--desturi=")?.split("socket=").nth(1));
    let socket = socket.context("no socket in the URI")?;
    run(alpha.command("mv").args([socket, "/run/other.sock"]), SHORT)?;
    let socat = lab.paths.libvirt("libvirt")?.join("relays/bin/socat");
    let listen = format!("UNIX-LISTEN:{socket},fork,mode=666");
    let between = start(alpha.command(socat).args([&listen, "UNIX-CONNECT:/run/other.sock"]))?;
    let is_there =
        || Ok((run_any(alpha.command("test").args(["-S", socket]), SHORT)?.code == 0).then_some(()));
    wait_for("the other program's socket", SHORT, is_there)?;
    Ok(between)
}

/// Without `--migrateuri` libvirt would send the RAM in clear. The destination sees that nobody waits for RAM
/// in the folder, and refuses the disks, which come first.
#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn a_printed_line_that_somebody_changes_fails_or_is_told() -> Result<()> {
    with_lab("a_printed_line_that_somebody_changes_fails_or_is_told", |lab| {
        let scene = Scene::set(lab)?;
        open_the_wall(&scene)?;
        let capture = Capture::start(&scene.hosts.net, "wire")?;
        let (mut words, id) = printed(&scene)?;
        words.retain(|word| !word.starts_with("--migrateuri="));
        let said = by_hand(&scene, &words)?;
        ensure!(said.code != 0, "{said:?}");
        let outcome = scene.agents.alpha.vmferry(&["libvirt", "end", &id])?;
        code(&outcome, 0)?;
        ensure!(outcome.stderr.contains("--migrateuri was changed or left out"), "{outcome:?}");
        let refused = [("side", "target"), ("reason", "target_alone")];
        let refused = scene.agents.bravo.metrics()?.sum("vmferry_forward_failed_total", &refused)?;
        ensure!(refused >= 1.0, "{refused}");
        scene.domain.proves_stay(Way::ToBravo)?;
        scene.agents.are_clean()?;
        let marker = scene.domain.alpha.spec.marker.clone();
        let traffic = capture.finish(&[marker.as_bytes()])?;
        ensure!(traffic.seen == [0], "RAM or disks were on the wire in clear");

        // Both URIs: nothing but libvirt's own connection is seen, and libvirt says that it has moved.
        let (mut words, id) = printed(&scene)?;
        words.retain(|word| !word.starts_with("--migrateuri=") && !word.starts_with("--disks-uri="));
        words.push("--migrateuri=tcp://10.77.0.2".to_owned());
        let _between = another_program(lab, &scene, &words)?;
        let said = by_hand(&scene, &words)?;
        ensure!(said.code == 0, "{said:?}");
        let outcome = scene.agents.alpha.vmferry(&["libvirt", "end", &id])?;
        code(&outcome, 3)?;
        ensure!(outcome.stderr.contains("WARNING: web1 has moved, and not all of it"), "{outcome:?}");
        ensure!(outcome.stderr.contains("another program had put its own libvirt.sock"), "{outcome:?}");
        ensure!(bypassed(&scene)? == Some(1.0), "{:?}", bypassed(&scene)?);
        scene.domain.proves_move(Way::ToBravo)?;
        scene.agents.are_clean()
    })
}

/// Both hosts see one folder: that is refused before virsh runs.
#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn a_shared_folder_is_refused() -> Result<()> {
    with_lab("a_shared_folder_is_refused", |lab| {
        let hosts = Hosts::start(lab, QEMU_USER)?;
        let domain = Domain::boot(lab, &hosts, &spec())?;
        let shared = lab.dir().join("shared");
        fs::create_dir(&shared)?;
        std::os::unix::fs::chown(&shared, Some(crate::agents::USER), Some(crate::agents::USER))?;
        for host in [&hosts.net.alpha, &hosts.net.bravo] {
            let there = crate::agents::FOLDER;
            run(host.command("mkdir").args(["-p", there]), SHORT)?;
            run(host.command("mount").arg("--bind").arg(&shared).arg(there), SHORT)?;
        }
        // Landlock lets them write to what is there when they start.
        let agents = Agents::start(lab, &hosts)?;
        let outcome = agents.migrate(&COPY)?;
        code(&outcome, 2)?;
        ensure!(outcome.stderr.contains("both hosts share it"), "{outcome:?}");
        domain.proves_stay(Way::ToBravo)?;
        agents.are_clean()
    })
}

/// `check` finds what would be refused, `--print` gives a line that works, and `end` takes its sockets away.
#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn a_printed_line_is_run_by_hand() -> Result<()> {
    with_lab("a_printed_line_is_run_by_hand", |lab| {
        let scene = Scene::set(lab)?;
        let check = ["libvirt", "check", "web1", "--to", "bravo", "--copy-storage-all"];
        code(&scene.agents.alpha.vmferry(&check)?, 0)?;
        let outcome = scene.agents.alpha.vmferry(&[&check[..], &["--json"]].concat())?;
        let found: Value = serde_json::from_str(&outcome.stdout)?;
        ensure!(found["schema"] == 1 && found["findings"].is_array(), "{found}");
        let outcome = scene.agents.alpha.vmferry(&["libvirt", "check", "db1", "--to", "bravo"])?;
        code(&outcome, 1)?;
        ensure!(outcome.stdout.contains("does not permit"), "{outcome:?}");
        let (words, id) = printed(&scene)?;
        let said = by_hand(&scene, &words)?;
        ensure!(said.code == 0, "{said:?}");
        scene.domain.proves_move(Way::ToBravo)?;
        let outcome = scene.agents.alpha.vmferry(&["libvirt", "end", &id])?;
        code(&outcome, 0)?;
        let listed = scene.agents.alpha.vmferry(&["libvirt", "list", "--json"])?;
        let listed: Value = serde_json::from_str(&listed.stdout)?;
        let all = listed["migrations"].as_array().context("no list")?;
        ensure!(listed["schema"] == 1 && all.iter().any(|m| m["ended"] == "moved"), "{listed}");
        scene.agents.are_clean()
    })
}
