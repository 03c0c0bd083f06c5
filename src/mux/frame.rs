//! Frames: the fixed header, which fields are allowed in which type, payload layouts. Version 1.
//! Knows no state: whether a frame is allowed *now* is the session's to judge.
//!
//! ```text
//! 0 type:u8 | 1 flags:u8 | 2 len:u16 | 4 stream:u32 | 8 value:u64      (big-endian)
//! ```
//!
//! Types below [`NUMBERED_FROM`] belong to one connection and are not numbered; the others are
//! numbered 1, 2, 3… in each direction of the session and kept until they are acknowledged.

use bytes::{BufMut, Bytes, BytesMut};

use super::{Class, Code, NAME_BYTES_MAX, Name, Open};

/// Length of every frame's header.
pub const HEADER_LEN: usize = 16;
/// Plaintext of a full TLS record (RFC 8446 §5.1).
pub const RECORD_LEN: usize = 16 * 1024;
/// Longest frame, header included: four full records. What a frame costs, at both ends, it costs
/// however long it is.
pub const FRAME_LEN_MAX: usize = 4 * RECORD_LEN;
/// Longest payload.
pub const PAYLOAD_MAX: usize = FRAME_LEN_MAX - HEADER_LEN;
/// Longest HELLO frame, header included.
pub const HELLO_LEN_MAX: usize = 4096;
/// Types from here on are numbered.
pub const NUMBERED_FROM: u8 = 0x10;
/// Longest text of a GOAWAY, in bytes.
pub const TEXT_MAX: usize = 256;
/// Length of an OPEN's fixed part.
pub const OPEN_LEN: usize = 23;
/// Longest extension part of an OPEN.
pub const OPEN_EXTENSIONS_MAX: usize = 1024;
/// The extension of an OPEN with the stream's name.
pub const OPEN_NAME: u16 = 1;
/// Longest payload of the control frames that we make: an OPEN with the longest name.
pub(super) const CONTROL_PAYLOAD_MAX: usize = OPEN_LEN + 4 + NAME_BYTES_MAX;
/// Length of a RESET's payload.
pub const RESET_LEN: usize = 4;

/// Flag of a numbered frame: the sender's log is half full, acknowledge at once.
pub const FLAG_ACK_NOW: u8 = 0x01;
/// Flag of a RESET: both directions end, and the peer is to reset its own.
pub const FLAG_ABORT: u8 = 0x02;
/// Flag of a type that may be unknown: skip it (but number it).
pub const FLAG_IGNORABLE: u8 = 0x80;

/// The types of version 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// First on a connection: see [`hello`](super::hello).
    Hello,
    /// Value: the highest frame number received without a gap.
    Ack,
    /// Value: opaque, comes back.
    Ping,
    /// Value: that of the PING.
    Pong,
    /// Value: code in the upper half, highest stream of the receiver seen in the lower; text.
    GoAway,
    /// The connection will be closed on purpose; the session goes on.
    Detach,
    /// Value: how much the peer may send; payload: [`encode_open`].
    Open,
    /// Value: how much the peer may send.
    Accept,
    /// Value: the payload's offset in the stream.
    Data,
    /// Value: the offset up to which the peer may send.
    Credit,
    /// Value: the offset of the end.
    Fin,
    /// Value: code. The reader is gone.
    Stop,
    /// Value: the offset of the end; payload: code.
    Reset,
    /// Value: class above the 16 bits of the weight.
    Prio,
}

const KINDS: [(u8, Kind); 14] = [
    (0x01, Kind::Hello),
    (0x02, Kind::Ack),
    (0x03, Kind::Ping),
    (0x04, Kind::Pong),
    (0x05, Kind::GoAway),
    (0x06, Kind::Detach),
    (0x10, Kind::Open),
    (0x11, Kind::Accept),
    (0x12, Kind::Data),
    (0x13, Kind::Credit),
    (0x14, Kind::Fin),
    (0x15, Kind::Stop),
    (0x16, Kind::Reset),
    (0x17, Kind::Prio),
];

impl Kind {
    /// The number on the wire.
    pub fn to_wire(self) -> u8 {
        KINDS.iter().find(|(_, kind)| *kind == self).map_or(0, |(n, _)| *n)
    }

    /// The type with this number.
    pub fn from_wire(number: u8) -> Option<Self> {
        KINDS.iter().find(|(n, _)| *n == number).map(|(_, kind)| *kind)
    }

    /// Whether frames of this type are numbered and logged.
    pub fn is_numbered(self) -> bool {
        self.to_wire() >= NUMBERED_FROM
    }

    fn flags_allowed(self) -> u8 {
        match self {
            Self::Reset => FLAG_ACK_NOW | FLAG_ABORT,
            numbered if numbered.is_numbered() => FLAG_ACK_NOW,
            _ => 0,
        }
    }

    fn payload_allowed(self) -> (usize, usize) {
        match self {
            Self::Hello => (0, HELLO_LEN_MAX - HEADER_LEN),
            Self::GoAway => (0, TEXT_MAX),
            Self::Open => (OPEN_LEN, OPEN_LEN + OPEN_EXTENSIONS_MAX),
            Self::Data => (1, PAYLOAD_MAX),
            Self::Reset => (RESET_LEN, RESET_LEN),
            _ => (0, 0),
        }
    }
}

/// What a header announces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// A type of version 1.
    Known(Kind),
    /// A later one that may be skipped.
    Ignorable {
        /// Whether it counts in the numbering.
        numbered: bool,
    },
}

/// Why a header is not one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("unknown frame type")]
    UnknownType,
    #[error("reserved flag")]
    ReservedFlag,
    #[error("payload length not allowed")]
    Length,
    #[error("stream number not allowed")]
    Stream,
    #[error("malformed payload")]
    Payload,
}

impl FrameError {
    pub(super) fn what(self) -> &'static str {
        match self {
            Self::UnknownType => "unknown frame type",
            Self::ReservedFlag => "reserved flag",
            Self::Length => "payload length not allowed",
            Self::Stream => "stream number not allowed",
            Self::Payload => "malformed payload",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Type number.
    pub kind: u8,
    pub flags: u8,
    /// Payload bytes.
    pub len: u16,
    /// Stream number; 0 for none.
    pub stream: u32,
    /// Meaning by type.
    pub value: u64,
}

impl Header {
    /// A header without flags and payload.
    pub fn new(kind: Kind, stream: u32, value: u64) -> Self {
        Self { kind: kind.to_wire(), flags: 0, len: 0, stream, value }
    }

    /// With this payload length, which must not exceed [`PAYLOAD_MAX`].
    pub fn with_len(self, len: usize) -> Self {
        debug_assert!(len <= PAYLOAD_MAX);
        Self { len: len as u16, ..self }
    }

    /// With these flags in addition.
    pub fn with_flags(self, flags: u8) -> Self {
        Self { flags: self.flags | flags, ..self }
    }

    /// As on the wire.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        out[0] = self.kind;
        out[1] = self.flags;
        out[2..4].copy_from_slice(&self.len.to_be_bytes());
        out[4..8].copy_from_slice(&self.stream.to_be_bytes());
        out[8..].copy_from_slice(&self.value.to_be_bytes());
        out
    }

    /// From the wire; any 16 bytes are a header, [`Header::content`] says whether it is allowed.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Self {
        let [kind, flags, l0, l1, s0, s1, s2, s3, value @ ..] = *bytes;
        Self {
            kind,
            flags,
            len: u16::from_be_bytes([l0, l1]),
            stream: u32::from_be_bytes([s0, s1, s2, s3]),
            value: u64::from_be_bytes(value),
        }
    }

    /// What follows this header.
    /// Errors: [`FrameError`], by the header alone.
    pub fn content(&self) -> Result<Content, FrameError> {
        let Some(kind) = Kind::from_wire(self.kind) else {
            return self.unknown_content();
        };
        if self.flags & !kind.flags_allowed() != 0 {
            return Err(FrameError::ReservedFlag);
        }
        let (least, most) = kind.payload_allowed();
        if !(least..=most).contains(&usize::from(self.len)) {
            return Err(FrameError::Length);
        }
        if kind.is_numbered() == (self.stream == 0) {
            return Err(FrameError::Stream);
        }
        Ok(Content::Known(kind))
    }

    fn unknown_content(&self) -> Result<Content, FrameError> {
        if self.flags & FLAG_IGNORABLE == 0 {
            return Err(FrameError::UnknownType);
        }
        if usize::from(self.len) > PAYLOAD_MAX {
            return Err(FrameError::Length);
        }
        Ok(Content::Ignorable { numbered: self.kind >= NUMBERED_FROM })
    }
}

/// An OPEN's payload. A stream without a name has no extension.
pub fn encode_open(open: &Open) -> Bytes {
    let name = open.name.as_bytes();
    let mut out = BytesMut::with_capacity(OPEN_LEN + 4 + name.len());
    out.put_u16(open.purpose);
    out.put_u8(open.class.to_wire());
    out.put_u16(open.weight);
    out.put_slice(&open.migration);
    out.put_u16(open.channel);
    if !name.is_empty() {
        out.put_u16(OPEN_NAME);
        out.put_u16(name.len() as u16);
        out.put_slice(name);
    }
    out.freeze()
}

/// An OPEN from its payload; `None` inside for a class or a name that this version cannot take.
pub fn decode_open(payload: &[u8]) -> Result<Option<Open>, FrameError> {
    let (fixed, extensions) = payload.split_first_chunk::<OPEN_LEN>().ok_or(FrameError::Payload)?;
    let name = decode_extensions(extensions)?;
    let [p0, p1, class, w0, w1, .., c0, c1] = *fixed;
    let mut migration = [0; 16];
    migration.copy_from_slice(&fixed[5..21]);
    let (Some(class), Some(name)) = (Class::from_wire(class), name) else { return Ok(None) };
    Ok(Some(Open {
        purpose: u16::from_be_bytes([p0, p1]),
        class,
        weight: u16::from_be_bytes([w0, w1]),
        migration,
        channel: u16::from_be_bytes([c0, c1]),
        name,
    }))
}

/// Extensions are (type u16, length u16, bytes); unknown ones are skipped. The name among them;
/// `None` inside if it is too long.
fn decode_extensions(mut rest: &[u8]) -> Result<Option<Name>, FrameError> {
    let mut name = Some(Name::NONE);
    while !rest.is_empty() {
        let ([t0, t1, l0, l1], after) = rest.split_first_chunk().ok_or(FrameError::Payload)?;
        let length = usize::from(u16::from_be_bytes([*l0, *l1]));
        let (value, others) = after.split_at_checked(length).ok_or(FrameError::Payload)?;
        if u16::from_be_bytes([*t0, *t1]) == OPEN_NAME {
            name = Name::new(value);
        }
        rest = others;
    }
    Ok(name)
}

/// A PRIO's value.
pub fn encode_prio(class: Class, weight: u16) -> u64 {
    u64::from(class.to_wire()) << 16 | u64::from(weight)
}

/// Class and weight from a PRIO's value; `None` for a class that this version does not know.
pub fn decode_prio(value: u64) -> Option<(Class, u16)> {
    let class = Class::from_wire(u8::try_from(value >> 16).ok()?)?;
    Some((class, (value & 0xffff) as u16))
}

/// A RESET's code from its payload.
pub fn decode_reset(payload: &[u8]) -> Result<Code, FrameError> {
    let bytes = payload.try_into().map_err(|_| FrameError::Payload)?;
    Ok(Code::from_wire(u32::from_be_bytes(bytes)))
}

pub fn encode_goaway_value(code: Code, highest_stream: u32) -> u64 {
    u64::from(code.to_wire()) << 32 | u64::from(highest_stream)
}

pub fn decode_goaway_code(value: u64) -> Code {
    Code::from_wire((value >> 32) as u32)
}

/// A peer's text, safe for logs and terminals.
pub fn clean_text(bytes: &[u8]) -> String {
    crate::printable::printable(&String::from_utf8_lossy(bytes))
}

/// `text`, cut to [`TEXT_MAX`] bytes at a character boundary.
pub fn cut_text(text: &str) -> &str {
    let mut end = text.len().min(TEXT_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}
