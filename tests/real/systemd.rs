//! The service under a real systemd, at the source and at the destination: `systemctl restart
//! vmferry` in the middle of migrations is a non-event in every phase, whatever the store refuses is
//! rolled back, and `systemctl stop` rolls back. The unit is deploy/'s own; a drop-in gives it this
//! test's paths and user, and leaves all else as it is.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::booted::Machine;
use crate::faults::{Migration, Plan, Reach, Stage};
use crate::support::process::{LONG, SHORT, wait_for};
use crate::support::proof::{self, field};
use crate::support::{Agent, Lab, Paths, Vm, VmEntry, VmSpec, with_lab};

/// Boots a machine with the agent as its service, as deploy/ has it.
fn boot(lab: &Lab, agent: &Agent, paths: &Paths) -> Result<Machine> {
    let host = agent.host();
    // The machine has a /tmp of its own, where this checkout may lie.
    let program = paths.vmferry.parent().context("the binary lies in no folder")?;
    let machine = Machine::boot(lab, host, &[&host.dir, &lab.dir().join("certs"), program])?;
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/vmferry.service");
    fs::copy(unit, machine.units().join("vmferry.service"))?;
    let (dir, program) = (host.dir.display(), paths.vmferry.display());
    machine.drop_in(
        "test",
        &format!(
            "ExecStart=\nExecStart={program} agent --config {dir}/vmferry.toml\nUser=root\nGroup=root\n\
             SupplementaryGroups=\nPrivateTmp=no\nProtectHome=no\nReadWritePaths={dir}\n"
        ),
    )?;
    machine.systemctl(&["start", "vmferry"])?;
    Ok(machine)
}

/// Whose service is restarted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whom {
    Source,
    Destination,
    Both,
}

/// Both agents as services. Their destinations' QEMUs wait already: they are not the agents' children.
struct Services {
    alpha: Machine,
    bravo: Machine,
}

impl Services {
    fn boot(lab: &Lab, stage: &mut Stage) -> Result<Self> {
        stage.alpha.terminate()?;
        stage.bravo.terminate()?;
        let alpha = boot(lab, &stage.alpha, &stage.paths)?;
        let bravo = boot(lab, &stage.bravo, &stage.paths)?;
        Ok(Self { alpha, bravo })
    }

    /// Restarts services in the middle of migrations, of which none may end by it.
    fn restart(&self, whom: Whom, stage: &Stage, migrations: &[&Migration]) -> Result<()> {
        let since = Instant::now();
        match whom {
            Whom::Source => self.alpha.restart()?,
            Whom::Destination => self.bravo.restart()?,
            Whom::Both => std::thread::scope(|scope| {
                let there = scope.spawn(|| self.bravo.restart());
                self.alpha.restart()?;
                there.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })?,
        }
        let mut phases = Vec::new();
        for migration in migrations {
            for agent in [&stage.alpha, &stage.bravo] {
                let now = migration.now(agent)?;
                let result = &now["outcome"]["result"];
                ensure!(
                    result.is_null() || result == "moved",
                    "{whom:?}: it ended on {}: {now}",
                    agent.host().name
                );
                phases.push(now["phase"].as_str().unwrap_or_default().to_owned());
            }
        }
        eprintln!("  {:<12} {:>5.1} s  {phases:?}", format!("{whom:?}"), since.elapsed().as_secs_f64());
        Ok(())
    }

    fn told<T>(&self, tested: Result<T>) -> Result<T> {
        tested.with_context(|| format!("alpha: {}\nbravo: {}", self.alpha.log(), self.bravo.log()))
    }
}

/// A second guest, small and slow, on both hosts of a stage whose agents do not run yet.
struct Second {
    source: Vm,
    destination: Vm,
}

const SECOND: &str = "web2";
/// Its disks are copied for as long as the first guest's migration takes.
const SLOWLY: &str = "512KiB/s";

impl Second {
    fn define(stage: &Stage) -> Result<Self> {
        let spec = VmSpec {
            disk_mib: 32,
            blocks: 1024,
            rate: 120,
            ..VmSpec::new(SECOND, stage.source.spec.version)
        };
        let on = |agent: &Agent| -> Result<Vm> {
            let vm = Vm::define(&stage.paths, agent.host(), &spec)?;
            let config = agent.host().dir.join("vmferry.toml");
            let entry = VmEntry::of(&vm);
            let lines = format!("\n[vm.{SECOND}]\nqmp = {:?}\n", entry.qmp);
            Ok(fs::write(&config, fs::read_to_string(&config)? + &lines).map(|()| vm)?)
        };
        let second = Self { source: on(&stage.alpha)?, destination: on(&stage.bravo)? };
        second.source.boot()?;
        second.destination.start_incoming()?;
        Ok(second)
    }
}

/// That nothing at all is exported by a QEMU, by its own word.
fn exports_nothing(vm: &Vm) -> Result<()> {
    let exports = vm.qmp()?.query("query-block-exports")?;
    ensure!(exports == json!([]), "{} exports {exports}", vm.host_name());
    let server =
        vm.qmp()?.execute("nbd-server-start", json!({"addr": {"type": "fd", "data": {"str": "nobody"}}}));
    let said = server.map_or_else(|e| format!("{e:#}"), |_| "it started one".into());
    ensure!(said.contains("has not been found"), "{} has an NBD server: {said}", vm.host_name());
    Ok(())
}

fn moved(migration: &Migration, agents: [&Agent; 2]) -> Result<()> {
    for agent in agents {
        let report = migration.ended(agent)?;
        ensure!(report["outcome"] == json!({"result": "moved", "leftovers": []}), "{report}");
    }
    Ok(())
}

/// Both services are restarted, one by one and at once, in every phase of one migration and in the
/// copy of a second one's disks. Afterwards the first guest moves back.
#[test]
fn restarts_at_both_ends_are_non_events() -> Result<()> {
    with_lab("restarts_at_both_ends_are_non_events", |lab| {
        let mut stage = Stage::set_up(lab, Plan { dirty_rest_ms: 20, ..Plan::ORDINARY })?;
        stage.destination.start_incoming()?;
        let second = Second::define(&stage)?;
        let services = Services::boot(lab, &mut stage)?;
        let tested = restart_in_every_phase(&mut stage, &second, &services);
        services.told(tested)
    })
}

fn restart_in_every_phase(stage: &mut Stage, second: &Second, services: &Services) -> Result<()> {
    let first = stage.begin()?;
    let also = Migration::begin(&stage.alpha, SECOND, "bravo", &["--limit", SLOWLY, "--keep-source"])?;
    stage.bring_to(Reach::Mirror, &first)?;
    for whom in [Whom::Destination, Whom::Source, Whom::Both] {
        services.restart(whom, stage, &[&first, &also])?;
    }
    stage.bring_to(Reach::Precopy, &first)?;
    for whom in [Whom::Destination, Whom::Source] {
        services.restart(whom, stage, &[&first, &also])?;
    }
    stage.bring_to(Reach::Switchover, &first)?;
    services.restart(Whom::Both, stage, &[&first, &also])?;
    stage.hook().close()?;
    stage.calm_network()?;
    stage.bring_to(Reach::HandOver, &first)?;
    services.restart(Whom::Source, stage, &[&first, &also])?;
    // The destination's process waits until its hook is through: nothing else is safe.
    let hook = stage.hook().clone();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(std::time::Duration::from_secs(2));
            hook.open();
        });
        services.restart(Whom::Destination, stage, &[&first, &also])
    })?;
    let there = first.now(&stage.bravo)?;
    ensure!(there["phase"] == "confirm" || there["phase"] == "done", "{there}");
    moved(&first, [&stage.alpha, &stage.bravo])?;
    ensure!(stage.copies().calls() == 1, "the hook was called {} times", stage.copies().calls());
    proof::guest_continued(&stage.source, &stage.destination)?;
    stage.copies().same_as_source(&stage.paths, &stage.source, &stage.destination)?;
    exports_nothing(&stage.destination)?;
    proof::qemu_is_clean(&mut stage.destination.qmp()?)?;

    let free = stage.alpha.vmferry(&["limit", &also.id, "--rate", "none"])?;
    ensure!(free.code == 0, "{free:?}");
    moved(&also, [&stage.alpha, &stage.bravo])?;
    exports_nothing(&second.destination)?;
    second.destination.qmp()?.query("stop")?;
    proof::disks_whole(&second.destination)?;
    move_back(stage)
}

/// What an interrupted migration forgot would be in its way.
fn move_back(stage: &Stage) -> Result<()> {
    stage.source.quit()?;
    stage.source.start_incoming()?;
    let counted = stage.destination.console()?.last().context("no counts")?;
    let outcome =
        stage.bravo.vmferry(&["migrate", &stage.source.spec.name, "--to", "alpha", "--keep-source"])?;
    ensure!(outcome.code == 0, "moving back gave {outcome:?}");
    stage.source.wait_count(counted + 50)?;
    exports_nothing(&stage.source)?;
    stage.source.qmp()?.query("stop")?;
    proof::disks_whole(&stage.source)
}

/// systemd does not say what its store refuses. It is found out while everything can still be undone.
#[test]
fn what_the_store_refuses_is_rolled_back() -> Result<()> {
    with_lab("what_the_store_refuses_is_rolled_back", |lab| {
        let mut stage = Stage::set_up(lab, Plan { dirty_mib: 0, ..Plan::ORDINARY })?;
        stage.destination.start_incoming()?;
        let services = Services::boot(lab, &mut stage)?;
        let tested = (|| {
            services.bravo.drop_in("small", "FileDescriptorStoreMax=1\n")?;
            services.bravo.systemctl(&["restart", "vmferry"])?;
            let migration = stage.begin()?;
            stage.bring_to(Reach::Mirror, &migration)?;
            services.bravo.restart()?;
            let report = migration.ended(&stage.alpha)?;
            ensure!(field(&report, "/outcome/result")? == "failed", "{report}");
            let log = services.bravo.log();
            ensure!(log.contains("1 of 2 descriptors"), "the log does not say so: {log}");
            exports_nothing(&stage.destination)?;
            stage.source.wait_more(20)?;
            proof::qemu_is_clean(&mut stage.source.qmp()?)?;
            // The next one is in nobody's way.
            stage.calm()?;
            let outcome = stage.alpha.vmferry(&["migrate", "web1", "--to", "bravo", "--keep-source"])?;
            ensure!(outcome.code == 0, "{outcome:?}");
            proof::guest_continued(&stage.source, &stage.destination)?;
            what_an_earlier_version_left_is_closed(&stage, &services.bravo)
        })();
        services.told(tested)
    })
}

/// An agent of an earlier version left a guest's exports open when it was restarted in mid-copy.
fn what_an_earlier_version_left_is_closed(stage: &Stage, machine: &Machine) -> Result<()> {
    let mut qmp = stage.destination.qmp()?;
    let path = stage.destination.dir().join("left.sock");
    let server = json!({"addr": {"type": "unix", "data": {"path": path}}});
    qmp.execute("nbd-server-start", server)?;
    let export =
        json!({"type": "nbd", "id": "vmferry-disk0", "node-name": "vda", "name": "left", "writable": false});
    qmp.execute("block-export-add", export)?;
    let node = json!({"driver": "null-co", "node-name": "vmferry-left"});
    qmp.execute("blockdev-add", node)?;
    let check = stage.bravo.vmferry(&["check", &stage.source.spec.name, "--to", "alpha"])?;
    let found = |what: &str| check.stdout.contains(what);
    ensure!(found("disk0 is exported at the source") && found("block nodes"), "{check:?}");
    qmp.execute("blockdev-del", json!({"node-name": "vmferry-left"}))?;
    // A monitor serves one at a time.
    drop(qmp);
    machine.restart()?;
    wait_for("the exports to be closed", SHORT, || Ok(exports_nothing(&stage.destination).ok()))?;
    let check = stage.bravo.vmferry(&["check", &stage.source.spec.name, "--to", "alpha"])?;
    ensure!(!check.stdout.contains("exported") && !check.stdout.contains("block nodes"), "{check:?}");
    Ok(())
}

/// A configuration that was edited since the start, badly: a guest in the pause does not wait for somebody who mends it.
#[test]
fn nothing_is_left_to_a_process_that_would_not_start() -> Result<()> {
    with_lab("nothing_is_left_to_a_process_that_would_not_start", |lab| {
        let mut stage = Stage::set_up(lab, Plan { dirty_rest_ms: 20, ..Plan::ORDINARY })?;
        stage.destination.start_incoming()?;
        let services = Services::boot(lab, &mut stage)?;
        let tested = (|| {
            let edited = Edited::of(&stage.alpha)?;
            let migration = stage.begin()?;
            for reach in [Reach::Mirror, Reach::Precopy, Reach::Switchover] {
                stage.bring_to(reach, &migration)?;
            }
            edited.write(|text| format!("{text}\n[misspelt]\nkey = 1\n"))?;
            ensure!(services.alpha.systemctl(&["restart", "vmferry"]).is_err(), "it started with that");
            ensure!(services.alpha.shown("ExecMainStatus", "vmferry")? == "2", "a restart would not help");
            // Without any agent here.
            stage.source.wait_more(20)?;
            proof::qemu_is_clean(&mut stage.source.qmp()?)?;
            stage.destination.wait_ended()?;
            let log = services.alpha.log();
            let said = "it would not start: ";
            ensure!(log.contains(said) && log.contains("misspelt"), "the log does not say so: {log}");
            edited.write(str::to_owned)?;
            services.alpha.systemctl(&["start", "vmferry"])?;
            let report = migration.ended(&stage.alpha)?;
            ensure!(field(&report, "/outcome/result")? == "failed", "{report}");
            Ok(())
        })();
        services.told(tested)
    })
}

/// What only the start itself shows to be wrong: what was left waits at systemd until it is mended, and goes on then.
#[test]
fn what_was_left_waits_for_a_process_that_can_start() -> Result<()> {
    with_lab("what_was_left_waits_for_a_process_that_can_start", |lab| {
        let mut stage =
            Stage::set_up(lab, Plan { deadlines: "resume_s = 600\n", dirty_rest_ms: 20, ..Plan::ORDINARY })?;
        stage.destination.start_incoming()?;
        let services = Services::boot(lab, &mut stage)?;
        let tested = (|| {
            let migration = stage.begin()?;
            stage.bring_to(Reach::Mirror, &migration)?;
            for (agent, machine) in [(&stage.alpha, &services.alpha), (&stage.bravo, &services.bravo)] {
                let edited = Edited::of(agent)?;
                // No host of the bed has it.
                edited.write(|text| {
                    text.replace("[metrics]\nlisten = \"", "[metrics]\nlisten = \"198.51.100.9:9908\" # \"")
                })?;
                ensure!(machine.systemctl(&["restart", "vmferry"]).is_err(), "it listens there");
                // More than once.
                tried_again(machine)?;
                wait_for("systemd to have it again", SHORT, || Ok((machine.kept()? == 2).then_some(())))?;
                // What even the configuration's readers find waits as well.
                edited.write(|text| format!("{text}\n[misspelt]\nkey = 1\n"))?;
                tried_again(machine)?;
                let log = machine.log();
                ensure!(log.contains("waits for the one after it"), "the log does not say so: {log}");
                edited.write(str::to_owned)?;
                let active = || Ok((machine.shown("ActiveState", "vmferry")? == "active").then_some(()));
                wait_for("the service to be active", LONG, active)?;
                wait_for("systemd to keep nothing", SHORT, || Ok((machine.kept()? == 0).then_some(())))?;
            }
            for reach in [Reach::Precopy, Reach::Switchover] {
                stage.bring_to(reach, &migration)?;
            }
            stage.calm()?;
            moved(&migration, [&stage.alpha, &stage.bravo])?;
            proof::guest_continued(&stage.source, &stage.destination)?;
            stage.copies().same_as_source(&stage.paths, &stage.source, &stage.destination)
        })();
        services.told(tested)
    })
}

/// Waits for two more starts.
fn tried_again(machine: &Machine) -> Result<()> {
    let tries = || -> Result<u32> { Ok(machine.shown("NRestarts", "vmferry")?.parse()?) };
    let before = tries()?;
    wait_for("two more starts", LONG, || Ok((tries()? > before + 1).then_some(())))
}

/// The configuration of an agent, as it was and as an operator leaves it.
struct Edited {
    path: PathBuf,
    before: String,
}

impl Edited {
    fn of(agent: &Agent) -> Result<Self> {
        let path = agent.host().dir.join("vmferry.toml");
        let before = fs::read_to_string(&path)?;
        Ok(Self { path, before })
    }

    /// Writes what an edit makes of what it was.
    fn write(&self, edit: impl FnOnce(&str) -> String) -> Result<()> {
        let text = edit(&self.before);
        Ok(fs::write(&self.path, text)?)
    }
}

/// The stop of a service rolls back what it may, and leaves nothing behind.
#[test]
fn systemctl_stop_rolls_back_and_keeps_nothing() -> Result<()> {
    with_lab("systemctl_stop_rolls_back_and_keeps_nothing", |lab| {
        let mut stage = Stage::set_up(lab, Plan::ORDINARY)?;
        stage.alpha.terminate()?;
        let machine = boot(lab, &stage.alpha, &stage.paths)?;
        let migration = stage.begin()?;
        stage.bring_to(Reach::Mirror, &migration)?;
        machine.systemctl(&["stop", "vmferry"])?;
        ensure!(machine.kept()? == 0, "systemd keeps descriptors of a stopped service");
        stage.source.wait_more(20)?;
        proof::qemu_is_clean(&mut stage.source.qmp()?)?;
        stage.destination.wait_ended()?;
        machine.systemctl(&["start", "vmferry"])?;
        let report: Value = migration.ended(&stage.alpha)?;
        ensure!(field(&report, "/outcome/result")? == "failed", "{report}");
        Ok(())
    })
}
