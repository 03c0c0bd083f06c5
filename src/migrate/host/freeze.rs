//! Whether everything stops for another process to take it up, and what has stopped.

use std::sync::{Mutex, PoisonError};

use tokio::sync::watch;

use crate::migrate::handoff::state::Stopped;

/// The word to stop, and those that have.
#[derive(Debug)]
pub(crate) struct Freeze {
    is_on: watch::Sender<bool>,
    stopped: Mutex<Vec<Stopped>>,
}

impl Freeze {
    pub(super) fn new() -> Self {
        Self { is_on: watch::Sender::new(false), stopped: Mutex::default() }
    }

    /// Asks all migrations to stop where they are, or to go on with what they have not begun.
    pub(crate) fn set(&self, is_on: bool) {
        self.is_on.send_replace(is_on);
    }

    /// Whether migrations are to stop.
    pub(crate) fn is_on(&self) -> bool {
        *self.is_on.borrow()
    }

    /// Waits until migrations are to stop.
    pub(crate) fn begun(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut is_on = self.is_on.subscribe();
        async move {
            if is_on.wait_for(|is_on| *is_on).await.is_err() {
                // The host is gone, and with it whoever could ask.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Waits until they are to go on: nobody has taken them over.
    pub(crate) async fn taken_back(&self) {
        let mut is_on = self.is_on.subscribe();
        if is_on.wait_for(|is_on| !is_on).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// A migration has stopped.
    pub(crate) fn add(&self, stopped: Stopped) {
        self.stopped.lock().unwrap_or_else(PoisonError::into_inner).push(stopped);
    }

    pub(crate) fn take_all(&self) -> Vec<Stopped> {
        std::mem::take(&mut *self.stopped.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
