//! Why a journal cannot be written or believed.

use std::io;
use std::path::PathBuf;

use uuid::Uuid;

use super::line::Flaw;
use super::{FORMAT_WITH_WITNESS, Role};

/// Why a journal cannot be written or believed.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("journal {}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("journal {} is damaged in line {line}; it was left as it is", path.display())]
    Damaged { path: PathBuf, line: usize, source: Flaw },
    #[error("journal {} is of migration {migration} and role {}; it was left as it is", path.display(), role.name())]
    Misnamed { path: PathBuf, migration: Uuid, role: Role },
    /// It ends within its first line: its migration had not begun when the agent or the host ended, for
    /// nothing is done before that line is on the disk.
    #[error("journal {} was never begun: nothing was done under it", path.display())]
    NotBegun { path: PathBuf },
    #[error("journal {} is in use by another part of this agent", path.display())]
    InUse { path: PathBuf },
    #[error("journal {} has no header; it was left as it is", path.display())]
    NoHeader { path: PathBuf },
    #[error("journal {} has format {format}, this version reads up to {FORMAT_WITH_WITNESS}; it was left as it is", path.display())]
    Newer { path: PathBuf, format: u32 },
    #[error("journal {} is of host {host}, not of this one; it was left as it is", path.display())]
    OtherHost { path: PathBuf, host: String },
}
