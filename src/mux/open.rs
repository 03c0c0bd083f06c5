//! What an OPEN says of a stream, and both sides know from then on: its number, class, weight and
//! purpose. Plain data.

use std::fmt;

/// A stream's number in its session: odd when the dialer opened it, even when the acceptor did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub u32);

/// Which side of a session this is. It never changes: only the dialer dials again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Made the first connection.
    Dialer,
    Acceptor,
}

impl Role {
    pub(super) fn first_id(self) -> u32 {
        match self {
            Self::Dialer => 1,
            Self::Acceptor => 2,
        }
    }

    pub(super) fn peer(self) -> Self {
        match self {
            Self::Dialer => Self::Acceptor,
            Self::Acceptor => Self::Dialer,
        }
    }
}

/// How a stream is scheduled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Small and awaited: control and QMP. Before everything else, within a bounded share.
    Urgent,
    /// RAM, disks, files: weighted fair among themselves.
    Bulk,
}

impl Class {
    /// The number on the wire.
    pub fn to_wire(self) -> u8 {
        match self {
            Self::Urgent => 0,
            Self::Bulk => 1,
        }
    }

    /// The class with this number on the wire.
    pub fn from_wire(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Urgent),
            1 => Some(Self::Bulk),
            _ => None,
        }
    }
}

/// The migration, or another group of streams with a share of its own, that streams belong to; zero
/// for none.
pub type MigrationId = [u8; 16];

/// The ordinary weight of a bulk stream.
pub const WEIGHT_DEFAULT: u16 = 16;
/// Largest weight; a larger one counts as this.
pub const WEIGHT_MAX: u16 = 1024;

/// Longest name in an OPEN, in bytes.
pub const NAME_BYTES_MAX: usize = 128;

/// A name that an OPEN carries. Any bytes: whoever takes the stream checks them.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Name {
    len: u8,
    bytes: [u8; NAME_BYTES_MAX],
}

impl Name {
    /// No name.
    pub const NONE: Self = Self { len: 0, bytes: [0; NAME_BYTES_MAX] };

    /// A name of these bytes; none if there are too many.
    pub fn new(name: &[u8]) -> Option<Self> {
        let mut bytes = [0; NAME_BYTES_MAX];
        bytes.get_mut(..name.len())?.copy_from_slice(name);
        Some(Self { len: u8::try_from(name.len()).ok()?, bytes })
    }

    /// Its bytes; empty for no name.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.len)).unwrap_or_default()
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", String::from_utf8_lossy(self.as_bytes()))
    }
}

/// What a stream is for, as its opener tells the acceptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Open {
    /// One of [`purpose`]; an unknown one is the acceptor's to refuse with
    /// [`Code::Unsupported`](super::Code::Unsupported).
    pub purpose: u16,
    /// How it is scheduled, at both ends.
    pub class: Class,
    /// Its share among bulk streams, 1 to [`WEIGHT_MAX`], [`WEIGHT_DEFAULT`] being ordinary.
    pub weight: u16,
    /// The migration that it belongs to; zero for none.
    pub migration: MigrationId,
    /// Which disk or RAM channel of that migration.
    pub channel: u16,
    /// What the acceptor is to connect it to, where the purpose has names.
    pub name: Name,
}

/// What streams are for (WIRE §3).
pub mod purpose {
    /// Requests and answers between the agents.
    pub const CONTROL: u16 = 1;
    /// A QEMU monitor.
    pub const QMP: u16 = 2;
    /// The main migration stream.
    pub const RAM: u16 = 3;
    /// A further migration channel (multifd, postcopy preempt).
    pub const RAM_CHANNEL: u16 = 4;
    /// One NBD connection.
    pub const NBD: u16 = 5;
    /// A file's contents.
    pub const FILE: u16 = 6;
    /// A connection to a named target of the acceptor's configuration.
    pub const FORWARD: u16 = 7;
    /// A question about a migration that libvirt makes itself.
    pub const LIBVIRT: u16 = 8;
    /// Bytes that are swallowed, to learn how fast they go.
    pub const PROBE: u16 = 9;
}
