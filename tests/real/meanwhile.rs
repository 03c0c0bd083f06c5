//! What others do while a migration is under way: the operator at a monitor of his own, and the
//! guest itself. `docs/meanwhile.md` is the table of it; each of its rows names a test of these.
//! Judged by QEMU's own state, over the test's monitor, and by the guest's count.

use std::os::unix::net::UnixListener;
use std::process::Command;

use crate::faults::proxy::Proxy;
use crate::faults::{End, Plan, Reach, Stage};
use crate::support::process::{LONG, SHORT, run, wait_for};
use crate::support::{Qmp, Version, Vm, with_lab};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

/// An ACPI power-down, as the guest's kernel asks the machine for it.
const POWER_DOWN: &str = "o /2h 0x604 0x2000";
/// A panic, as the guest's kernel tells it to pvpanic.
const PANIC: &str = "o /1b 0x505 1";

/// What the guest does to its machine, done for it over HMP.
fn hmp(qmp: &mut Qmp, line: &str) -> Result<()> {
    qmp.execute("human-monitor-command", json!({"command-line": line})).map(drop)
}

fn wait_status(vm: &Vm, wanted: &str) -> Result<()> {
    let seen = wait_for(&format!("{wanted} on {}", vm.host_name()), SHORT, || {
        Ok((vm.qmp()?.status()? == wanted).then_some(()))
    });
    seen.with_context(|| format!("it is {:?}", vm.qmp().and_then(|mut qmp| qmp.status())))
}

/// That the guest stands still, by its own count.
fn stands_still(vm: &Vm) -> Result<()> {
    let before = vm.console()?.last();
    std::thread::sleep(std::time::Duration::from_millis(1500));
    let after = vm.console()?.last();
    ensure!(before == after, "the guest went on from {before:?} to {after:?}");
    Ok(())
}

fn notes(report: &Value) -> String {
    report["notes"].as_array().into_iter().flatten().filter_map(Value::as_str).collect::<Vec<_>>().join("\n")
}

/// Continues the guest, as its operator would, and all is as before.
fn goes_on(stage: &Stage) -> Result<()> {
    stage.source.qmp()?.query("cont")?;
    stage.is_as_before()
}

/// That the guest has arrived paused, and goes on when its operator continues it.
fn arrived_paused(stage: &Stage, report: &Value) -> Result<()> {
    ensure!(report["outcome"]["result"] == "moved" && report["paused"] == true, "{report}");
    ensure!(notes(report).contains("somebody paused VM web1"), "{report}");
    let states = (stage.source.qmp()?.status()?, stage.destination.qmp()?.status()?);
    ensure!(states == ("postmigrate".to_owned(), "paused".to_owned()), "{states:?}");
    stands_still(&stage.destination)?;
    ensure!(stage.destination.console()?.counts.is_empty(), "the guest has run on the destination");
    stage.copies().same_as_source(&stage.paths, &stage.source, &stage.destination)?;
    stage.is_clean()?;
    stage.destination.qmp()?.query("cont")?;
    stage.destination.wait_more(20).map(drop)
}

#[test]
fn a_guest_that_somebody_paused_stays_paused() -> Result<()> {
    with_lab("a_guest_that_somebody_paused_stays_paused", |lab| {
        // It writes so little that its mirrors keep up even on a slow link: `stop` waits for them.
        let mut stage = Stage::set_up(lab, Plan { rate: 50, ..Plan::ORDINARY })?;
        // Paused, then cancelled.
        let migration = stage.reach(Reach::Precopy)?;
        // Slow, because the RAM of a guest that stands still is soon there.
        stage.net.limit_mbit(8)?;
        stage.source.qmp()?.query("stop")?;
        wait_for("the agent to take note", SHORT, || {
            Ok((migration.now(&stage.alpha)?["paused"] == true).then_some(()))
        })?;
        migration.cancel(&stage.alpha)?;
        stage.net.no_limit()?;
        let report = migration.ended(&stage.alpha)?;
        End::cancelled(&["precopy"]).fits(&report)?;
        wait_status(&stage.source, "paused")?;
        stands_still(&stage.source)?;
        goes_on(&stage)?;
        // Paused, and the agent is killed before it can have a hand in it.
        let migration = stage.reach(Reach::Mirror)?;
        stage.alpha.kill()?;
        stage.source.qmp()?.query("stop")?;
        stage.alpha.restart()?;
        stage.calm()?;
        End::failed(&["mirror"], &["restarted"]).fits(&migration.ended(&stage.alpha)?)?;
        wait_status(&stage.source, "paused")?;
        stands_still(&stage.source)?;
        goes_on(&stage)?;
        // Paused and continued: as if nothing had been.
        let migration = stage.reach(Reach::Mirror)?;
        let mut qmp = stage.source.qmp()?;
        qmp.query("stop")?;
        qmp.query("cont")?;
        drop(qmp);
        migration.cancel(&stage.alpha)?;
        stage.calm()?;
        migration.ended(&stage.alpha)?;
        stage.is_as_before()?;
        given_back(&mut stage)?;
        // Paused for good: it moves, and stays paused.
        let migration = stage.reach_with(Reach::Precopy, &["--keep-source"])?;
        stage.source.qmp()?.query("stop")?;
        stage.calm()?;
        arrived_paused(&stage, &migration.ended(&stage.alpha)?)
    })
}

/// It has the whole guest, which is the source's: what runs there would run twice when that takes it back.
#[test]
fn a_guest_that_somebody_continues_at_the_destination_is_stopped_there() -> Result<()> {
    with_lab("a_guest_that_somebody_continues_at_the_destination_is_stopped_there", |lab| {
        let mut stage = Stage::set_up(lab, Plan { state_volume_mib: Some(16), ..Plan::ORDINARY })?;
        let migration = stage.reach(Reach::Device)?;
        let state = stage.alpha.host().dir.join("state");
        let freeze = |flag| run(Command::new("fsfreeze").arg(flag).arg(&state), SHORT).map(drop);
        // The record that hands it over does not come to the disk.
        freeze("-f")?;
        let ended = stage.calm_network().and_then(|()| {
            wait_status(&stage.destination, "paused")?;
            stage.destination.qmp()?.query("cont")?;
            wait_status(&stage.destination, "paused")?;
            migration.ended(&stage.bravo)
        });
        freeze("-u")?;
        let theirs = ended?;
        let report = migration.ended(&stage.alpha)?;
        ensure!(report["outcome"]["result"] == "failed", "{report}");
        let cause = theirs["outcome"]["cause"].as_str().unwrap_or_default();
        ensure!(cause.contains("somebody continued the guest at the destination"), "{theirs}");
        let left = theirs["outcome"]["leftovers"].to_string();
        ensure!(left.contains("Never continue it while the VM may run there"), "{theirs}");
        wait_status(&stage.source, "running")?;
        wait_status(&stage.destination, "paused")?;
        stage.bravo.vmferry(&["recover"])?;
        ensure!(!stage.destination.is_running(), "its QEMU is still there");
        stage.source.wait_more(50).map(drop)
    })
}

/// By a `migrate` of his own, while the agent that was about to copy the disks is away.
#[test]
fn a_guest_that_somebody_has_moved_away_is_not_continued() -> Result<()> {
    with_lab("a_guest_that_somebody_has_moved_away_is_not_continued", |lab| {
        let mut stage = Stage::set_up(lab, Plan::ORDINARY)?;
        let migration = stage.reach(Reach::Prepare)?;
        stage.alpha.kill()?;
        let mut qmp = stage.source.qmp()?;
        // The trial has left them on.
        let off = ["return-path", "pause-before-switchover"]
            .map(|name| json!({"capability": name, "state": false}));
        qmp.execute("migrate-set-capabilities", json!({"capabilities": off}))?;
        let fast = json!({"max-bandwidth": 10_u64 << 30, "downtime-limit": 5000});
        qmp.execute("migrate-set-parameters", fast)?;
        let elsewhere = lab.dir().join("elsewhere");
        let listener = UnixListener::bind(&elsewhere)?;
        let taken = std::thread::spawn(move || {
            listener.accept().and_then(|(mut stream, _)| std::io::copy(&mut stream, &mut std::io::sink()))
        });
        qmp.execute("migrate", json!({"uri": format!("unix:{}", elsewhere.display())}))?;
        drop(qmp);
        wait_status(&stage.source, "postmigrate")?;
        let bytes = taken.join().ok().context("the thread")??;
        ensure!(bytes > 0, "nothing was taken");
        stage.alpha.restart()?;
        stage.calm()?;
        let report = migration.ended(&stage.alpha)?;
        ensure!(report["outcome"]["result"] == "failed", "{report}");
        let left = report["outcome"]["leftovers"].to_string();
        ensure!(left.contains("a migration that is not this one has taken the guest out"), "{report}");
        let now = stage.source.qmp()?.status()?;
        ensure!(now == "postmigrate", "it is {now}");
        Ok(())
    })
}

/// Paused by somebody, handed over, and given back because the destination's QEMU has died.
fn given_back(stage: &mut Stage) -> Result<()> {
    stage.hook().close()?;
    let migration = stage.reach(Reach::Mirror)?;
    stage.source.qmp()?.query("stop")?;
    // Fast, but the hook stays closed.
    stage.net.limit_mbit(1000)?;
    stage.hook().wait_reached()?;
    stage.destination.kill()?;
    stage.calm()?;
    let report = migration.ended(&stage.alpha)?;
    End::failed(&["hand-over"], &["destination"]).fits(&report)?;
    ensure!(notes(&report).contains("VM web1 is paused at the source"), "{report}");
    stands_still(&stage.source)?;
    goes_on(stage)
}

#[test]
fn on_qemu_7_2_a_paused_guest_stays_paused_and_one_that_shut_down_stays_off() -> Result<()> {
    let plan = Plan { version: Version::V72, dirty_mib: 0, auto_read_only: true, ..Plan::ORDINARY };
    with_lab("on_qemu_7_2_a_paused_guest_stays_paused", |lab| {
        let mut stage = Stage::set_up(lab, plan)?;
        // QEMU 7.2 does not say that it cannot give its disks up: that nobody ended the stream does.
        let report = without_its_image(&mut stage, Reach::Mirror, |_| Ok(()))?;
        End::failed(&["device"], &["source's QEMU", "give the guest's disks up"]).fits(&report)?;
        not_tried_again(&report)?;
        stage.is_as_before()?;
        postmigrate(&mut stage)?;
        // Without -no-shutdown QEMU ends with its guest.
        let migration = stage.reach_with(Reach::Mirror, &["--retry", "3"])?;
        let _ = hmp(&mut stage.source.qmp()?, POWER_DOWN);
        stage.calm()?;
        let report = migration.ended(&stage.alpha)?;
        End::failed(&["mirror"], &["the guest has shut down"]).fits(&report)?;
        not_tried_again(&report)?;
        stage.source.wait_ended()?;
        stage.destination.wait_ended()?;
        stage.source.boot()?;
        let migration = stage.reach_with(Reach::Mirror, &["--keep-source"])?;
        stage.source.qmp()?.query("stop")?;
        stage.calm()?;
        arrived_paused(&stage, &migration.ended(&stage.alpha)?)
    })
}

fn not_tried_again(report: &Value) -> Result<()> {
    ensure!(report["tries"]["number"] == 1, "it was tried again: {report}");
    ensure!(notes(report).contains("not tried again"), "{report}");
    Ok(())
}

#[test]
fn what_the_guest_and_its_operator_end_is_not_tried_again() -> Result<()> {
    let plan = Plan { extra: &["-no-shutdown", "-device", "pvpanic"], ..Plan::ORDINARY };
    with_lab("what_the_guest_and_its_operator_end_is_not_tried_again", |lab| {
        let mut stage = Stage::set_up(lab, plan)?;
        let again: &[&str] = &["--retry", "3"];
        let mut ends = |reach, act: &dyn Fn(&mut Qmp) -> Result<()>, end: End| -> Result<()> {
            let migration = stage.reach_with(reach, again)?;
            act(&mut stage.source.qmp()?)?;
            stage.calm()?;
            let report = migration.ended(&stage.alpha)?;
            end.fits(&report)?;
            not_tried_again(&report)
        };
        let cancel = |qmp: &mut Qmp| qmp.query("migrate_cancel").map(drop);
        ends(Reach::Precopy, &cancel, End::failed(&["precopy"], &["somebody", "migrate_cancel", "source"]))?;
        let job = |qmp: &mut Qmp| {
            let jobs = qmp.query("query-block-jobs")?;
            qmp.execute("block-job-cancel", json!({"device": jobs[0]["device"], "force": true})).map(drop)
        };
        ends(Reach::Mirror, &job, End::failed(&["mirror"], &["somebody else cancelled the mirror", "disk"]))?;
        let panic = |qmp: &mut Qmp| hmp(qmp, PANIC);
        ends(Reach::Precopy, &panic, End::failed(&["precopy"], &["the guest has panicked"]))?;
        ensure!(stage.source.qmp()?.status()? == "guest-panicked", "{}", stage.source.qmp()?.status()?);
        goes_on(&stage)?;
        still_off(&mut stage)?;
        quit(&mut stage)
    })
}

/// The guest's disk is the destination's image then: what it writes comes back before the stream is cut.
#[test]
fn a_mirror_that_somebody_completes_is_copied_back() -> Result<()> {
    with_lab("a_mirror_that_somebody_completes_is_copied_back", |lab| {
        let mut stage = Stage::set_up(lab, Plan::ORDINARY)?;
        let migration = stage.reach_with(Reach::Precopy, &["--retry", "3"])?;
        complete_a_mirror(&mut stage)?;
        let report = migration.ended(&stage.alpha)?;
        End::failed(&["precopy"], &["somebody else ended the mirror"]).fits(&report)?;
        not_tried_again(&report)?;
        is_copied_back(&mut stage, &report)
    })
}

/// The same while the agent hears nothing of its QEMU: it looks when it does again.
#[test]
fn a_mirror_that_somebody_completes_unheard_is_copied_back() -> Result<()> {
    with_lab("a_mirror_that_somebody_completes_unheard_is_copied_back", |lab| {
        let mut stage = Stage::set_up(lab, Plan::ORDINARY)?;
        let mut proxy = Proxy::before(&stage.source.agent_monitor())?;
        let migration = stage.reach_with(Reach::Precopy, &[])?;
        proxy.end();
        complete_a_mirror(&mut stage)?;
        wait_for("the guest to be on the other image", LONG, || {
            let blocks = stage.source.qmp()?.query("query-block")?;
            let mut nodes = blocks.as_array().into_iter().flatten().map(|b| &b["inserted"]["node-name"]);
            Ok(nodes.any(|node| *node != "vda" && *node != "vdb").then_some(()))
        })?;
        proxy.listen()?;
        let report = migration.ended(&stage.alpha)?;
        End::failed(&["precopy"], &["it ended before its time"]).fits(&report)?;
        proxy.leave()?;
        is_copied_back(&mut stage, &report)
    })
}

/// Completes the mirror of the first disk, on a link that carries what the guest writes.
fn complete_a_mirror(stage: &mut Stage) -> Result<()> {
    let mut qmp = stage.source.qmp()?;
    let jobs = qmp.query("query-block-jobs")?;
    let job = jobs[0]["device"].as_str().context("no mirror")?.to_owned();
    qmp.execute("block-job-complete", json!({"device": job}))?;
    stage.calm()
}

fn is_copied_back(stage: &mut Stage, report: &Value) -> Result<()> {
    ensure!(notes(report).contains("was copied back"), "{report}");
    let nodes = stage.source.qmp()?.query("query-block")?;
    let nodes: Vec<_> = nodes.as_array().into_iter().flatten().map(|b| &b["inserted"]["node-name"]).collect();
    ensure!(nodes == ["vda", "vdb"], "the guest's disks are {nodes:?}");
    stage.is_as_before()?;
    // All that it ever wrote is in its own images.
    let reported = stage.source.console()?.last().unwrap_or(0);
    stage.source.quit()?;
    for disk in 0..2 {
        let verdict = stage.source.verify(disk, &stage.source.disk(disk))?;
        ensure!(verdict.ok && verdict.max_seq >= reported, "disk {disk}: {reported}, {verdict:?}");
    }
    Ok(())
}

/// A guest that has shut down is not started again by the roll-back.
fn still_off(stage: &mut Stage) -> Result<()> {
    let migration = stage.reach_with(Reach::Mirror, &["--retry", "3"])?;
    hmp(&mut stage.source.qmp()?, POWER_DOWN)?;
    stage.calm()?;
    let report = migration.ended(&stage.alpha)?;
    End::failed(&["mirror"], &["the guest has shut down"]).fits(&report)?;
    not_tried_again(&report)?;
    ensure!(notes(&report).contains("VM web1 is in state shutdown"), "{report}");
    stands_still(&stage.source)?;
    ensure!(stage.source.qmp()?.status()? == "shutdown", "{}", stage.source.qmp()?.status()?);
    stage.destination.wait_ended()?;
    stage.is_clean()?;
    stage.source.quit()?;
    stage.source.boot()
}

/// The last of a stage. A reset before does not end anything.
fn quit(stage: &mut Stage) -> Result<()> {
    let migration = stage.reach_with(Reach::Mirror, &["--retry", "3"])?;
    let mut qmp = stage.source.qmp()?;
    qmp.query("system_reset")?;
    qmp.wait_event("RESET", LONG)?;
    migration.reach(&stage.alpha.socket(), "mirror", |_| true).context("after a reset of the guest")?;
    drop(qmp);
    stage.source.quit()?;
    stage.calm()?;
    let report = migration.ended(&stage.alpha)?;
    End::failed(&["mirror"], &["somebody ended the guest's QEMU", "quit"]).fits(&report)?;
    not_tried_again(&report)?;
    stage.destination.wait_ended()?;
    stage.is_clean()
}

/// QEMU 7.2 takes no further migration of a paused guest whose migration has failed in the pause.
fn postmigrate(stage: &mut Stage) -> Result<()> {
    let report =
        without_its_image(stage, Reach::Mirror, |stage| stage.source.qmp()?.query("stop").map(drop))?;
    ensure!(notes(&report).contains("takes no further migration until the guest was continued"), "{report}");
    ensure!(stage.source.qmp()?.status()? == "postmigrate", "{}", stage.source.qmp()?.status()?);
    stands_still(&stage.source)?;
    let said = stage.alpha.vmferry(&["check", "web1", "--to", "bravo"])?;
    ensure!(said.code == 1 && said.stdout.contains("it did not move and is paused here"), "{said:?}");
    goes_on(stage)
}

/// Takes the image of the first disk away from the source's QEMU, which has it open, and puts it back
/// when the migration has ended.
fn without_its_image(
    stage: &mut Stage,
    reach: Reach,
    then: impl FnOnce(&mut Stage) -> Result<()>,
) -> Result<Value> {
    let migration = stage.reach_with(reach, &["--retry", "3"])?;
    let image = stage.source.disk(0);
    let away = image.with_extension("away");
    std::fs::rename(&image, &away)?;
    let then = then(stage);
    stage.calm()?;
    let report = then.and_then(|()| migration.ended(&stage.alpha));
    std::fs::rename(&away, &image)?;
    report
}

#[test]
fn a_machine_that_is_no_longer_the_planned_one_is_not_moved() -> Result<()> {
    let extra = &[
        "-device",
        "pcie-root-port,id=rp0,chassis=9",
        "-drive",
        "if=none,id=cd0,media=cdrom",
        "-device",
        "ide-cd,id=cd,drive=cd0",
    ];
    let plan = Plan { extra, auto_read_only: true, ..Plan::ORDINARY };
    with_lab("a_machine_that_is_no_longer_the_planned_one_is_not_moved", |lab| {
        let mut stage = Stage::set_up(lab, plan)?;
        another_medium(&mut stage)?;
        bitmap_in_use(&mut stage)?;
        let report = without_its_image(&mut stage, Reach::Precopy, |stage| {
            stage.pause_at_once();
            Ok(())
        })?;
        End::failed(&["device"], &["source's QEMU could not give the guest's disks up"]).fits(&report)?;
        not_tried_again(&report)?;
        stage.is_as_before()?;
        hot_plug(&mut stage)
    })
}

fn another_medium(stage: &mut Stage) -> Result<()> {
    let migration = stage.reach(Reach::Precopy)?;
    let mut qmp = stage.source.qmp()?;
    qmp.execute(
        "blockdev-change-medium",
        json!({"id": "cd", "filename": stage.paths.kernel, "format": "raw"}),
    )?;
    drop(qmp);
    stage.pause_at_once();
    let report = migration.ended(&stage.alpha)?;
    End::failed(&["switchover"], &["changed since", "medium was put into drive", "cd"]).fits(&report)?;
    stage.source.qmp()?.execute("eject", json!({"id": "cd", "force": true}))?;
    stage.is_as_before()
}

/// As a backup tool uses one. QEMU would abort at the switchover.
fn bitmap_in_use(stage: &mut Stage) -> Result<()> {
    let migration = stage.reach(Reach::Precopy)?;
    let mut qmp = stage.source.qmp()?;
    qmp.execute("block-dirty-bitmap-add", json!({"node": "vdb", "name": "backup", "persistent": true}))?;
    qmp.execute("block-dirty-bitmap-disable", json!({"node": "vdb", "name": "backup"}))?;
    let socket = stage.source.dir().join("backup.sock");
    let server = json!({"addr": {"type": "unix", "data": {"path": socket}}});
    qmp.execute("nbd-server-start", server)?;
    let export = json!({"type": "nbd", "id": "backup", "node-name": "vdb", "bitmaps": ["backup"]});
    qmp.execute("block-export-add", export)?;
    let hot = json!({"driver": "virtio-net-pci", "id": "hot1", "bus": "rp0"});
    ensure!(qmp.execute("device_add", hot).is_err(), "a device was plugged in while the RAM is sent");
    drop(qmp);
    stage.pause_at_once();
    let report = migration.ended(&stage.alpha)?;
    End::failed(&["switchover"], &["bitmap backup", "in use", "end the backup"]).fits(&report)?;
    let mut qmp = stage.source.qmp()?;
    qmp.query("nbd-server-stop")?;
    qmp.execute("block-dirty-bitmap-remove", json!({"node": "vdb", "name": "backup"}))?;
    drop(qmp);
    stage.is_as_before()
}

/// The last of a stage: the guest keeps the disk.
fn hot_plug(stage: &mut Stage) -> Result<()> {
    let migration = stage.reach(Reach::Mirror)?;
    let mut qmp = stage.source.qmp()?;
    qmp.execute("blockdev-add", json!({"driver": "null-co", "node-name": "hot", "size": 1 << 20}))?;
    let snapshot = json!({"node-name": "vda", "snapshot-file": stage.source.dir().join("snapshot.qcow2"),
                          "snapshot-node-name": "overlay"});
    let backup = json!({"job-id": "backup", "device": "vda", "target": "hot", "sync": "full"});
    let resize = json!({"node-name": "vda", "size": 1_u64 << 30});
    for (command, arguments) in
        [("blockdev-snapshot-sync", snapshot), ("blockdev-backup", backup), ("block_resize", resize)]
    {
        ensure!(qmp.execute(command, arguments).is_err(), "{command} was possible beside a mirror");
    }
    qmp.execute(
        "device_add",
        json!({"driver": "virtio-blk-pci", "id": "hot0", "drive": "hot", "bus": "rp0"}),
    )?;
    drop(qmp);
    stage.calm()?;
    let report = migration.ended(&stage.alpha)?;
    End::failed(&["precopy"], &["changed since", "device hot0 (virtio-blk-pci) was plugged in"])
        .fits(&report)?;
    stage.is_as_before()
}

#[test]
fn an_io_error_is_named_and_what_an_operator_paused_is_no_downtime() -> Result<()> {
    // The guest goes on needing room on its second disk for as long as the test lasts.
    let plan = Plan { blocks: 32_768, rate: 100, disk_volume_mib: [Some(256), None], ..Plan::ORDINARY };
    with_lab("an_io_error_is_named", |lab| {
        let mut stage = Stage::set_up(lab, plan)?;
        let migration = stage.reach_with(Reach::Mirror, &["--retry", "3"])?;
        let volume = stage.disks[0].as_ref().context("no volume")?;
        volume.fill()?;
        let report = migration.ended(&stage.alpha)?;
        End::failed(&["mirror"], &["I/O error", "disk disk1 (no space left)", "cont"]).fits(&report)?;
        not_tried_again(&report)?;
        ensure!(stage.source.qmp()?.status()? == "io-error", "{}", stage.source.qmp()?.status()?);
        volume.empty()?;
        stage.calm()?;
        goes_on(&stage)?;
        // Paused and continued long before the switchover.
        let migration = stage.reach_with(Reach::Precopy, &["--keep-source"])?;
        stage.net.limit_mbit(16)?;
        let mut qmp = stage.source.qmp()?;
        qmp.query("stop")?;
        std::thread::sleep(std::time::Duration::from_secs(3));
        let continued = std::time::Instant::now();
        qmp.query("cont")?;
        wait_for("the agent to take note", SHORT, || {
            Ok(notes(&migration.now(&stage.alpha)?).contains("somebody continued VM web1").then_some(()))
        })?;
        drop(qmp);
        // Somebody continues the destination's QEMU, which has no guest yet.
        stage.destination.qmp()?.query("cont")?;
        stage.hook().close()?;
        stage.net.no_limit()?;
        stage.pause_at_once();
        stage.hook().wait_reached()?;
        ensure!(stage.destination.qmp()?.status()? == "paused", "it started before it was told to");
        stage.hook().open();
        let report = migration.ended(&stage.alpha)?;
        let still_ms = report["downtime"]["total_ms"].as_u64().context("no downtime")?;
        let since_ms = continued.elapsed().as_millis();
        ensure!(u128::from(still_ms) <= since_ms, "{still_ms} ms of {since_ms} since it was continued");
        stage.is_moved()
    })
}
