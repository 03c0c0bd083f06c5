//! The reading client: which parts of an export are dirty, zeroes or of the topmost image, and its contents.

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::{
    BASE_ALLOCATION, HANDSHAKE_FLAGS, INIT_MAGIC, NbdError, OPT_SET_META_CONTEXT, OPT_STRUCTURED_REPLY,
    OPTION_MAGIC, OPTION_REPLY_MAGIC, REP_ACK, REP_ERROR_BIT, REP_META_CONTEXT, REPLY_BYTES_MAX,
    REQUEST_BYTES_MAX, be_u32, export_info, option, option_go, request_header, set_meta_context, wants,
};
use crate::printable::bounded;

const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
const CMD_READ: u16 = 0;
const CMD_BLOCK_STATUS: u16 = 7;
/// One chunk of data for a read, holes included.
const CMD_FLAG_DF: u16 = 1 << 2;
const SEND_DF: u16 = 1 << 7;

/// The context in which an extent's flags are the number of the image that has it: 1 is the topmost.
const ALLOCATION_DEPTH: &str = "qemu:allocation-depth";

/// What an extent's flags say: in a dirty bitmap, in `base:allocation`, in [`ALLOCATION_DEPTH`].
type Says = fn(u32) -> bool;
const IS_DIRTY: Says = |flags| flags & 1 != 0;
const IS_ZERO: Says = |flags| flags & 1 << 1 != 0;
const IS_OF_THE_TOP: Says = |flags| flags == 1;

const CHUNK_DONE: u16 = 1;
const CHUNK_NONE: u16 = 0;
const CHUNK_OFFSET_DATA: u16 = 1;
const CHUNK_BLOCK_STATUS: u16 = 5;
const CHUNK_ERROR_BIT: u16 = 1 << 15;

/// How much of a disk one question about its parts covers.
const STATUS_BYTES_MAX: u64 = 1 << 30;

#[derive(Debug)]
struct Connection {
    socket: UnixStream,
    size: u64,
    flags: u16,
    cookie: u64,
}

impl Connection {
    async fn greeted(socket: OwnedFd) -> Result<Self, NbdError> {
        let socket = std::os::unix::net::UnixStream::from(socket);
        socket.set_nonblocking(true)?;
        let mut socket = UnixStream::from_std(socket)?;
        if socket.read_u64().await? != INIT_MAGIC || socket.read_u64().await? != OPTION_MAGIC {
            return Err(NbdError::Protocol("no newstyle greeting"));
        }
        let flags = socket.read_u16().await?;
        if flags & HANDSHAKE_FLAGS != HANDSHAKE_FLAGS {
            return Err(NbdError::Protocol("no fixed newstyle"));
        }
        socket.write_u32(u32::from(HANDSHAKE_FLAGS)).await?;
        Ok(Self { socket, size: 0, flags: 0, cookie: 0 })
    }

    async fn option(&mut self, number: u32, data: &[u8]) -> Result<(), NbdError> {
        self.socket.write_all(&option(number, data)?).await?;
        Ok(())
    }

    /// The next reply to an option; `None` when the server is done with it.
    async fn option_reply(&mut self, what: &'static str) -> Result<Option<(u32, Vec<u8>)>, NbdError> {
        if self.socket.read_u64().await? != OPTION_REPLY_MAGIC {
            return Err(NbdError::Protocol("no reply to an option"));
        }
        let _option = self.socket.read_u32().await?;
        let kind = self.socket.read_u32().await?;
        let data = self.payload().await?;
        if kind & REP_ERROR_BIT != 0 {
            return Err(NbdError::Handshake { what, text: bounded(&String::from_utf8_lossy(&data)) });
        }
        Ok((kind != REP_ACK).then_some((kind, data)))
    }

    async fn payload(&mut self) -> Result<Vec<u8>, NbdError> {
        let length = self.socket.read_u32().await? as usize;
        if length > REPLY_BYTES_MAX {
            return Err(NbdError::Protocol("a reply that is too long"));
        }
        let mut data = vec![0; length];
        self.socket.read_exact(&mut data).await?;
        Ok(data)
    }

    /// Enters transmission.
    async fn go(&mut self, export: &str) -> Result<(), NbdError> {
        self.socket.write_all(&option_go(export)?).await?;
        while let Some((kind, info)) = self.option_reply("the export").await? {
            if let Some((size, flags)) = export_info(kind, &info)? {
                (self.size, self.flags) = (size, flags);
            }
        }
        Ok(())
    }

    async fn request(&mut self, command: u16, flags: u16, at: Range<u64>) -> Result<(), NbdError> {
        self.cookie += 1;
        self.socket.write_all(&request_header(command, flags, self.cookie, at)?).await?;
        Ok(())
    }

    /// The head of a structured reply to the last request: flags, kind and length.
    async fn chunk(&mut self, what: &'static str) -> Result<(u16, u16, u32), NbdError> {
        if self.socket.read_u32().await? != STRUCTURED_REPLY_MAGIC {
            return Err(NbdError::Protocol("no structured reply"));
        }
        let flags = self.socket.read_u16().await?;
        let kind = self.socket.read_u16().await?;
        if self.socket.read_u64().await? != self.cookie {
            return Err(NbdError::Protocol("a reply to another request"));
        }
        if kind & CHUNK_ERROR_BIT == 0 {
            return Ok((flags, kind, self.socket.read_u32().await?));
        }
        let error = self.payload().await?;
        let number = error.get(..4).ok_or(NbdError::Protocol("a short error"))?;
        let number = i32::from_be_bytes([number[0], number[1], number[2], number[3]]);
        Err(NbdError::Request { what, source: io::Error::from_raw_os_error(number) })
    }
}

/// Reads an export, and which parts of it a dirty bitmap holds.
#[derive(Debug)]
pub struct NbdReader {
    connection: Connection,
    context: u32,
}

impl NbdReader {
    /// Shakes hands for an export that shows this bitmap.
    pub async fn connect(socket: OwnedFd, export: &str, bitmap: &str) -> Result<Self, NbdError> {
        Self::asking(socket, export, &format!("qemu:dirty-bitmap:{bitmap}")).await
    }

    /// Shakes hands for an export whose parts are described in this context.
    async fn asking(socket: OwnedFd, export: &str, context: &str) -> Result<Self, NbdError> {
        let mut connection = Connection::greeted(socket).await?;
        connection.option(OPT_STRUCTURED_REPLY, &[]).await?;
        while connection.option_reply("structured replies").await?.is_some() {}
        connection.option(OPT_SET_META_CONTEXT, &set_meta_context(export, context)?).await?;
        let mut context = None;
        while let Some((kind, reply)) = connection.option_reply("what its parts are").await? {
            if kind == REP_META_CONTEXT {
                context = reply.get(..4).map(|id| u32::from_be_bytes([id[0], id[1], id[2], id[3]]));
            }
        }
        let Some(context) = context else {
            let text = "it does not show it".into();
            return Err(NbdError::Handshake { what: "what its parts are", text });
        };
        connection.go(export).await?;
        wants(connection.flags, SEND_DF, "whole reads")?;
        Ok(Self { connection, context })
    }

    /// Shakes hands for an export that is only read.
    pub async fn plain(socket: OwnedFd, export: &str) -> Result<Self, NbdError> {
        Self::asking(socket, export, BASE_ALLOCATION).await
    }

    /// Shakes hands for an export that tells which image of its chain has what.
    pub async fn of_chain(socket: OwnedFd, export: &str) -> Result<Self, NbdError> {
        Self::asking(socket, export, ALLOCATION_DEPTH).await
    }

    /// The export's size in bytes.
    pub fn size(&self) -> u64 {
        self.connection.size
    }

    /// The parts from `from` on that the topmost image has, as far as one question goes, and where the next begins.
    /// Only of one that tells ([`of_chain`](Self::of_chain)).
    pub async fn of_the_top(&mut self, from: u64) -> Result<(Vec<Range<u64>>, u64), NbdError> {
        self.parts(from, IS_OF_THE_TOP).await
    }

    /// The dirty parts from `from` on, as far as one question goes, and where the next begins.
    pub async fn dirty(&mut self, from: u64) -> Result<(Vec<Range<u64>>, u64), NbdError> {
        self.parts(from, IS_DIRTY).await
    }

    /// The parts from `from` on of which this is said, as far as one question goes, and where the next begins.
    async fn parts(&mut self, from: u64, says: Says) -> Result<(Vec<Range<u64>>, u64), NbdError> {
        let until = self.size().min(from.saturating_add(STATUS_BYTES_MAX));
        self.parts_of(from..until, says).await
    }

    /// The parts from `from` on that read as zeroes by the server's word, as far as one question goes, and where the
    /// next begins. Only of one that is [`plain`](Self::plain).
    pub async fn zeroes(&mut self, from: u64) -> Result<(Vec<Range<u64>>, u64), NbdError> {
        self.parts(from, IS_ZERO).await
    }

    /// The same of one part alone.
    pub async fn zeroes_of(&mut self, part: Range<u64>) -> Result<(Vec<Range<u64>>, u64), NbdError> {
        let until = part.end.min(part.start.saturating_add(STATUS_BYTES_MAX));
        self.parts_of(part.start..until, IS_ZERO).await
    }

    /// Whether all of a part reads as zeroes by the server's word; likewise.
    pub async fn is_zero(&mut self, part: Range<u64>) -> Result<bool, NbdError> {
        let mut at = part.start;
        while at < part.end {
            let until = part.end.min(at.saturating_add(STATUS_BYTES_MAX));
            let (zeroes, next) = self.parts_of(at..until, IS_ZERO).await?;
            if zeroes.first() != Some(&(at..next)) {
                return Ok(false);
            }
            at = next;
        }
        Ok(true)
    }

    async fn parts_of(&mut self, of: Range<u64>, says: Says) -> Result<(Vec<Range<u64>>, u64), NbdError> {
        let Range { start: from, end: until } = of;
        self.connection.request(CMD_BLOCK_STATUS, 0, from..until).await?;
        let (mut parts, mut at) = (Vec::new(), from);
        // Of all its chunks together: parts of a byte each would be gigabytes.
        let mut room = REPLY_BYTES_MAX as u32;
        loop {
            let (flags, kind, length) = self.connection.chunk("question for parts").await?;
            match kind {
                CHUNK_NONE if length == 0 => {}
                CHUNK_BLOCK_STATUS if (4..=room).contains(&length) => {
                    room -= length;
                    let mut data = vec![0; length as usize];
                    self.connection.socket.read_exact(&mut data).await?;
                    if be_u32(&data) == self.context {
                        at = extents(&data[4..], at..until, says, &mut parts);
                    }
                }
                _ => return Err(NbdError::Protocol("a reply that does not fit a question for parts")),
            }
            if flags & CHUNK_DONE != 0 {
                break;
            }
        }
        if at <= from && from < until {
            return Err(NbdError::Protocol("nothing about the parts"));
        }
        Ok((parts, at))
    }

    /// Reads `at` into `buffer`, which is as long.
    pub async fn read(&mut self, at: u64, buffer: &mut [u8]) -> Result<(), NbdError> {
        let bytes = buffer.len() as u64;
        self.connection.request(CMD_READ, CMD_FLAG_DF, at..at + bytes).await?;
        let mut filled = false;
        loop {
            let (flags, kind, length) = self.connection.chunk("read").await?;
            match kind {
                CHUNK_NONE if length == 0 => {}
                CHUNK_OFFSET_DATA if u64::from(length) == bytes + 8 && !filled => {
                    if self.connection.socket.read_u64().await? != at {
                        return Err(NbdError::Protocol("data from elsewhere"));
                    }
                    self.connection.socket.read_exact(buffer).await?;
                    filled = true;
                }
                _ => return Err(NbdError::Protocol("a reply that does not fit a read")),
            }
            if flags & CHUNK_DONE != 0 {
                break;
            }
        }
        if filled { Ok(()) } else { Err(NbdError::Protocol("a read without data")) }
    }
}

/// Whether an export reads as zeroes from its beginning to its end. Its server says so without reading it, but
/// for a little: QEMU writes the first block of the images that it makes.
///
/// Errors: any [`NbdError`]; a server that does not say what its parts are is one, too.
pub async fn reads_as_zeroes(socket: OwnedFd, export: &str) -> Result<bool, NbdError> {
    let mut reader = NbdReader::asking(socket, export, BASE_ALLOCATION).await?;
    let (mut at, mut to_read) = (0, REQUEST_BYTES_MAX as u64);
    while at < reader.size() {
        let (zeroes, next) = reader.parts(at, IS_ZERO).await?;
        for zero in zeroes.into_iter().chain(std::iter::once(next..next)) {
            let unknown = at..zero.start;
            let Some(left) = to_read.checked_sub(unknown.end - unknown.start) else { return Ok(false) };
            let mut data = vec![0; (unknown.end - unknown.start) as usize];
            if !data.is_empty() {
                reader.read(unknown.start, &mut data).await?;
            }
            if data.iter().any(|&byte| byte != 0) {
                return Ok(false);
            }
            (at, to_read) = (zero.end, left);
        }
    }
    Ok(true)
}

/// Takes those extents of a block status reply of which this is said: `length, flags` each.
fn extents(data: &[u8], of: Range<u64>, says: Says, parts: &mut Vec<Range<u64>>) -> u64 {
    let mut at = of.start;
    for extent in data.chunks_exact(8) {
        let end = at.saturating_add(u64::from(be_u32(extent))).min(of.end);
        if says(be_u32(&extent[4..])) && end > at {
            match parts.last_mut() {
                Some(last) if last.end == at => last.end = end,
                _ => parts.push(at..end),
            }
        }
        at = end;
    }
    at
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, clippy::unwrap_used)]
mod tests {
    use super::*;

    fn extent(length: u32, flags: u32) -> Vec<u8> {
        [length.to_be_bytes(), flags.to_be_bytes()].concat()
    }

    /// A server that never ends its answer.
    #[tokio::test]
    async fn parts_of_a_disk_are_not_told_without_end() {
        use std::io::Write;
        let (client, mut server) = std::os::unix::net::UnixStream::pair().unwrap();
        client.set_nonblocking(true).unwrap();
        let parts = [extent(1, 1), extent(1, 0)].concat().repeat(30_000);
        let mut chunk = STRUCTURED_REPLY_MAGIC.to_be_bytes().to_vec();
        chunk.extend_from_slice(&[0, 0, 0, 5]);
        chunk.extend_from_slice(&1_u64.to_be_bytes());
        chunk.extend_from_slice(&(4 + parts.len() as u32).to_be_bytes());
        chunk.extend_from_slice(&7_u32.to_be_bytes());
        chunk.extend_from_slice(&parts);
        let telling = std::thread::spawn(move || while server.write_all(&chunk).is_ok() {});
        let socket = UnixStream::from_std(client).unwrap();
        let connection = Connection { socket, size: 1 << 40, flags: SEND_DF, cookie: 0 };
        let answer = NbdReader { connection, context: 7 }.dirty(0).await;
        assert!(matches!(answer, Err(NbdError::Protocol(_))), "{answer:?}");
        telling.join().unwrap();
    }

    #[test]
    fn dirty_extents_are_joined_and_cut_at_the_end_of_the_question() {
        let data = [extent(10, 0), extent(5, 1), extent(5, 1), extent(10, 0), extent(100, 1)].concat();
        let mut dirty = Vec::new();
        assert_eq!(extents(&data, 1000..1050, IS_DIRTY, &mut dirty), 1050);
        assert_eq!(dirty, [1010..1020, 1030..1050]);
        let mut none = Vec::new();
        assert_eq!(extents(&extent(7, 2), 0..50, IS_DIRTY, &mut none), 7, "other flags are not dirty");
        assert!(none.is_empty());
        assert_eq!(extents(&extent(7, 3), 0..50, IS_ZERO, &mut none), 7);
        assert_eq!(none, [0..7]);
        let chain = [extent(10, 1), extent(5, 0), extent(5, 3), extent(10, 1)].concat();
        let mut top = Vec::new();
        extents(&chain, 0..30, IS_OF_THE_TOP, &mut top);
        assert_eq!(top, [0..10, 20..30], "what lies deeper is not the topmost image's");
    }
}
