//! A host that is emptied: its guests go to two others, of which one fails, while its own agent is restarted. Who
//! runs where is judged at every QEMU, without asking vmferry.

use crate::support::process::{LONG, wait_for};
use crate::support::{
    Agent, AgentSpec, Credentials, Host, Lab, Net, Version, Vm, VmEntry, VmSpec, proof, with_lab,
};
use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// Slow enough that a guest is on its way until the limit is lifted.
const CRAWL: &str = "64KiB/s";
/// Long enough for a guest's disks and RAM beside seven others.
const DRAIN_WITHIN: std::time::Duration = std::time::Duration::from_secs(300);

/// Guests on alpha, and where they may go.
struct Fleet {
    alpha: Agent,
    bravo: Agent,
    _charlie: Agent,
    /// Each on alpha, bravo, charlie.
    guests: Vec<[Vm; 3]>,
    _net: Net,
}

impl Fleet {
    fn set_up(lab: &Lab, names: &[&str]) -> Result<Self> {
        let net = lab.two_hosts()?;
        let charlie = net.third(lab.dir())?;
        let hosts = [&net.alpha, &net.bravo, &charlie];
        let mut guests = Vec::new();
        for name in names {
            let spec = VmSpec { rate: 50, blocks: 256, memory_mib: 128, ..VmSpec::new(name, Version::V10) };
            let vms: Result<Vec<_>> = hosts.iter().map(|host| Vm::define(&lab.paths, host, &spec)).collect();
            let vms: [Vm; 3] = vms?.try_into().ok().context("three hosts")?;
            vms[0].begin_boot()?;
            guests.push(vms);
        }
        for [vm, ..] in &guests {
            vm.wait_count(5)?;
        }
        let credentials = Credentials::create(&lab.paths, lab.dir())?;
        let agent = |at: usize, host: &Host, peers: &[&Host]| {
            let short = "[deadlines]\nresume_s = 10\n[drain]\nat_once_per_peer = 1\n".to_owned();
            let mut spec = AgentSpec { end_lines: short, ..AgentSpec::default() };
            for peer in peers {
                spec = spec.peer(peer);
            }
            for vms in &guests {
                spec = spec.vm(VmEntry::of(&vms[at]));
            }
            Agent::start(&lab.paths, host, &spec, &credentials.issue(&host.name)?)
        };
        let of_alpha = agent(0, &net.alpha, &[&net.bravo, &charlie])?;
        let (of_bravo, of_charlie) =
            (agent(1, &net.bravo, &[&net.alpha])?, agent(2, &charlie, &[&net.alpha])?);
        Ok(Self { alpha: of_alpha, bravo: of_bravo, _charlie: of_charlie, guests, _net: net })
    }

    fn limit(&self, peer: &str, rate: &str) -> Result<()> {
        let outcome = self.alpha.vmferry(&["limit", "--peer", peer, "--rate", rate])?;
        ensure!(outcome.code == 0, "{outcome:?}");
        Ok(())
    }

    fn drain(&self) -> Result<Value> {
        self.alpha.api("/v1/drain")
    }

    /// Waits until so many VMs are on their way to a peer, all in their mirror phase.
    fn wait_mirrors(&self, peer: &str, number: usize) -> Result<()> {
        wait_for(&format!("{number} mirrors to {peer}"), LONG, || {
            let all = self.alpha.api("/v1/migrations")?;
            let all = all.as_array().context("migrations")?;
            let mirrors = all
                .iter()
                .filter(|one| one["peer"] == peer && one["phase"] == "mirror" && one["outcome"].is_null());
            Ok((mirrors.count() >= number).then_some(()))
        })
    }

    /// At the hosts' QEMUs: each guest runs at exactly one, and it is none of `empty`.
    fn each_runs_once(&self, empty: &[usize]) -> Result<()> {
        for vms in &self.guests {
            let mut running = Vec::new();
            for (at, vm) in vms.iter().enumerate() {
                if vm.is_running() && vm.qmp()?.status()? == "running" {
                    running.push(at);
                }
            }
            let name = &vms[0].spec.name;
            ensure!(running.len() == 1 && !empty.contains(&running[0]), "{name} runs at {running:?}");
            proof::guest_continued(&vms[0], &vms[running[0]])?;
        }
        Ok(())
    }
}

fn states(drain: &Value) -> Vec<String> {
    let vms = drain["vms"].as_array().into_iter().flatten();
    vms.map(|vm| format!("{} {} {}", vm["vm"], vm["state"], vm["peer"]).replace('"', "")).collect()
}

/// The agent crashes with guests on their way, and the peer of one of them is lost for good.
#[test]
fn a_drain_survives_a_peer_and_a_crash() -> Result<()> {
    with_lab("a_drain_survives_a_peer_and_a_crash", |lab| {
        let mut fleet = Fleet::set_up(lab, &["web1", "web2", "web3"])?;
        for peer in ["bravo", "charlie"] {
            fleet.limit(peer, CRAWL)?;
        }
        let begun = fleet.alpha.vmferry(&["drain", "--to", "bravo,charlie", "--detach"])?;
        ensure!(begun.code == 0, "{begun:?}");
        fleet.wait_mirrors("bravo", 1)?;
        fleet.wait_mirrors("charlie", 1)?;
        fleet.alpha.kill()?;
        fleet.bravo.kill()?;
        fleet.alpha.restart()?;
        let ended = fleet.alpha.vmferry_start(&["drain", "--to", "bravo,charlie"])?.wait(DRAIN_WITHIN)?;
        let drain = fleet.drain()?;
        ensure!(ended.code == 0, "{ended:?} {drain}");
        let expected = ["web1 moved charlie", "web2 moved charlie", "web3 moved charlie"];
        ensure!(states(&drain) == expected && drain["result"] == "moved", "{drain}");
        ensure!(
            ended.stdout.contains("3 of 3 VMs moved") && ended.stdout.contains("host is empty"),
            "{ended:?}"
        );
        fleet.each_runs_once(&[0, 1])
    })
}

/// Eight guests, both peers busy; one fails for good, the agent is replaced and then crashes.
#[test]
#[ignore = "`make fleet`"]
fn a_fleet_of_eight_is_moved_whatever_breaks() -> Result<()> {
    with_lab("a_fleet_of_eight_is_moved_whatever_breaks", |lab| {
        let names = ["web1", "web2", "web3", "web4", "web5", "web6", "web7", "web8"];
        let mut fleet = Fleet::set_up(lab, &names)?;
        let plan = fleet.alpha.vmferry(&["drain", "--to", "bravo,charlie", "--dry-run"])?;
        ensure!(plan.code == 0, "{plan:?}");
        let order: Vec<_> = plan.stdout.lines().filter(|line| line.contains('→')).collect();
        ensure!(order.len() == 8 && order[0].contains("web1") && order[0].contains("→ bravo"), "{plan:?}");
        let begun = fleet.alpha.vmferry(&["drain", "--to", "bravo,charlie", "--detach"])?;
        ensure!(begun.code == 0, "{begun:?}");
        wait_for("one on each side", LONG, || {
            let states = states(&fleet.drain()?);
            let there = |peer: &str| states.iter().any(|state| state.ends_with(&format!("moved {peer}")));
            Ok((there("bravo") && there("charlie")).then_some(()))
        })?;
        for peer in ["bravo", "charlie"] {
            fleet.limit(peer, CRAWL)?;
        }
        fleet.alpha.take_over()?;
        fleet.wait_mirrors("bravo", 1)?;
        fleet.bravo.kill()?;
        fleet.wait_mirrors("charlie", 1)?;
        fleet.alpha.kill()?;
        fleet.alpha.restart()?;
        let ended = fleet.alpha.vmferry_start(&["drain", "--to", "bravo,charlie"])?.wait(DRAIN_WITHIN)?;
        let drain = fleet.drain()?;
        ensure!(ended.code == 0 && drain["result"] == "moved", "{ended:?} {drain}");
        ensure!(ended.stdout.contains("8 of 8 VMs moved"), "{ended:?}");
        let states = states(&drain);
        ensure!(states.iter().any(|state| state.ends_with("moved bravo")), "{states:?}");
        fleet.each_runs_once(&[0])
    })
}
