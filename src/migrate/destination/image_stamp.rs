//! Whether a disk at the destination is still as an earlier try left it.
//!
//! The destination takes note of each file of each image when a try has been undone: which file it
//! is, its size and when it was last written, and which boot of the host that was. An image may have
//! several files: backing files, a data file. Which ones they are is told by what QEMU has open, not
//! by their names. Before the next try the destination looks again. A file that somebody replaced,
//! restored, or wrote to shows, whoever it was and whether or not through vmferry. What cannot be
//! known makes a doubt, and a doubt makes a whole copy: a file that this agent cannot see as QEMU
//! does, a block device (nobody keeps the time of its last write), a host that was booted since. What
//! is not seen: a write to an image on a network file system by another host whose time of change has
//! not arrived here, and one whose author put the old time back.

use std::os::unix::fs::MetadataExt;

use uuid::Uuid;

use crate::migrate::host::Host;
use crate::migrate::host::journals::Journals;
use crate::migrate::journal::{self, Ending, Journal, Record, Role};
use crate::migrate::model::image::{FileStamp, Image, ImageFile, ImageStamp};
use crate::migrate::model::problem::chain;
use crate::migrate::model::replica::LeftAs;
use crate::migrate::protocol::message::DiskState;
use crate::net::identity::Identity;
use crate::qemu::{Disk, boot_id};

const HERE_SINCE: &str = "the VM has been at the destination since";

/// The images of these disks, under the names that the source knows.
pub(crate) fn images<'a>(disks: impl IntoIterator<Item = (&'a str, &'a Disk)>) -> Vec<Image> {
    disks.into_iter().map(|(name, disk)| image(name, disk)).collect()
}

fn image(name: &str, disk: &Disk) -> Image {
    let files: Result<Vec<ImageFile>, String> = disk.images.iter().map(image_file).collect();
    let (files, doubt) = match files {
        Ok(files) if disk.layers_known && !files.is_empty() => (files, None),
        Ok(_) => (Vec::new(), Some("the destination's QEMU does not tell which files its image has".into())),
        Err(doubt) => (Vec::new(), Some(doubt)),
    };
    Image { disk: name.to_owned(), files, doubt }
}

fn image_file(image: &crate::qemu::Image) -> Result<ImageFile, String> {
    let name = &image.filename;
    let unseen = || format!("the destination's agent cannot see {name} as its QEMU does");
    let seen = image.seen.as_ref().ok_or_else(unseen)?;
    if !seen.is_file {
        return Err(format!("{name} is no regular file, of which nobody can tell whether it was written to"));
    }
    let path = seen.path.clone().ok_or_else(unseen)?;
    Ok(ImageFile { path, device: seen.device, inode: seen.inode })
}

/// Writes into a try's journal how it left the images, and into the record of the replica that they are. Not if
/// something is left of it, which might still write to them.
pub(crate) fn record(host: &Host, journal: &mut Journal, images: &[Image], leftovers: &[String]) {
    if images.is_empty() || !leftovers.is_empty() {
        return;
    }
    let stamp = take(images);
    if let Err(e) = journal.record(Record::ImageStamp(stamp.clone())) {
        tracing::info!(error = chain(&e), "a further try will copy the whole disks");
        return;
    }
    let header = &journal.past().header;
    let left = LeftAs { after: header.migration, began_at: header.began_at, stamp };
    if let Err(e) = host.replicas.left(journal.past(), left) {
        // The journal has it as well, for as long as it is kept.
        tracing::warn!(error = chain(&e), "how the images of a replica were left is not in its record");
    }
}

/// Looks at the images.
fn take(images: &[Image]) -> ImageStamp {
    let files = images.iter().filter_map(|image| see(image).ok()).flatten().collect();
    ImageStamp { boot_id: boot_id().unwrap_or_default(), files }
}

/// All files of an image, in an order of their own.
fn see(image: &Image) -> Result<Vec<FileStamp>, String> {
    if let Some(doubt) = &image.doubt {
        return Err(doubt.clone());
    }
    let mut files = Vec::new();
    for file in &image.files {
        let name = file.path.display();
        let seen = std::fs::metadata(&file.path)
            .map_err(|e| format!("the destination's agent cannot see {name}: {e}"))?;
        if (seen.dev(), seen.ino()) != (file.device, file.inode) {
            return Err(format!("{name} is another file than the one that the destination's QEMU has open"));
        }
        files.push(FileStamp::of(&image.disk, &seen));
    }
    files.sort_by_key(|file| (file.device, file.inode));
    Ok(files)
}

/// What has become of each image since the try `after`, which `peer` had sent.
pub(crate) fn since(host: &Host, peer: &Identity, vm: &str, after: Uuid, images: &[Image]) -> Vec<DiskState> {
    let stamp =
        of_replica(host, peer, vm, after).unwrap_or_else(|| recorded(&host.journals, peer, vm, after));
    let state = |image: &Image| {
        let doubt = match &stamp {
            Ok(stamp) => doubt(stamp, image, &boot_id().unwrap_or_default()),
            Err(doubt) => Some(doubt.clone()),
        };
        DiskState { disk: image.disk.clone(), doubt }
    };
    images.iter().map(state).collect()
}

/// The same, of the images of a replica that was last touched by that run or migration. Journals go in time.
fn of_replica(host: &Host, peer: &Identity, vm: &str, after: Uuid) -> Option<Result<ImageStamp, String>> {
    let left = host.replicas.kept(vm, peer.as_str())?.left.filter(|left| left.after == after)?;
    Some(match was_here_since(&host.journals, vm, left.began_at) {
        true => Err(HERE_SINCE.into()),
        false => Ok(left.stamp),
    })
}

/// The stamp of a try that durably never ran its guest here, and after which it ran from nothing
/// of ours.
fn recorded(journals: &Journals, peer: &Identity, vm: &str, after: Uuid) -> Result<ImageStamp, String> {
    let path = journals.path(after, Role::Destination);
    let past =
        journals.peek(&path).map_err(|_| "the destination has no record of the try before".to_owned())?;
    if past.header.peer != peer.as_str() || past.header.vm != vm {
        return Err("the destination's record of the try before is of another migration".into());
    }
    let undone = matches!(&past.ended, Some(Ending::Failed { leftovers, .. }) if leftovers.is_empty());
    if !undone || !past.never_ran || past.runs {
        return Err("the destination did not undo the try before completely".into());
    }
    if was_here_since(journals, vm, past.header.began_at) {
        return Err(HERE_SINCE.into());
    }
    past.image_stamp
        .ok_or_else(|| "the destination took no note of how the try before left its images".into())
}

/// Whether journals tell of another migration of the VM, begun since, with which its guest was on this host.
pub(crate) fn was_here_since(journals: &Journals, vm: &str, began_at: i64) -> bool {
    // Only looked at: others are writing to theirs.
    let Ok(all) = journals.peek_all() else { return true };
    all.iter().any(|(path, past)| match past {
        // Of one that is not believed nothing is known.
        Err(_) => journal::vm_of(path).is_none_or(|of| of == vm),
        Ok(past) => {
            let later = past.header.began_at >= began_at;
            let here = past.header.role == Role::Source || past.starting || past.runs;
            past.header.vm == vm && later && here
        }
    })
}

fn doubt(then: &ImageStamp, image: &Image, boot_id: &str) -> Option<String> {
    if then.boot_id.is_empty() || then.boot_id != boot_id {
        return Some("the destination was booted since it was copied".into());
    }
    let now = match see(image) {
        Ok(now) => now,
        Err(doubt) => return Some(doubt),
    };
    let then: Vec<&FileStamp> = then.files.iter().filter(|f| f.disk == image.disk).collect();
    if then.is_empty() {
        return Some("the destination's agent could not see its image after the try before".into());
    }
    let which = |file: &FileStamp| (file.device, file.inode);
    if !then.iter().map(|file| which(file)).eq(now.iter().map(which)) {
        return Some("there is another file in the place of its image at the destination".into());
    }
    let unchanged = then.into_iter().eq(now.iter());
    (!unchanged).then(|| "its image at the destination was changed since it was copied".into())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::qemu::{Seen, Transit};

    /// An image of these files, as they are now.
    fn image(paths: &[&Path]) -> Image {
        let file = |path: &&Path| {
            let metadata = std::fs::metadata(path).unwrap();
            ImageFile { path: path.to_path_buf(), device: metadata.dev(), inode: metadata.ino() }
        };
        Image { disk: "disk0".into(), files: paths.iter().map(file).collect(), doubt: None }
    }

    fn taken(image: &Image) -> ImageStamp {
        take(std::slice::from_ref(image))
    }

    #[test]
    fn whatever_happened_to_any_file_of_the_image_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let (path, data) = (folder.path().join("disk0.qcow2"), folder.path().join("data.raw"));
        std::fs::write(&path, "left by the first try").unwrap();
        std::fs::write(&data, "left by the first try").unwrap();
        let image_now = || image(&[&path, &data]);
        let then = taken(&image_now());
        let boot = boot_id().unwrap();
        assert_eq!(doubt(&then, &image_now(), &boot), None);
        assert!(doubt(&then, &image_now(), "another").unwrap().contains("booted"));
        assert!(doubt(&then, &image(&[&path]), &boot).unwrap().contains("another file"));

        std::thread::sleep(std::time::Duration::from_millis(20));
        std::fs::write(&data, "left by another guest").unwrap();
        assert!(doubt(&then, &image_now(), &boot).unwrap().contains("changed"));

        let other = folder.path().join("other");
        std::fs::write(&other, "left by the first try").unwrap();
        let open = image_now();
        std::fs::rename(&other, &path).unwrap();
        assert!(doubt(&then, &image_now(), &boot).unwrap().contains("another file"));
        assert!(doubt(&then, &open, &boot).unwrap().contains("another file than"));
        assert_eq!(taken(&open).files, []);

        std::fs::remove_file(&path).unwrap();
        assert!(doubt(&then, &open, &boot).unwrap().contains("cannot see"));
    }

    #[test]
    fn what_cannot_be_seen_as_qemu_does_is_a_doubt() {
        let seen = |is_file, path: Option<&str>| Seen {
            path: path.map(Into::into),
            device: 1,
            inode: 1,
            is_file,
            allocated: 0,
            free: None,
        };
        let disk = |seen: Option<Seen>| {
            let image = crate::qemu::Image {
                filename: "/srv/disk0".into(),
                driver: "file".into(),
                backing: false,
                read_only: false,
                temporary: false,
                seen,
                on_host: None,
                transit: Transit::None,
                keys: Vec::new(),
            };
            Disk { images: vec![image], layers_known: true, ..Disk::default() }
        };
        let doubt_of = |disk: &Disk| super::image("disk0", disk).doubt;
        assert_eq!(doubt_of(&disk(Some(seen(true, Some("/srv/disk0"))))), None);
        assert!(doubt_of(&disk(None)).unwrap().contains("cannot see"));
        assert!(doubt_of(&disk(Some(seen(true, None)))).unwrap().contains("cannot see"));
        assert!(doubt_of(&disk(Some(seen(false, Some("/dev/vg/a"))))).unwrap().contains("no regular file"));
        assert!(doubt_of(&Disk::default()).unwrap().contains("does not tell"));
        let old: Image = serde_json::from_str(r#"{"disk":"disk0","filename":"/srv/disk0"}"#).unwrap();
        assert!(see(&old).unwrap_err().contains("did not note"));
    }
}
