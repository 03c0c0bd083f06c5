//! One block as the guest writes it (tests/guest/block.h), read from a raw image while the guest
//! runs. Knows no guest and no host.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// Bytes of a block.
pub const BLOCK_BYTES: usize = 4096;
const MAGIC: u64 = 0x3230_4b4c_4259_4656;
const WORDS: usize = BLOCK_BYTES / 8;
const HEAD_WORDS: usize = 7;

/// What stands at a block's beginning, behind its magic number and its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Head {
    /// Its number: 1, 2, 3, ...
    pub seq: u64,
    /// The boot that wrote it.
    pub generation: u64,
    /// First letter of the host on whose QEMU the guest executed when it made this block.
    pub host: u8,
}

/// Where block `seq` lies in an area of `blocks`.
pub fn place(seq: u64, blocks: u64) -> u64 {
    seq.wrapping_mul(2_654_435_761) & (blocks - 1)
}

/// The head of what lies at a place, without a look at the rest; none where no block has been.
pub fn head(image: &File, place: u64, blocks: u64) -> Option<Head> {
    let mut bytes = [0; HEAD_WORDS * 8];
    image.read_exact_at(&mut bytes, place * BLOCK_BYTES as u64).ok()?;
    parse(&bytes, place, blocks)
}

/// The whole block at a place, if it is one: a torn one is none.
pub fn whole(image: &File, place: u64, blocks: u64) -> Option<Head> {
    let mut bytes = [0; BLOCK_BYTES];
    image.read_exact_at(&mut bytes, place * BLOCK_BYTES as u64).ok()?;
    let mut sum = 1_469_598_103_934_665_603_u64;
    for at in 0..WORDS - 1 {
        sum = (sum ^ word(&bytes, at)).wrapping_mul(1_099_511_628_211);
        sum ^= sum >> 29;
    }
    parse(&bytes, place, blocks).filter(|_| sum == word(&bytes, WORDS - 1))
}

fn parse(bytes: &[u8], at: u64, blocks: u64) -> Option<Head> {
    let head =
        Head { seq: word(bytes, 2), generation: word(bytes, 5), host: u8::try_from(word(bytes, 6)).ok()? };
    let fits = word(bytes, 0) == MAGIC && word(bytes, 3) == at && place(head.seq, blocks) == at;
    fits.then_some(head)
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut eight = [0; 8];
    eight.copy_from_slice(&bytes[at * 8..at * 8 + 8]);
    u64::from_le_bytes(eight)
}
