//! What becomes of libvirt's migrations when the connection between the hosts is away, or an agent is, in each
//! of their phases.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::agents::{Agents, End, code};
use crate::bed::{Domain, Hosts, QEMU_USER};
use crate::moves::proves_wire;
use crate::scene::{COPY, Phase, Scene, calm, is_under_way, phase_of};
use crate::support::agent::PORT;
use crate::support::process::{LONG, wait_for};
use crate::support::{Agent, Capture, Way, with_lab};

/// Ten seconds less than libvirt's own patience.
const AWAY: Duration = Duration::from_secs(20);
const RESET_EVERY: Duration = Duration::from_secs(1);

#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn twenty_seconds_without_a_connection_are_a_pause_in_either_phase() -> Result<()> {
    with_lab("twenty_seconds_without_a_connection_are_a_pause_in_either_phase", |lab| {
        let scene = Scene::set_sound(lab)?;
        let capture = Capture::start(&scene.hosts.net, "wire")?;
        let run = scene.slow_move()?;
        for phase in [Phase::Disks, Phase::Ram] {
            scene.wait_phase(Way::ToBravo, phase)?;
            scene.hosts.net.cut()?;
            std::thread::sleep(AWAY);
            scene.hosts.net.restore()?;
        }
        scene.arrives(run)?;
        ensure!(proves_wire(capture, &scene.hosts)? >= 3, "the connection was never lost");
        Ok(())
    })
}

#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn a_reset_every_second_is_not_noticed_in_either_phase() -> Result<()> {
    with_lab("a_reset_every_second_is_not_noticed_in_either_phase", |lab| {
        let scene = Scene::set_sound(lab)?;
        let capture = Capture::start(&scene.hosts.net, "wire")?;
        let mut run = scene.slow_move()?;
        let (mut disks, mut ram) = (0, 0);
        let began = Instant::now();
        while run.ended()?.is_none() {
            ensure!(began.elapsed() < LONG, "it does not end: {:?}", scene.agents.migrations()?);
            let now = scene.agents.migrations()?.into_iter().find(is_under_way);
            if scene.hosts.net.bravo.reset_tcp(PORT)? {
                match now.as_ref().and_then(phase_of) {
                    Some(Phase::Disks) => disks += 1,
                    Some(Phase::Ram) => ram += 1,
                    None => {}
                }
            }
            std::thread::sleep(RESET_EVERY);
        }
        ensure!(disks >= 2 && ram >= 2, "{disks} resets while disks were copied, {ram} while RAM was");
        scene.arrives(run)?;
        ensure!(proves_wire(capture, &scene.hosts)? > disks + ram, "connections were not reset");
        Ok(())
    })
}

/// What an agent carries now, in both directions.
fn carried(agent: &Agent) -> Result<u64> {
    let all = agent.api("/v1/forwards")?;
    let both =
        ["forwards", "targets"].into_iter().flat_map(|kind| all[kind].as_array().into_iter().flatten());
    Ok(both.filter_map(|one| one["connections"].as_u64()).sum())
}

/// A connection that does not come back: each agent gives it up by itself and closes all that it carried, so that
/// libvirt sees the end on both hosts while they cannot reach each other.
#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn a_dead_tunnel_closes_what_it_carried_on_both_hosts() -> Result<()> {
    with_lab("a_dead_tunnel_closes_what_it_carried_on_both_hosts", |lab| {
        let hosts = Hosts::start(lab, QEMU_USER)?;
        let domain = Domain::boot(lab, &hosts, &calm())?;
        let agents = Agents::start_impatient(lab, &hosts)?;
        let scene = Scene { hosts, domain, agents };
        for phase in [Phase::Disks, Phase::Ram] {
            // libvirt 9 does not always notice the end of a migration with two disks.
            let options = [&COPY[..], &["--stall", "30"]].concat();
            let run = scene.slow_move_to(Way::ToBravo, &options, phase)?;
            let both = [&scene.agents.alpha, &scene.agents.bravo];
            for agent in both {
                ensure!(carried(agent)? > 0, "{} carries nothing", agent.host().name);
            }
            scene.hosts.net.cut()?;
            for agent in both {
                let name = format!("{} to carry nothing", agent.host().name);
                wait_for(&name, LONG, || Ok((carried(agent)? == 0).then_some(())))?;
            }
            wait_for("the other host to forget it", LONG, || {
                Ok((scene.domain.state_there(Way::ToBravo)? == "absent").then_some(()))
            })?;
            let outcome = run.wait(LONG)?;
            code(&outcome, 1)?;
            ensure!(outcome.stderr.contains("libvirt has it here: running"), "{outcome:?}");
            ensure!(outcome.stderr.contains("the connection to bravo was lost"), "{outcome:?}");
            scene.hosts.net.restore()?;
            scene.hosts.net.no_limit()?;
            scene.domain.proves_stay(Way::ToBravo)?;
            scene.agents.are_clean()?;
        }
        code(&scene.agents.migrate(&COPY)?, 0)?;
        scene.domain.proves_move(Way::ToBravo)?;
        scene.agents.are_clean()
    })
}

/// At either end, in either phase: the migration fails, the guest runs on, nothing is left, and a retry moves
/// it; the next one goes back.
#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn an_agent_that_is_killed_fails_the_migration_and_no_further_one() -> Result<()> {
    with_lab("an_agent_that_is_killed_fails_the_migration_and_no_further_one", |lab| {
        let mut scene = Scene::set_calm(lab)?;
        let capture = Capture::start(&scene.hosts.net, "wire")?;
        for (way, end, phase) in [
            (Way::ToBravo, End::Destination, Phase::Disks),
            (Way::ToAlpha, End::Source, Phase::Disks),
            (Way::ToBravo, End::Source, Phase::Ram),
            (Way::ToAlpha, End::Destination, Phase::Ram),
        ] {
            let run = scene.slow_move_to(way, &COPY, phase)?;
            let agent = scene.agents.of(way, end);
            agent.kill()?;
            agent.restart()?;
            let outcome = run.wait(LONG)?;
            code(&outcome, 1)?;
            ensure!(outcome.stderr.contains("libvirt has it here: running"), "{outcome:?}");
            ensure!(outcome.stderr.contains("libvirt: "), "{outcome:?}");
            scene.hosts.net.no_limit()?;
            scene.domain.proves_stay(way)?;
            scene.agents.are_clean()?;
            code(&scene.agents.begin_move(way, "web1", &COPY)?.wait(LONG)?, 0)?;
            scene.domain.goes_on(way)?;
            scene.agents.are_clean()?;
        }
        scene.domain.ends_whole(Way::ToAlpha)?;
        proves_wire(capture, &scene.hosts).map(drop)
    })
}
