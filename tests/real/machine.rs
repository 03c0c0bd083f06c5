//! What is around the disks: the settings of QEMU's migration, which other tools leave on, the
//! trial that `check` makes, and the comparison of the two machines. Judged on the test's own
//! monitors.

use std::time::Duration;

use crate::support::process::{Outcome, wait_for};
use crate::support::{
    Agent, AgentSpec, Credentials, DiskFormat, Pair, Qmp, Version, Vm, VmEntry, VmSpec, Way, with_lab,
};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

const VM: &str = "web1";
const MOVE_WITHIN: Duration = Duration::from_secs(300);
/// Slow enough for a cancel to come in time.
const SLOW: &str = "4MiB/s";
/// What other tools leave on.
const CAPABILITIES: [&str; 6] =
    ["multifd", "x-ignore-shared", "dirty-bitmaps", "late-block-activate", "release-ram", "validate-uuid"];

/// A guest with one small disk: what is tested here is around the disks.
fn spec(version: Version) -> VmSpec {
    VmSpec { rate: 20, blocks: 64, disks: vec![DiskFormat::Raw], ..VmSpec::new(VM, version) }
}

fn vmferry(pair: &Pair, words: &[&str]) -> Result<Outcome> {
    pair.alpha.vmferry_start(words)?.wait(MOVE_WITHIN)
}

/// What `check` finds, by kind, severity and text.
fn findings(pair: &Pair) -> Result<Vec<Value>> {
    let checked = vmferry(pair, &["check", VM, "--to", "bravo", "--json"])?;
    let report: Value = serde_json::from_str(&checked.stdout).with_context(|| format!("{checked:?}"))?;
    report["problems"].as_array().cloned().context("no problems")
}

/// That there is a finding of this kind and severity whose text has all of these words.
fn is_found(found: &[Value], kind: &str, severity: &str, words: &[&str]) -> Result<()> {
    let fits = |finding: &&Value| {
        let text = finding["text"].as_str().unwrap_or_default();
        finding["kind"] == kind
            && finding["severity"] == severity
            && words.iter().all(|word| text.contains(word))
    };
    ensure!(found.iter().any(|f| fits(&f)), "no {severity} {kind} with {words:?} in {found:#?}");
    Ok(())
}

/// Capabilities and parameters, as QEMU itself tells them.
fn settings(qmp: &mut Qmp) -> Result<[Value; 2]> {
    Ok([qmp.query("query-migrate-capabilities")?, qmp.query("query-migrate-parameters")?])
}

/// Leaves settings on, as another tool may have done.
fn leave_on(vm: &Vm) -> Result<[Value; 2]> {
    let mut qmp = vm.qmp()?;
    let on: Vec<_> = CAPABILITIES.iter().map(|name| json!({"capability": name, "state": true})).collect();
    qmp.execute("migrate-set-capabilities", json!({"capabilities": on}))?;
    let endpoint = if vm.host_name() == "alpha" { "client" } else { "server" };
    qmp.execute("object-add", json!({"qom-type": "tls-creds-anon", "id": "tls0", "endpoint": endpoint}))?;
    let parameters = json!({"tls-creds": "tls0", "tls-hostname": "nobody", "max-bandwidth": 9_000_000,
                            "cpu-throttle-initial": 33, "max-postcopy-bandwidth": 7});
    qmp.execute("migrate-set-parameters", parameters)?;
    settings(&mut qmp)
}

fn are_as_before(vm: &Vm, before: &[Value; 2]) -> Result<()> {
    let mut qmp = vm.qmp()?;
    let within = Duration::from_secs(20);
    wait_for("the migration settings to be as before", within, || {
        Ok((settings(&mut qmp)? == *before).then_some(()))
    })
    .with_context(|| format!("{before:#?}\nbecame\n{:#?}", settings(&mut qmp).ok()))
}

/// `check` in the middle of a guest's life.
fn check_leaves_no_trace(pair: &Pair, source: &Vm) -> Result<()> {
    let mut qmp = source.qmp()?;
    let (before, state) = (settings(&mut qmp)?, qmp.status()?);
    qmp.take_events();
    findings(pair)?;
    let (after, state_after) = (settings(&mut qmp)?, qmp.status()?);
    ensure!(after == before, "{before:#?}\nbecame\n{after:#?}");
    ensure!(state_after == state, "the guest was {state} and is {state_after}");
    let events = qmp.take_events();
    ensure!(events.is_empty(), "others hear of it: {events:?}");
    let migration = qmp.query("query-migrate")?;
    // QEMU may call its end a failure.
    let ended = migration["status"] == "cancelled" || migration["status"] == "failed";
    ensure!(ended, "no trial was made, or it goes on: {migration}");
    Ok(())
}

/// Migrates slowly, cancels in this phase, and waits for the end.
fn cancel_in(pair: &Pair, phase: &str) -> Result<()> {
    let words = ["migrate", VM, "--to", "bravo", "--limit", SLOW, "--detach"];
    let begun = vmferry(pair, &words)?;
    ensure!(begun.code == 0, "{begun:?}");
    let id = begun.stdout.trim();
    wait_for(&format!("phase {phase}"), MOVE_WITHIN, || {
        let migration = pair.alpha.api(&format!("/v1/migrations/{id}"))?;
        ensure!(migration["outcome"].is_null(), "it ended: {migration}");
        Ok((migration["phase"] == phase).then_some(()))
    })?;
    vmferry(pair, &["cancel", id])?;
    let end = vmferry(pair, &["watch", id, "--json"])?;
    ensure!(end.code == 1 && end.stdout.contains("\"cancelled\":true"), "{end:?}");
    Ok(())
}

fn settings_are_set_aside(name: &str, from: Version, to: Version) -> Result<()> {
    with_lab(name, |lab| {
        let (pair, guest) = Pair::with_guest(lab, &spec(from), &spec(to))?;

        check_leaves_no_trace(&pair, &guest.alpha).context("nothing was left on")?;
        guest.alpha.qmp()?.query("stop")?;
        check_leaves_no_trace(&pair, &guest.alpha).context("a paused guest")?;
        let paused = guest.alpha.qmp()?.status()?;
        ensure!(paused == "paused", "the guest is {paused}");
        guest.alpha.qmp()?.query("cont")?;
        guest.alpha.wait_more(10)?;

        let left_on = leave_on(&guest.alpha)?;
        check_leaves_no_trace(&pair, &guest.alpha).context("settings were left on")?;
        let words = [&CAPABILITIES[..], &["tls-creds=\"tls0\"", "max-bandwidth=9000000"]].concat();
        is_found(&findings(&pair)?, "migration-settings", "note", &words)?;

        cancel_in(&pair, "precopy")?;
        are_as_before(&guest.alpha, &left_on).context("after a roll-back at the source")?;
        guest.alpha.wait_more(10)?;

        guest.bravo.wait_ended()?;
        guest.bravo.start_incoming()?;
        let left_on_there = leave_on(&guest.bravo)?;
        let moved = vmferry(&pair, &["migrate", VM, "--to", "bravo", "--json"])?;
        ensure!(moved.code == 0 && moved.stdout.contains("\"result\":\"moved\""), "{moved:?}");
        ensure!(moved.stdout.contains("multifd"), "the settings are among the notes: {}", moved.stdout);
        pair.proves_move(&guest, Way::ToBravo)?;
        ensure!(guest.bravo.qmp()?.status()? == "running");
        are_as_before(&guest.bravo, &left_on_there).context("at the destination")
    })
}

#[test]
fn settings_left_on_are_set_aside_and_come_back_from_7_2_to_10() -> Result<()> {
    settings_are_set_aside(
        "settings_left_on_are_set_aside_and_come_back_from_7_2_to_10",
        Version::V72,
        Version::V10,
    )
}

#[test]
fn settings_left_on_are_set_aside_and_come_back_from_10_to_7_2() -> Result<()> {
    settings_are_set_aside(
        "settings_left_on_are_set_aside_and_come_back_from_10_to_7_2",
        Version::V10,
        Version::V72,
    )
}

/// A destination that differs from the source in one way, and how that must be told.
struct Case {
    name: &'static str,
    /// Arguments after those that both have.
    extra: &'static [&'static str],
    kind: &'static str,
    severity: &'static str,
    words: &'static [&'static str],
}

const NET: &[&str] = &["-device", "virtio-net-pci,id=net0,addr=0xa,mac=52:54:00:00:00:01"];

const CASES: &[Case] = &[
    Case {
        name: "larger",
        extra: &["-m", "129"],
        kind: "memory",
        severity: "problem",
        words: &["128 MiB of RAM at the source", "129 MiB at the destination"],
    },
    Case {
        name: "more",
        extra: &["-device", "virtio-rng-pci,addr=0xb"],
        kind: "device",
        severity: "problem",
        words: &["virtio-rng-pci, at 0000:00:0b.0 at the destination, is missing at the source"],
    },
    Case {
        name: "less",
        extra: &["bare"],
        kind: "device",
        severity: "problem",
        words: &["net0 (virtio-net-pci), at 0000:00:0a.0 at the source, is missing at the destination"],
    },
    Case {
        name: "moved",
        extra: &["bare", "-device", "virtio-net-pci,id=net0,addr=0xc,mac=52:54:00:00:00:01"],
        kind: "device",
        severity: "problem",
        words: &["net0 (virtio-net-pci) is at 0000:00:0a.0 at the source and at 0000:00:0c.0"],
    },
    Case {
        name: "other",
        extra: &["bare", "-device", "e1000,id=net0,addr=0xa,mac=52:54:00:00:00:01"],
        kind: "device",
        severity: "problem",
        words: &["0000:00:0a.0 is net0 (virtio-net-pci) at the source and net0 (e1000)"],
    },
    Case {
        name: "offloads",
        extra: &["bare", "-device", "virtio-net-pci,id=net0,addr=0xa,mac=52:54:00:00:00:01,csum=off,gso=off"],
        kind: "device-settings",
        severity: "problem",
        words: &["net0 (virtio-net-pci), at 0000:00:0a.0", "csum true and false", "gso true and false"],
    },
    Case {
        name: "mac",
        extra: &["bare", "-device", "virtio-net-pci,id=net0,addr=0xa,mac=52:54:00:00:00:02"],
        kind: "device-settings",
        severity: "warning",
        words: &["net0", "mac 52:54:00:00:00:01 and 52:54:00:00:00:02"],
    },
    Case {
        name: "type",
        extra: &["-machine", "pc-q35-7.1"],
        kind: "machine-type",
        severity: "problem",
        words: &["pc-q35-7.2 at the source and pc-q35-7.1 at the destination"],
    },
    Case {
        name: "cpus",
        extra: &["-smp", "2"],
        kind: "cpu-count",
        severity: "problem",
        words: &["1 processors at the source and 2 at the destination"],
    },
    Case {
        name: "features",
        extra: &["-cpu", "qemu64,-sse3,-cx16"],
        kind: "cpu",
        severity: "problem",
        words: &["lack features that the guest may use", "1 ECX bit 0 13"],
    },
    Case {
        name: "model",
        extra: &["-cpu", "qemu64,+sse4.2,model=6"],
        kind: "cpu",
        severity: "warning",
        words: &["have more features", "1 ECX bit 20"],
    },
];

/// `bare` leaves the network card out.
fn around(name: &str, version: Version, extra: &[&str]) -> VmSpec {
    let (common, extra) = match extra {
        ["bare", extra @ ..] => (&[][..], extra),
        extra => (NET, extra),
    };
    let words = common.iter().chain(extra).map(|word| (*word).to_owned()).collect();
    let disks = vec![DiskFormat::Raw];
    VmSpec { rate: 20, blocks: 64, disks, extra: words, ..VmSpec::new(name, version) }
}

/// A source, and destinations that differ from it, each under a name of its own.
fn two_machines_are_compared(name: &str, from: Version, to: Version) -> Result<()> {
    with_lab(name, |lab| {
        let net = lab.two_hosts()?;
        let source = Vm::define(&lab.paths, &net.alpha, &around("source", from, &[]))?;
        source.boot()?;
        let fits = Vm::define(&lab.paths, &net.bravo, &around("fits", to, &[]))?;
        let define = |case: &Case| Vm::define(&lab.paths, &net.bravo, &around(case.name, to, case.extra));
        let others = CASES.iter().map(define).collect::<Result<Vec<_>>>()?;
        let targets: Vec<&Vm> = [&fits].into_iter().chain(&others).collect();
        targets.iter().try_for_each(|vm| vm.start_incoming())?;

        let credentials = Credentials::create(&lab.paths, lab.dir())?;
        let mut on_alpha = AgentSpec::default().peer(&net.bravo);
        let mut on_bravo = AgentSpec::default().peer(&net.alpha);
        for vm in &targets {
            let entry = VmEntry { start: None, ..VmEntry::of(vm) };
            on_alpha = on_alpha.vm(VmEntry { qmp: source.agent_monitor(), ..entry.clone() });
            on_bravo = on_bravo.vm(entry);
        }
        let alpha = Agent::start(&lab.paths, &net.alpha, &on_alpha, &credentials.issue("alpha")?)?;
        let _bravo = Agent::start(&lab.paths, &net.bravo, &on_bravo, &credentials.issue("bravo")?)?;

        let nothing = checked(&alpha, "fits")?;
        ensure!(nothing.is_empty(), "found between two machines alike: {nothing:#?}");
        for (case, vm) in CASES.iter().zip(&others) {
            case.is_told(&alpha, vm).with_context(|| case.name)?;
        }
        source.wait_more(5).map(drop)
    })
}

fn checked(agent: &Agent, vm: &str) -> Result<Vec<Value>> {
    let outcome = agent.vmferry(&["check", vm, "--to", "bravo", "--json"])?;
    let report: Value = serde_json::from_str(&outcome.stdout).with_context(|| format!("{outcome:?}"))?;
    report["problems"].as_array().cloned().context("no problems")
}

impl Case {
    fn is_told(&self, alpha: &Agent, target: &Vm) -> Result<()> {
        let found = checked(alpha, self.name)?;
        is_found(&found, self.kind, self.severity, self.words)?;
        // The numbers of a device's queues follow the processors'.
        let follows = |kind: &Value| self.kind == "cpu-count" && *kind == "device-settings";
        let mut others = found.iter().filter(|f| f["kind"] != self.kind && !follows(&f["kind"]));
        ensure!(others.next().is_none(), "more was found: {found:#?}");
        if self.severity == "problem" {
            let tried = alpha.vmferry(&["migrate", self.name, "--to", "bravo", "--json"])?;
            ensure!(tried.code == 1, "{tried:?}");
            let last: Value = serde_json::from_str(tried.stdout.lines().last().context("no line")?)?;
            let problems = last["outcome"]["problems"].as_array().context("no problems")?;
            is_found(problems, self.kind, "problem", self.words)?;
            ensure!(last["outcome"]["leftovers"] == json!([]), "{last}");
        }
        let state = target.qmp()?.status()?;
        ensure!(state == "inmigrate", "the waiting QEMU is {state}");
        Ok(())
    }
}

#[test]
fn two_machines_are_compared_from_7_2_to_10() -> Result<()> {
    two_machines_are_compared("two_machines_are_compared_from_7_2_to_10", Version::V72, Version::V10)
}

#[test]
fn two_machines_are_compared_from_10_to_7_2() -> Result<()> {
    two_machines_are_compared("two_machines_are_compared_from_10_to_7_2", Version::V10, Version::V72)
}

/// Devices that QEMU cannot migrate: by a blocker, and for want of a state.
#[test]
fn what_qemu_cannot_migrate_is_told_before_the_disks() -> Result<()> {
    with_lab("what_qemu_cannot_migrate_is_told_before_the_disks", |lab| {
        let shared =
            ["-object", "memory-backend-ram,id=mm,size=1M,share=on", "-device", "ivshmem-plain,memdev=mm"];
        let nvme = [
            "-blockdev",
            "null-co,node-name=nn,size=1048576,read-zeroes=on",
            "-device",
            "nvme,drive=nn,serial=x",
        ];
        let extra: Vec<String> = shared.iter().chain(&nvme).map(|word| (*word).to_owned()).collect();
        let spec = VmSpec { extra, ..spec(Version::V10) };
        let (pair, guest) = Pair::with_guest(lab, &spec, &spec)?;
        let blockers = [["web1", "'peer mode' in device 'ivshmem'"], ["non-migratable device", "nvme"]];
        let found = findings(&pair)?;
        for words in &blockers {
            is_found(&found, "migration-blocked", "problem", words)?;
        }
        let tried = vmferry(&pair, &["migrate", VM, "--to", "bravo", "--json"])?;
        ensure!(tried.code == 1 && tried.stdout.contains("migration-blocked"), "{tried:?}");
        ensure!(!tried.stdout.contains("\"phase\":\"mirror\""), "disks were copied: {}", tried.stdout);
        ensure!(guest.bravo.starts() <= 1, "a QEMU was started for nothing");
        guest.alpha.wait_more(10)?;
        pair.is_clean()
    })
}
