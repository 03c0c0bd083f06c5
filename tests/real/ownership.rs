//! Who owns the VM, for eight VMs at once whose destination is lost at their hand-over: what is
//! undecided is shown soon, an operator decides within moments while the peer is being dialed, and
//! a decision whose answer nobody waits for is never carried out later.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::faults::Migration;
use crate::support::agent::PORT;
use crate::support::net::Way;
use crate::support::process::{LONG, Outcome, SHORT, run, wait_for};
use crate::support::vm::write_script;
use crate::support::{
    Agent, AgentSpec, Credentials, DiskFormat, Lab, Net, Version, Vm, VmEntry, VmSpec, Volume, with_lab,
};

const GUESTS: usize = 8;
/// `recover` waits this long for a peer. One after the other would be eight times that.
const PEER_S: u64 = 6;
/// Half of what one after the other would take.
const AT_ONCE: Duration = Duration::from_secs(PEER_S * GUESTS as u64 / 2);
/// A decision is not held up by a peer that is dialed, which takes 5 s and more for each VM.
const DECIDED_WITHIN: Duration = Duration::from_secs(20);
/// For something to happen that must not.
const NEVER_FOR: Duration = Duration::from_secs(8);

/// Two hosts, and guests that have nothing but a firmware: they run, and cost next to nothing.
struct Herd {
    net: Net,
    alpha: Agent,
    bravo: Agent,
    guests: Vec<(Vm, Vm)>,
    /// `before_start` at bravo waits while it is there.
    gate: PathBuf,
    /// With alpha's journals.
    _state: Volume,
}

impl Herd {
    fn set_up(lab: &Lab) -> Result<Self> {
        let net = lab.two_hosts()?;
        net.only_port(PORT, &[Way::ToBravo])?;
        let gate = net.bravo.dir.join("gate");
        let hook = net.bravo.dir.join("hook");
        fs::write(&gate, "")?;
        let waits = format!("while [ -e '{}' ]; do sleep 0.2; done", gate.display());
        write_script(&hook, &format!("#!/bin/sh\ntouch \"{}.$VMFERRY_VM\"\n{waits}\n", gate.display()))?;
        let credentials = Credentials::create(&lab.paths, lab.dir())?;
        let (on_alpha, on_bravo) = (credentials.issue("alpha")?, credentials.issue("bravo")?);
        let deadlines = format!(
            "[deadlines]\ndead_peer_s = 5\nresume_s = 15\nresume_paused_s = 10\nundecided_s = 2\norder_s = 10\n\
             recover_s = {PEER_S}\n"
        );
        let mut source = AgentSpec { end_lines: deadlines, ..AgentSpec::default() }.peer(&net.bravo);
        let mut destination =
            AgentSpec { end_lines: "[deadlines]\nhook_s = 600\n".into(), ..AgentSpec::default() }
                .peer(&net.alpha);
        let mut guests = Vec::new();
        for number in 0..GUESTS {
            let guest = (bare(lab, &net, true, number)?, bare(lab, &net, false, number)?);
            source = source.vm(VmEntry::of(&guest.0));
            destination = destination.vm(VmEntry::of(&guest.1).with_hook(&hook));
            guests.push(guest);
        }
        let _state = Volume::mount(&net.alpha.dir.join("state"), 8)?;
        let alpha = Agent::start(&lab.paths, &net.alpha, &source, &on_alpha)?;
        let bravo = Agent::start(&lab.paths, &net.bravo, &destination, &on_bravo)?;
        for (source, _) in &guests {
            run(net.alpha.command(source.start_script()).arg("boot"), SHORT)?;
        }
        Ok(Self { net, alpha, bravo, guests, gate, _state })
    }

    /// All are handed over, none is started, and then the destination's host is lost behind a black
    /// hole: nobody answers, not even with a reset.
    fn lose_the_destination(&mut self) -> Result<Vec<Migration>> {
        let begin = |(vm, _): &(Vm, Vm)| Migration::begin(&self.alpha, &vm.spec.name, "bravo", &[]);
        let migrations = self.guests.iter().map(begin).collect::<Result<Vec<_>>>()?;
        for (vm, _) in &self.guests {
            let reached = PathBuf::from(format!("{}.{}", self.gate.display(), vm.spec.name));
            wait_for(&format!("the hand-over of {}", vm.spec.name), LONG, || {
                Ok(reached.exists().then_some(()))
            })?;
        }
        self.net.cut()?;
        self.bravo.kill()?;
        self.guests.iter().try_for_each(|(_, vm)| vm.kill())?;
        Ok(migrations)
    }

    fn status(&self, guest: usize) -> Result<String> {
        self.guests[guest].0.qmp()?.status()
    }

    /// The decisions on alpha's disk over a migration.
    fn forced(&self, migration: &Migration) -> Result<Vec<Value>> {
        let folder = self.alpha.host().dir.join("state/migrations");
        let text = fs::read_to_string(folder.join(format!("{}.source.journal", migration.id)))?;
        let lines = text.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>()?;
        Ok(lines.into_iter().filter(|line| line["record"].get("forced").is_some()).collect())
    }

    /// Sends a decision, as a program does; the answer comes there.
    fn decide(&self, migration: &Migration, body: &str) -> Result<UnixStream> {
        let mut stream = UnixStream::connect(self.alpha.socket())?;
        let head = format!("POST /v1/recover/{} HTTP/1.1\r\nHost: vmferry\r\n", migration.id);
        let kind = format!("Content-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len());
        write!(stream, "{head}{kind}{body}")?;
        Ok(stream)
    }

    fn recover(&self, words: &[&str]) -> Result<(Outcome, Duration)> {
        let since = Instant::now();
        let outcome = self.alpha.vmferry(&[&["recover"], words].concat())?;
        Ok((outcome, since.elapsed()))
    }
}

/// A guest without a kernel.
pub(crate) fn bare(lab: &Lab, net: &Net, on_alpha: bool, number: usize) -> Result<Vm> {
    let spec = VmSpec {
        disks: vec![DiskFormat::Raw],
        disk_mib: 1,
        memory_mib: 64,
        ..VmSpec::new(&format!("web{number}"), Version::V10)
    };
    let vm = Vm::define(&lab.paths, if on_alpha { &net.alpha } else { &net.bravo }, &spec)?;
    let script = fs::read_to_string(vm.start_script())?;
    let (before, rest) = script.split_once("'-kernel'").context("no kernel")?;
    let (_, after) = rest.split_once("'-blockdev'").context("no disk")?;
    write_script(&vm.start_script(), &format!("{before}'-blockdev'{after}"))?;
    Ok(vm)
}

fn said(outcome: &Outcome) -> String {
    format!("{}: {}{}", outcome.code, outcome.stdout, outcome.stderr)
}

#[test]
fn eight_vms_whose_destination_is_lost_are_decided() -> Result<()> {
    with_lab("eight_vms_whose_destination_is_lost_are_decided", |lab| {
        let mut herd = Herd::set_up(lab)?;
        let migrations = herd.lose_the_destination()?;
        let [by_hand, left, twice, stale, frozen, rest @ ..] = &migrations[..] else { unreachable!() };
        all_are_shown(&herd, &migrations)?;
        taken_while_the_peer_is_dialed(&herd, by_hand)?;
        never_later_than_its_asker(&herd, left)?;
        one_of_two(&herd, twice)?;
        void_when_it_is_stale(&herd, stale)?;
        unknown_is_not_refused(&herd, frozen)?;
        stops_and_shows_them_again(&mut herd, rest)?;
        fs::remove_file(&herd.gate)?;
        Ok(())
    })
}

fn all_are_shown(herd: &Herd, migrations: &[Migration]) -> Result<()> {
    wait_for("all to be shown as undecided", LONG, || {
        let undecided = |m: &Migration| Ok(m.now(&herd.alpha)?["outcome"]["result"] == "undecided");
        let all: Result<Vec<bool>> = migrations.iter().map(undecided).collect();
        Ok(all?.iter().all(|is| *is).then_some(()))
    })?;
    let (outcome, took) = herd.recover(&["--look"])?;
    ensure!(outcome.code == 4 && outcome.stdout.matches("UNDECIDED").count() == GUESTS, "{}", said(&outcome));
    ensure!(outcome.stdout.matches("cannot be reached").count() == GUESTS, "{}", said(&outcome));
    ensure!(outcome.stdout.matches("the VM is  not known").count() == GUESTS, "{}", said(&outcome));
    ensure!(took < AT_ONCE, "{took:?} for {GUESTS} peers that are silent");
    stand_still(herd, 0)?;
    let unknown = uuid_of_nobody();
    let (outcome, _) = herd.recover(&[&unknown])?;
    ensure!(outcome.code == 2 && said(&outcome).contains("no journal of migration"), "{}", said(&outcome));
    Ok(())
}

fn stand_still(herd: &Herd, from: usize) -> Result<()> {
    for guest in from..GUESTS {
        let status = herd.status(guest)?;
        ensure!(status == "postmigrate", "web{guest} is {status}");
    }
    Ok(())
}

fn uuid_of_nobody() -> String {
    "00000000-0000-4000-8000-000000000000".to_owned()
}

fn taken_while_the_peer_is_dialed(herd: &Herd, migration: &Migration) -> Result<()> {
    let (outcome, took) = herd.recover(&[&migration.id, "--force", "here", "--yes"])?;
    ensure!(outcome.stdout.contains("decided: web0 is this host's"), "{}", said(&outcome));
    ensure!(took < DECIDED_WITHIN, "{took:?} for a decision");
    ensure!(herd.forced(migration)?.len() == 1);
    runs(herd, 0)
}

fn runs(herd: &Herd, guest: usize) -> Result<()> {
    wait_for("the guest to run here again", SHORT, || Ok((herd.status(guest)? == "running").then_some(())))
}

/// Whoever decides goes away soon. Whatever has not been decided by then never is.
fn never_later_than_its_asker(herd: &Herd, migration: &Migration) -> Result<()> {
    let mut asker = herd.decide(migration, r#"{"force":"here"}"#)?;
    // Longer than a decision is good for.
    asker.set_read_timeout(Some(Duration::from_secs(12)))?;
    let mut answer = [0; 12];
    let answered = asker.read_exact(&mut answer).is_ok();
    drop(asker);
    ensure!(!answered || answer.ends_with(b"202"), "{}", String::from_utf8_lossy(&answer));
    let then = herd.forced(migration)?.len();
    ensure!(!answered || then == 1, "it is said to be decided, and is not on the disk");
    // What waits in a queue is taken when the peer has been asked: 5 s for each VM at most.
    std::thread::sleep(if answered { Duration::from_secs(1) } else { AT_ONCE * 2 });
    ensure!(herd.forced(migration)?.len() == then, "decided when nobody waited for it any more");
    if answered { runs(herd, 1) } else { Ok(()) }
}

/// Two operators decide at the same time.
fn one_of_two(herd: &Herd, migration: &Migration) -> Result<()> {
    let start = |side| herd.alpha.vmferry_start(&["recover", &migration.id, "--force", side, "--yes"]);
    let (here, there) = (start("here")?, start("there")?);
    let (here, there) = (here.wait(LONG)?, there.wait(LONG)?);
    let decided = |outcome: &Outcome| outcome.stdout.contains("decided: web2");
    ensure!(decided(&here) != decided(&there), "{} and {}", said(&here), said(&there));
    let forced = herd.forced(migration)?;
    let side = if decided(&here) { "here" } else { "there" };
    ensure!(forced.len() == 1 && forced[0]["record"]["forced"]["side"] == side, "{forced:?}");
    if decided(&here) {
        return runs(herd, 2);
    }
    migration.ended(&herd.alpha)?;
    ensure!(herd.status(2)? != "running");
    Ok(())
}

/// A decision that reaches an agent which stood still is void once its time has passed.
fn void_when_it_is_stale(herd: &Herd, migration: &Migration) -> Result<()> {
    herd.alpha.signal(Signal::SIGSTOP)?;
    let pid = herd.alpha.pid().context("no agent")?;
    wait_for("the agent to stand still", SHORT, || {
        Ok(fs::read_to_string(format!("/proc/{pid}/stat"))?.contains(") T ").then_some(()))
    })?;
    let until = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
    let _asker = herd.decide(migration, &format!(r#"{{"force":"here","until":{until}}}"#))?;
    std::thread::sleep(Duration::from_secs(3));
    herd.alpha.signal(Signal::SIGCONT)?;
    std::thread::sleep(NEVER_FOR);
    ensure!(herd.forced(migration)?.is_empty(), "decided after its time");
    ensure!(herd.status(3)? == "postmigrate");
    Ok(())
}

/// The disk does not answer: nobody may think that nothing was decided.
fn unknown_is_not_refused(herd: &Herd, migration: &Migration) -> Result<()> {
    let folder = herd.alpha.host().dir.join("state");
    let freeze = |flag| run(Command::new("fsfreeze").arg(flag).arg(&folder), SHORT).map(drop);
    freeze("-f")?;
    let forced = herd.recover(&[&migration.id, "--force", "here", "--yes"]);
    freeze("-u")?;
    let (outcome, _) = forced?;
    ensure!(outcome.code == 4 && !outcome.stdout.contains("decided"), "{}", said(&outcome));
    for words in ["NOT KNOWN", "--look", "do not decide the other way"] {
        ensure!(outcome.stderr.contains(words), "{words} is missing: {}", said(&outcome));
    }
    ensure!(!outcome.stderr.contains("nothing was changed"), "{}", said(&outcome));
    // And here it was taken after all.
    runs(herd, 4)?;
    ensure!(herd.forced(migration)?.len() == 1);
    let (outcome, _) = herd.recover(&[&migration.id, "--look"])?;
    ensure!(outcome.code == 0 && outcome.stdout.contains("forced here"), "{}", said(&outcome));
    Ok(())
}

/// An agent does not wait for a destination that is away, and its next life shows the hand-over.
fn stops_and_shows_them_again(herd: &mut Herd, rest: &[Migration]) -> Result<()> {
    let before = fs::read_to_string(herd.alpha.log())?.len();
    herd.alpha.terminate()?;
    let log = fs::read_to_string(herd.alpha.log())?;
    let late =
        log[before..].lines().find(|line| line.contains("end in time") || line.contains("ended in time"));
    ensure!(late.is_none(), "{late:?}");
    let empty = herd.alpha.host().dir.join(format!("state/migrations/{}.source.journal", uuid_of_nobody()));
    fs::write(&empty, "")?;
    herd.alpha.restart()?;
    ensure!(!empty.exists(), "a journal that was never begun is still there");
    fs::write(&empty, "{\"n\":0,\"rec")?;
    let (outcome, _) = herd.recover(&[&uuid_of_nobody(), "--look"])?;
    ensure!(
        outcome.code == 3 && outcome.stdout.contains("never began") && empty.exists(),
        "{}",
        said(&outcome)
    );
    let (outcome, _) = herd.recover(&[&uuid_of_nobody()])?;
    ensure!(
        outcome.code == 2 && said(&outcome).contains("no journal") && !empty.exists(),
        "{}",
        said(&outcome)
    );
    for migration in rest {
        let now = migration.now(&herd.alpha)?;
        ensure!(["hand-over", "undecided"].contains(&now["phase"].as_str().unwrap_or_default()), "{now}");
        ensure!(now["outcome"].is_null() || now["outcome"]["result"] == "undecided", "{now}");
    }
    stand_still(herd, 5)?;
    Ok(())
}
