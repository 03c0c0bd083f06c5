//! What two agents say to each other about a migration of libvirt's: one question and one answer on a stream,
//! so that nothing has to be left to the next process of either.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::state::Channels;

/// How long a destination keeps what it has prepared without being asked to.
pub(super) const KEPT: Duration = Duration::from_secs(180);
/// Longest name of a domain, in bytes.
pub(super) const DOMAIN_BYTES_MAX: usize = 256;

/// Asked by the source's agent. The migration's id is the stream's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// Whether it would be permitted; nothing is made.
    Look {
        /// The domain's name at the destination.
        domain: String,
        /// Where the source has its folders.
        folder: PathBuf,
    },
    /// Make the folder, and grant what is in it.
    Prepare {
        /// The domain's name at the destination.
        domain: String,
        /// The source's, of this migration.
        folder: PathBuf,
        /// libvirt's own connection, too.
        rpc: bool,
    },
    /// It still goes on.
    Renew,
    /// Take it all away. How it ended follows as a message of its own, a [`super::Ended`]: earlier versions send
    /// none, and do not read it.
    End,
}

/// The destination's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It would be permitted.
    Looked {
        /// libvirt's own connection, too.
        rpc: bool,
        /// What the destination's host lacks.
        lacks: Vec<String>,
    },
    /// All of it is there.
    Prepared,
    /// It goes on.
    Renewed {
        /// What has gone through at the destination.
        channels: Channels,
    },
    /// It is gone.
    Gone {
        /// What could not be taken away.
        left: Vec<String>,
    },
    /// No.
    Refused(Refused),
}

/// Why not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    pub text: String,
    pub remedy: String,
}
