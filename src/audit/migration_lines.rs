//! The lines of one migration. A peer that begins and gives up one after the other would roll away everything else:
//! of those of a peer beyond a number the lines are kept back until the guest is about to run here, and are only
//! counted if it never is.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use time::OffsetDateTime;

use super::event::Event;
use super::keeper::Audit;

/// Lines that are kept back of one migration; beyond that those in the middle go.
const KEPT_MAX: usize = 64;

/// Where they go. Clones share it.
#[derive(Debug, Clone)]
pub struct MigrationLines {
    kept: Arc<Kept>,
}

#[derive(Debug)]
struct Kept {
    audit: Audit,
    /// Who has begun it.
    peer: Option<String>,
    /// Its VM, once data has come of which nothing was recorded.
    data_of: Mutex<Option<String>>,
    /// `None`: they are recorded as they come.
    back: Mutex<Option<Vec<(OffsetDateTime, Event)>>>,
}

impl Kept {
    fn back(&self) -> MutexGuard<'_, Option<Vec<(OffsetDateTime, Event)>>> {
        self.back.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It has come to nothing.
    fn end(&self) {
        if let (Some(_), Some(peer)) = (self.back().take(), &self.peer) {
            let data_of = self.data_of.lock().unwrap_or_else(PoisonError::into_inner).take();
            self.audit.count_migration(peer, data_of);
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.end();
    }
}

impl MigrationLines {
    /// An operator of this host has begun it, or a peer, of which it is known. Each line is recorded as it comes.
    pub fn all(audit: &Audit) -> Self {
        Self {
            kept: Arc::new(Kept {
                audit: audit.clone(),
                peer: None,
                data_of: Mutex::default(),
                back: Mutex::new(None),
            }),
        }
    }

    /// `peer` begins one. Each line is recorded as it comes, unless that peer has begun too many.
    pub fn of_peer(audit: &Audit, peer: &str) -> Self {
        let back = Mutex::new((!audit.takes_migration(peer)).then(Vec::new));
        Self {
            kept: Arc::new(Kept {
                audit: audit.clone(),
                peer: Some(peer.to_owned()),
                data_of: Mutex::default(),
                back,
            }),
        }
    }

    /// Records, now or once it has come to something.
    pub fn record(&self, event: Event) {
        let mut back = self.kept.back();
        match &mut *back {
            None => self.kept.audit.record(event),
            Some(lines) => {
                if lines.len() == KEPT_MAX {
                    lines.remove(KEPT_MAX / 2);
                }
                lines.push((OffsetDateTime::now_utc(), event));
            }
        }
    }

    /// The peer could read and write images of this VM: that is recorded in any case.
    pub fn data_comes(&self, vm: &str) {
        let mut data_of = self.kept.data_of.lock().unwrap_or_else(PoisonError::into_inner);
        data_of.get_or_insert_with(|| vm.to_owned());
    }

    /// It has ended: what is kept back then has come to nothing, and is counted.
    pub fn end(&self) {
        self.kept.end();
    }

    /// It has come to something: what was kept back is recorded, with the time at which it happened.
    pub fn release(&self) {
        for (at, event) in self.kept.back().take().unwrap_or_default() {
            self.kept.audit.record_of(at, event);
        }
    }
}
