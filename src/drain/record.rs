//! The drain on the disk: one file with the whole of it, replaced as a whole and synced before what it tells of is
//! done. The agent's lock keeps a second writer away. Of what became of a VM its migration's journal is the truth;
//! this is the truth of which migrations are the drain's.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::machine::Drain;

/// The format that this version writes and reads.
const FORMAT: u32 = 1;
/// Larger than any drain.
const BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Where the drain is kept.
#[derive(Debug)]
pub struct Record(PathBuf);

/// Why it cannot be.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("the record of the drain {} cannot be read", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("the record of the drain {} is damaged", path.display())]
    Damaged { path: PathBuf, source: serde_json::Error },
    #[error("the record of the drain {} has format {format}, this version knows {FORMAT}", path.display())]
    Format { path: PathBuf, format: u32 },
    #[error("the record of the drain {} cannot be written", path.display())]
    Write { path: PathBuf, source: io::Error },
}

#[derive(Debug, Serialize, Deserialize)]
struct Written<D> {
    format: u32,
    drain: D,
}

#[derive(Debug, Deserialize)]
struct Head {
    format: u32,
}

impl Record {
    /// In the agent's state folder.
    pub fn new(state_dir: &Path) -> Self {
        Self(state_dir.join("drain.json"))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// What an earlier process has left; the last drain also after its end.
    ///
    /// # Errors
    /// It is there and cannot be understood.
    pub fn load(&self) -> Result<Option<Drain>, RecordError> {
        let path = || self.0.clone();
        let text = match fs::metadata(&self.0) {
            Ok(file) if file.len() > BYTES_MAX => Err(io::Error::other("it is too large")),
            Ok(_) => fs::read(&self.0),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => Err(e),
        };
        let text = text.map_err(|source| RecordError::Read { path: path(), source })?;
        let damaged = |source| RecordError::Damaged { path: path(), source };
        let Head { format } = serde_json::from_slice(&text).map_err(damaged)?;
        if format != FORMAT {
            return Err(RecordError::Format { path: path(), format });
        }
        let written: Written<Drain> = serde_json::from_slice(&text).map_err(damaged)?;
        Ok(Some(written.drain))
    }

    /// Writes the drain, durably. The one before stays if that fails.
    ///
    /// # Errors
    /// Whether it is on the disk is not known.
    pub fn save(&self, drain: &Drain) -> Result<(), RecordError> {
        let written = || -> io::Result<()> {
            let text = serde_json::to_vec(&Written { format: FORMAT, drain })?;
            let new = self.0.with_extension("new");
            let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&new, &self.0)?;
            self.0.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
        };
        written().map_err(|source| RecordError::Write { path: self.0.clone(), source })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;
    use uuid::Uuid;

    use super::*;
    use crate::drain::{Guest, Limits};

    #[test]
    fn what_was_written_is_read_and_what_is_no_record_is_refused_and_left() {
        let folder = tempfile::tempdir().unwrap();
        let record = Record::new(folder.path());
        assert!(record.load().unwrap().is_none());
        let request = serde_json::from_value(json!({"to": ["bravo"], "options": {"retry": 3}})).unwrap();
        let limits = Limits { at_once: 4, per_peer: 2 };
        let mut drain = Drain::new(Uuid::nil(), request, limits, vec![Guest::new("web1", Some(7), true)], 5);
        drain.begin("web1", "bravo", Uuid::from_u128(1));
        record.save(&drain).unwrap();
        let read = record.load().unwrap().unwrap();
        assert_eq!(serde_json::to_value(&read).unwrap(), serde_json::to_value(&drain).unwrap());
        for (text, words) in
            [("{", "is damaged"), (r#"{"format":2}"#, "has format 2"), (r#"{"format":1}"#, "damaged")]
        {
            fs::write(record.path(), text).unwrap();
            let error = record.load().unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
            assert_eq!(fs::read_to_string(record.path()).unwrap(), text);
        }
        // A folder in its place: the write fails and says so.
        fs::remove_file(record.path()).unwrap();
        fs::create_dir(record.path()).unwrap();
        assert!(record.save(&drain).is_err());
    }
}
