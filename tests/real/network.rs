//! Names, addresses, and what each of the two hosts says of one VM: with real agents, real QEMUs, and
//! the names of a host's own /etc/hosts.

use std::fs;
use std::path::PathBuf;

use crate::support::agent::{PORT, PeerEntry};
use crate::support::process::{LONG, SHORT, run, wait_for};
use crate::support::proof::{self, field};
use crate::support::{Agent, AgentSpec, Credentials, Lab, Net, Version, Vm, VmEntry, VmSpec, with_lab};
use anyhow::{Context, Result, ensure};
use serde_json::Value;

const VM: &str = "web1";
/// The name by which alpha dials bravo.
const NAME: &str = "bravo.lab";

/// Names that one network namespace has for itself (ip-netns(8)); gone when dropped.
struct Hosts(PathBuf);

impl Hosts {
    fn of(net: &Net, text: &str) -> Result<Self> {
        let folder = PathBuf::from("/etc/netns").join(net.alpha.namespace());
        fs::create_dir_all(&folder)?;
        let hosts = Self(folder);
        fs::write(hosts.0.join("hosts"), text)?;
        Ok(hosts)
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

struct Stage {
    _net: Net,
    alpha: Agent,
    bravo: Agent,
    on_alpha: Vm,
    on_bravo: Vm,
    _hosts: Hosts,
}

impl Stage {
    /// Each agent has the other's identity in capitals. Alpha dials a name with two addresses: at the
    /// first, packets to the port vanish.
    fn set_up(lab: &Lab) -> Result<Self> {
        let net = lab.two_hosts()?;
        let spec = VmSpec { rate: 100, ..VmSpec::new(VM, Version::V10) };
        let on_alpha = Vm::define(&lab.paths, &net.alpha, &spec)?;
        let on_bravo = Vm::define(&lab.paths, &net.bravo, &spec)?;
        let hosts = Hosts::of(&net, &format!("{} {NAME}\n{} {NAME}\n", net.bravo.v6, net.bravo.v4))?;
        let silence = format!(
            "add table inet silent\nadd chain inet silent in {{ type filter hook input priority 0; }}\n\
             add rule inet silent in ip6 daddr {} tcp dport {PORT} drop\n",
            net.bravo.v6
        );
        run(net.bravo.command("sh").args(["-c", &format!("echo '{silence}' | nft -f -")]), SHORT)?;
        let found = run(net.alpha.command("getent").args(["ahosts", NAME]), SHORT)?;
        ensure!(
            found.starts_with(&net.bravo.v6) && found.contains(&net.bravo.v4),
            "no two addresses: {found}"
        );
        let credentials = Credentials::create(&lab.paths, lab.dir())?;
        let entry = |name: &str, address: Option<String>| PeerEntry {
            name: name.to_owned(),
            address,
            receive: vec!["*".to_owned()],
        };
        let mut spec_alpha = AgentSpec::default().vm(VmEntry::of(&on_alpha));
        spec_alpha.peers.push(entry("BRAVO", Some(format!("{NAME}:{PORT}"))));
        let mut spec_bravo = AgentSpec::default().vm(VmEntry::of(&on_bravo));
        spec_bravo.peers.push(entry("Alpha", None));
        let alpha = Agent::start(&lab.paths, &net.alpha, &spec_alpha, &credentials.issue("alpha")?)?;
        let bravo = Agent::start(&lab.paths, &net.bravo, &spec_bravo, &credentials.issue("bravo")?)?;
        Ok(Self { _net: net, alpha, bravo, on_alpha, on_bravo, _hosts: hosts })
    }

    /// What each host's agent says of the VM.
    fn here(&self) -> Result<(String, String)> {
        let of = |agent: &Agent| -> Result<String> {
            let status = agent.api("/v1/status")?;
            Ok(field(&status, "/vm_states/0/here")?.as_str().unwrap_or_default().to_owned())
        };
        Ok((of(&self.alpha)?, of(&self.bravo)?))
    }

    fn sees(&self, on_alpha: &str, on_bravo: &str) -> Result<()> {
        // A look may be a second old.
        wait_for(&format!("{VM} {on_alpha} on alpha and {on_bravo} on bravo"), LONG, || {
            let (a, b) = self.here()?;
            Ok((a == on_alpha && b == on_bravo).then_some(()))
        })
        .with_context(|| format!("they say {:?}", self.here()))
    }
}

/// The VM is started on both hosts by mistake; then the one on bravo is ended, and it moves there.
#[test]
fn both_hosts_say_who_runs_a_vm_and_how_it_came_there() -> Result<()> {
    with_lab("both_hosts_say_who_runs_a_vm_and_how_it_came_there", |lab| {
        let stage = Stage::set_up(lab)?;
        stage.on_alpha.begin_boot()?;
        stage.on_bravo.begin_boot()?;
        stage.sees("runs", "runs")?;
        twice_is_refused_and_nothing_ended(&stage)?;
        stage.on_bravo.quit()?;
        stage.sees("runs", "no-qemu")?;
        stage.on_alpha.wait_more(200)?;
        let (source, destination) = moved(&stage)?;
        the_same_is_said_at_both(&source, &destination)?;
        stage.sees("no-qemu", "runs")?;
        logged(&stage)
    })
}

fn twice_is_refused_and_nothing_ended(stage: &Stage) -> Result<()> {
    for words in [&["check", VM, "--to", "BRAVO", "--json"][..], &["migrate", VM, "--to", "BRAVO", "--json"]]
    {
        let outcome = stage.alpha.vmferry(words)?;
        ensure!(outcome.code == 1, "{words:?}: {outcome:?}");
        let all = format!("{outcome:?}");
        ensure!(all.contains("target-not-waiting") && all.contains("do not end it before"), "{all}");
        ensure!(!all.contains("end it and start it anew"), "{all}");
    }
    for vm in [&stage.on_alpha, &stage.on_bravo] {
        let state = vm.qmp()?.status()?;
        ensure!(state == "running", "the guest on {} is {state}", vm.host_name());
    }
    Ok(())
}

/// Moves it, and looks while it does: the progress at both ends.
fn moved(stage: &Stage) -> Result<(Value, Value)> {
    let words = ["migrate", VM, "--to", "BRAVO", "--json", "--limit", "1MiB/s"];
    let moving = stage.alpha.vmferry_start(&words)?;
    let at_bravo = || -> Result<Option<Value>> {
        let all = stage.bravo.api("/v1/migrations")?;
        Ok(all.as_array().and_then(|all| all.iter().find(|p| p["role"] == "destination")).cloned())
    };
    wait_for("bytes at the destination", LONG, || {
        let Some(progress) = at_bravo()? else { return Ok(None) };
        let bytes = progress["disks"][0]["stream_bytes"].as_u64().unwrap_or(0);
        Ok((progress["phase"] == "mirror" && bytes > 0).then_some(()))
    })?;
    stage.sees("in-migration", "in-migration")?;
    let watching = stage.bravo.vmferry_start(&["watch", VM])?;
    let lifted = stage.alpha.vmferry(&["limit", VM, "--rate", "none"])?;
    ensure!(lifted.code == 0, "{lifted:?}");
    let outcome = moving.wait(LONG)?;
    ensure!(outcome.code == 0, "{outcome:?}");
    let last = outcome.stdout.lines().last().context("no line of JSON")?;
    let watched = watching.wait(LONG)?;
    ensure!(watched.code == 0, "{watched:?}");
    ensure!(watched.stdout.contains("web1 runs on bravo, moved from alpha ("), "{watched:?}");
    ensure!(watched.stdout.contains("the guest stood still for"), "{watched:?}");
    ensure!(watched.stderr.contains("web1 from alpha: mirror"), "{watched:?}");
    proof::qemu_is_clean(&mut stage.on_bravo.qmp()?)?;
    Ok((serde_json::from_str(last)?, at_bravo()?.context("bravo has forgotten it")?))
}

fn the_same_is_said_at_both(source: &Value, destination: &Value) -> Result<()> {
    for path in
        ["/id", "/vm", "/phase", "/outcome/result", "/downtime", "/ram/total_bytes", "/disks/0/total_bytes"]
    {
        let (there, here) = (field(source, path)?, field(destination, path)?);
        ensure!(there == here, "{path}: {there} at the source, {here} at the destination");
    }
    ensure!(destination["host"] == "bravo" && destination["peer"] == "alpha", "{destination}");
    ensure!(source["host"] == "alpha" && source["peer"] == "bravo", "{source}");
    ensure!(field(destination, "/downtime/total_ms")?.as_u64() > Some(0), "{destination}");
    let bytes = |p: &Value| -> u64 {
        let disks = p["disks"].as_array().into_iter().flatten().filter_map(|d| d["stream_bytes"].as_u64());
        disks.sum::<u64>() + p["ram"]["stream_bytes"].as_u64().unwrap_or(0)
    };
    let (sent, came) = (bytes(source), bytes(destination));
    ensure!(
        came > sent / 10 * 9 && came <= sent + sent / 10,
        "{sent} bytes at the source, {came} at the destination"
    );
    Ok(())
}

/// Every phase, with VM and migration, in both agents' logs.
fn logged(stage: &Stage) -> Result<()> {
    for (agent, phases) in [
        (&stage.alpha, &["prepare", "mirror", "precopy", "switchover", "device", "hand-over", "confirm"][..]),
        (&stage.bravo, &["prepare", "mirror", "precopy", "switchover", "device", "hand-over", "confirm"]),
    ] {
        let log = fs::read_to_string(agent.log())?;
        let of_vm: Vec<&str> =
            log.lines().filter(|l| l.contains(&format!("vm=\"{VM}\"")) && l.contains("migration=")).collect();
        for phase in phases {
            let word = format!("phase=\"{phase}\"");
            let said = of_vm.iter().any(|l| l.contains(" phase ") && l.contains(&word));
            ensure!(said, "{phase} is not in the log of {}: {of_vm:#?}", agent.host().name);
        }
        ensure!(
            of_vm.iter().any(|l| l.contains("migration ends")),
            "no end on {}: {of_vm:#?}",
            agent.host().name
        );
    }
    Ok(())
}
