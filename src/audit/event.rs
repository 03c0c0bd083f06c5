//! What is recorded. Names and words, no values of other modules: the format of a record outlives them.

use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

/// Who calls the local API: the kernel's word.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct By {
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub pid: Option<i32>,
}

/// A migration on one side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Subject {
    /// As both hosts' records call it.
    pub migration: Uuid,
    /// The one that was asked for, where this is a further try.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first: Option<Uuid>,
    pub role: &'static str,
    pub vm: String,
    /// The other host, as its certificate names it.
    pub peer: String,
}

/// Where a migration is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Step {
    #[serde(flatten)]
    pub subject: Subject,
    pub phase: &'static str,
    /// How it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub result: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
}

/// What a destination lets a source do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Grant {
    #[serde(flatten)]
    pub subject: Subject,
    /// SHA-256 of the peer's certificate.
    pub certificate: String,
    /// Disks that are written at the destination.
    pub disks: Vec<String>,
    /// That destination's record, or source's: an anchor for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peers_head: Option<String>,
}

/// What one side of a migration has hashed of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Hashed {
    pub disk: String,
    pub pieces: u64,
    pub bytes: u64,
    /// Of the pieces' hashes: SHA-256.
    pub digest: String,
    /// At the source: what the destination has told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub told: Option<Compared>,
}

/// What the other side has told of the same pieces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Compared {
    /// As the destination's own record has it.
    pub digest: String,
    /// So many pieces had another hash when they were compared; they are compared again.
    pub different: u64,
}

/// One thing that happened.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The first line of each file.
    FileBegins {
        host: String,
        format: u32,
    },
    /// An old file is about to be removed: its last line.
    FileRemoved {
        last: u64,
        hash: String,
    },
    /// The last line of the process before was cut off, and was removed.
    TornLine {
        bytes: u64,
        hash: String,
    },
    /// So many events could not be kept until they could be written.
    Lost {
        events: u64,
    },
    AgentStarts {
        version: &'static str,
        identity: String,
        pid: u32,
        took_over: bool,
    },
    AgentEnds {
        left_to_another: bool,
    },
    /// The witness keeps this word of a migration now, by this side's doing.
    Witness {
        #[serde(flatten)]
        subject: Subject,
        word: &'static str,
    },
    /// Somebody asks for something that changes something.
    Asked {
        by: By,
        action: &'static str,
        path: String,
        request: Value,
    },
    /// What came of line `asked`.
    Answered {
        asked: Option<u64>,
        status: u16,
        migration: Option<Uuid>,
    },
    /// Somebody asks for what they may not, or a peer or a stranger does.
    Refused {
        source: String,
        reason: String,
        text: String,
    },
    /// Refusals that were not recorded one by one.
    FurtherRefused {
        reason: String,
        count: u64,
    },
    SessionBegins {
        peer: String,
        certificate: String,
        address: String,
        cipher: String,
        session: String,
    },
    SessionEnds {
        peer: String,
        session: String,
        cause: String,
    },
    /// Sessions of a peer that began, ended or came back and were not recorded one by one.
    FurtherSessions {
        peer: String,
        events: u64,
    },
    /// Migrations that a peer began here, which came to nothing and were not recorded one by one.
    FurtherMigrations {
        peer: String,
        migrations: u64,
        /// VMs whose images that peer could read and write meanwhile; 32 at most.
        data_of: Vec<String>,
    },
    /// Another certificate, or another connection, in a session that goes on.
    SessionResumed {
        peer: String,
        certificate: String,
        address: String,
        session: String,
    },
    /// This destination lets a source begin.
    Granted(Grant),
    /// This source was let begin.
    Obtained(Grant),
    Migration(Step),
    /// A disk, or what it stands on, was compared with that of the other side.
    Hashed {
        #[serde(flatten)]
        subject: Subject,
        #[serde(flatten)]
        hashed: Hashed,
    },
    /// This host is being emptied: it begins, moves a VM, is cancelled, ends.
    Drain {
        drain: Uuid,
        step: &'static str,
        #[serde(skip_serializing_if = "Option::is_none")]
        vm: Option<String>,
        /// The peer's name in the configuration.
        #[serde(skip_serializing_if = "Option::is_none")]
        peer: Option<String>,
        #[serde(skip_serializing_if = "Option::is_none")]
        migration: Option<Uuid>,
    },
}

impl Event {
    /// Whose sessions it is about, where the peer can make as many of it as it likes.
    pub(super) fn session_of(&self) -> Option<&str> {
        match self {
            Self::SessionBegins { peer, .. }
            | Self::SessionEnds { peer, .. }
            | Self::SessionResumed { peer, .. } => Some(peer),
            _ => None,
        }
    }

    /// Whether it is on the disk as soon as it is written, and not a little later.
    pub(super) fn is_urgent(&self) -> bool {
        match self {
            Self::Asked { .. } | Self::Granted(_) | Self::Obtained(_) | Self::AgentEnds { .. } => true,
            Self::Migration(step) => step.result.is_some(),
            _ => false,
        }
    }

    /// Whether the head after it is worth a line in the log.
    pub(super) fn is_end(&self) -> bool {
        matches!(self, Self::Migration(Step { result: Some(_), .. }))
    }
}
