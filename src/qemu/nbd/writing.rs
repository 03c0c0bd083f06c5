//! The writing client's protocol, without its socket: what the server sends goes in, what it is sent comes out.
//!
//! All of it is data, and so one process can leave it to the next between any two bytes: in the handshake, in the
//! middle of a request, with writes on their way.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;

use bytes::{Buf, BytesMut};
use serde::{Deserialize, Serialize};

use super::{
    HANDSHAKE_FLAGS, INIT_MAGIC, NbdError, OPTION_MAGIC, OPTION_REPLY_MAGIC, REP_ACK, REP_ERROR_BIT, be_u32,
    be_u64, export_info, option_go, request_header, wants,
};
use crate::printable::bounded;

const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const CMD_WRITE: u16 = 1;
const CMD_FLUSH: u16 = 3;
const CMD_WRITE_ZEROES: u16 = 6;
const SEND_FLUSH: u16 = 1 << 2;
const SEND_WRITE_ZEROES: u16 = 1 << 6;

pub(super) const GREETING_LEN: usize = 18;
pub(super) const OPTION_REPLY_LEN: usize = 20;
const REPLY_LEN: usize = 16;
/// Longest reply to our one option: a description of a few bytes, or words on why not.
const OPTION_DATA_MAX: usize = 64 << 10;
/// Writes that may be on their way at once.
const WRITES_MAX: usize = 16;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Stage {
    /// The server speaks first.
    Greeting {
        export: String,
    },
    /// What it says of the export.
    Option,
    Transmission,
}

/// One client of one export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Writing {
    stage: Stage,
    size: u64,
    flags: u16,
    /// Of the last request.
    cookie: u64,
    /// Requests whose reply has not come. Replies may come in any order.
    pending: BTreeSet<u64>,
    to_send: BytesMut,
    received: BytesMut,
}

impl Writing {
    /// Before the first byte from the server.
    pub fn new(export: &str) -> Self {
        Self {
            stage: Stage::Greeting { export: export.into() },
            size: 0,
            flags: 0,
            cookie: 0,
            pending: BTreeSet::new(),
            to_send: BytesMut::new(),
            received: BytesMut::new(),
        }
    }

    /// The export's size in bytes, once the handshake is over.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether the handshake is over.
    pub fn is_ready(&self) -> bool {
        self.stage == Stage::Transmission
    }

    /// What is to be sent next.
    pub fn to_send(&self) -> &[u8] {
        &self.to_send
    }

    /// So many bytes of it have been sent.
    pub fn sent(&mut self, bytes: usize) {
        self.to_send.advance(bytes);
    }

    /// What the server sends goes in here, when [`take`](Self::take) has nothing whole.
    pub fn received(&mut self) -> &mut BytesMut {
        &mut self.received
    }

    /// Whether a write may be begun now: the one before has been sent, and not too many are on their way.
    pub fn has_room(&self) -> bool {
        self.is_ready() && self.to_send.is_empty() && self.pending.len() < WRITES_MAX
    }

    /// Whether every request has been answered.
    pub fn is_settled(&self) -> bool {
        self.is_ready() && self.pending.is_empty()
    }

    /// Begins to write data, or, if it is all zeroes, that.
    pub fn write(&mut self, at: u64, data: &[u8]) -> Result<(), NbdError> {
        let range = at..at + data.len() as u64;
        if data.iter().all(|&byte| byte == 0) {
            return self.request(CMD_WRITE_ZEROES, range);
        }
        self.request(CMD_WRITE, range)?;
        self.to_send.extend_from_slice(data);
        Ok(())
    }

    /// Begins to flush. It covers what has been answered by now.
    pub fn flush(&mut self) -> Result<(), NbdError> {
        self.request(CMD_FLUSH, 0..0)
    }

    fn request(&mut self, command: u16, at: Range<u64>) -> Result<(), NbdError> {
        self.cookie += 1;
        let header = request_header(command, 0, self.cookie, at)?;
        self.pending.insert(self.cookie);
        self.to_send.extend_from_slice(&header);
        Ok(())
    }

    /// Takes the next whole message; false when more has to come.
    ///
    /// Errors: any [`NbdError`], also of an earlier write.
    pub fn take(&mut self) -> Result<bool, NbdError> {
        match &self.stage {
            Stage::Greeting { export } => {
                let Some(greeting) = self.received.get(..GREETING_LEN) else { return Ok(false) };
                is_newstyle(greeting)?;
                let go = option_go(export)?;
                self.received.advance(GREETING_LEN);
                self.to_send.extend_from_slice(&u32::from(HANDSHAKE_FLAGS).to_be_bytes());
                self.to_send.extend_from_slice(&go);
                self.stage = Stage::Option;
                Ok(true)
            }
            Stage::Option => self.option_reply(),
            Stage::Transmission => self.reply(),
        }
    }

    fn option_reply(&mut self) -> Result<bool, NbdError> {
        const WHAT: &str = "the export";
        let Some(head) = self.received.get(..OPTION_REPLY_LEN) else { return Ok(false) };
        let (kind, length) = (be_u32(&head[12..]), be_u32(&head[16..]) as usize);
        if be_u64(head) != OPTION_REPLY_MAGIC {
            return Err(NbdError::Protocol("no reply to an option"));
        }
        if length > OPTION_DATA_MAX {
            return Err(NbdError::Protocol("a reply that is too long"));
        }
        if self.received.len() < OPTION_REPLY_LEN + length {
            return Ok(false);
        }
        self.received.advance(OPTION_REPLY_LEN);
        let data = self.received.split_to(length);
        if kind & REP_ERROR_BIT != 0 {
            return Err(NbdError::Handshake { what: WHAT, text: bounded(&String::from_utf8_lossy(&data)) });
        }
        if let Some((size, flags)) = export_info(kind, &data)? {
            (self.size, self.flags) = (size, flags);
        }
        if kind == REP_ACK {
            wants(self.flags, SEND_FLUSH | SEND_WRITE_ZEROES, "flushes and zeroes")?;
            self.stage = Stage::Transmission;
        }
        Ok(true)
    }

    fn reply(&mut self) -> Result<bool, NbdError> {
        let Some(reply) = self.received.get(..REPLY_LEN) else { return Ok(false) };
        let (magic, error, cookie) = (be_u32(reply), be_u32(&reply[4..]), be_u64(&reply[8..]));
        if magic != SIMPLE_REPLY_MAGIC {
            return Err(NbdError::Protocol("no simple reply"));
        }
        if !self.pending.remove(&cookie) {
            return Err(NbdError::Protocol("a reply to no request of ours"));
        }
        self.received.advance(REPLY_LEN);
        if error == 0 {
            return Ok(true);
        }
        let source = io::Error::from_raw_os_error(error.cast_signed());
        Err(NbdError::Request { what: "write", source })
    }
}

pub(super) fn is_newstyle(greeting: &[u8]) -> Result<(), NbdError> {
    if be_u64(greeting) != INIT_MAGIC || be_u64(&greeting[8..]) != OPTION_MAGIC {
        return Err(NbdError::Protocol("no newstyle greeting"));
    }
    if u16::from_be_bytes([greeting[16], greeting[17]]) & HANDSHAKE_FLAGS != HANDSHAKE_FLAGS {
        return Err(NbdError::Protocol("no fixed newstyle"));
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::REP_INFO;
    use super::*;

    const SIZE: usize = 1 << 20;
    const EXPORT: &str = "disk0";

    /// A server of one export, by doc/proto.md alone.
    struct Server {
        disk: Vec<u8>,
        received: BytesMut,
        in_transmission: bool,
        flushed: usize,
        to_send: BytesMut,
    }

    impl Server {
        fn new() -> Self {
            let to_send = BytesMut::from(&b"NBDMAGICIHAVEOPT\0\x03"[..]);
            Self {
                disk: vec![0xee; SIZE],
                received: BytesMut::new(),
                in_transmission: false,
                flushed: 0,
                to_send,
            }
        }

        fn serve(&mut self) {
            if !self.in_transmission {
                let hello =
                    [&[0, 0, 0, 3][..], b"IHAVEOPT", &[0, 0, 0, 7, 0, 0, 0, 11, 0, 0, 0, 5], b"disk0\0\0"]
                        .concat();
                if self.received.len() < hello.len() {
                    return;
                }
                assert_eq!(self.received.split_to(hello.len()), hello);
                let info =
                    [&[0, 0][..], &(SIZE as u64).to_be_bytes(), &0b100_0101_u16.to_be_bytes()].concat();
                self.to_send.extend_from_slice(&option_reply(REP_INFO, &info));
                self.to_send.extend_from_slice(&option_reply(REP_ACK, &[]));
                self.in_transmission = true;
            }
            while let Some(header) = self.received.get(..28).map(<[u8]>::to_vec) {
                let (kind, at) = (u16::from_be_bytes([header[6], header[7]]), be_u64(&header[16..]) as usize);
                let length = be_u32(&header[24..]) as usize;
                let data = if kind == CMD_WRITE { length } else { 0 };
                if self.received.len() < 28 + data {
                    return;
                }
                assert_eq!(header[..6], [0x25, 0x60, 0x95, 0x13, 0, 0]);
                self.received.advance(28);
                let data = self.received.split_to(data);
                match kind {
                    CMD_WRITE => self.disk[at..at + length].copy_from_slice(&data),
                    CMD_WRITE_ZEROES => self.disk[at..at + length].fill(0),
                    CMD_FLUSH => self.flushed += 1,
                    other => panic!("command {other}"),
                }
                self.to_send.extend_from_slice(&reply(0, &header[8..16]));
            }
        }
    }

    fn option_reply(kind: u32, data: &[u8]) -> Vec<u8> {
        let head =
            [&OPTION_REPLY_MAGIC.to_be_bytes()[..], &7_u32.to_be_bytes(), &kind.to_be_bytes()].concat();
        [&head[..], &(data.len() as u32).to_be_bytes(), data].concat()
    }

    fn reply(error: u32, cookie: &[u8]) -> Vec<u8> {
        [&SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &error.to_be_bytes(), cookie].concat()
    }

    /// What a process leaves, and the next one takes up.
    fn next_process(left: &Writing) -> Writing {
        let mut bytes = Vec::new();
        ciborium::into_writer(left, &mut bytes).unwrap();
        let taken: Writing = ciborium::from_reader(&bytes[..]).unwrap();
        assert_eq!(&taken, left);
        taken
    }

    /// Bytes in pieces both ways, and another process between any two of them: the disk is what was written.
    #[test]
    fn it_is_left_between_any_two_bytes() {
        for seed in 0..40_u64 {
            let mut random = seed;
            let mut below = |most: usize| {
                random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
                (random >> 33) as usize % most
            };
            let (mut server, mut client) = (Server::new(), Writing::new(EXPORT));
            let mut wanted = vec![0xee; SIZE];
            let (mut begun, mut flushes) = (0, 0);
            while flushes < 2 || !client.is_settled() {
                if client.has_room() && begun < 40 {
                    let (at, bytes, with) = (begun * 20_000, 1 + below(20_000), (begun % 3) as u8);
                    client.write(at as u64, &vec![with; bytes]).unwrap();
                    wanted[at..at + bytes].fill(with);
                    begun += 1;
                } else if begun == 40 && client.is_settled() {
                    client.flush().unwrap();
                    flushes += 1;
                }
                let sent = below(client.to_send().len() + 1).min(1 + below(9000));
                server.received.extend_from_slice(&client.to_send()[..sent]);
                client.sent(sent);
                server.serve();
                let told = below(server.to_send.len() + 1).min(1 + below(40));
                client.received().extend_from_slice(&server.to_send.split_to(told));
                let _ = client.take().unwrap();
                if below(4) == 0 {
                    client = next_process(&client);
                }
            }
            assert_eq!((client.size(), server.flushed), (SIZE as u64, 2), "{seed}");
            assert!(server.disk == wanted, "{seed}: the disk differs");
        }
    }

    /// A client in transmission, and what it says to these bytes.
    fn told(bytes: &[u8]) -> Result<bool, NbdError> {
        let mut client = Writing::new(EXPORT);
        let mut server = Server::new();
        while !client.is_ready() {
            server.received.extend_from_slice(client.to_send());
            client.sent(client.to_send().len());
            server.serve();
            client.received().extend_from_slice(&server.to_send.split());
            client.take().unwrap();
        }
        client.write(0, &[1; 512]).unwrap();
        client.received().extend_from_slice(bytes);
        client.take()
    }

    #[test]
    fn a_servers_word_is_taken_for_what_it_is() {
        let mine = 1_u64.to_be_bytes();
        assert!(told(&reply(0, &mine)).unwrap());
        assert!(!told(&reply(0, &mine)[..15]).unwrap(), "not whole");
        assert!(matches!(told(&reply(28, &mine)), Err(NbdError::Request { .. })), "no room");
        assert!(matches!(told(&reply(0, &2_u64.to_be_bytes())), Err(NbdError::Protocol(_))), "of no request");
        assert!(matches!(told(&[0; 16]), Err(NbdError::Protocol(_))));
    }

    #[test]
    fn a_handshake_has_limits() {
        let after_greeting = |bytes: &[u8]| {
            let mut client = Writing::new(EXPORT);
            client.received().extend_from_slice(b"NBDMAGICIHAVEOPT\0\x03");
            assert!(client.take().unwrap());
            client.received().extend_from_slice(bytes);
            client.take()
        };
        let mut long = option_reply(REP_INFO, &[]);
        long[16..].copy_from_slice(&(OPTION_DATA_MAX as u32 + 1).to_be_bytes());
        assert!(matches!(after_greeting(&long), Err(NbdError::Protocol(_))), "before it has come");
        assert!(
            matches!(after_greeting(&option_reply(REP_INFO, &[0; 5])), Err(NbdError::Protocol(_))),
            "short"
        );
        let refused = after_greeting(&option_reply(REP_ERROR_BIT | 6, b"no such export"));
        assert!(refused.unwrap_err().to_string().contains("no such export"));
        let unable = after_greeting(&option_reply(REP_ACK, &[]));
        assert!(matches!(unable, Err(NbdError::Handshake { .. })), "it can neither flush nor write zeroes");
        let mut other = Writing::new(EXPORT);
        other.received().extend_from_slice(b"NBDMAGICIHAVEOPT\0\x01");
        assert!(matches!(other.take(), Err(NbdError::Protocol(_))));
    }
}
