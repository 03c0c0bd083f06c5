//! Two machines compared, before anything is moved: what QEMU would refuse at the very end, and what
//! would change under the guest. The destination compares; disks are compared elsewhere.

mod compare;
mod devices;
mod hardware;

pub(crate) use compare::{ask, findings};

/// Letters of a peer's word that are shown.
const SHOWN_MAX: usize = 80;

/// A word of the other side's, fit for a terminal.
fn shown(word: &str) -> String {
    word.chars().take(SHOWN_MAX).map(|c| if c.is_control() { '?' } else { c }).collect()
}
