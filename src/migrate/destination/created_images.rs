//! Images that this agent makes for a guest that comes here, by its own configuration; the source tells names
//! and sizes only.
//!
//! ```text
//! journal: unfinished file ─► make it, under a name that is nobody's ─► journal: which file it is ─► its name
//! ```
//! So an image that is there already is never touched, and one is removed only if it is the very file that the
//! journal tells of. It is removed when nothing can have been copied to it, or when the source has said that
//! its guest stays there; until then it may be the best copy that there is.

use std::collections::HashSet;
use std::fs::{self, File, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::process::Command;
use tokio::time::{Instant, timeout_at};

use super::error::Error;
use super::made_by_command;
use crate::config::{Config, CreateConfig, Preallocation};
use crate::migrate::guest::process;
use crate::migrate::guest::start_order::PlacedDisk;
use crate::migrate::host::Host;
use crate::migrate::journal::{self, Journal, MadeFile, MadeVolume, Past, Undo};
use crate::migrate::model::problem::{Problem, ProblemKind};
use crate::migrate::protocol::message::{DiskSpec, Offer};
use crate::printable::printable;
use crate::qemu::{Disk, names};

/// Whatever file a process has there, also one without a name.
const STANDARD_INPUT: &str = "/proc/self/fd/0";

/// Makes what is not there, with all its room only if it is to stay; where each disk is then, in the order of the
/// offer. One that is not copied is among them if it is there.
pub(super) async fn make(
    all: &Config,
    config: &CreateConfig,
    offer: &Offer,
    journal: &mut Journal,
    stays: bool,
) -> Result<Vec<PlacedDisk>, Error> {
    let (mut paths, mut placed) = (HashSet::new(), Vec::new());
    let end = Instant::now() + all.deadlines.make();
    for disk in &offer.disks {
        let format = config.format_of(&disk.format);
        let path = config.path_of(&offer.vm, &disk.name, format);
        if !disk.is_copied() {
            let found = path.filter(|path| path.exists());
            placed.extend(found.map(|path| placed_disk(disk, path, format)));
            continue;
        }
        let path = path.ok_or_else(|| not_made(disk, "its name cannot be a part of a file's name"))?;
        placed.push(placed_disk(disk, path.clone(), format));
        if !paths.insert(path.clone()) {
            let why = format!("another disk has {} already: write {{disk}} into `path`", path.display());
            return Err(not_made(disk, &why));
        }
        match fs::symlink_metadata(&path) {
            // Somebody has made it: it is used as it is.
            Ok(_) => continue,
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(not_made(disk, &format!("{}: {e}", path.display()))),
        }
        if config.command.is_empty() {
            let image = Image { vm: &offer.vm, config, disk, format, path: &path, stays };
            let made = timeout_at(end, image.make(journal)).await;
            made.map_err(|_| too_late(all, disk))??;
        } else {
            let volume = MadeVolume {
                disk: disk.name.clone(),
                path: path.clone(),
                bytes: disk.virtual_size,
                format: format.to_owned(),
                made: None,
            };
            let left = end.saturating_duration_since(Instant::now());
            let made = made_by_command::make(all, config, volume, journal, left).await?;
            made.map_err(|why| not_made(disk, &why))?;
        }
        tracing::info!(vm = offer.vm, disk = disk.name, path = %path.display(), bytes = disk.virtual_size, "an image was made");
    }
    Ok(placed)
}

fn placed_disk(disk: &DiskSpec, path: PathBuf, format: &'static str) -> PlacedDisk {
    let address = disk.place.as_ref().and_then(|place| place.address.as_deref());
    PlacedDisk::new(&disk.name, path, format, disk.virtual_size, address)
}

fn not_made(disk: &DiskSpec, why: &str) -> Error {
    let text = format!("no image can be made for disk {} at the destination: {why}", printable(&disk.name));
    let remedy = "look at `create` in the configuration there, at the folder's owner and at its room";
    Error::Problems(vec![Problem::new(ProblemKind::ImageNotMade, text, remedy)])
}

fn too_late(config: &Config, disk: &DiskSpec) -> Error {
    not_made(
        disk,
        &format!("it was not ready {} s (`make_s` there) after the first was begun", config.deadlines.make_s),
    )
}

/// One that is not there.
struct Image<'a> {
    vm: &'a str,
    config: &'a CreateConfig,
    disk: &'a DiskSpec,
    format: &'static str,
    path: &'a Path,
    stays: bool,
}

impl Image<'_> {
    async fn make(&self, journal: &mut Journal) -> Result<(), Error> {
        let at = |path: &Path, e: io::Error| not_made(self.disk, &format!("{}: {e}", path.display()));
        let folder = self.path.parent().unwrap_or(Path::new("/"));
        let unfinished = folder.join(format!(".vmferry-{}", uuid::Uuid::new_v4()));
        journal.will_make(Undo::Image { path: unfinished.clone(), made: None })?;
        let mode = self.config.mode_bits().unwrap_or(0o600);
        let file = File::options().write(true).create_new(true).mode(mode).open(&unfinished);
        let file = file.map_err(|e| at(&unfinished, e))?;
        // Whatever the mask of this process is.
        file.set_permissions(Permissions::from_mode(mode)).map_err(|e| at(&unfinished, e))?;
        self.fill(&file).await?;
        let made = MadeFile::of(&file.metadata().map_err(|e| at(&unfinished, e))?);
        journal.will_make(Undo::Image { path: self.path.to_owned(), made: Some(made) })?;
        let named = fs::hard_link(&unfinished, self.path);
        let removed = fs::remove_file(&unfinished);
        named.and(removed).map_err(|e| at(self.path, e))?;
        // A guest's disk must be there after a power cut.
        let synced = file.sync_all().and_then(|()| File::open(folder)?.sync_all());
        synced.map_err(|e| at(folder, e))
    }

    async fn fill(&self, file: &File) -> Result<(), Error> {
        let room = if self.stays { self.config.preallocation } else { Preallocation::Off };
        if let Some(backing) = self.backing()? {
            let config = self.config;
            let mut options = vec![format!("backing_fmt={}", config.backing_format.name())];
            options.extend(config.cluster_kib.map(|kib| format!("cluster_size={kib}k")));
            return self.create(file, &options, Some(&backing)).await;
        }
        if self.format == "raw" && matches!(room, Preallocation::Off | Preallocation::Metadata) {
            let sized = file.set_len(self.disk.virtual_size);
            return sized.map_err(|e| not_made(self.disk, &format!("{}: {e}", self.path.display())));
        }
        let mut options = vec![format!("preallocation={}", room.name())];
        if self.format == "qcow2" {
            options.extend(self.config.cluster_kib.map(|kib| format!("cluster_size={kib}k")));
        }
        self.create(file, &options, None).await
    }

    /// What it is to stand on.
    fn backing(&self) -> Result<Option<PathBuf>, Error> {
        let disk = self.disk;
        if !disk.incremental {
            return Ok(None);
        }
        if self.format != "qcow2" {
            let why =
                format!("only its topmost image is copied, and `format` there makes it {}", self.format);
            return Err(not_made(disk, &why));
        }
        let backing = self.config.backing_of(self.vm, &disk.name);
        let why = "only its topmost image is copied, and there is no `backing` for it to stand on";
        backing.map(Some).ok_or_else(|| not_made(disk, why))
    }

    /// By `qemu-img`, which has the file and not its name: one that an agent which was killed has left makes no
    /// file again that the next agent has removed.
    async fn create(&self, file: &File, options: &[String], backing: Option<&Path>) -> Result<(), Error> {
        let mut command = Command::new(&self.config.qemu_img);
        command.args(["create", "-q", "-f", self.format, "-o", &options.join(",")]);
        if let Some(backing) = backing {
            command.arg("-b").arg(backing);
        }
        command.arg(STANDARD_INPUT).arg(self.disk.virtual_size.to_string());
        let program = self.config.qemu_img.display();
        let file = file.try_clone().map_err(|e| not_made(self.disk, &format!("{program}: {e}")))?;
        command.stdin(Stdio::from(file)).kill_on_drop(true);
        let why = match command.output().await {
            Ok(output) if output.status.success() => return Ok(()),
            Ok(output) => {
                let told = printable(String::from_utf8_lossy(&output.stderr).trim());
                let told = if told.is_empty() { String::new() } else { format!(": {told}") };
                format!("{program} failed with {}{told}", output.status)
            }
            Err(e) => format!("{program}: {e}"),
        };
        Err(not_made(self.disk, &why))
    }
}

/// What this migration has made, or had made, and what is still there.
pub(crate) fn present(past: &Past) -> Vec<PathBuf> {
    let volumes = made_by_command::present(past).into_iter().map(|volume| volume.path.clone());
    images(past).into_iter().chain(volumes).collect()
}

/// Whether something is there, or may come yet.
pub(crate) fn may_be_there(past: &Past) -> bool {
    !present(past).is_empty() || made_by_command::unfinished(past).is_some()
}

fn images(past: &Past) -> Vec<PathBuf> {
    let images = past.undo.iter().filter_map(|undo| match undo {
        Undo::Image { path, made } => Some((path, made)),
        _ => None,
    });
    let is_ours = |path: &Path, made: &Option<MadeFile>| {
        let file = fs::symlink_metadata(path).ok();
        file.is_some_and(|file| made.as_ref().is_none_or(|made| *made == MadeFile::of(&file)))
    };
    images.filter(|(path, made)| is_ours(path, made)).map(|(path, _)| path.clone()).collect()
}

/// Whether a disk is one of them and stands on nothing else.
pub(crate) fn is_made(past: &Past, disk: &Disk) -> bool {
    let [image] = &disk.images[..] else { return false };
    // Where the agent may not see what QEMU has open, its name has to do.
    let seen = image.seen.as_ref().and_then(|seen| seen.path.as_deref());
    present(past).iter().any(|path| seen.unwrap_or(Path::new(&image.filename)) == path)
}

/// Whose the images of a migration that has ended are.
enum Use {
    Nobodys,
    /// A later migration has found them, or somebody has started the VM.
    Others,
    /// Of a guest that came here later.
    Guests,
}

async fn used(host: &Host, past: &Past) -> Use {
    // What cannot be read may be of a later one.
    let Ok(all) = host.journals.peek_all() else { return Use::Others };
    if all.iter().any(|one| journal::is_later(one, past).is_none()) {
        return Use::Others;
    }
    let later: Vec<_> = all
        .iter()
        .filter(|one| journal::is_later(one, past) == Some(true))
        .filter_map(|(_, later)| later.as_ref().ok())
        .collect();
    if later.iter().any(|p| p.has_moved()) {
        return Use::Guests;
    }
    let Some(config) = host.config.vm(&past.header.vm) else { return Use::Others };
    let is_silent = process::connect(&config).await.is_err_and(|e| e.is_not_listening());
    if is_silent && later.is_empty() { Use::Nobodys } else { Use::Others }
}

/// Removes them long after, if nobody uses them and either nothing can have been copied to them or the source
/// has said that its guest stays there (`is_given_back`); what is still there, in words.
pub(crate) async fn remove_late(host: &Host, past: &Past, is_given_back: bool) -> Vec<String> {
    if let Some(runs) = made_by_command::runs_still(&host.config, past).await {
        return [runs].into_iter().chain(kept(&host.config, past)).collect();
    }
    if present(past).is_empty() || host.replicas.has(past) {
        return Vec::new();
    }
    // What goes in band comes with the RAM.
    let touched = [Undo::NbdServer, Undo::Fd(names::RAM_FDNAME.into())];
    let is_untouched = !touched.iter().any(|undo| past.undo.contains(undo));
    match used(host, past).await {
        Use::Guests => Vec::new(),
        Use::Nobodys if is_untouched || is_given_back => remove(&host.config, past).await,
        Use::Nobodys | Use::Others => kept(&host.config, past),
    }
}

/// Whether they stay whatever comes, by the configuration, but for one that is not finished.
fn are_to_stay(config: &Config, past: &Past) -> bool {
    let vm = config.vm(&past.header.vm);
    vm.as_ref().and_then(|vm| config.create_for(vm)).is_some_and(|create| create.keep)
}

/// Removes them, unless they are to stay; what is still there and should not be, in words.
pub(crate) async fn remove(config: &Config, past: &Past) -> Vec<String> {
    if !are_to_stay(config, past) {
        return remove_all(config, past).await;
    }
    for undo in &past.undo {
        if let Undo::Image { path, made: None } = undo {
            let _ = fs::remove_file(path);
        }
    }
    Vec::new()
}

/// Removes them in any case; what is still there, in words.
pub(crate) async fn remove_all(config: &Config, past: &Past) -> Vec<String> {
    let removed = images(past).into_iter().filter_map(|path| {
        let error = fs::remove_file(&path).err()?;
        Some(format!("the image {}, made for this migration: {error}", path.display()))
    });
    let mut left: Vec<String> = removed.collect();
    left.extend(made_by_command::remove(config, past).await);
    left
}

/// What is said of those that stay until the source has said that its guest stays there.
pub(crate) fn kept(config: &Config, past: &Past) -> Vec<String> {
    if are_to_stay(config, past) {
        return Vec::new();
    }
    let kept = |path: PathBuf| {
        format!(
            "the image {}, made for this migration. It goes when {} says that the guest stays there and no QEMU \
             has it open (`vmferry recover` asks)",
            path.display(),
            past.header.peer
        )
    };
    present(past).into_iter().map(kept).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use std::collections::BTreeSet;
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::migrate::journal::{Header, Role};

    fn journal(folder: &Path) -> Journal {
        let header = Header {
            format: 1,
            migration: uuid::Uuid::new_v4(),
            role: Role::Destination,
            vm: "web1".into(),
            host: "bravo".into(),
            peer: "alpha".into(),
            began_at: 0,
            began_ns: None,
            running: true,
            keep_source: false,
            retry: None,
            accepted: BTreeSet::new(),
        };
        Journal::create(folder, header).unwrap()
    }

    fn offer(disks: &[&str]) -> Offer {
        let disk = |name: &&str| DiskSpec {
            name: (*name).into(),
            virtual_size: 1 << 20,
            format: "raw".into(),
            read_only: false,
            left_out: false,
            incremental: false,
            bitmaps: None,
            place: None,
        };
        Offer {
            vm: "web1".into(),
            disks: disks.iter().map(disk).collect(),
            running: true,
            qemu: String::new(),
            after: None,
            compress: false,
            policy: Default::default(),
            machine: None,
            audit_head: None,
            witness: None,
            in_band: None,
            hears_busy: false,
            flash: Vec::new(),
            needs: Default::default(),
        }
    }

    fn config(folder: &Path) -> CreateConfig {
        toml::from_str(&format!("path = \"{}/{{vm}}-{{disk}}.{{format}}\"", folder.display())).unwrap()
    }

    /// Of this host, which knows the VM.
    fn all(state: &Path, lines: &str) -> Config {
        let text = format!(
            "state_dir = '{}'\n[tls]\nca = 'a'\ncert = 'b'\nkey = 'c'\n{lines}[vm.web1]\nqmp = '/x'\n",
            state.display()
        );
        Config::parse(&text, state).unwrap()
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder).unwrap().flatten().map(|e| e.file_name()).collect();
        names.sort();
        names.into_iter().map(|name| name.into_string().unwrap()).collect()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn only_what_was_made_goes_and_what_was_there_is_not_touched() {
        let (state, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let theirs = folder.path().join("web1-vdb.raw");
        fs::write(&theirs, "somebody's").unwrap();
        let mut journal = journal(state.path());
        let (all, config) = (all(state.path(), ""), config(folder.path()));
        let offer = offer(&["vda", "vdb", "vdc"]);
        make(&all, &config, &offer, &mut journal, true).await.unwrap();
        assert_eq!(names(folder.path()), ["web1-vda.raw", "web1-vdb.raw", "web1-vdc.raw"]);
        let made = folder.path().join("web1-vda.raw");
        let file = fs::metadata(&made).unwrap();
        assert_eq!((file.len(), file.blocks(), file.mode() & 0o777), (1 << 20, 0, 0o600));
        // Somebody puts another file in the place of one.
        let other = folder.path().join("web1-vdc.raw");
        fs::remove_file(&other).unwrap();
        fs::write(&other, "another").unwrap();
        assert_eq!(present(journal.past()), [made]);
        assert_eq!(remove(&all, journal.past()).await, Vec::<String>::new());
        assert_eq!(names(folder.path()), ["web1-vdb.raw", "web1-vdc.raw"]);
        assert_eq!(
            (fs::read(theirs).unwrap(), fs::read(other).unwrap()),
            (b"somebody's".into(), b"another".into())
        );
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_cannot_be_made_leaves_nothing_that_the_journal_does_not_tell_of() {
        let (state, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut journal = journal(state.path());
        let (all, mut config) = (all(state.path(), ""), config(folder.path()));
        config.qemu_img = folder.path().join("none");
        config.format = crate::config::CreateFormat::Qcow2;
        let failed = make(&all, &config, &offer(&["vda"]), &mut journal, true).await.unwrap_err();
        assert!(
            matches!(&failed, Error::Problems(p) if p[0].kind == ProblemKind::ImageNotMade),
            "{failed:?}"
        );
        assert_eq!(names(folder.path()).len(), 1, "the unfinished one");
        assert_eq!(remove(&all, journal.past()).await, Vec::<String>::new());
        assert_eq!(names(folder.path()), Vec::<String>::new());
        let failed = make(&all, &config, &offer(&["../vda"]), &mut journal, true).await.unwrap_err();
        assert!(matches!(failed, Error::Problems(_)) && names(folder.path()).is_empty());
    }

    /// A program. Another process writes it: what this one forks meanwhile would have it open for writing as well, and
    /// nobody could run it (execve(2), ETXTBSY).
    fn write_program(path: &Path, text: &str) {
        let mut shell = std::process::Command::new("sh");
        shell.args(["-c", "printf %s \"$1\" >\"$0\" && chmod 700 \"$0\""]).arg(path).arg(text);
        assert!(shell.status().unwrap().success());
    }

    /// A program that an agent which was killed has left goes on when the next agent has cleaned up.
    #[tokio::test(flavor = "multi_thread")]
    async fn what_was_removed_is_not_made_again_by_a_program_that_goes_on() {
        let (state, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let program = state.path().join("writes");
        let text = format!(
            "#!/bin/sh\nrm '{}'/.vmferry-*\nfor file; do case $file in /*) echo x > $file;; esac; done\n",
            folder.path().display()
        );
        write_program(&program, &text);
        let mut journal = journal(state.path());
        let (all, mut config) = (all(state.path(), ""), config(folder.path()));
        (config.qemu_img, config.format) = (program, crate::config::CreateFormat::Qcow2);
        make(&all, &config, &offer(&["vda"]), &mut journal, true).await.unwrap_err();
        assert_eq!(names(folder.path()), Vec::<String>::new());
    }

    /// Whatever makes them, and whatever of it is slow.
    #[tokio::test(flavor = "multi_thread")]
    async fn images_that_take_too_long_are_given_up() {
        let (state, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let program = state.path().join("hangs");
        write_program(&program, "#!/bin/sh\nexec sleep 1000\n");
        let lines = format!(
            "[deadlines]\nmake_s = 1\n[create]\npath = '{}/{{vm}}-{{disk}}'\n",
            folder.path().display()
        );
        for more in ["format = 'qcow2'\nqemu_img = 'HANGS'\n", "command = ['HANGS']\nremove = ['rm']\n"] {
            let more = more.replace("HANGS", &program.display().to_string());
            let all = all(state.path(), &(lines.clone() + &more));
            let mut journal = journal(state.path());
            let failed = make(&all, all.create.as_ref().unwrap(), &offer(&["vda"]), &mut journal, true)
                .await
                .unwrap_err();
            let Error::Problems(problems) = failed else { unreachable!("{failed:?}") };
            assert!(problems[0].text.contains(" after "), "{problems:?}");
            assert_eq!(remove(&all, journal.past()).await, Vec::<String>::new());
        }
        assert_eq!(names(folder.path()), Vec::<String>::new());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn images_that_are_to_stay_do_but_for_an_unfinished_one() {
        let (state, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut journal = journal(state.path());
        let path = folder.path().display();
        let all = all(state.path(), &format!("[create]\npath = '{path}/{{vm}}-{{disk}}'\nkeep = true\n"));
        make(&all, all.create.as_ref().unwrap(), &offer(&["vda"]), &mut journal, true).await.unwrap();
        let unfinished = folder.path().join(".vmferry-1");
        journal.will_make(Undo::Image { path: unfinished.clone(), made: None }).unwrap();
        fs::write(&unfinished, "").unwrap();
        assert!(remove(&all, journal.past()).await.is_empty() && kept(&all, journal.past()).is_empty());
        assert_eq!(names(folder.path()), ["web1-vda"]);
        // A check leaves nothing all the same.
        assert!(remove_all(&all, journal.past()).await.is_empty() && names(folder.path()).is_empty());
        assert!(!journal.past().came_to_a_qemu());
        journal.will_make(Undo::Qemu).unwrap();
        assert!(journal.past().came_to_a_qemu());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_a_command_surely_made_is_removed_by_a_command_and_nothing_else() {
        let (state, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let script = state.path().join("script");
        let text = "echo too much said >&2\n[ $VMFERRY_ACTION = create ] || exec rm \"$VMFERRY_PATH\"\n\
                    truncate -s $VMFERRY_BYTES \"$VMFERRY_PATH\"\n[ $VMFERRY_DISK != vdc ]\n";
        fs::write(&script, text).unwrap();
        let (path, script) = (folder.path().display(), script.display());
        let lines = format!(
            "[create]\npath = '{path}/{{vm}}-{{disk}}'\ncommand = ['sh', '{script}']\nremove = ['sh', '{script}']\n"
        );
        let all = all(state.path(), &lines);
        let create = all.create.clone().unwrap();
        let mut journal = journal(state.path());
        let vdb = folder.path().join("web1-vdb");
        make(&all, &create, &offer(&["vda", "vdb"]), &mut journal, true).await.unwrap();
        assert_eq!(fs::metadata(&vdb).unwrap().len(), 1 << 20);
        // Another one takes its place.
        fs::rename(&vdb, folder.path().join("kept")).unwrap();
        fs::write(&vdb, "another").unwrap();
        let failed = make(&all, &create, &offer(&["vdc"]), &mut journal, true).await.unwrap_err();
        let Error::Problems(problems) = failed else { unreachable!("{failed:?}") };
        assert!(problems[0].text.contains("too much said"), "{problems:?}");
        let left = remove(&all, journal.past()).await;
        assert!(left.len() == 1 && left[0].contains("web1-vdc") && left[0].contains("perhaps"), "{left:?}");
        // One that an agent has left would go on with its standard input.
        assert_eq!(made_by_command::runs_still(&all, journal.past()).await, None);
        let lock = File::open(state.path().join("web1.create")).unwrap();
        lock.lock().unwrap();
        let runs = made_by_command::runs_still(&all, journal.past()).await.unwrap();
        assert!(runs.contains("web1-vdc") && runs.contains("still runs"), "{runs}");
        drop(lock);
        assert_eq!(names(folder.path()), ["kept", "web1-vdb", "web1-vdc"]);
    }
}
