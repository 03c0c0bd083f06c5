//! Frames: the wire unit. A fixed header of 16 bytes, big-endian, and a payload (WIRE §3).
//!
//! ```text
//! 0 type:u8 | 1 flags:u8 | 2 payload length:u16 | 4 stream:u32 | 8 value:u64
//! ```
//! Parses and writes; knows no state.

use bytes::Bytes;

/// Length of a header.
pub const HEADER_LEN: usize = 16;
/// Longest payload: with its header it fills one TLS record of 16 KiB (RFC 8446 §5.1).
pub const PAYLOAD_MAX: usize = 16 * 1024 - HEADER_LEN;
/// Flag of a frame that a receiver may ignore when it does not know its type.
pub const FLAG_IGNORABLE: u8 = 0x80;
/// Flag of a session frame whose sender wants an acknowledgement at once.
pub const FLAG_ACK_NOW: u8 = 0x01;

/// Types of frames. Those below 16 belong to the link and are not numbered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// First frame of a connection.
    Hello = 1,
    /// Highest session frame received without a gap.
    Ack = 2,
    /// Asks for a [`Kind::Pong`].
    Ping = 3,
    /// Answers a [`Kind::Ping`].
    Pong = 4,
    /// No further streams; why.
    GoAway = 5,
    /// The connection will be closed on purpose; the session stays.
    Detach = 6,
    /// Opens a stream.
    Open = 16,
    /// Accepts one.
    Accept = 17,
    /// Bytes at an offset.
    Data = 18,
    /// The receiver takes bytes up to this offset.
    Credit = 19,
    /// No bytes after this offset.
    Fin = 20,
    /// The receiver wants no more.
    Stop = 21,
    /// The stream is over, both ways.
    Reset = 22,
    /// Class and weight asked of the peer's scheduler.
    Prio = 23,
}

impl Kind {
    const ALL: [Self; 14] = [
        Self::Hello,
        Self::Ack,
        Self::Ping,
        Self::Pong,
        Self::GoAway,
        Self::Detach,
        Self::Open,
        Self::Accept,
        Self::Data,
        Self::Credit,
        Self::Fin,
        Self::Stop,
        Self::Reset,
        Self::Prio,
    ];

    /// The type of a byte.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|k| *k as u8 == byte)
    }
}

/// Whether frames of this type are numbered and kept until they are acknowledged.
#[must_use]
pub fn is_numbered(kind: u8) -> bool {
    kind >= 16
}

/// A parsed header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Type; see [`Kind`].
    pub kind: u8,
    /// Flags.
    pub flags: u8,
    /// Length of the payload.
    pub len: u16,
    /// Stream, 0 for the link's frames.
    pub stream: u32,
    /// Meaning by type.
    pub value: u64,
}

impl Header {
    /// Writes it.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0] = self.kind;
        bytes[1] = self.flags;
        bytes[2..4].copy_from_slice(&self.len.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.stream.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.value.to_be_bytes());
        bytes
    }

    /// Reads it. Every sixteen bytes are a header; what it says is checked by the session.
    #[must_use]
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
}

/// A frame that is sent: its payload is shared with whoever queued it and with the replay log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Written header.
    pub header: [u8; HEADER_LEN],
    /// Payload.
    pub payload: Bytes,
}

impl Frame {
    /// A frame. The payload is at most [`PAYLOAD_MAX`] long.
    #[must_use]
    pub fn new(kind: Kind, flags: u8, stream: u32, value: u64, payload: Bytes) -> Self {
        debug_assert!(payload.len() <= PAYLOAD_MAX);
        let header = Header { kind: kind as u8, flags, len: payload.len() as u16, stream, value };
        Self { header: header.encode(), payload }
    }

    /// Bytes on the wire, before TLS.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        HEADER_LEN + self.payload.len()
    }
}

/// Collects frames out of plaintext that comes in any split.
///
/// Whole frames within one piece are handed on without being copied; only a frame that
/// straddles two pieces is put together first.
#[derive(Debug, Default)]
pub struct Assembler {
    partial: Vec<u8>,
}

/// A header that announces a payload longer than [`PAYLOAD_MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a frame announces {0} bytes, more than {PAYLOAD_MAX}")]
pub struct TooLong(pub u16);

impl Assembler {
    /// Feeds a piece; calls `each` for every frame that is whole now.
    ///
    /// # Errors
    /// [`TooLong`], or what `each` returned; the rest of the piece is dropped then.
    pub fn feed<E: From<TooLong>>(
        &mut self,
        mut piece: &[u8],
        mut each: impl FnMut(Header, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        while !self.partial.is_empty() && !piece.is_empty() {
            let missing = self.missing()?;
            let (now, rest) = piece.split_at(missing.min(piece.len()));
            self.partial.extend_from_slice(now);
            piece = rest;
            if let Some((header, len)) = split(&self.partial)? {
                each(header, &self.partial[HEADER_LEN..len])?;
                self.partial.clear();
            }
        }
        while let Some((header, len)) = split(piece)? {
            each(header, &piece[HEADER_LEN..len])?;
            piece = &piece[len..];
        }
        self.partial.extend_from_slice(piece);
        Ok(())
    }

    /// Drops a partial frame: its connection is gone.
    pub fn reset(&mut self) {
        self.partial.clear();
    }

    /// Bytes held; never more than a frame.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.partial.len()
    }

    fn missing(&self) -> Result<usize, TooLong> {
        let Some(header) = self.partial.first_chunk::<HEADER_LEN>() else {
            return Ok(HEADER_LEN - self.partial.len());
        };
        Ok(frame_len(&Header::decode(header))? - self.partial.len())
    }
}

fn frame_len(header: &Header) -> Result<usize, TooLong> {
    let len = usize::from(header.len);
    if len > PAYLOAD_MAX { Err(TooLong(header.len)) } else { Ok(HEADER_LEN + len) }
}

fn split(bytes: &[u8]) -> Result<Option<(Header, usize)>, TooLong> {
    let Some(header) = bytes.first_chunk::<HEADER_LEN>() else { return Ok(None) };
    let header = Header::decode(header);
    let len = frame_len(&header)?;
    Ok((bytes.len() >= len).then_some((header, len)))
}
