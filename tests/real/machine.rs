//! What is around the disks: the settings of QEMU's migration, which other tools leave on, the
//! trial that `check` makes, and the comparison of the two machines. Judged on the test's own
//! monitors.

use std::time::Duration;

use crate::support::process::{Outcome, wait_for};
use crate::support::{DiskFormat, Guest, Pair, Qmp, Version, Vm, VmSpec, Way, with_lab};
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
        let net = lab.two_hosts()?;
        let guest = Guest::define(lab, &net, &spec(from), &spec(to))?;
        guest.alpha.boot()?;
        let pair = Pair::start(lab, net, &[&guest])?;

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
