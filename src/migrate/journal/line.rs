//! One line: a number, a record, and a checksum that covers every line before it as well. Pure.
//!
//! ```text
//! {"n":3,"record":"handed-over","sum":"1c291ca3"}
//! ```
//! `sum` is the CRC-32 (IEEE 802.3) of the line before it, seeded with the line before's sum; the
//! first is seeded with migration and role. In format 1 a line was the record alone.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Record, Role};

/// `,"sum":"00000000"}`
const SUM_BYTES: usize = 18;

/// What is wrong with a line.
#[derive(Debug, thiserror::Error)]
pub enum Flaw {
    #[error("it is not a record")]
    Json(#[from] serde_json::Error),
    #[error("its checksum does not fit: a line was changed, removed, or brought in from elsewhere")]
    Checksum,
    #[error("it has number {found} where {expected} follows: lines were doubled, moved or removed")]
    Order { found: u64, expected: u64 },
    #[error("it begins another journal")]
    Begins,
    #[error("something follows that is not a record")]
    Tail,
}

/// Where the next line belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Chain {
    format: u32,
    number: u64,
    sum: u32,
}

#[derive(Serialize)]
struct Written<'a> {
    n: u64,
    record: &'a Record,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Read {
    n: u64,
    record: Record,
    #[serde(rename = "sum")]
    _sum: String,
}

impl Chain {
    /// The beginning of a journal.
    pub(crate) fn begin(format: u32, migration: Uuid, role: Role) -> Self {
        let sum = crc(0, format!("{migration}.{}", role.name()).as_bytes());
        Self { format, number: 0, sum }
    }

    /// The next line with `record`, and where the one after it belongs.
    pub(crate) fn write(self, record: &Record) -> Result<(Vec<u8>, Self), serde_json::Error> {
        if self.format < 2 {
            let mut line = serde_json::to_vec(record)?;
            line.push(b'\n');
            return Ok((line, self));
        }
        let mut line = serde_json::to_vec(&Written { n: self.number, record })?;
        line.pop();
        let sum = crc(self.sum, &line);
        line.extend_from_slice(format!(",\"sum\":\"{sum:08x}\"}}\n").as_bytes());
        Ok((line, Self { number: self.number + 1, sum, ..self }))
    }

    /// The record of a line without its end, and where the next one belongs.
    pub(crate) fn read(self, line: &[u8]) -> Result<(Record, Self), Flaw> {
        if self.format < 2 {
            return Ok((serde_json::from_slice(line)?, self));
        }
        let read: Read = serde_json::from_slice(line)?;
        let (body, tail) =
            line.split_at_checked(line.len().saturating_sub(SUM_BYTES)).ok_or(Flaw::Checksum)?;
        if read.n != self.number {
            return Err(Flaw::Order { found: read.n, expected: self.number });
        }
        let sum = crc(self.sum, body);
        if tail != format!(",\"sum\":\"{sum:08x}\"}}").as_bytes() {
            return Err(Flaw::Checksum);
        }
        Ok((read.record, Self { number: self.number + 1, sum, ..self }))
    }

    /// How much of a last line without its end is to be kept: all of it if only the end is missing,
    /// nothing if it was torn. What has a whole record and then something else was not torn.
    pub(crate) fn torn(self, tail: &[u8]) -> Result<usize, Flaw> {
        if self.format >= 2 && !tail.is_empty() && self.read(tail).is_ok() {
            return Ok(tail.len());
        }
        let ends = (1..tail.len()).filter(|end| tail[..*end].ends_with(b"\"}"));
        match ends.filter(|_| self.format >= 2).any(|end| self.read(&tail[..end]).is_ok()) {
            true => Err(Flaw::Tail),
            false => Ok(0),
        }
    }
}

/// CRC-32 as in Ethernet and gzip, going on from the sum of what is before.
fn crc(before: u32, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(before);
    hasher.update(bytes);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::crc;

    #[test]
    fn the_checksum_is_crc_32() {
        assert_eq!(crc(0, b"123456789"), 0xcbf4_3926);
        assert_eq!(crc(crc(0, b"1234"), b"56789"), 0xcbf4_3926);
    }
}
