//! Why a journal cannot be written or believed.

use std::io;
use std::path::PathBuf;

use uuid::Uuid;

use super::line::Flaw;
use super::{FORMAT, Role};

/// Why a journal cannot be written or believed.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Reading or writing failed.
    #[error("journal {}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// A line is not what was written there.
    #[error("journal {} is damaged in line {line}; it was left as it is", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Counted from one.
        line: usize,
        /// What is wrong with it.
        source: Flaw,
    },
    /// The file's name is that of another migration or role.
    #[error("journal {} is of migration {migration} and role {}; it was left as it is", path.display(), role.name())]
    Misnamed {
        /// The file.
        path: PathBuf,
        /// What its header says.
        migration: Uuid,
        /// What its header says.
        role: Role,
    },
    /// It ends within its first line: its migration had not begun when the agent or the host ended, for
    /// nothing is done before that line is on the disk.
    #[error("journal {} was never begun: nothing was done under it", path.display())]
    NotBegun {
        /// The file.
        path: PathBuf,
    },
    /// Another part of this agent writes to it.
    #[error("journal {} is in use by another part of this agent", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The first line is not a header.
    #[error("journal {} has no header; it was left as it is", path.display())]
    NoHeader {
        /// The file.
        path: PathBuf,
    },
    /// Written by a newer version.
    #[error("journal {} has format {format}, this version reads up to {FORMAT}; it was left as it is", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        format: u32,
    },
    /// Written on another host.
    #[error("journal {} is of host {host}, not of this one; it was left as it is", path.display())]
    OtherHost {
        /// The file.
        path: PathBuf,
        /// Its host.
        host: String,
    },
}
