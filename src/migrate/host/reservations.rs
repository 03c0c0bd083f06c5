//! Who has which VM for himself on this host, and who only looks at one. Owns no task.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use uuid::Uuid;

/// Who has a VM for himself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Holder {
    Migration(Uuid),
    /// Something short, in words: it is no migration, and nobody can cancel it.
    Task(&'static str),
}

/// A look by its number, and its end: none while it may go on, then whose the VM is.
type Look = (u64, watch::Sender<Option<Holder>>);

#[derive(Debug, Default)]
struct Inner {
    /// With what its end closes.
    busy: BTreeMap<String, (Holder, watch::Sender<()>)>,
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

/// A look at a VM that nobody has; it gives way to whoever takes that.
#[derive(Debug)]
pub(crate) struct Looking {
    all: Reservations,
    vm: String,
    number: u64,
    taken: watch::Receiver<Option<Holder>>,
}

impl Reservations {
    /// Reserves a VM, and ends the looks at it.
    /// Errors: who has it.
    pub(crate) fn reserve(&self, vm: &str, holder: Holder) -> Result<Reservation, Holder> {
        let mut inner = self.locked();
        if let Some((other, _)) = inner.busy.get(vm) {
            return Err(*other);
        }
        inner.busy.insert(vm.into(), (holder, watch::Sender::new(())));
        for (_, look) in inner.looks.remove(vm).into_iter().flatten() {
            look.send_replace(Some(holder));
        }
        Ok(Reservation { all: self.clone(), vm: vm.into() })
    }

    /// Waits until no task has this VM.
    pub(crate) async fn no_task(&self, vm: &str) {
        let task = || match self.locked().busy.get(vm) {
            Some((Holder::Task(_), end)) => Some(end.subscribe()),
            _ => None,
        };
        while let Some(mut end) = task() {
            // The only change there is.
            let _closed = end.changed().await;
        }
    }

    /// Begins to look at a VM.
    /// Errors: who has it.
    pub(crate) fn begin_look(&self, vm: &str) -> Result<Looking, Holder> {
        let mut inner = self.locked();
        if let Some((holder, _)) = inner.busy.get(vm) {
            return Err(*holder);
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
    /// Waits until somebody takes the VM for himself.
    pub(crate) async fn taken(&self) -> Option<Holder> {
        let mut taken = self.taken.clone();
        // An error: it was taken, and the word with it.
        taken.wait_for(Option::is_some).await.ok().and_then(|holder| *holder)
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
        let id = Holder::Migration(Uuid::from_u128(7));
        let (one, two) = (all.begin_look("web1").unwrap(), all.begin_look("web1").unwrap());
        drop(two);
        let reserved = all.reserve("web1", id).unwrap();
        assert_eq!(one.taken().await, Some(id));
        assert_eq!(all.begin_look("web1").unwrap_err(), id);
        assert_eq!(all.reserve("web1", Holder::Task("a check")).unwrap_err(), id);
        drop(reserved);
        drop(one);
        assert!(all.begin_look("web1").is_ok());
        let inner = all.locked();
        assert!(inner.busy.is_empty() && inner.looks.is_empty());
    }

    #[tokio::test]
    async fn a_migration_can_wait_for_the_end_of_a_task() {
        let (all, check) = (Reservations::default(), Holder::Task("a check"));
        let first = all.reserve("web1", check).unwrap();
        let waiting = tokio::spawn({
            let all = all.clone();
            async move {
                all.no_task("web1").await;
                all.reserve("web1", Holder::Migration(Uuid::nil()))
            }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(first);
        let migration = waiting.await.unwrap().unwrap();
        all.no_task("web1").await;
        assert_eq!(all.reserve("web1", check).unwrap_err(), Holder::Migration(Uuid::nil()));
        drop(migration);
        all.no_task("web1").await;
    }
}
