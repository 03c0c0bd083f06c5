//! Why a destination gives up, in QEMU's own last words where it has ended.

use std::time::Duration;

use tokio::time::timeout;

use super::error::Error;
use super::state::Destination;
use crate::qemu::Life;

/// A QEMU that cannot load a guest says so and ends a moment later.
const END_SHOWS_WITHIN: Duration = Duration::from_millis(500);

impl Destination {
    /// With what QEMU said last, if that may be what it is about.
    pub(crate) async fn explained(&mut self, trouble: Error) -> Error {
        let may_be_its_end = match &trouble {
            Error::QemuGone { words, .. } => words.is_empty(),
            Error::Qmp(error) => error.is_over() || error.is_interrupted(),
            Error::Ram { .. } | Error::NotStarted { .. } => true,
            _ => false,
        };
        if !may_be_its_end {
            return trouble;
        }
        let _ = timeout(END_SHOWS_WITHIN, self.guest.qmp.process().ended()).await;
        let (life, pid) = (self.guest.qmp.process().life(), self.guest.qmp.process().pid());
        if let (Life::Ended, Some(pid)) = (life, pid) {
            let status = self.guest.started.as_mut().and_then(|started| started.exit_status());
            let words = self.guest.last_words.heard(status).await;
            return Error::QemuGone { vm: self.vm.clone(), pid, words };
        }
        match trouble {
            Error::Ram { status, error } => {
                Error::Ram { status, error: format!("{error}{}", self.guest.last_words.heard(None).await) }
            }
            other => other,
        }
    }
}
