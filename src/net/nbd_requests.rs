//! Where the requests of an NBD client begin in the bytes that it sends, so that the header of each is
//! handed to the server in one piece.
//!
//! QEMU's NBD server forgets what it has read of a request's header when the export is drained before the
//! rest has come (`nbd_read_eof` in nbd/server.c; seen with 10.0.2). From there on it takes data for
//! headers, or waits for ever. A drain comes with any change of the block graph and with the guest's pause.
//! A unix socket takes a short write whole or not at all (`unix_stream_sendmsg` of Linux makes one buffer
//! of it), so a header that is written whole is read whole.
//!
//! ```text
//! client := flags 4 | option* | request*
//! option := "IHAVEOPT" | number u32 | length u32 | data
//! request := 25609513 | flags u16 | type u16 | cookie u64 | offset u64 | length u32 | data, of a WRITE
//!          | 21e41c71 | flags u16 | type u16 | cookie u64 | offset u64 | length u64 | data, if so flagged
//! ```
//! Source: the NBD protocol (doc/proto.md of NetworkBlockDevice/nbd), with its extended headers. What is
//! none of that is the server's to refuse: it is handed over as it comes, from there on.

use std::collections::VecDeque;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

const FLAGS_LEN: usize = 4;
const OPTION_LEN: usize = 16;
const COMPACT_LEN: usize = 28;
const EXTENDED_LEN: usize = 32;
const MAGIC_LEN: usize = 4;

const OPTION_MAGIC: [u8; MAGIC_LEN] = *b"IHAV";
const COMPACT_MAGIC: [u8; MAGIC_LEN] = [0x25, 0x60, 0x95, 0x13];
const EXTENDED_MAGIC: [u8; MAGIC_LEN] = [0x21, 0xe4, 0x1c, 0x71];

const CMD_WRITE: u16 = 1;
const CMD_FLAG_PAYLOAD_LEN: u16 = 1 << 5;

/// A header that ends within so many bytes from where a write begins is taken in one piece with them. Linux
/// makes buffers of 32 KiB, or of half the socket's send buffer if that is less; it is more.
const ONE_PIECE_BYTES: usize = 16 * 1024;

/// What the next byte of a client is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
enum Next {
    /// The first of the client's handshake flags.
    #[default]
    Flags,
    /// The first of an option or a request.
    Header,
    /// One of so many that are handed over as they come.
    Data(u64),
    /// Nothing that this module knows.
    Unknown,
}

/// Follows one client from its first byte on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NbdRequests {
    next: Next,
}

impl NbdRequests {
    /// How many bytes of `queue` may be written in one call now; 0: not before more has come. What is kept
    /// back is less than a header.
    pub fn writable(&self, queue: &VecDeque<Bytes>) -> usize {
        let available = queue.iter().map(Bytes::len).sum();
        let (mut next, mut at) = (self.next, 0);
        while at < available {
            let (after, length) = match step(next, queue, at, available) {
                Some(step) => step,
                None => return at,
            };
            let is_header = matches!(next, Next::Flags | Next::Header);
            if is_header && at > 0 && at + length > ONE_PIECE_BYTES {
                return at;
            }
            (next, at) = (after, at + length);
        }
        at
    }

    /// So many bytes of `queue` have been written.
    pub fn written(&mut self, queue: &VecDeque<Bytes>, written: usize) {
        let available = queue.iter().map(Bytes::len).sum();
        let mut at = 0;
        while at < written {
            let Some((after, length)) = step(self.next, queue, at, available) else {
                // A header in parts, because nothing more was to come.
                self.next = Next::Unknown;
                return;
            };
            self.next = after;
            at += length;
        }
        // Of the last step the rest is still to be written.
        if at > written {
            let rest = (at - written) as u64;
            self.next = match self.next {
                Next::Unknown => Next::Unknown,
                Next::Data(left) => Next::Data(left.saturating_add(rest)),
                Next::Flags | Next::Header => Next::Data(rest),
            };
        }
    }
}

/// What comes after the piece at `at`, and how long the piece is as far as it is there. `None`: a header of
/// which a part is missing.
fn step(next: Next, queue: &VecDeque<Bytes>, at: usize, available: usize) -> Option<(Next, usize)> {
    let there = available - at;
    match next {
        Next::Unknown => Some((Next::Unknown, there)),
        Next::Data(left) => {
            let length = usize::try_from(left).map_or(there, |left| left.min(there));
            let rest = left - length as u64;
            Some((if rest == 0 { Next::Header } else { Next::Data(rest) }, length))
        }
        Next::Flags => (there >= FLAGS_LEN).then_some((Next::Header, FLAGS_LEN)),
        Next::Header => {
            let mut header = [0; EXTENDED_LEN];
            let copied = copy(queue, at, &mut header);
            after_header(&header[..copied], there)
        }
    }
}

fn after_header(header: &[u8], there: usize) -> Option<(Next, usize)> {
    let magic: [u8; MAGIC_LEN] = header.get(..MAGIC_LEN)?.try_into().ok()?;
    let (length, data) = match magic {
        OPTION_MAGIC => (OPTION_LEN, u64::from(be_u32(header.get(12..OPTION_LEN)?))),
        COMPACT_MAGIC => {
            let data = be_u32(header.get(24..COMPACT_LEN)?);
            (COMPACT_LEN, if be_u16(&header[6..8]) == CMD_WRITE { data.into() } else { 0 })
        }
        EXTENDED_MAGIC => {
            let data = be_u64(header.get(24..EXTENDED_LEN)?);
            (EXTENDED_LEN, if be_u16(&header[4..6]) & CMD_FLAG_PAYLOAD_LEN != 0 { data } else { 0 })
        }
        _ => return Some((Next::Unknown, there)),
    };
    Some((if data == 0 { Next::Header } else { Next::Data(data) }, length))
}

/// Copies what there is from `at` on, as far as it fits; tells how much.
fn copy(queue: &VecDeque<Bytes>, mut at: usize, into: &mut [u8]) -> usize {
    let mut copied = 0;
    for chunk in queue {
        let Some(chunk) = chunk.get(at..) else {
            at -= chunk.len();
            continue;
        };
        at = 0;
        let n = chunk.len().min(into.len() - copied);
        into[copied..copied + n].copy_from_slice(&chunk[..n]);
        copied += n;
        if copied == into.len() {
            break;
        }
    }
    copied
}

fn be_u16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |value, byte| value << 8 | u16::from(*byte))
}

fn be_u32(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

fn be_u64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What a client sends, and where its headers are.
    fn client(parts: &[(u8, u16)]) -> (Vec<u8>, Vec<(usize, usize)>) {
        let mut bytes = vec![0, 0, 0, 3];
        let mut headers = vec![(0, FLAGS_LEN)];
        for (kind, data) in parts {
            let begin = bytes.len();
            let data = usize::from(*data);
            match kind % 5 {
                0 => {
                    bytes.extend(b"IHAVEOPT\0\0\0\x07");
                    bytes.extend(u32::try_from(data).unwrap().to_be_bytes());
                }
                kind @ (1 | 2) => {
                    bytes.extend(COMPACT_MAGIC);
                    bytes.extend([0, 0, 0, if kind == 1 { 1 } else { 6 }]);
                    bytes.extend([0x25; 16]);
                    bytes.extend(u32::try_from(data).unwrap().to_be_bytes());
                }
                kind => {
                    bytes.extend(EXTENDED_MAGIC);
                    bytes.extend([0, if kind == 3 { 1 << 5 } else { 0 }, 0, 1]);
                    bytes.extend([0x25; 16]);
                    bytes.extend((data as u64).to_be_bytes());
                }
            }
            headers.push((begin, bytes.len()));
            if matches!(kind % 5, 0 | 1 | 3) {
                bytes.extend(COMPACT_MAGIC.iter().cycle().take(data));
            }
        }
        (bytes, headers)
    }

    fn joined(queue: &VecDeque<Bytes>) -> Vec<u8> {
        queue.iter().flatten().copied().collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        /// However the bytes arrive and however much of a write is taken, all of them are handed over in
        /// order, and each header ends within what the kernel takes in one piece.
        #[test]
        fn no_header_is_split(
            parts in prop::collection::vec((any::<u8>(), prop_oneof![0_u16..40, any::<u16>()]), 0..12),
            arrivals in prop::collection::vec(prop_oneof![1_usize..40, 1_usize..70_000], 1..40),
            takes in prop::collection::vec(prop_oneof![Just(usize::MAX), ONE_PIECE_BYTES..80_000], 1..10),
        ) {
            let (bytes, headers) = client(&parts);
            let mut requests = NbdRequests::default();
            let (mut queue, mut arrived, mut handed) = (VecDeque::new(), 0, Vec::new());
            let (mut arrivals, mut takes) = (arrivals.iter().cycle(), takes.iter().cycle());
            while handed.len() < bytes.len() {
                let writable = requests.writable(&queue);
                if writable == 0 {
                    prop_assert!(joined(&queue).len() < EXTENDED_LEN, "more than a header is kept back");
                    prop_assert!(arrived < bytes.len(), "something is kept back for ever");
                    let n = (*arrivals.next().unwrap()).min(bytes.len() - arrived);
                    queue.push_back(Bytes::copy_from_slice(&bytes[arrived..arrived + n]));
                    arrived += n;
                    continue;
                }
                // The kernel takes the first piece whole, and perhaps more.
                let written = writable.min(*takes.next().unwrap());
                let begin = handed.len();
                for (from, to) in headers.iter().filter(|(from, _)| (begin..begin + writable).contains(from)) {
                    prop_assert!(to - begin <= writable, "a header is not whole");
                    prop_assert!(*from == begin || to - begin <= ONE_PIECE_BYTES, "a header may be split");
                }
                requests.written(&queue, written);
                let mut rest = joined(&queue);
                handed.extend(rest.drain(..written));
                queue = VecDeque::from([Bytes::from(rest)]);
            }
            prop_assert_eq!(handed, bytes);
            prop_assert_eq!(requests.next, Next::Header);
        }

        /// A peer may send anything: nothing is kept back but the beginning of a header.
        #[test]
        fn anything_else_is_handed_over(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            take in 1_usize..50,
        ) {
            let mut requests = NbdRequests::default();
            let mut queue = VecDeque::from([Bytes::from(bytes)]);
            loop {
                let written = requests.writable(&queue).min(take);
                if written == 0 {
                    break;
                }
                requests.written(&queue, written);
                queue[0] = queue[0].slice(written..);
            }
            prop_assert!(queue[0].len() < EXTENDED_LEN);
        }
    }

    #[test]
    fn what_is_no_request_is_the_servers_to_refuse() {
        let mut requests = NbdRequests::default();
        let queue = VecDeque::from([Bytes::from_static(b"\0\0\0\x03GET / HTTP/1.1\r\n")]);
        assert_eq!(requests.writable(&queue), 20);
        requests.written(&queue, 20);
        assert_eq!(requests.next, Next::Unknown);
        let queue = VecDeque::from([Bytes::from_static(&COMPACT_MAGIC)]);
        assert_eq!(requests.writable(&queue), 4);
    }
}
