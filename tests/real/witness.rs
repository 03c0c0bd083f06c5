//! A real etcd as tie-breaker, with TLS of an authority of its own: either host lost for good in the hand-over, and the
//! guest runs again where it is whole, without an operator; etcd killed in the pause; a witness that one host lacks or
//! nobody reaches is refused before anything begins; one that swallows what it is asked; an agent that is replaced while
//! only the witness knows.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::faults::{Migration, Plan, Reach, Stage};
use crate::ownership::bare;
use crate::support::agent::PORT;
use crate::support::net::Way;
use crate::support::process::{LONG, Outcome, SHORT, run, wait_for};
use crate::support::{Agent, AgentSpec, Credentials, Etcd, Host, Lab, Net, Vm, VmEntry, proof, with_lab};

const VM: &str = "web0";
/// Hosts that are gone are given up soon.
const DEADLINES: &str = "[deadlines]\ndead_peer_s = 5\nresume_s = 8\nresume_paused_s = 6\nundecided_s = 2\n\
                         order_s = 3\nrecover_s = 3\nhandover_s = 8\n";
/// How long the witness is waited for where it answers.
const ANSWER_S: u64 = 5;

/// Two hosts, an etcd between them, and a guest that has nothing but a firmware.
struct Two {
    net: Net,
    etcd: Etcd,
    alpha: Agent,
    bravo: Agent,
    source: Vm,
    destination: Vm,
}

impl Two {
    /// `bravo_table`: bravo's `[witness]`, from the one that fits.
    fn set_up(lab: &Lab, answer_s: u64, bravo_table: impl Fn(String) -> String) -> Result<Self> {
        let net = lab.two_hosts()?;
        net.only_port(PORT, &[Way::ToBravo])?;
        let etcd = Etcd::start(lab, &net, answer_s)?;
        let (source, destination) = (bare(lab, &net, true, 0)?, bare(lab, &net, false, 0)?);
        let credentials = Credentials::create(&lab.paths, lab.dir())?;
        let spec = |peer: &Host, vm: &Vm, table: String| {
            let end_lines = format!("{DEADLINES}{table}");
            AgentSpec { end_lines, ..AgentSpec::default() }.peer(peer).vm(VmEntry::of(vm))
        };
        let on_alpha = spec(&net.bravo, &source, etcd.table(&net.alpha));
        let on_bravo = spec(&net.alpha, &destination, bravo_table(etcd.table(&net.bravo)));
        let alpha = Agent::start(&lab.paths, &net.alpha, &on_alpha, &credentials.issue("alpha")?)?;
        let bravo = Agent::start(&lab.paths, &net.bravo, &on_bravo, &credentials.issue("bravo")?)?;
        run(net.alpha.command(source.start_script()).arg("boot"), SHORT)?;
        Ok(Self { net, etcd, alpha, bravo, source, destination })
    }

    fn migrate(&self, more: &[&str]) -> Result<Outcome> {
        self.alpha.vmferry(&[&["migrate", VM, "--to", "bravo"], more].concat())
    }

    /// It was refused for the witness, the guest runs on, and bravo has begun nothing.
    fn is_refused(&self, words: &str) -> Result<()> {
        let checked = self.alpha.vmferry(&["check", VM, "--to", "bravo"])?;
        ensure!(checked.code != 0 && said(&checked).contains(words), "{}", said(&checked));
        let outcome = self.migrate(&[])?;
        ensure!(outcome.code != 0 && said(&outcome).contains(words), "{}", said(&outcome));
        ensure!(self.source.qmp()?.status()? == "running");
        ensure!(journals(&self.bravo)?.is_empty(), "{:?}", journals(&self.bravo)?);
        ensure!(!self.destination.is_running(), "bravo has started a QEMU");
        Ok(())
    }
}

fn said(outcome: &Outcome) -> String {
    format!("{}: {}{}", outcome.code, outcome.stdout, outcome.stderr)
}

/// The names of an agent's journals.
fn journals(agent: &Agent) -> Result<Vec<String>> {
    let files = fs::read_dir(agent.host().dir.join("state/migrations"))?.flatten();
    Ok(files.map(|file| file.file_name().to_string_lossy().into_owned()).collect())
}

fn journal(agent: &Agent, migration: &Migration, role: &str) -> Result<String> {
    let name = format!("state/migrations/{}.{role}.journal", migration.id);
    Ok(fs::read_to_string(agent.host().dir.join(name))?)
}

/// Waits until a journal has a record.
fn has_record(agent: &Agent, migration: &Migration, role: &str, record: &str) -> Result<()> {
    wait_for(&format!("\"{record}\" in {}'s journal", agent.host().name), LONG, || {
        Ok(journal(agent, migration, role).unwrap_or_default().contains(record).then_some(()))
    })
}

fn word_is(etcd: &Etcd, migration: &Migration, wanted: Option<&str>) -> Result<()> {
    wait_for(&format!("the word {wanted:?}"), LONG, || {
        Ok((etcd.word(&migration.id)?.as_deref() == wanted).then_some(()))
    })
}

fn runs(vm: &Vm) -> Result<()> {
    wait_for(&format!("{} to run on {}", vm.spec.name, vm.host_name()), LONG, || {
        let status = vm.qmp().and_then(|mut qmp| qmp.status()).unwrap_or_default();
        Ok((status == "running").then_some(()))
    })
}

/// Whether an agent's audit record has that word.
fn audited(agent: &Agent, word: &str) -> Result<bool> {
    let files = fs::read_dir(agent.host().dir.join("state/audit"))?.flatten();
    let texts = files.map(|file| fs::read_to_string(file.path()).unwrap_or_default());
    let wanted = format!("\"word\":\"{word}\"");
    Ok(texts.into_iter().any(|text| text.contains(&wanted)))
}

#[test]
fn a_guest_moves_with_a_witness_that_forgets_it_afterwards() -> Result<()> {
    with_lab("a_guest_moves_with_a_witness_that_forgets_it_afterwards", |lab| {
        let mut two = Two::set_up(lab, ANSWER_S, |table| table)?;
        let checked = two.alpha.vmferry(&["check", VM, "--to", "bravo"])?;
        ensure!(checked.code == 0 && !said(&checked).contains("witness"), "{}", said(&checked));
        ensure!(two.etcd.words()? == 0, "a check has left a word");
        let migration = Migration::begin(&two.alpha, VM, "bravo", &[])?;
        let report = migration.ended(&two.alpha)?;
        ensure!(report["outcome"]["result"] == "moved", "{report}");
        runs(&two.destination)?;
        word_is(&two.etcd, &migration, None)?;
        ensure!(audited(&two.bravo, "sealed-by-destination")?, "it is not in bravo's audit record");
        for agent in [&two.alpha, &two.bravo] {
            let metrics = agent.metrics()?;
            let answered = metrics.find("vmferry_witness_requests_total", &[("result", "answered")]);
            ensure!(answered.unwrap_or_default() >= 2.0, "{answered:?} on {}", agent.host().name);
            ensure!(metrics.find("vmferry_witness_up", &[]) == Some(1.0));
        }
        // And back, with an etcd that does not answer, does not begin: nothing is left of it.
        two.etcd.kill()?;
        let checked = two.bravo.vmferry(&["check", VM, "--to", "alpha"])?;
        ensure!(said(&checked).contains("the witness of bravo cannot be used"), "{}", said(&checked));
        ensure!(two.bravo.metrics()?.find("vmferry_witness_up", &[]) == Some(0.0));
        Ok(())
    })
}

#[test]
fn a_witness_that_only_one_host_has_is_refused_before_anything_begins() -> Result<()> {
    with_lab("a_witness_that_only_one_host_has_is_refused_before_anything_begins", |lab| {
        let two = Two::set_up(lab, ANSWER_S, |_| String::new())?;
        two.is_refused("alpha has a witness for its migrations, and bravo has none")?;
        wait_for("the word of what never began to go", LONG, || Ok((two.etcd.words()? == 0).then_some(())))
    })
}

#[test]
fn a_witness_with_another_prefix_is_refused_before_anything_begins() -> Result<()> {
    with_lab("a_witness_with_another_prefix_is_refused_before_anything_begins", |lab| {
        let mut two = Two::set_up(lab, ANSWER_S, |table| format!("{table}prefix = \"/other/\"\n"))?;
        two.is_refused("their `prefix` differs")?;
        two.etcd.kill()?;
        two.is_refused("the witness of alpha cannot be used: no endpoint of the witness answers")
    })
}

/// It was told to start the guest, and had not taken it at the witness.
#[test]
fn a_destination_that_is_lost_before_it_has_taken_the_guest_loses_it() -> Result<()> {
    with_lab("a_destination_that_is_lost_before_it_has_taken_the_guest_loses_it", |lab| {
        let mut two = Two::set_up(lab, ANSWER_S, |table| table)?;
        // Bravo agrees, and then does not reach it.
        let gate = two.destination.start_script();
        let held = hold(&gate)?;
        let migration = Migration::begin(&two.alpha, VM, "bravo", &[])?;
        wait_for("bravo to have agreed", LONG, || Ok(held.reached().then_some(())))?;
        two.etcd.joined(&two.net.bravo, false)?;
        held.open()?;
        has_record(&two.bravo, &migration, "destination", "\"starting\"")?;
        word_is(&two.etcd, &migration, Some("offered"))?;
        two.net.cut()?;
        two.bravo.kill()?;
        two.destination.kill()?;
        // By itself: nobody decides anything.
        word_is(&two.etcd, &migration, Some("sealed-by-source"))?;
        runs(&two.source)?;
        let report = migration.ended(&two.alpha)?;
        ensure!(report["outcome"]["result"] == "failed", "{report}");
        ensure!(audited(&two.alpha, "sealed-by-source")?, "it is not in alpha's audit record");
        let looked = two.alpha.vmferry(&["recover", "--look"])?;
        ensure!(!looked.stdout.contains("UNDECIDED"), "{}", said(&looked));
        // It was not lost for good after all: its journal says that it was about to start the guest.
        two.net.restore()?;
        two.etcd.joined(&two.net.bravo, true)?;
        two.bravo.restart()?;
        has_record(&two.bravo, &migration, "destination", "\"never-ran\"")?;
        ensure!(!two.destination.is_running(), "bravo has started it");
        ensure!(two.source.qmp()?.status()? == "running");
        Ok(())
    })
}

/// It was told to start the guest and does not reach the witness; then its source is lost for good as well. It asks on,
/// however long that takes.
#[test]
fn a_destination_that_was_told_to_start_asks_on_when_its_source_is_lost() -> Result<()> {
    with_lab("a_destination_that_was_told_to_start_asks_on_when_its_source_is_lost", |lab| {
        // So many questions are asked in vain that each must be given up soon.
        let mut two = Two::set_up(lab, 1, |table| table)?;
        let held = hold(&two.destination.start_script())?;
        let migration = Migration::begin(&two.alpha, VM, "bravo", &[])?;
        wait_for("bravo to have agreed", LONG, || Ok(held.reached().then_some(())))?;
        two.etcd.joined(&two.net.bravo, false)?;
        held.open()?;
        has_record(&two.bravo, &migration, "destination", "\"starting\"")?;
        two.alpha.kill()?;
        two.source.kill()?;
        // A question begins a second after the one before: more of them than a source would be waited for.
        let unanswered = || -> Result<f64> {
            let metrics = two.bravo.metrics()?;
            Ok(metrics
                .find("vmferry_witness_requests_total", &[("result", "unanswered")])
                .unwrap_or_default())
        };
        let before = unanswered()?;
        wait_for("bravo to ask on", LONG, || Ok((unanswered()? >= before + 14.0).then_some(())))?;
        let looked = two.bravo.vmferry(&["recover", "--look"])?;
        let words = "whether it has taken it back the witness has not said";
        ensure!(looked.stdout.contains(words), "{}", said(&looked));
        two.etcd.joined(&two.net.bravo, true)?;
        word_is(&two.etcd, &migration, Some("sealed-by-destination"))?;
        runs(&two.destination)?;
        let report = migration.ended(&two.bravo)?;
        ensure!(report["outcome"]["result"] == "moved", "{report}");
        Ok(())
    })
}

/// A start script that waits before it does its work.
struct Held {
    closed: std::path::PathBuf,
    reached: std::path::PathBuf,
}

impl Held {
    fn reached(&self) -> bool {
        self.reached.exists()
    }

    fn open(&self) -> Result<()> {
        Ok(fs::remove_file(&self.closed)?)
    }
}

fn hold(script: &std::path::Path) -> Result<Held> {
    let text = fs::read_to_string(script)?;
    let held = Held { closed: script.with_extension("closed"), reached: script.with_extension("reached") };
    fs::write(&held.closed, "")?;
    let (first, rest) = text.split_once('\n').context("a script of one line")?;
    let (closed, reached) = (held.closed.display(), held.reached.display());
    let waits = format!("touch '{reached}'\nwhile [ -e '{closed}' ]; do sleep 0.05; done\n");
    crate::support::vm::write_script(script, &format!("{first}\n{waits}{rest}"))?;
    Ok(held)
}

/// First etcd is killed while the guest is paused. In the next migration the source's agent is lost when it has handed over
/// and before it has said so to anybody but the witness, of which nobody hears: it comes back, and takes the guest back.
/// In the last one the source is lost for good, and so for a while is etcd.
#[test]
fn etcd_or_the_source_is_lost_in_the_pause_and_both_are() -> Result<()> {
    with_lab("etcd_or_the_source_is_lost_in_the_pause_and_both_are", |lab| {
        let deadlines = "resume_s = 8\nresume_paused_s = 6\nhandover_s = 8\n";
        let plan = Plan {
            witness: Some(ANSWER_S),
            deadlines,
            undecided_s: 2,
            state_volume_mib: Some(16),
            ..Plan::ORDINARY
        };
        let mut stage = Stage::set_up(lab, plan)?;
        rolled_back_without_an_etcd(&mut stage)?;
        taken_back_without_an_etcd(&mut stage)?;
        taken_by_the_destination(&mut stage)
    })
}

fn etcd(stage: &mut Stage) -> Result<&mut Etcd> {
    stage.witness.as_mut().context("a stage without a witness")
}

fn rolled_back_without_an_etcd(stage: &mut Stage) -> Result<()> {
    let migration = stage.reach(Reach::Device)?;
    etcd(stage)?.kill()?;
    stage.calm()?;
    let report = migration.ended(&stage.alpha)?;
    ensure!(report["outcome"]["result"] == "failed", "{report}");
    let cause = report["outcome"]["cause"].as_str().unwrap_or_default();
    ensure!(cause.contains("the witness does not let the guest run here"), "{report}");
    has_record(&stage.bravo, &migration, "destination", "\"never-ran\"")?;
    runs(&stage.source)?;
    stage.source.wait_more(50)?;
    ensure!(!stage.destination.is_running(), "bravo's QEMU is still there");
    etcd(stage)?.start_again()
}

/// The source hands over, and the link is cut before it says so.
fn handed_over_and_cut(stage: &mut Stage) -> Result<Migration> {
    let migration = stage.reach(Reach::Device)?;
    let state = stage.alpha.host().dir.join("state");
    let freeze = |flag| run(Command::new("fsfreeze").arg(flag).arg(&state), SHORT).map(drop);
    // Its `handed-over` does not come to the disk, and all of the guest to bravo.
    freeze("-f")?;
    let arrived = stage.calm_network().and_then(|()| {
        wait_for("the whole guest to be at bravo", LONG, || {
            Ok((stage.destination.qmp()?.status()? == "paused").then_some(()))
        })?;
        // Bravo has said so, and alpha is about to hand over.
        wait_for("alpha to hear of that", LONG, || {
            Ok((migration.now(&stage.alpha)?["phase"] == "hand-over").then_some(()))
        })
    });
    let cut = stage.net.cut();
    freeze("-u")?;
    arrived.and(cut)?;
    // Whatever alpha says to bravo from here on is lost.
    word_is(etcd(stage)?, &migration, Some("offered"))?;
    Ok(migration)
}

/// Waits until bravo says that its source is away, and that the witness has not said whose the guest is.
fn is_alone(stage: &Stage) -> Result<()> {
    wait_for("bravo to be alone with the guest", LONG, || {
        let looked = stage.bravo.vmferry(&["recover", "--look"])?;
        let words = "whether it has handed the guest over the witness has not said";
        Ok(looked.stdout.contains(words).then_some(()))
    })
}

fn taken_back_without_an_etcd(stage: &mut Stage) -> Result<()> {
    let migration = handed_over_and_cut(stage)?;
    stage.alpha.kill()?;
    etcd(stage)?.kill()?;
    is_alone(stage)?;
    stage.net.restore()?;
    stage.alpha.restart()?;
    runs(&stage.source)?;
    has_record(&stage.bravo, &migration, "destination", "\"never-ran\"")?;
    stage.source.wait_more(50)?;
    ensure!(!stage.destination.is_running(), "bravo's QEMU is still there");
    etcd(stage)?.start_again()
}

fn taken_by_the_destination(stage: &mut Stage) -> Result<()> {
    let migration = handed_over_and_cut(stage)?;
    stage.alpha.kill()?;
    stage.source.kill()?;
    etcd(stage)?.kill()?;
    is_alone(stage)?;
    // What a restart for an upgrade does.
    stage.bravo.take_over()?;
    is_alone(stage)?;
    etcd(stage)?.start_again()?;
    word_is(etcd(stage)?, &migration, Some("sealed-by-destination"))?;
    runs(&stage.destination)?;
    has_record(&stage.bravo, &migration, "destination", "\"runs\"")?;
    ensure!(audited(&stage.bravo, "sealed-by-destination")?, "it is not in bravo's audit record");
    let report = migration.ended(&stage.bravo)?;
    ensure!(report["outcome"]["result"] == "moved", "{report}");
    stage.destination.wait_more(50)?;
    proof::guest_continued(&stage.source, &stage.destination)?;
    stage.destination.qmp()?.query("stop")?;
    proof::disks_whole(&stage.destination)
}

/// What the witness is asked is lost on the way, and takes longer each time than the destination would be waited for.
#[test]
fn a_source_asks_its_destination_on_while_the_witness_is_silent() -> Result<()> {
    with_lab("a_source_asks_its_destination_on_while_the_witness_is_silent", |lab| {
        let deadlines = "resume_s = 8\nresume_paused_s = 4\n";
        let plan = Plan { witness: Some(5), deadlines, undecided_s: 2, ..Plan::ORDINARY };
        let mut stage = Stage::set_up(lab, plan)?;
        let migration = stage.reach(Reach::HandOver)?;
        etcd(&mut stage)?.stands_still(true)?;
        stage.net.cut()?;
        stage.hook().open();
        runs(&stage.destination)?;
        wait_for("alpha to have asked the witness in vain", LONG, || {
            let looked = stage.alpha.vmferry(&["recover", "--look"])?;
            Ok(looked.stdout.contains("The witness: ").then_some(()))
        })?;
        stage.net.restore()?;
        wait_for("alpha to hear that the guest runs", LONG, || {
            Ok((migration.now(&stage.alpha)?["outcome"]["result"] == "moved").then_some(()))
        })?;
        stage.source.wait_ended()?;
        stage.destination.wait_more(50).map(drop)
    })
}
