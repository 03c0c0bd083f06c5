//! Whether the files with certificates are others than those in use. Looks at them from outside, and reads none.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::config::TlsConfig;

/// What is seen of a file without reading it: device, inode, size, change of contents and of anything.
type Seen = (u64, u64, u64, (i64, i64), (i64, i64));

/// What was seen of all files together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stamp(Vec<Option<Seen>>);

impl Stamp {
    /// Of the files as they are now, behind symbolic links.
    pub(super) fn of(tls: &TlsConfig) -> Self {
        let files = [Some(&tls.ca), Some(&tls.cert), Some(&tls.key), tls.crl.as_ref()];
        Self(files.into_iter().flatten().map(seen).collect())
    }
}

fn seen(file: &PathBuf) -> Option<Seen> {
    let data = std::fs::metadata(file).ok()?;
    let (contents, anything) = ((data.mtime(), data.mtime_nsec()), (data.ctime(), data.ctime_nsec()));
    Some((data.dev(), data.ino(), data.size(), contents, anything))
}

/// When what is seen is to be read: once it has not changed from one look to the next, and only once.
#[derive(Debug)]
pub(super) struct Watch {
    in_use: Stamp,
    last: Option<Stamp>,
    refused: Option<Stamp>,
}

impl Watch {
    /// `in_use` was seen before the files in use were read.
    pub(super) fn new(in_use: Stamp) -> Self {
        Self { in_use, last: None, refused: None }
    }

    /// Whether the files are to be read now.
    pub(super) fn look(&mut self, now: &Stamp) -> bool {
        let is_settled = self.last.as_ref() == Some(now);
        self.last = Some(now.clone());
        is_settled && *now != self.in_use && self.refused.as_ref() != Some(now)
    }

    /// They are not right as they are: they are read again when they have changed.
    pub(super) fn refuse(&mut self, now: Stamp) {
        self.refused = Some(now);
    }
}

/// Which files are in use, and whether they have changed.
#[derive(Debug, Default)]
pub(super) struct CertificatesInUse(Mutex<Option<(TlsConfig, Watch)>>);

impl CertificatesInUse {
    /// Files were taken that looked so before they were read.
    pub(super) fn set(&self, config: TlsConfig, before: Stamp) {
        *self.locked() = Some((config, Watch::new(before)));
    }

    pub(super) fn locked(&self) -> MutexGuard<'_, Option<(TlsConfig, Watch)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(size: u64) -> Stamp {
        Stamp(vec![Some((1, 2, size, (0, 0), (0, 0))), None])
    }

    #[test]
    fn what_has_changed_is_read_once_it_has_settled_and_once() {
        let mut watch = Watch::new(stamp(1));
        assert!(!watch.look(&stamp(1)) && !watch.look(&stamp(1)), "nothing has changed");
        assert!(!watch.look(&stamp(2)) && !watch.look(&stamp(3)), "it is being written");
        assert!(watch.look(&stamp(3)));
        watch.refuse(stamp(3));
        assert!(!watch.look(&stamp(3)) && !watch.look(&stamp(3)), "refused, and not read again");
        assert!(!watch.look(&stamp(4)));
        assert!(watch.look(&stamp(4)));
        let mut watch = Watch::new(stamp(4));
        assert!(!watch.look(&stamp(5)) && !watch.look(&stamp(4)) && !watch.look(&stamp(4)), "back again");
    }
}
