//! Which VM belongs to which migration on this host, and who only looks at one. Owns no task.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use uuid::Uuid;

/// A look by its number, and its end: none while it may go on, then whose the VM is.
type Look = (u64, watch::Sender<Option<Uuid>>);

#[derive(Debug, Default)]
struct Inner {
    busy: BTreeMap<String, Uuid>,
    looks: BTreeMap<String, Vec<Look>>,
    looks_begun: u64,
}

/// All of them; clones share them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reservations(Arc<Mutex<Inner>>);

/// A VM's reservation; dropped, it is free.
#[derive(Debug)]
pub(crate) struct Reservation {
    all: Reservations,
    vm: String,
}

/// A look at a VM that is in no migration; it gives way to one that begins.
#[derive(Debug)]
pub(crate) struct Looking {
    all: Reservations,
    vm: String,
    number: u64,
    taken: watch::Receiver<Option<Uuid>>,
}

impl Reservations {
    /// Reserves a VM, and ends the looks at it.
    /// Errors: the migration that has it.
    pub(crate) fn reserve(&self, vm: &str, migration: Uuid) -> Result<Reservation, Uuid> {
        let mut inner = self.locked();
        if let Some(other) = inner.busy.get(vm) {
            return Err(*other);
        }
        inner.busy.insert(vm.into(), migration);
        for (_, look) in inner.looks.remove(vm).into_iter().flatten() {
            look.send_replace(Some(migration));
        }
        Ok(Reservation { all: self.clone(), vm: vm.into() })
    }

    /// Begins to look at a VM.
    /// Errors: the migration that has it.
    pub(crate) fn begin_look(&self, vm: &str) -> Result<Looking, Uuid> {
        let mut inner = self.locked();
        if let Some(migration) = inner.busy.get(vm) {
            return Err(*migration);
        }
        let (sender, taken) = watch::channel(None);
        let number = inner.looks_begun;
        inner.looks_begun = number.wrapping_add(1);
        inner.looks.entry(vm.into()).or_default().push((number, sender));
        Ok(Looking { all: self.clone(), vm: vm.into(), number, taken })
    }

    fn locked(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.all.locked().busy.remove(&self.vm);
    }
}

impl Looking {
    /// Waits until a migration takes the VM.
    pub(crate) async fn taken(&self) -> Option<Uuid> {
        let mut taken = self.taken.clone();
        // An error: it was taken, and the word with it.
        taken.wait_for(Option::is_some).await.ok().and_then(|migration| *migration)
    }
}

impl Drop for Looking {
    fn drop(&mut self) {
        let mut inner = self.all.locked();
        if let Some(looks) = inner.looks.get_mut(&self.vm) {
            looks.retain(|(number, _)| *number != self.number);
            if looks.is_empty() {
                inner.looks.remove(&self.vm);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_look_gives_way_to_a_migration_and_never_keeps_one_out() {
        let all = Reservations::default();
        let id = Uuid::from_u128(7);
        let (one, two) = (all.begin_look("web1").unwrap(), all.begin_look("web1").unwrap());
        drop(two);
        let reserved = all.reserve("web1", id).unwrap();
        assert_eq!(one.taken().await, Some(id));
        assert_eq!(all.begin_look("web1").unwrap_err(), id);
        assert_eq!(all.reserve("web1", Uuid::nil()).unwrap_err(), id);
        drop(reserved);
        drop(one);
        assert!(all.begin_look("web1").is_ok());
        let inner = all.locked();
        assert!(inner.busy.is_empty() && inner.looks.is_empty());
    }
}
