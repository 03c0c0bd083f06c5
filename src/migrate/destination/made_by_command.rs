//! What a disk lies on, made and removed by the destination's own commands (`create.command`, `create.remove`):
//! volumes of LVM or ZFS, or anything else that is no file of an agent.
//!
//! ```text
//! nothing at the path ─► journal: is to be made ─► command ─► journal: what there is now ─► QEMU
//! ```
//! The commands are run without a shell, and get what the source said in their environment only: names of a few
//! harmless characters, and a number. One of which the journal does not tell what it made is never removed.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

use crate::config::{Config, CreateConfig};
use crate::migrate::guest::before_start::{Turn, lock_file};
use crate::migrate::guest::process::private_log;
use crate::migrate::journal::{Journal, JournalError, MadeFile, MadeVolume, Past, Undo};
use crate::printable::printable;

/// How much of what a command has printed is shown when it failed.
const OUTPUT_BYTES_SHOWN: u64 = 600;

/// Makes what is not there; why it is not, in words.
pub(super) async fn make(
    config: &Config,
    create: &CreateConfig,
    volume: MadeVolume,
    journal: &mut Journal,
    within: Duration,
) -> Result<Result<(), String>, JournalError> {
    journal.will_make(Undo::Volume(volume.clone()))?;
    let run = Run { config, words: &create.command, past: journal.past(), volume: &volume, action: "create" };
    if let Err(why) = run.run(within).await {
        return Ok(Err(why));
    }
    let path = volume.path.display();
    let made = match fs::metadata(&volume.path) {
        Ok(made) if made.file_type().is_block_device() || made.is_file() => MadeFile::of(&made),
        Ok(_) => return Ok(Err(format!("{path} is neither a file nor a block device"))),
        Err(e) => return Ok(Err(format!("{} has ended well, and {path}: {e}", create.command[0]))),
    };
    journal.will_make(Undo::Volume(MadeVolume { made: Some(made), ..volume }))?;
    Ok(Ok(()))
}

/// Of a command that the agent did not see end, the last for its path.
pub(super) fn unfinished(past: &Past) -> Option<&MadeVolume> {
    let mut told = past.undo.iter().rev().filter_map(|undo| match undo {
        Undo::Volume(volume) => Some(volume),
        _ => None,
    });
    told.next().filter(|volume| volume.made.is_none())
}

/// A command that an agent which was killed has left, and that has not ended: what it makes may not be there yet.
pub(super) async fn runs_still(config: &Config, past: &Past) -> Option<String> {
    let volume = unfinished(past)?;
    let lock = config.state_dir.join(format!("{}.create", past.header.vm));
    let is_free = lock_file(lock, Turn::Again, Duration::ZERO).await.is_ok_and(|lock| lock.is_some());
    let (path, disk) = (volume.path.display(), &volume.disk);
    (!is_free).then(|| format!("the command that makes {path} for disk {disk} of this migration still runs"))
}

/// What this migration had made, or may have, and is there.
pub(super) fn present(past: &Past) -> Vec<&MadeVolume> {
    let told = past.undo.iter().filter_map(|undo| match undo {
        Undo::Volume(volume) => Some(volume),
        _ => None,
    });
    let told: Vec<&MadeVolume> = told.collect();
    let is_last = |at: usize| !told[at + 1..].iter().any(|later| later.path == told[at].path);
    let there = |volume: &MadeVolume| fs::metadata(&volume.path).ok();
    // Something else in its place is nobody's business here.
    let may_be_it = |volume: &MadeVolume| {
        there(volume).is_some_and(|now| volume.made.as_ref().is_none_or(|made| *made == MadeFile::of(&now)))
    };
    (0..told.len()).filter(|at| is_last(*at) && may_be_it(told[*at])).map(|at| told[at]).collect()
}

/// Removes what surely was made for this migration; what is still there, in words.
pub(super) async fn remove(config: &Config, past: &Past) -> Vec<String> {
    let mut left = Vec::new();
    let vm = config.vm(&past.header.vm);
    let create = vm.as_ref().and_then(|vm| config.create_for(vm));
    for volume in present(past) {
        let what = format!("{}, made for disk {} of this migration", volume.path.display(), volume.disk);
        let words = create.map(|create| create.remove.as_slice()).unwrap_or_default();
        if volume.made.is_none() {
            left.push(format!("{what}, perhaps: its command did not end. Look whose it is, and remove it"));
        } else if words.is_empty() {
            left.push(format!("{what}: there is no `remove` command in `create` any more"));
        } else {
            let run = Run { config, words, past, volume, action: "remove" };
            let why = match run.run(config.deadlines.hook()).await {
                Ok(()) if present(past).contains(&volume) => Some(format!("{} did not remove it", words[0])),
                run => run.err(),
            };
            left.extend(why.map(|why| format!("{what}: {why}")));
        }
    }
    left
}

struct Run<'a> {
    config: &'a Config,
    words: &'a [String],
    past: &'a Past,
    volume: &'a MadeVolume,
    action: &'static str,
}

impl Run<'_> {
    /// Not beside one that an agent which crashed has left.
    async fn run(&self, deadline: Duration) -> Result<(), String> {
        let Self { config, past, volume, action, .. } = self;
        let [program, arguments @ ..] = self.words else { return Err(format!("no command to {action} it")) };
        let lock = config.state_dir.join(format!("{}.create", past.header.vm));
        let input = match lock_file(lock, Turn::Again, deadline).await {
            Ok(Some(lock)) => lock,
            Ok(None) => return Err(format!("an earlier command still runs after {} s", deadline.as_secs())),
            Err(e) => return Err(format!("no lock for {program}: {e}")),
        };
        let log = config.state_dir.join(format!("{}.create.log", past.header.vm));
        let output = private_log(&log).map_err(|e| format!("{}: {e}", log.display()))?;
        let errors = output.try_clone().map_err(|e| format!("{}: {e}", log.display()))?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(input).stdout(output).stderr(errors).kill_on_drop(true);
        command
            .env("VMFERRY_ACTION", action)
            .env("VMFERRY_VM", &past.header.vm)
            .env("VMFERRY_DISK", &volume.disk)
            .env("VMFERRY_BYTES", volume.bytes.to_string())
            .env("VMFERRY_FORMAT", &volume.format)
            .env("VMFERRY_PATH", &volume.path)
            .env("VMFERRY_MIGRATION", past.header.migration.to_string());
        let told = || told(&log);
        match timeout(deadline, command.status()).await {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(format!("{program} failed with {status}{}", told())),
            Ok(Err(e)) => Err(format!("{program} cannot be run: {e}")),
            Err(_) => Err(format!("{program} was killed after {} s{}", deadline.as_secs(), told())),
        }
    }
}

/// What a command has printed, for a sentence.
fn told(log: &PathBuf) -> String {
    let mut text = Vec::new();
    let read = File::open(log).and_then(|log| log.take(OUTPUT_BYTES_SHOWN).read_to_end(&mut text));
    let text = String::from_utf8_lossy(&text);
    match read {
        Ok(_) if !text.trim().is_empty() => format!(": {}", printable(text.trim())),
        _ => String::new(),
    }
}
