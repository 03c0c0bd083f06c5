//! HELLO: the first frame of a connection in each direction, its negotiation, and the GOAWAY that
//! may stand in its place. Its layout can never change, only grow at the end. Knows no TLS: proofs
//! and secrets are opaque bytes here.

use bytes::{BufMut, Bytes, BytesMut};

use super::frame::{self, Content, FrameError, Header, Kind};
pub use super::frame::{HEADER_LEN, HELLO_LEN_MAX};
use super::{Code, Config, PerClass};

/// Oldest version that this program speaks.
pub const VERSION_MIN: u16 = 1;
/// Newest version that this program speaks.
pub const VERSION_MAX: u16 = 1;

const MAGIC: [u8; 8] = *b"vmferry\0";

/// Why a first frame was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    #[error("the first frame is neither HELLO nor GOAWAY")]
    NotHello,
    #[error("the first frame's header is malformed")]
    Header(#[source] FrameError),
    #[error("the HELLO ends within a field")]
    Truncated,
    #[error("the HELLO does not begin with this protocol's name")]
    Magic,
    #[error("the HELLO's mode {0} is not known")]
    Mode(u8),
    #[error("the HELLO's version range is empty")]
    VersionRange,
}

/// What a peer allows us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerLimits {
    /// Streams that we may have open.
    pub max_streams: u32,
    /// What we may send on a new stream before it is accepted.
    pub initial_credit: PerClass<u64>,
    /// Its replay log's size; for people only.
    pub replay_cap: u64,
    /// Its receive budget; for people only.
    pub budget: u64,
}

/// What a HELLO wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The dialer begins a session.
    New {
        /// Its name, random.
        session_id: [u8; 16],
        /// The dialer's part of the resume secret.
        secret_share: [u8; 32],
    },
    /// The dialer goes on with one.
    Resume {
        session_id: [u8; 16],
        /// Raised with every attempt.
        generation: u64,
        /// The last frame that it received.
        rx_seq: u64,
        /// That it is the same dialer, on this connection.
        proof: [u8; 32],
    },
    /// The acceptor goes on with it.
    Resumed {
        /// The last frame that it received.
        rx_seq: u64,
        /// That it is the same acceptor, on this connection.
        proof: [u8; 32],
    },
    /// The acceptor takes a new session.
    Accepted {
        /// The acceptor's part of the resume secret.
        secret_share: [u8; 32],
    },
}

/// The first frame in each direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Oldest version spoken.
    pub version_min: u16,
    /// Newest version spoken.
    pub version_max: u16,
    /// Features that could be used, one bit each.
    pub features_offered: u64,
    /// Features without which there is no session.
    pub features_required: u64,
    /// Names the agent's process: new with every start.
    pub agent_instance: [u8; 16],
    /// What the receiver of this HELLO may do.
    pub limits: PeerLimits,
    pub mode: Mode,
}

/// What two HELLOs agree on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Negotiated {
    pub version: u16,
    pub features: u64,
    pub peer: PeerLimits,
    pub peer_instance: [u8; 16],
}

/// The first frame of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FirstFrame {
    Hello {
        hello: Box<Hello>,
        /// Its length, header included.
        consumed: usize,
    },
    GoAway {
        code: Code,
        /// In the peer's words, without control characters.
        text: String,
        /// Its length, header included.
        consumed: usize,
    },
}

impl Hello {
    /// A HELLO of this program with the limits of `config`.
    pub fn new(config: &Config, agent_instance: [u8; 16], mode: Mode) -> Self {
        Self {
            version_min: VERSION_MIN,
            version_max: VERSION_MAX,
            features_offered: 0,
            features_required: 0,
            agent_instance,
            limits: PeerLimits {
                max_streams: config.streams_max(),
                initial_credit: config.initial_credit,
                replay_cap: config.replay_cap_bytes as u64,
                budget: config.budget_bytes,
            },
            mode,
        }
    }

    /// The whole frame, header included.
    pub fn encode(&self) -> Bytes {
        let mut payload = BytesMut::with_capacity(256);
        payload.put_slice(&MAGIC);
        payload.put_u16(self.version_min);
        payload.put_u16(self.version_max);
        payload.put_u64(self.features_offered);
        payload.put_u64(self.features_required);
        payload.put_slice(&self.agent_instance);
        payload.put_u32(self.limits.max_streams);
        payload.put_u64(self.limits.initial_credit.urgent);
        payload.put_u64(self.limits.initial_credit.bulk);
        payload.put_u64(self.limits.replay_cap);
        payload.put_u64(self.limits.budget);
        self.mode.encode(&mut payload);
        whole_frame(Header::new(Kind::Hello, 0, 0), &payload)
    }

    /// A HELLO from its frame's payload. Bytes after the known fields are skipped: they belong to
    /// later versions.
    pub fn decode(payload: &[u8]) -> Result<Self, HelloError> {
        let mut fields = Fields(payload);
        if fields.bytes::<8>()? != MAGIC {
            return Err(HelloError::Magic);
        }
        let (version_min, version_max) = (fields.u16()?, fields.u16()?);
        if version_min > version_max {
            return Err(HelloError::VersionRange);
        }
        Ok(Self {
            version_min,
            version_max,
            features_offered: fields.u64()?,
            features_required: fields.u64()?,
            agent_instance: fields.bytes()?,
            limits: PeerLimits {
                max_streams: fields.u32()?,
                initial_credit: PerClass { urgent: fields.u64()?, bulk: fields.u64()? },
                replay_cap: fields.u64()?,
                budget: fields.u64()?,
            },
            mode: Mode::decode(&mut fields)?,
        })
    }
}

impl Mode {
    fn encode(&self, out: &mut BytesMut) {
        match self {
            Self::New { session_id, secret_share } => {
                out.put_u8(1);
                out.put_slice(session_id);
                out.put_slice(secret_share);
            }
            Self::Accepted { secret_share } => {
                out.put_u8(2);
                out.put_slice(secret_share);
            }
            Self::Resume { session_id, generation, rx_seq, proof } => {
                out.put_u8(3);
                out.put_slice(session_id);
                out.put_u64(*generation);
                out.put_u64(*rx_seq);
                out.put_slice(proof);
            }
            Self::Resumed { rx_seq, proof } => {
                out.put_u8(4);
                out.put_u64(*rx_seq);
                out.put_slice(proof);
            }
        }
    }

    fn decode(fields: &mut Fields<'_>) -> Result<Self, HelloError> {
        Ok(match fields.bytes::<1>()?[0] {
            1 => Self::New { session_id: fields.bytes()?, secret_share: fields.bytes()? },
            2 => Self::Accepted { secret_share: fields.bytes()? },
            3 => Self::Resume {
                session_id: fields.bytes()?,
                generation: fields.u64()?,
                rx_seq: fields.u64()?,
                proof: fields.bytes()?,
            },
            4 => Self::Resumed { rx_seq: fields.u64()?, proof: fields.bytes()? },
            unknown => return Err(HelloError::Mode(unknown)),
        })
    }
}

/// Reads fields one after the other.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], HelloError> {
        let (field, rest) = self.0.split_first_chunk::<N>().ok_or(HelloError::Truncated)?;
        self.0 = rest;
        Ok(*field)
    }

    fn u16(&mut self) -> Result<u16, HelloError> {
        self.bytes().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, HelloError> {
        self.bytes().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, HelloError> {
        self.bytes().map(u64::from_be_bytes)
    }
}

/// What both sides agree on: the highest version in both ranges, the features that both offer.
/// Errors: [`Code::Version`] or [`Code::Feature`], for the GOAWAY.
pub fn negotiate(local: &Hello, remote: &Hello) -> Result<Negotiated, Code> {
    let version = local.version_max.min(remote.version_max);
    if version < local.version_min.max(remote.version_min) {
        return Err(Code::Version);
    }
    let missing = (local.features_required & !remote.features_offered)
        | (remote.features_required & !local.features_offered);
    if missing != 0 {
        return Err(Code::Feature);
    }
    Ok(Negotiated {
        version,
        features: local.features_offered & remote.features_offered,
        peer: remote.limits,
        peer_instance: remote.agent_instance,
    })
}

/// The first frame, if `buf` holds it whole; `None` asks for more bytes.
/// Errors: [`HelloError`], as soon as it is certain.
pub fn peek(buf: &[u8]) -> Result<Option<FirstFrame>, HelloError> {
    match buf.first().map(|first| Kind::from_wire(*first)) {
        None => return Ok(None),
        Some(Some(Kind::Hello | Kind::GoAway)) => {}
        Some(_) => return Err(HelloError::NotHello),
    }
    if buf.len() < HEADER_LEN {
        return Ok(None);
    }
    let consumed = first_frame_len(buf)?;
    let Some(payload) = buf.get(HEADER_LEN..consumed) else { return Ok(None) };
    let header = first_header(buf)?;
    if header.kind == Kind::Hello.to_wire() {
        let hello = Box::new(Hello::decode(payload)?);
        return Ok(Some(FirstFrame::Hello { hello, consumed }));
    }
    let code = frame::decode_goaway_code(header.value);
    Ok(Some(FirstFrame::GoAway { code, text: frame::clean_text(payload), consumed }))
}

/// Length of the first frame, header included, from at least its header.
/// Errors: [`HelloError`]: neither HELLO nor GOAWAY, or too long for one.
pub fn first_frame_len(buf: &[u8]) -> Result<usize, HelloError> {
    first_header(buf).map(|header| HEADER_LEN + usize::from(header.len))
}

fn first_header(buf: &[u8]) -> Result<Header, HelloError> {
    let header = Header::decode(buf.first_chunk().ok_or(HelloError::Truncated)?);
    match header.content() {
        Ok(Content::Known(Kind::Hello | Kind::GoAway)) => Ok(header),
        Ok(_) => Err(HelloError::NotHello),
        Err(e) => Err(HelloError::Header(e)),
    }
}

/// A whole GOAWAY frame, for a connection without a session. The text is cut to
/// [`frame::TEXT_MAX`] bytes.
pub fn encode_goaway(code: Code, highest_stream: u32, text: &str) -> Bytes {
    let value = frame::encode_goaway_value(code, highest_stream);
    whole_frame(Header::new(Kind::GoAway, 0, value), frame::cut_text(text).as_bytes())
}

fn whole_frame(header: Header, payload: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(HEADER_LEN + payload.len());
    out.put_slice(&header.with_len(payload.len()).encode());
    out.put_slice(payload);
    out.freeze()
}
