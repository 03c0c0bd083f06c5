//! Clients of QEMU's NBD server, for what no job of QEMU's does: reading which parts of a disk a
//! dirty bitmap holds, and copying just those while the guest goes on writing; and asking whether a disk
//! reads as zeroes. And the two halves of a handshake that is led for QEMU's own client.
//!
//! ```text
//! reader    a socket: asks for parts and contents, one request at a time, structured replies
//! writer    a socket: several writes at a time, simple replies
//! writing   the writer's protocol without its socket, which one process leaves to the next
//! asking    a handshake for QEMU's client, without its socket: what is agreed on with the far server
//! offering  the same for that client, which is offered what was agreed on
//! ```
//! All speak the fixed newstyle handshake (doc/proto.md of NetworkBlockDevice/nbd). They know no bitmap, job or
//! migration. What the other side sends is never believed in length: every reply has a limit.

mod asking;
mod offering;
mod reader;
mod writer;
mod writing;

use std::io;
use std::ops::Range;

pub use asking::{Asking, Replies, Terms};
pub use reader::{NbdReader, reads_as_zeroes};
pub use writer::{LeftWriter, NbdWriter};
pub use writing::Writing;

const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943; // "NBDMAGIC"
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054; // "IHAVEOPT"
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Of a request's header.
const HEADER_LEN: usize = 28;

/// Fixed newstyle, and no padding after an export's description.
const HANDSHAKE_FLAGS: u16 = 0b11;
const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;
const OPT_SET_META_CONTEXT: u32 = 10;
const OPT_EXTENDED_HEADERS: u32 = 11;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_META_CONTEXT: u32 = 4;
const REP_ERROR_BIT: u32 = 1 << 31;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

/// Longest name of an export that the protocol knows.
pub const EXPORT_NAME_BYTES_MAX: usize = 4096;

/// The context in which an extent's flags say whether it is allocated and whether it reads as zeroes.
const BASE_ALLOCATION: &str = "base:allocation";

/// Longest reply to an option, and longest chunk that is not data.
const REPLY_BYTES_MAX: usize = 2 << 20;
/// Bytes read or written in one request. QEMU takes 32 MiB.
pub const REQUEST_BYTES_MAX: usize = 1 << 20;

/// Why an NBD exchange did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    #[error("the NBD connection failed")]
    Io(#[from] io::Error),
    #[error("the NBD server does not give {what}: {text}")]
    Handshake { what: &'static str, text: String },
    #[error("the NBD server failed a {what}")]
    Request { what: &'static str, source: io::Error },
    /// What it sent is not the protocol, or not this part of it.
    #[error("the NBD server sent something unexpected: {0}")]
    Protocol(&'static str),
    /// Of the client that is offered an export.
    #[error("QEMU's NBD client {0}")]
    Client(&'static str),
    #[error("an export's name of {0} bytes, of which NBD knows {EXPORT_NAME_BYTES_MAX}")]
    Name(usize),
}

impl NbdError {
    /// Whether the same may succeed later without anybody's doing. What this host's own QEMU is may not change, and
    /// a name does not.
    pub fn may_pass(&self) -> bool {
        !matches!(self, Self::Client(_) | Self::Name(_))
    }
}

fn length(data: &[u8]) -> Result<u32, NbdError> {
    u32::try_from(data.len()).map_err(|_| NbdError::Protocol("our option is too long"))
}

/// A string as options carry it.
fn named(text: &str) -> Result<Vec<u8>, NbdError> {
    let mut data = length(text.as_bytes())?.to_be_bytes().to_vec();
    data.extend_from_slice(text.as_bytes());
    Ok(data)
}

fn be_u32(data: &[u8]) -> u32 {
    data.iter().take(4).fold(0, |number, &byte| number << 8 | u32::from(byte))
}

fn be_u64(data: &[u8]) -> u64 {
    data.iter().take(8).fold(0, |number, &byte| number << 8 | u64::from(byte))
}

/// The header of a request for a part of an export.
fn request_header(
    command: u16,
    flags: u16,
    cookie: u64,
    at: Range<u64>,
) -> Result<[u8; HEADER_LEN], NbdError> {
    let length =
        u32::try_from(at.end - at.start).map_err(|_| NbdError::Protocol("our request is too long"))?;
    let mut header = [0; HEADER_LEN];
    header[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    header[4..6].copy_from_slice(&flags.to_be_bytes());
    header[6..8].copy_from_slice(&command.to_be_bytes());
    header[8..16].copy_from_slice(&cookie.to_be_bytes());
    header[16..24].copy_from_slice(&at.start.to_be_bytes());
    header[24..].copy_from_slice(&length.to_be_bytes());
    Ok(header)
}

/// An option of the handshake.
fn option(number: u32, data: &[u8]) -> Result<Vec<u8>, NbdError> {
    let mut message = Vec::with_capacity(16 + data.len());
    message.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    message.extend_from_slice(&number.to_be_bytes());
    message.extend_from_slice(&length(data)?.to_be_bytes());
    message.extend_from_slice(data);
    Ok(message)
}

/// What [`OPT_SET_META_CONTEXT`] carries for one context.
fn set_meta_context(export: &str, context: &str) -> Result<Vec<u8>, NbdError> {
    Ok([named(export)?, 1_u32.to_be_bytes().to_vec(), named(context)?].concat())
}

/// The option that enters transmission, with the export's name.
fn option_go(export: &str) -> Result<Vec<u8>, NbdError> {
    let mut data = named(export)?;
    data.extend_from_slice(&0_u16.to_be_bytes());
    option(OPT_GO, &data)
}

/// An export's size in bytes and its flags, if a reply to [`option_go`] tells them.
fn export_info(kind: u32, info: &[u8]) -> Result<Option<(u64, u16)>, NbdError> {
    if kind != REP_INFO || !info.starts_with(&INFO_EXPORT.to_be_bytes()) {
        return Ok(None);
    }
    let fields = info.get(2..12).ok_or(NbdError::Protocol("a short export description"))?;
    Ok(Some((be_u64(fields), u16::from_be_bytes([fields[8], fields[9]]))))
}

/// Whether an export's flags have what is needed.
fn wants(flags: u16, flag: u16, what: &'static str) -> Result<(), NbdError> {
    if flags & flag == flag {
        return Ok(());
    }
    Err(NbdError::Handshake { what, text: "this server cannot".into() })
}
