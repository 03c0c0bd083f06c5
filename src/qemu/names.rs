//! The names vmferry gives to things inside a QEMU: nodes, jobs, exports and descriptors.
//!
//! Every one begins with [`PREFIX`], so that what is ours can be told from what is the
//! operator's, even by an agent that has lost its memory. Knows nothing of QMP itself.

/// What every name of ours begins with.
pub const PREFIX: &str = "vmferry-";

/// What names of things begin with that are there to compare disks.
const COMPARED: &str = "vmferry-compared-";

/// What names of dirty bitmaps begin with that stay for a replica when a migration has ended.
const REPLICA: &str = "vmferry-replica-";

/// The descriptor name of the destination's listening NBD socket.
pub const NBD_LISTEN_FDNAME: &str = "vmferry-nbd-listen";

/// The descriptor name of the RAM stream, on both sides.
pub const RAM_FDNAME: &str = "vmferry-ram";

/// The descriptor name of a trial's stream on the source, which nobody reads.
pub const TRIAL_FDNAME: &str = "vmferry-trial";

/// A descriptor name that is never handed over: asking with it must be refused by QEMU.
pub(super) const ABSENT_FDNAME: &str = "vmferry-absent";

/// QEMU refuses a node name of more bytes than this (`Node name too long`).
pub const NODE_NAME_MAX_BYTES: usize = 31;

/// The source's NBD client node for this disk; at most [`NODE_NAME_MAX_BYTES`] long.
///
/// A disk name that does not fit keeps its beginning and ends in a hash of the whole, the same
/// on every host and in every version of vmferry.
pub fn node_name(disk: &str) -> String {
    let room = NODE_NAME_MAX_BYTES - PREFIX.len();
    if disk.len() <= room {
        return format!("{PREFIX}{disk}");
    }
    let mut end = room - 9;
    while !disk.is_char_boundary(end) {
        end -= 1;
    }
    format!("{PREFIX}{}-{:08x}", &disk[..end], fnv1a(disk))
}

/// The group of this disk's device while the guest's writes to it are limited.
pub fn throttle_group(disk: &str) -> String {
    format!("{PREFIX}{disk}")
}

/// The source's mirror job for this disk.
pub fn job_id(disk: &str) -> String {
    format!("{PREFIX}{disk}")
}

/// The destination's block export for this disk (its id; the NBD export name is the disk's).
pub fn export_id(disk: &str) -> String {
    format!("{PREFIX}{disk}")
}

/// The descriptor name of this disk's NBD stream on the source.
pub fn nbd_fdname(disk: &str) -> String {
    format!("{PREFIX}nbd-{disk}")
}

/// One of the two dirty bitmaps that follow a disk from try to try of this migration.
pub fn bitmap(migration: &str, which: char) -> String {
    format!("{PREFIX}{which}-{migration}")
}

/// One of the two dirty bitmaps that follow a disk from run to run of this replica.
pub fn replica(id: &str, which: char) -> String {
    format!("{REPLICA}{which}-{id}")
}

/// Whether a bitmap of ours is one of those.
pub fn is_replica(bitmap: &str) -> bool {
    bitmap.starts_with(REPLICA)
}

/// One of the two dirty bitmaps by which this migration knows what it has compared.
pub fn compared(migration: &str, which: char) -> String {
    format!("{COMPARED}{which}-{migration}")
}

/// Whether a bitmap of ours is one of those.
pub fn is_compared(bitmap: &str) -> bool {
    bitmap.starts_with(COMPARED)
}

/// The source's private block export of a disk that is compared (its id, and its name at the NBD server).
pub fn compared_export(disk: &str) -> String {
    format!("{COMPARED}{disk}")
}

/// The source's private block export of a disk that tells what its topmost image has.
pub fn top_export(disk: &str) -> String {
    format!("{PREFIX}top-of-{disk}")
}

/// Whether a name inside QEMU was given by vmferry.
pub fn is_ours(name: &str) -> bool {
    name.starts_with(PREFIX)
}

/// A name of somebody's that is to be remembered: a long one by its beginning and a hash of the whole.
pub fn bounded(name: &str) -> String {
    const BYTES_MAX: usize = 256;
    if name.len() <= BYTES_MAX {
        return name.to_owned();
    }
    let mut end = BYTES_MAX;
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}... ({:08x})", &name[..end], fnv1a(name))
}

/// FNV-1a, 32 bits: written out because the result is part of a name and may never change.
fn fnv1a(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_disk_names_keep_to_the_limit_and_stay_apart() {
        let one = node_name("ua-3f2c81d0-55aa-4be1-9d51-7f1de0c0a001");
        let two = node_name("ua-3f2c81d0-55aa-4be1-9d51-7f1de0c0a002");
        assert_eq!(one, "vmferry-ua-3f2c81d0-55-2c3b2a9e");
        assert_eq!(one.len(), NODE_NAME_MAX_BYTES);
        assert_ne!(one, two);
        assert_eq!(node_name("vda"), "vmferry-vda");
        assert_eq!(node_name(&"x".repeat(23)).len(), NODE_NAME_MAX_BYTES);
        assert!(is_ours(&one) && !is_ours("vda"));
    }
}
