//! Whether a disk at the destination is still as an earlier try left it.
//!
//! The destination takes note of each image file when a try has been undone: which file it is, its
//! size and when it was last written, and which boot of the host that was. Before the next try it
//! looks again. A file that somebody replaced, restored, or wrote to shows, whoever it was and
//! whether or not through vmferry. What cannot be known makes a doubt, and a doubt makes a whole
//! copy: an image that this agent cannot see, a block device (nobody keeps the time of its last
//! write), a host that was booted since. What is not seen: a write to an image on a network file
//! system by another host whose time of change has not arrived here, and one whose author put the
//! old time back.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::host::Host;
use super::journal::{self, Journal, Past, Record, Role};
use super::message::DiskState;
use super::problem::chain;
use super::progress::Outcome;
use crate::net::identity::Identity;
use crate::qemu::Disk;

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// A disk and its image, as QEMU names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Image {
    disk: String,
    filename: Option<String>,
}

/// All of a destination's disks, when a try was over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Witness {
    /// Of the host, at that time.
    boot_id: String,
    /// The disks that could be seen.
    files: Vec<FileSeen>,
}

/// One image file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct FileSeen {
    disk: String,
    device: u64,
    inode: u64,
    bytes: u64,
    written_s: i64,
    written_ns: i64,
}

/// The images of these disks.
pub(super) fn images(disks: &[Disk]) -> Vec<Image> {
    disks.iter().map(|d| Image { disk: d.name.clone(), filename: d.filename.clone() }).collect()
}

/// Writes into a try's journal how it left the images. Not if something is left of it, which might
/// still write to them.
pub(super) fn bear(journal: &mut Journal, images: &[Image], leftovers: &[String]) {
    if images.is_empty() || !leftovers.is_empty() {
        return;
    }
    if let Err(e) = journal.record(Record::Witness(take(images))) {
        tracing::info!(error = chain(&e), "a further try will copy the whole disks");
    }
}

/// Looks at the images.
fn take(images: &[Image]) -> Witness {
    Witness { boot_id: boot_id(), files: images.iter().filter_map(|image| see(image).ok()).collect() }
}

fn boot_id() -> String {
    std::fs::read_to_string(BOOT_ID).map(|id| id.trim().to_owned()).unwrap_or_default()
}

fn see(image: &Image) -> Result<FileSeen, String> {
    let name = image.filename.as_deref().unwrap_or_default();
    let path = Path::new(name);
    if !path.is_absolute() {
        return Err(format!("the destination's QEMU does not name an image file by its path but {name:?}"));
    }
    let seen =
        std::fs::metadata(path).map_err(|e| format!("the destination's agent cannot see {name}: {e}"))?;
    if !seen.is_file() {
        return Err(format!("{name} is no regular file, of which nobody can tell whether it was written to"));
    }
    Ok(FileSeen {
        disk: image.disk.clone(),
        device: seen.dev(),
        inode: seen.ino(),
        bytes: seen.len(),
        written_s: seen.mtime(),
        written_ns: seen.mtime_nsec(),
    })
}

/// What has become of each image since the try `after`, which `peer` had sent.
pub(super) fn since(host: &Host, peer: &Identity, vm: &str, after: Uuid, images: &[Image]) -> Vec<DiskState> {
    let witness = testimony(host, peer, vm, after);
    let state = |image: &Image| {
        let doubt = match &witness {
            Ok(witness) => doubt(witness, image, &boot_id()),
            Err(doubt) => Some(doubt.clone()),
        };
        DiskState { disk: image.disk.clone(), doubt }
    };
    images.iter().map(state).collect()
}

/// The witness of a try that durably never ran its guest here, and after which it ran from nothing
/// of ours.
fn testimony(host: &Host, peer: &Identity, vm: &str, after: Uuid) -> Result<Witness, String> {
    let path = Journal::path(&host.journals(), after, Role::Destination);
    let past = Journal::peek(&path, host.identity.as_str())
        .map_err(|_| "the destination has no record of the try before".to_owned())?;
    if past.header.peer != peer.as_str() || past.header.vm != vm {
        return Err("the destination's record of the try before is of another migration".into());
    }
    let undone = matches!(&past.ended, Some(Outcome::Failed { leftovers, .. }) if leftovers.is_empty());
    if !undone || !past.never_ran || past.runs {
        return Err("the destination did not undo the try before completely".into());
    }
    if was_here_since(host, vm, &past) {
        return Err("the VM has been at the destination since".into());
    }
    past.witness.ok_or_else(|| "the destination took no note of how the try before left its images".into())
}

/// Whether journals tell of another migration of the VM with which its guest was on this host.
fn was_here_since(host: &Host, vm: &str, before: &Past) -> bool {
    // Only looked at: others are writing to theirs.
    let Ok(all) = journal::peek_all(&host.journals(), host.identity.as_str()) else { return true };
    all.iter().any(|(path, past)| match past {
        // Of one that is not believed nothing is known.
        Err(_) => journal::vm_of(path).is_none_or(|of| of == vm),
        Ok(past) => {
            let later = past.header.began_at >= before.header.began_at;
            let here = past.header.role == Role::Source || past.starting || past.runs;
            past.header.vm == vm && later && here
        }
    })
}

fn doubt(then: &Witness, image: &Image, boot_id: &str) -> Option<String> {
    if then.boot_id.is_empty() || then.boot_id != boot_id {
        return Some("the destination was booted since the try before".into());
    }
    let now = match see(image) {
        Ok(now) => now,
        Err(doubt) => return Some(doubt),
    };
    let Some(then) = then.files.iter().find(|f| f.disk == image.disk) else {
        return Some("the destination's agent could not see its image after the try before".into());
    };
    if (then.device, then.inode) != (now.device, now.inode) {
        return Some("there is another file in the place of its image at the destination".into());
    }
    (*then != now).then(|| "its image at the destination was changed since the try before".into())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn image(path: &Path) -> Image {
        Image { disk: "disk0".into(), filename: Some(path.display().to_string()) }
    }

    #[test]
    fn whatever_happened_to_the_image_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk0.raw");
        std::fs::write(&path, "left by the first try").unwrap();
        let image = image(&path);
        let then = take(std::slice::from_ref(&image));
        let boot = boot_id();
        assert!(!boot.is_empty());
        assert_eq!(doubt(&then, &image, &boot), None);
        assert!(doubt(&then, &image, "another").unwrap().contains("booted"));

        std::thread::sleep(std::time::Duration::from_millis(20));
        std::fs::write(&path, "left by another guest").unwrap();
        assert!(doubt(&then, &image, &boot).unwrap().contains("changed"));

        let other = folder.path().join("other");
        std::fs::write(&other, "left by the first try").unwrap();
        std::fs::rename(&other, &path).unwrap();
        assert!(doubt(&then, &image, &boot).unwrap().contains("another file"));

        std::fs::remove_file(&path).unwrap();
        assert!(doubt(&then, &image, &boot).unwrap().contains("cannot see"));
        let unnamed = Image { disk: "disk0".into(), filename: Some("json:{}".into()) };
        assert!(doubt(&then, &unnamed, &boot).unwrap().contains("does not name"));
        assert!(doubt(&take(&[unnamed]), &image, &boot).is_some());
        let device = Image { disk: "disk0".into(), filename: Some("/dev/null".into()) };
        assert!(doubt(&then, &device, &boot).unwrap().contains("no regular file"));
    }
}
