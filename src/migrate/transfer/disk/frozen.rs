//! Copies of changes at rest: what one process of an agent leaves of them to the next, as plain data, with their
//! connections beside it in a list of descriptors.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::copied::Counts;
use super::copier::Pass;
use super::delta::LeftCopy;
use crate::net::stream_owner::Descriptors;
use crate::qemu::{LeftWriter, Writing};

/// The copy of one disk's changes.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct FrozenCopy {
    /// The place of its connection to the destination's NBD server in the list of descriptors.
    fd: usize,
    protocol: Writing,
    pass: Option<Pass>,
    is_over: bool,
    counts: Counts,
}

pub(crate) fn freeze_changes(
    changes: BTreeMap<String, Option<LeftCopy>>,
    fds: &mut Descriptors,
) -> BTreeMap<String, Option<FrozenCopy>> {
    let mut freeze = |LeftCopy { writer: LeftWriter { socket, protocol }, pass, is_over, counts }| {
        FrozenCopy { fd: fds.add(socket), protocol, pass, is_over, counts }
    };
    changes.into_iter().map(|(disk, left)| (disk, left.map(&mut freeze))).collect()
}

/// Without its connection no copy can go on: it is none.
pub(crate) fn thaw_changes(
    changes: BTreeMap<String, Option<FrozenCopy>>,
    fds: &mut Descriptors,
) -> BTreeMap<String, Option<LeftCopy>> {
    let mut thaw = |FrozenCopy { fd, protocol, pass, is_over, counts }| {
        let writer = LeftWriter { socket: fds.take(fd)?, protocol };
        Some(LeftCopy { writer, pass, is_over, counts })
    };
    changes.into_iter().map(|(disk, left)| (disk, left.and_then(&mut thaw))).collect()
}
