//! HELLO: the first frame of a connection in each direction; versions, features, limits, and
//! which session the connection is for (WIRE §4). Owns no session.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::code::Code;
use super::config::Config;
use super::frame::{Frame, Header, Kind};

pub use super::frame::HEADER_LEN;

/// Longest payload of a HELLO.
pub const HELLO_LEN_MAX: usize = 4096;
/// Longest text of a GOAWAY.
pub const GOAWAY_TEXT_MAX: usize = 256;
/// The only version so far.
pub const VERSION: u16 = 1;

const MAGIC: u32 = 0x564d_4652;

/// What the first frame was instead of a HELLO or GOAWAY.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// Another type of frame, or none at all.
    #[error("the first frame has type {0}")]
    Kind(u8),
    /// Too long for what it is.
    #[error("the first frame has {0} bytes")]
    TooLong(u16),
    /// Cut short or not ours.
    #[error("the HELLO cannot be decoded")]
    Malformed,
}

/// What a side is ready to receive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerLimits {
    /// Streams that the other side may have open.
    pub max_streams: u32,
    /// Bytes that it may send on each before any credit.
    pub initial_credit_bytes: u32,
}

/// Which session a connection is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mode {
    /// Dialer: a new one.
    New {
        /// Random.
        session_id: [u8; 16],
        /// Random; both shares together make the resume secret.
        secret_share: [u8; 32],
    },
    /// Acceptor: agreed.
    Accepted {
        /// Random.
        secret_share: [u8; 32],
    },
    /// Dialer: one that has lost its connection.
    Resume {
        /// Which.
        session_id: [u8; 16],
        /// Raised with every attempt.
        generation: u64,
        /// Highest session frame received without a gap.
        rx_seq: u64,
        /// Binds the claim to this TLS connection.
        proof: [u8; 32],
    },
    /// Acceptor: agreed.
    Resumed {
        /// Highest session frame received without a gap.
        rx_seq: u64,
        /// Binds the claim to this TLS connection.
        proof: [u8; 32],
    },
}

/// A HELLO.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Lowest version spoken.
    pub version_min: u16,
    /// Highest version spoken.
    pub version_max: u16,
    /// Feature bits that this side can.
    pub features_offered: u64,
    /// Feature bits without which it does not talk.
    pub features_required: u64,
    /// New with every process.
    pub agent_instance: [u8; 16],
    /// What this side is ready to receive.
    pub limits: PeerLimits,
    /// For which session.
    pub mode: Mode,
}

/// What both sides agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Negotiated {
    /// The version.
    pub version: u16,
    /// Features in use.
    pub features: u64,
    /// The peer's limits.
    pub peer: PeerLimits,
}

/// The first frame of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FirstFrame {
    /// As it should be.
    Hello {
        /// The HELLO.
        hello: Box<Hello>,
        /// Bytes that it took.
        consumed: usize,
    },
    /// The peer says no.
    GoAway {
        /// Why.
        code: Code,
        /// In its words.
        text: String,
        /// Bytes that it took.
        consumed: usize,
    },
}

impl Hello {
    /// A HELLO of this version.
    #[must_use]
    pub fn new(config: &Config, agent_instance: [u8; 16], mode: Mode) -> Self {
        Self {
            version_min: VERSION,
            version_max: VERSION,
            features_offered: 0,
            features_required: 0,
            agent_instance,
            limits: PeerLimits {
                max_streams: config.max_streams,
                initial_credit_bytes: config.initial_credit_bytes,
            },
            mode,
        }
    }

    /// The whole frame.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut body = BytesMut::new();
        body.put_u32(MAGIC);
        body.put_u16(self.version_min);
        body.put_u16(self.version_max);
        body.put_u64(self.features_offered);
        body.put_u64(self.features_required);
        body.put_slice(&self.agent_instance);
        body.put_u32(self.limits.max_streams);
        body.put_u32(self.limits.initial_credit_bytes);
        match &self.mode {
            Mode::New { session_id, secret_share } => {
                body.put_u8(1);
                body.put_slice(session_id);
                body.put_slice(secret_share);
            }
            Mode::Accepted { secret_share } => {
                body.put_u8(2);
                body.put_slice(secret_share);
            }
            Mode::Resume { session_id, generation, rx_seq, proof } => {
                body.put_u8(3);
                body.put_slice(session_id);
                body.put_u64(*generation);
                body.put_u64(*rx_seq);
                body.put_slice(proof);
            }
            Mode::Resumed { rx_seq, proof } => {
                body.put_u8(4);
                body.put_u64(*rx_seq);
                body.put_slice(proof);
            }
        }
        whole(Frame::new(Kind::Hello, 0, 0, 0, body.freeze()))
    }

    /// Reads a payload. Bytes after what this version knows are a later version's and ignored.
    ///
    /// # Errors
    /// [`HelloError::Malformed`].
    pub fn decode(mut body: &[u8]) -> Result<Self, HelloError> {
        Self::read(&mut body).ok_or(HelloError::Malformed)
    }

    fn read(body: &mut &[u8]) -> Option<Self> {
        if body.try_get_u32().ok()? != MAGIC {
            return None;
        }
        Some(Self {
            version_min: body.try_get_u16().ok()?,
            version_max: body.try_get_u16().ok()?,
            features_offered: body.try_get_u64().ok()?,
            features_required: body.try_get_u64().ok()?,
            agent_instance: array(body)?,
            limits: PeerLimits {
                max_streams: body.try_get_u32().ok()?,
                initial_credit_bytes: body.try_get_u32().ok()?,
            },
            mode: read_mode(body)?,
        })
    }
}

fn read_mode(body: &mut &[u8]) -> Option<Mode> {
    Some(match body.try_get_u8().ok()? {
        1 => Mode::New { session_id: array(body)?, secret_share: array(body)? },
        2 => Mode::Accepted { secret_share: array(body)? },
        3 => Mode::Resume {
            session_id: array(body)?,
            generation: body.try_get_u64().ok()?,
            rx_seq: body.try_get_u64().ok()?,
            proof: array(body)?,
        },
        4 => Mode::Resumed { rx_seq: body.try_get_u64().ok()?, proof: array(body)? },
        _ => return None,
    })
}

fn array<const N: usize>(body: &mut &[u8]) -> Option<[u8; N]> {
    let (array, rest) = body.split_first_chunk::<N>()?;
    *body = rest;
    Some(*array)
}

fn whole(frame: Frame) -> Bytes {
    let mut bytes = BytesMut::with_capacity(frame.len_bytes());
    bytes.put_slice(&frame.header);
    bytes.put_slice(&frame.payload);
    bytes.freeze()
}

/// A GOAWAY frame as the answer to a HELLO, or later.
#[must_use]
pub fn encode_goaway(code: Code, highest_stream: u32, text: &str) -> Bytes {
    whole(goaway(code, highest_stream, text))
}

pub(super) fn goaway(code: Code, highest_stream: u32, text: &str) -> Frame {
    let mut end = text.len().min(GOAWAY_TEXT_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let payload = Bytes::copy_from_slice(&text.as_bytes()[..end]);
    let value = u64::from(code.number()) << 32 | u64::from(highest_stream);
    Frame::new(Kind::GoAway, 0, 0, value, payload)
}

pub(super) fn read_goaway(header: &Header, payload: &[u8]) -> (Code, String) {
    let code = Code::from_number((header.value >> 32) as u32);
    let printable = |c: char| if c.is_control() { ' ' } else { c };
    let text = String::from_utf8_lossy(&payload[..payload.len().min(GOAWAY_TEXT_MAX)]);
    (code, text.chars().map(printable).collect())
}

/// Length of a first frame, header included.
///
/// # Errors
/// [`HelloError`] when it is not one that may come first.
pub fn first_frame_len(bytes: &[u8]) -> Result<usize, HelloError> {
    let header = bytes.first_chunk::<HEADER_LEN>().ok_or(HelloError::Malformed)?;
    let header = Header::decode(header);
    let max = match Kind::from_byte(header.kind) {
        Some(Kind::Hello) => HELLO_LEN_MAX,
        Some(Kind::GoAway) => GOAWAY_TEXT_MAX,
        _ => return Err(HelloError::Kind(header.kind)),
    };
    let len = usize::from(header.len);
    if len > max { Err(HelloError::TooLong(header.len)) } else { Ok(HEADER_LEN + len) }
}

/// Looks for a whole first frame; `None` when more bytes are needed.
///
/// # Errors
/// [`HelloError`]: refuse at once.
pub fn peek(bytes: &[u8]) -> Result<Option<FirstFrame>, HelloError> {
    let Some(header) = bytes.first_chunk::<HEADER_LEN>() else { return Ok(None) };
    let header = Header::decode(header);
    let consumed = first_frame_len(bytes)?;
    let Some(payload) = bytes.get(HEADER_LEN..consumed) else { return Ok(None) };
    if header.kind == Kind::GoAway as u8 {
        let (code, text) = read_goaway(&header, payload);
        return Ok(Some(FirstFrame::GoAway { code, text, consumed }));
    }
    let hello = Box::new(Hello::decode(payload)?);
    Ok(Some(FirstFrame::Hello { hello, consumed }))
}

/// What two HELLOs have in common.
///
/// # Errors
/// [`Code::Version`] or [`Code::Feature`], to be said in a GOAWAY.
pub fn negotiate(local: &Hello, remote: &Hello) -> Result<Negotiated, Code> {
    let version = local.version_max.min(remote.version_max);
    if version < local.version_min.max(remote.version_min) {
        return Err(Code::Version);
    }
    let features = local.features_offered & remote.features_offered;
    if (local.features_required | remote.features_required) & !features != 0 {
        return Err(Code::Feature);
    }
    Ok(Negotiated { version, features, peer: remote.limits })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn hello(mode: Mode) -> Hello {
        Hello::new(&Config::default(), [7; 16], mode)
    }

    #[test]
    fn every_mode_comes_back_and_no_cut_of_it_does() {
        let modes = [
            Mode::New { session_id: [1; 16], secret_share: [2; 32] },
            Mode::Accepted { secret_share: [3; 32] },
            Mode::Resume { session_id: [4; 16], generation: 5, rx_seq: 6, proof: [7; 32] },
            Mode::Resumed { rx_seq: 8, proof: [9; 32] },
        ];
        for mode in modes {
            let hello = hello(mode);
            let bytes = hello.encode();
            let expected = FirstFrame::Hello { hello: Box::new(hello), consumed: bytes.len() };
            assert_eq!(peek(&bytes), Ok(Some(expected)));
            for cut in 0..bytes.len() {
                assert_eq!(peek(&bytes[..cut]), Ok(None), "cut at {cut}");
                assert!(Hello::decode(bytes.get(HEADER_LEN..cut).unwrap_or(&[])).is_err());
            }
        }
    }

    #[test]
    fn nothing_else_may_come_first() {
        for byte in (0..=255u8).filter(|b| ![1, 5].contains(b)) {
            let mut bytes = [0; HEADER_LEN];
            bytes[0] = byte;
            assert_eq!(peek(&bytes), Err(HelloError::Kind(byte)));
        }
        let mut long = hello(Mode::Accepted { secret_share: [0; 32] }).encode().to_vec();
        long[2..4].copy_from_slice(&5000u16.to_be_bytes());
        assert_eq!(peek(&long), Err(HelloError::TooLong(5000)));
    }

    #[test]
    fn versions_and_features_meet_or_say_why_not() {
        let ours = hello(Mode::Accepted { secret_share: [0; 32] });
        let newer = Hello { version_max: 3, ..ours.clone() };
        assert_eq!(negotiate(&ours, &newer).unwrap().version, 1);
        let too_new = Hello { version_min: 2, version_max: 3, ..ours.clone() };
        assert_eq!(negotiate(&ours, &too_new), Err(Code::Version));
        let picky = Hello { features_offered: 6, features_required: 4, ..ours.clone() };
        assert_eq!(negotiate(&ours, &picky), Err(Code::Feature));
        let able = Hello { features_offered: 12, ..ours };
        assert_eq!(negotiate(&able, &picky).unwrap().features, 4);
    }

    #[test]
    fn a_refusal_carries_its_reason() {
        let bytes = encode_goaway(Code::Auth, 0, &"ü".repeat(200));
        let Ok(Some(FirstFrame::GoAway { code, text, consumed })) = peek(&bytes) else { panic!("no GOAWAY") };
        assert_eq!((code, consumed), (Code::Auth, bytes.len()));
        assert_eq!(text, "ü".repeat(128));
    }
}
