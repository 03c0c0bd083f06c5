//! The two tables of bulk: a disk's mirror and the copy of RAM, each by vmferry, by QEMU's own TLS
//! and in clear.

use anyhow::{Context, Result};

use crate::by_hand::{ByHand, DOWNTIME_LIMIT_MS, Tls};
use crate::guest::Guest;
use crate::migration::Migration;
use crate::monitor::{Monitor, Sign};
use crate::report::Section;
use crate::rounds::Rounds;
use crate::stage::{Stage, Used};

/// Who copies, in the order of the table: what all are compared to comes first.
const NAMES: [&str; 3] = ["clear TCP", "QEMU's own TLS", "vmferry"];
const CLEAR: usize = 0;
const TLS: usize = 1;
const VMFERRY: usize = 2;

/// What is copied, and the events between which it is.
struct Copied {
    part: Part,
    begins: Sign,
    ends: Sign,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Disk,
    Ram,
}

const DISK: Copied =
    Copied { part: Part::Disk, begins: Sign::job("created"), ends: Sign::new("BLOCK_JOB_READY") };
const RAM: Copied =
    Copied { part: Part::Ram, begins: Sign::migration("setup"), ends: Sign::migration("completed") };

/// One copy.
#[derive(Clone, Copy)]
struct Sample {
    seconds: f64,
    gib: f64,
    used: Used,
}

impl Sample {
    fn cpu_per_gib(&self) -> f64 {
        (self.used.agents + self.used.qemus) / self.gib
    }
}

/// A disk.
pub(crate) fn disk(stage: &Stage, rounds: usize, mib: u64) -> Result<Section> {
    let found = measure(stage, &stage.disk, &DISK, rounds, mib)?;
    let what = format!(
        "A raw disk of {mib} MiB of content that cannot be shortened, to an empty file; the guest is \
         paused. From the creation of the mirror's job to `BLOCK_JOB_READY`: vmferry's is that of its \
         phase `mirror` without what comes before the job. The same mirror and the same NBD options for \
         all. {}",
        asked()
    );
    let again = format!("--tables disk --rounds {rounds} --disk-mib {mib}");
    Ok(Section { title: "A disk".to_owned(), what, again, table: table(&found) })
}

/// RAM.
pub(crate) fn ram(stage: &Stage, rounds: usize, mib: u64) -> Result<Section> {
    let found = measure(stage, &stage.ram, &RAM, rounds, mib)?;
    let what = format!(
        "A guest without disks and with {mib} MiB of RAM, every page of it random bytes, in one stream; \
         the guest is paused, so that each page goes once. From `MIGRATION setup` to `completed` at the \
         source, that is with the switchover. No limit of bandwidth. {}",
        asked()
    );
    let again = format!("--tables ram --rounds {rounds} --ram-mib {mib}");
    Ok(Section { title: "RAM".to_owned(), what, again, table: table(&found) })
}

fn asked() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!(
        "Asked of vmferry: faster and cheaper than QEMU's TLS, and at most 1.10 of the time in clear where \
         a core is free for each agent (here {cores} cores are all there is for four processes). QEMU's \
         TLS is 1.3, mutual, with AES-128-GCM like vmferry's and its certificates. Processor time is that \
         of both QEMUs and both agents, user and system."
    )
}

fn measure(stage: &Stage, guest: &Guest, copied: &Copied, rounds: usize, mib: u64) -> Result<Rounds<Sample>> {
    guest.stock(&stage.net, &stage.memory)?;
    #[allow(clippy::cast_precision_loss)]
    let gib = mib as f64 / 1024.0;
    let names = NAMES.map(str::to_owned).to_vec();
    let found = Rounds::take(names, rounds, |contender| {
        guest.fresh(&stage.net, &stage.memory)?;
        let sample = match contender {
            VMFERRY => through_vmferry(stage, guest, copied, gib),
            TLS => by_hand(stage, guest, copied, gib, Some(tls(stage))),
            _ => by_hand(stage, guest, copied, gib, None),
        }?;
        guest.is_copied(&stage.net, &stage.memory)?;
        eprintln!("  {:.2} s, {:.2} CPU s/GiB", sample.seconds, sample.cpu_per_gib());
        Ok(sample)
    });
    guest.clear(&stage.net, &stage.memory)?;
    found
}

fn tls(stage: &Stage) -> Tls {
    Tls { dirs: stage.qemu_tls.clone(), destination: "bravo" }
}

/// A whole migration, watched through the monitor that the agent does not use.
fn through_vmferry(stage: &Stage, guest: &Guest, copied: &Copied, gib: f64) -> Result<Sample> {
    let mut source = Monitor::of(&guest.source)?;
    let migration = Migration::begin(&stage.alpha, guest.name, "bravo", &["--keep-source"])?;
    let watched = watch(stage, guest, copied, &mut source, gib);
    let sample = watched.with_context(|| format!("{:?}", migration.now(&stage.alpha)));
    stage.moved(&migration, &stage.alpha)?;
    sample
}

fn watch(stage: &Stage, guest: &Guest, copied: &Copied, source: &mut Monitor, gib: f64) -> Result<Sample> {
    let begun = source.wait(copied.begins)?;
    let before = stage.used(guest)?;
    let ended = source.wait(copied.ends)?;
    let used = stage.used(guest)?.since(before);
    Ok(Sample { seconds: ended - begun, gib, used })
}

fn by_hand(stage: &Stage, guest: &Guest, copied: &Copied, gib: f64, tls: Option<Tls>) -> Result<Sample> {
    let mut hand = ByHand::begin(&guest.source, &guest.destination, &stage.net.bravo.v4, tls)?;
    let is_disk = copied.part == Part::Disk;
    if is_disk {
        hand.prepare_disk()?;
    } else {
        hand.prepare_ram(DOWNTIME_LIMIT_MS)?;
    }
    let before = stage.used(guest)?;
    if is_disk {
        hand.mirror()?;
    } else {
        hand.migrate()?;
        hand.go_on()?;
    }
    let begun = hand.source.wait(copied.begins)?;
    let ended = hand.source.wait(copied.ends)?;
    let used = stage.used(guest)?.since(before);
    Ok(Sample { seconds: ended - begun, gib, used })
}

fn table(all: &Rounds<Sample>) -> String {
    let mut table = String::from(
        "| contender | time to clear | CPU to clear | time to QEMU's TLS | CPU to QEMU's TLS | seconds | MiB/s | CPU s/GiB | QEMUs' | agents' |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    all.rows(&mut table, |index| {
        let of = |value: fn(&Sample) -> f64| all.spread(index, value);
        format!(
            "{} | {} | {} | {} | {} | {:.0} | {} | {:.2} | {:.2}",
            all.ratio_to(CLEAR, index, |s| s.seconds),
            all.ratio_to(CLEAR, index, Sample::cpu_per_gib),
            all.ratio_to(TLS, index, |s| s.seconds),
            all.ratio_to(TLS, index, Sample::cpu_per_gib),
            of(|s| s.seconds).shown(2),
            of(|s| s.gib * 1024.0 / s.seconds).median,
            of(Sample::cpu_per_gib).shown(2),
            of(|s| s.used.qemus / s.gib).median,
            of(|s| s.used.agents / s.gib).median,
        )
    });
    table
}
