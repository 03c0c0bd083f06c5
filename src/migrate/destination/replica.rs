//! The end of a replica that this host keeps for a peer, when that peer asks for it. An image is removed only if this
//! agent has made it for the replica, and nobody can have used it since: not the VM, not a QEMU, not another program.

use std::fs;
use std::path::Path;

use super::error::Error;
use super::image_stamp;
use crate::migrate::guest::process;
use crate::migrate::host::Host;
use crate::migrate::host::replicas::KeptReplica;
use crate::migrate::journal::{MadeFile, Undo};
use crate::migrate::model::replica::LeftAs;
use crate::migrate::protocol::message::EndedReplica;
use crate::net::identity::Identity;
use crate::qemu::boot_id;

/// Forgets the replica, and removes its images if that is wanted. What stays keeps its record.
pub(crate) async fn end(host: &Host, peer: &Identity, vm: &str, images: bool) -> Result<EndedReplica, Error> {
    let problem = |p| Error::Problems(vec![p]);
    let config = host.vm_from(peer, vm).map_err(problem)?;
    let _not_meanwhile = host.reserve_for_task(vm, "the end of a replica").map_err(problem)?;
    let Some(kept) = host.replicas.kept(vm, peer.as_str()) else {
        return Ok(EndedReplica { was_kept: false, left: Vec::new() });
    };
    let mut left = Vec::new();
    if images {
        let is_silent = process::connect(&config).await.is_err_and(|e| e.is_not_listening());
        left = match is_silent {
            true => remove(host, &kept),
            false => kept_all(&kept, "a QEMU of the VM is there"),
        };
    }
    if left.is_empty() {
        host.replicas.forget_kept(vm, peer.as_str())?;
    }
    tracing::info!(vm, %peer, images, left = left.len(), "a replica was ended");
    Ok(EndedReplica { was_kept: true, left })
}

fn remove(host: &Host, kept: &KeptReplica) -> Vec<String> {
    let Some(left) = &kept.left else {
        return kept_all(kept, "nobody saw how its last run left it");
    };
    if image_stamp::was_here_since(&host.journals, &kept.vm, left.began_at) {
        return kept_all(kept, "the VM has been here since");
    }
    if boot_id().is_none_or(|now| now != left.stamp.boot_id) {
        return kept_all(kept, "the host was booted since");
    }
    let mut stays = Vec::new();
    for made in &kept.made {
        let removed = match made {
            Undo::Image { path, made: Some(made) } => {
                remove_one(path, made, left).map_err(|why| (path.as_path(), why))
            }
            Undo::Volume(volume) => {
                Err((volume.path.as_path(), "a command has made it: remove it yourself".to_owned()))
            }
            _ => Ok(()),
        };
        stays.extend(removed.err().map(|(path, why)| stays_as(path, &why)));
    }
    stays
}

fn remove_one(path: &Path, made: &MadeFile, left: &LeftAs) -> Result<(), String> {
    let Ok(file) = fs::symlink_metadata(path) else { return Ok(()) };
    if MadeFile::of(&file) != *made {
        return Err("it is another file than the one that was made".into());
    }
    if !left.stamp.files.iter().any(|stamp| stamp.is_of(&file)) {
        return Err("it was changed since it was copied".into());
    }
    fs::remove_file(path).map_err(|e| e.to_string())
}

fn kept_all(kept: &KeptReplica, why: &str) -> Vec<String> {
    let paths = kept.made.iter().filter_map(|undo| match undo {
        Undo::Image { path, .. } => Some(path),
        Undo::Volume(volume) => Some(&volume.path),
        _ => None,
    });
    paths.filter(|path| fs::symlink_metadata(path).is_ok()).map(|path| stays_as(path, why)).collect()
}

fn stays_as(path: &Path, why: &str) -> String {
    format!("the image {} stays: {why}", path.display())
}
