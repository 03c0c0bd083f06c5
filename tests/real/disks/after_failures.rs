//! Every step of a migration onto images that the destination's agent makes, and every failure of it: afterwards
//! the images are gone, or listed by `vmferry recover` for as long as the source cannot be asked; what else lies in
//! their folder is as it was, byte for byte; and the guest runs on where it was, once, and counts.
//!
//! ```text
//!                    cancel  source's  destination's  its   cut for  no room  its command
//!                            agent     agent          QEMU  good     there    fails
//! image of disk 0      x        x           x          -       x        x         x
//! image of disk 1      x        x           x          -       =        x         x
//! start of QEMU        x        x           x          -       x        -         x
//! granted              x        x           x          x       x        -         -
//! one mirror of two    x        x           x          x       =        x         -
//! copy                 x        x           x          x       x        x         -
//! RAM                  x        x           x          x       x        x         -
//! pause, disks         x        x           x          x       x        -         -
//! pause, device        x        x           x          x       x        -         -
//! hand-over            -      moved       moved        x     moved      -       moved
//! ```
//! `-` cannot be: there is no QEMU yet, nothing is written, no command runs, or nothing is cancelled any more. `=`
//! is the same as the line above: nothing of the destination's depends on which of the two it is. "Mirrors ready" is
//! the moment between copy and RAM, in which nothing at the destination changes; with the guest paused its room is
//! what it was. "moved": the guest is the destination's from there on, and so are the images.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::faults::fault::Lasts;
use crate::faults::stage::volume_folder;
use crate::faults::{Case, End, Fault, Plan, Reach, Stage, Who};
use crate::support::process::{LONG, run, wait_for};
use crate::support::{Version, Volume, with_lab};

const PLAN: Plan = Plan {
    created: 2,
    // Bravo may ask alpha what became of a guest.
    both_ways: true,
    disk_volume_mib: [None, Some(512)],
    deadlines: "dead_peer_s = 2\nresume_s = 4\nresume_paused_s = 3\nhandover_s = 8\n",
    ..Plan::ORDINARY
};
/// Both formats are made by `qemu-img`, with all of their room.
const WITH_ROOM: Plan = Plan { create_lines: "preallocation = \"falloc\"\n", ..PLAN };
/// The second image is somebody's.
const ONE: Plan = Plan { created: 1, create_lines: WITH_ROOM.create_lines, ..PLAN };

const CANCEL: Fault = Fault::Cancel;
const SOURCE_AGENT: Fault = Fault::Kill(Who::SourceAgent);
const AGENT: Fault = Fault::Kill(Who::DestinationAgent);
const QEMU: Fault = Fault::Kill(Who::DestinationQemu);
const FULL: Fault = Fault::DestinationDiskFull;
const COMMAND: Fault = Fault::CommandFails;
/// Is played by [`cut_for_good`].
const CUT: Fault = Fault::LinkDownForEver;

/// What lies where the images are made.
struct Folder {
    path: PathBuf,
    names: Vec<String>,
    /// Nobody's of ours, and what is in them.
    others: Vec<(PathBuf, String)>,
    /// The guest's, which are made.
    made: Vec<PathBuf>,
    /// The guest's that was there already, and which file it is: it is copied to.
    found: Option<(PathBuf, u64)>,
}

fn hash(path: &PathBuf) -> Result<String> {
    run(Command::new("sha256sum").arg(path), LONG)
}

impl Folder {
    /// Puts files beside the images that look as if they were of use here.
    fn of(stage: &Stage) -> Result<Self> {
        let path = volume_folder(&stage.destination);
        let image = |disk: usize| {
            let name = stage.destination.disk(disk).file_name().map(|name| path.join(name));
            name.context("a disk without a name")
        };
        let mut made = (0..2).map(image).collect::<Result<Vec<PathBuf>>>()?;
        let mut others = Vec::new();
        for name in ["disk0.raw.old", ".vmferry-somebodys", "disk2.raw", "disk0.qcow2"] {
            fs::write(path.join(name), format!("{name} is nobody's of ours\n").repeat(5000))?;
            others.push((path.join(name), hash(&path.join(name))?));
        }
        // What is there already is not made.
        let found = made.pop_if(|last| last.exists());
        let found = found.map(|path| Ok::<_, anyhow::Error>((path.clone(), fs::metadata(&path)?.ino())));
        Ok(Self { names: names(&path)?, path, others, made, found: found.transpose()? })
    }

    /// Whether an image that was not made is written to by then.
    fn is_copied_to(reach: Reach) -> bool {
        !matches!(reach, Reach::Image(_) | Reach::Prepare | Reach::Granted)
    }

    /// The image that was not made may be copied to, or has to be as it is now.
    fn expect(&mut self, reach: Reach) -> Result<()> {
        let Some((path, _)) = &self.found else { return Ok(()) };
        self.others.retain(|(other, _)| other != path);
        if !Self::is_copied_to(reach) {
            self.others.push((path.clone(), hash(path)?));
        }
        Ok(())
    }

    fn others_are_untouched(&self) -> Result<()> {
        self.others.iter().try_for_each(|(path, before)| {
            let now = hash(path).with_context(|| format!("{} is gone", path.display()))?;
            ensure!(now == *before, "{} was {before} and is {now}", path.display());
            Ok(())
        })
    }

    /// Whatever was made is gone, and nothing else.
    fn is_as_before(&self, stage: &Stage) -> Result<()> {
        let now = names(&self.path)?;
        let told = stage.bravo.vmferry(&["recover", "--look"])?;
        ensure!(now == self.names, "{:?} were there, and are {now:?}: {told:?}", self.names);
        if let Some((path, inode)) = &self.found {
            ensure!(
                fs::metadata(path)?.ino() == *inode,
                "another file is in the place of {}",
                path.display()
            );
        }
        self.others_are_untouched()
    }

    /// Whatever was made is gone, or `recover` names it.
    fn is_listed(&self, stage: &Stage) -> Result<()> {
        let told = stage.bravo.vmferry(&["recover", "--look"])?;
        let now = names(&self.path)?;
        let unknown: Vec<&String> = now.iter().filter(|name| !self.names.contains(name)).collect();
        let is_told = |name: &&&String| told.stdout.contains(&*self.path.join(name).to_string_lossy());
        ensure!(unknown.iter().all(|name| is_told(&name)), "{unknown:?} are there, and not in {told:?}");
        self.others_are_untouched()
    }

    /// The images are the guest's, which has moved, and nobody takes them away.
    fn is_the_guests(&self, stage: &Stage) -> Result<()> {
        for agent in [&stage.alpha, &stage.bravo] {
            let told = agent.vmferry(&["recover"])?;
            ensure!(told.code == 0, "{told:?}");
        }
        let mut with_images = self.names.clone();
        with_images.extend(self.made.iter().filter_map(|path| Some(path.file_name()?.to_str()?.to_owned())));
        with_images.sort();
        let now = names(&self.path)?;
        ensure!(now == with_images, "{with_images:?} are to be there, and there are {now:?}");
        self.others_are_untouched()
    }
}

fn names(folder: &PathBuf) -> Result<Vec<String>> {
    let mut names: Vec<String> = fs::read_dir(folder)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    names.sort();
    Ok(names)
}

/// How a migration ends that is hit there.
fn end(fault: Fault, reach: Reach) -> End {
    let phases: &[&str] = match reach {
        Reach::Image(_) | Reach::Prepare => &["prepare"],
        Reach::Granted => &["prepare", "mirror"],
        Reach::OneDisk | Reach::Mirror => &["mirror"],
        Reach::Precopy => &["precopy"],
        Reach::Switchover | Reach::Device => &["precopy", "switchover", "device"],
        Reach::HandOver => &["hand-over"],
    };
    match fault {
        Fault::Cancel => End::cancelled(phases),
        SOURCE_AGENT => End::failed(phases, &["agent", "restarted"]),
        Fault::DestinationDiskFull => End::failed(phases, &["disk0|disk1", "No space left"]),
        Fault::CommandFails => End::failed(phases, &["failed|exit"]),
        _ => End::failed(phases, &["bravo|destination|connection"]),
    }
}

/// The connection never comes back, and each side does what it can by itself.
fn cut_for_good(stage: &mut Stage, folder: &Folder, reach: Reach) -> Result<()> {
    let since = Instant::now();
    let migration = stage.reach(reach)?;
    stage.net.cut()?;
    stage.calm()?;
    let report = migration.ended(&stage.alpha)?;
    end(CUT, reach).fits(&report)?;
    wait_for("the destination to give up", LONG, || {
        let all = stage.bravo.api("/v1/migrations")?;
        let ended = all.as_array().is_some_and(|all| all.iter().all(|one| !one["outcome"].is_null()));
        Ok(ended.then_some(()))
    })?;
    folder.is_listed(stage).context("while the source is away")?;
    stage.net.restore()?;
    stage.is_as_before().with_context(|| format!("after {report}"))?;
    told(CUT, reach, since);
    Ok(())
}

/// What is in the images has its room by then: the guest writes where it never has.
fn full_while_ram_is_copied(stage: &mut Stage) -> Result<()> {
    let since = Instant::now();
    let migration = stage.reach(Reach::Precopy)?;
    stage.disks[1].as_ref().map(Volume::fill).context("no volume")??;
    ensure!(stage.source.write_beyond(0, 16)?, "no place to write to");
    let report = migration.ended(&stage.alpha)?;
    end(FULL, Reach::Precopy).fits(&report)?;
    stage.disks[1].as_ref().map(Volume::empty).context("no volume")??;
    stage.calm()?;
    stage.is_as_before().with_context(|| format!("after {report}"))?;
    told(FULL, Reach::Precopy, since);
    Ok(())
}

fn told(fault: Fault, reach: Reach, since: Instant) {
    eprintln!("  {:<58} {:>6.1} s", format!("{fault}, {reach:?}"), since.elapsed().as_secs_f64());
}

fn play(stage: &mut Stage, folder: &mut Folder, (reach, faults): (Reach, &[Fault])) -> Result<()> {
    folder.expect(reach)?;
    for fault in faults {
        let case = Case::new(*fault, reach, end(*fault, reach));
        let played = match *fault {
            CUT => cut_for_good(stage, folder, reach),
            COMMAND => case.until_the_end().play(stage),
            // An image is being made: it goes on with no room.
            FULL if reach == Reach::Precopy => full_while_ram_is_copied(stage),
            FULL if matches!(reach, Reach::Image(_)) => case.until_the_end().play(stage),
            FULL => case.held().play(stage),
            _ => case.play(stage),
        };
        let judged = played.and_then(|()| folder.is_as_before(stage));
        judged.with_context(|| format!("{fault} at {reach:?}"))?;
    }
    Ok(())
}

/// The last of a stage: from the hand-over on guest and images are the destination's, whatever fails.
fn moves_all_the_same(stage: &mut Stage, folder: &Folder, fault: Fault) -> Result<()> {
    let migration = stage.reach(Reach::HandOver)?;
    if fault == CUT {
        stage.net.cut()?;
        stage.calm()?;
        wait_for("the guest to run at the destination", LONG, || {
            Ok(stage.destination.console()?.last().map(drop))
        })?;
        stage.net.restore()?;
    } else {
        // The command that a dead agent has begun goes on, and the next agent's waits for it.
        let lasts = if fault == COMMAND { Lasts::UntilTheEnd(LONG) } else { Lasts::INSTANT };
        fault.inflict(stage, &migration, lasts, true)?;
        stage.calm()?;
    }
    stage.has_moved(&migration)?;
    folder.is_the_guests(stage)
}

/// One failure or two at each step, each of them at least once.
pub(crate) fn a_choice(name: &str, version: Version) -> Result<()> {
    family(
        name,
        Plan { version, ..WITH_ROOM },
        &[
            (Reach::Image(0), &[COMMAND, FULL]),
            (Reach::Image(1), &[AGENT]),
            (Reach::Prepare, &[CANCEL]),
            (Reach::Granted, &[SOURCE_AGENT]),
            (Reach::OneDisk, &[QEMU]),
            (Reach::Mirror, &[CUT]),
            (Reach::Precopy, &[AGENT]),
            (Reach::Switchover, &[AGENT]),
            (Reach::Device, &[QEMU]),
        ],
        SOURCE_AGENT,
    )
}

fn family(name: &str, plan: Plan, rows: &[(Reach, &[Fault])], last: Fault) -> Result<()> {
    with_lab(name, |lab| {
        let mut stage = Stage::set_up(lab, plan)?;
        let mut folder = Folder::of(&stage)?;
        rows.iter().try_for_each(|row| play(&mut stage, &mut folder, *row))?;
        folder.expect(Reach::HandOver)?;
        moves_all_the_same(&mut stage, &folder, last).with_context(|| format!("{last} after the hand-over"))
    })
}

#[test]
#[ignore = "make disks"]
fn images_go_after_every_failure_while_they_are_made_and_opened() -> Result<()> {
    family(
        "images_go_after_every_failure_while_they_are_made_and_opened",
        WITH_ROOM,
        &[
            (Reach::Image(0), &[CANCEL, SOURCE_AGENT, AGENT, CUT, FULL, COMMAND]),
            (Reach::Image(1), &[CANCEL, SOURCE_AGENT, AGENT, FULL, COMMAND]),
            (Reach::Prepare, &[CANCEL, SOURCE_AGENT, AGENT, CUT, COMMAND]),
            (Reach::Granted, &[CANCEL, SOURCE_AGENT, AGENT, QEMU, CUT]),
        ],
        SOURCE_AGENT,
    )
}

#[test]
#[ignore = "make disks"]
fn images_go_after_every_failure_while_disks_and_ram_are_copied() -> Result<()> {
    family(
        "images_go_after_every_failure_while_disks_and_ram_are_copied",
        PLAN,
        &[
            (Reach::OneDisk, &[CANCEL, SOURCE_AGENT, AGENT, QEMU, FULL]),
            (Reach::Mirror, &[CANCEL, SOURCE_AGENT, AGENT, QEMU, CUT, FULL]),
            (Reach::Precopy, &[CANCEL, SOURCE_AGENT, AGENT, QEMU, CUT, FULL]),
        ],
        AGENT,
    )
}

#[test]
#[ignore = "make disks"]
fn images_go_after_every_failure_in_the_pause() -> Result<()> {
    family(
        "images_go_after_every_failure_in_the_pause",
        PLAN,
        &[
            (Reach::Switchover, &[CANCEL, SOURCE_AGENT, AGENT, QEMU, CUT]),
            (Reach::Device, &[CANCEL, SOURCE_AGENT, AGENT, QEMU, CUT]),
            (Reach::HandOver, &[QEMU]),
        ],
        CUT,
    )
}

#[test]
#[ignore = "make disks"]
fn images_go_after_a_choice_of_failures_on_qemu_7_2() -> Result<()> {
    a_choice("images_go_after_a_choice_of_failures_on_qemu_7_2", Version::V72)
}

/// Of two disks one has an image already: nobody writes to it before the copy, and nobody removes it.
#[test]
#[ignore = "make disks"]
fn an_image_that_was_there_stays_after_every_failure() -> Result<()> {
    family(
        "an_image_that_was_there_stays_after_every_failure",
        ONE,
        &[
            (Reach::Image(0), &[CANCEL, AGENT, COMMAND]),
            (Reach::Prepare, &[AGENT, COMMAND]),
            (Reach::Granted, &[CANCEL, SOURCE_AGENT, AGENT, QEMU]),
            (Reach::Mirror, &[CANCEL, AGENT]),
        ],
        COMMAND,
    )
}
