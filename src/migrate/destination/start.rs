//! The guest's start at its destination.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::error::Error;
use super::state::Destination;
use crate::migrate::guest::before_start::{self, Turn};
use crate::migrate::handover::Ran;
use crate::migrate::model::phase::Phase;
use crate::migrate::protocol::message::Started;
use crate::qemu::{Cont, QmpError, QueryStatus, RunState};

/// How long the guest may take to run after `cont`.
const RUNNING_DEADLINE: Duration = Duration::from_secs(15);
/// Between two looks at a guest that was told to run.
const LOOK_EVERY: Duration = Duration::from_millis(10);

impl Destination {
    /// The guest's start, once `starting` is on the disk.
    pub(super) async fn start_guest(&mut self) -> (Ran, Option<Error>) {
        self.enter(Phase::HandOver);
        let mut warnings = Vec::new();
        let hook_ms = self.run_hook(&mut warnings).await;
        // Whoever asks has looked a moment ago, if no hook has run and no witness was asked since.
        let looked = self.serving.asked && hook_ms.is_none() && self.journal.past().witness.is_none();
        let mut stands = None;
        let (ran, trouble) = self.let_run(looked, &mut stands).await;
        if trouble.is_none() {
            self.host.replicas.guest_is_here(&self.vm);
            self.enter(Phase::Confirm);
            match &stands {
                None if self.journal.past().running() => tracing::info!(vm = self.vm, "the guest runs here"),
                None => tracing::info!(vm = self.vm, "the guest is here and stays paused"),
                Some(why) => tracing::warn!(vm = self.vm, why, "the guest is here and does not run"),
            }
            self.said_started = Some(Started { hook_ms, warnings, stands });
        }
        (ran, trouble)
    }

    async fn let_run(&mut self, looked: bool, stands: &mut Option<String>) -> (Ran, Option<Error>) {
        // Also of a guest that stays paused: it must be there.
        if !looked && let Err(e) = self.guest.qmp.execute(QueryStatus).await {
            return (Ran::No, Some(e.into()));
        }
        if !self.journal.past().running() {
            return (Ran::Yes, None);
        }
        let mut told = self.guest.qmp.execute(Cont).await;
        while told.as_ref().is_err_and(QmpError::is_interrupted) {
            // Whether it was heard is asked; if it was not, the guest is ours to start all the same.
            told = match self.guest.qmp.execute(QueryStatus).await {
                Ok(info) if info.status == RunState::Paused => self.guest.qmp.execute(Cont).await,
                Ok(_) => break,
                Err(e) => Err(e),
            };
        }
        match told {
            Err(e) if e.is_interrupted() => {}
            Err(source) if source.desc().is_some() => {
                return (Ran::No, Some(Error::NotStarted { vm: self.vm.clone(), source }));
            }
            Err(e) => return (Ran::Perhaps, Some(e.into())),
            Ok(_) => {}
        }
        match self.wait_running().await {
            Ok(why) => {
                *stands = why;
                (Ran::Yes, None)
            }
            Err(e) => (Ran::Perhaps, Some(e)),
        }
    }

    async fn run_hook(&self, warnings: &mut Vec<String>) -> Option<u64> {
        let since = Instant::now();
        let ran = before_start::run(&self.host.config, &self.vm, Turn::First).await;
        if ran == Ok(false) {
            return None;
        }
        warnings.extend(ran.err());
        Some(since.elapsed().as_millis() as u64)
    }

    /// In which state it is instead when QEMU does not say that the guest runs.
    async fn wait_running(&self) -> Result<Option<String>, Error> {
        let until = Instant::now() + RUNNING_DEADLINE;
        loop {
            let info = self.guest.qmp.execute(QueryStatus).await?;
            if info.running {
                return Ok(None);
            }
            if has_run(&info.status) || Instant::now() > until {
                return Ok(Some(format!("VM {} was started and is in state {}", self.vm, info.status)));
            }
            sleep(LOOK_EVERY).await;
        }
    }
}

/// Whether a guest that was told to run, and does not, has come to that state by running.
fn has_run(state: &RunState) -> bool {
    use RunState::{Debug, GuestPanicked, InternalError, IoError, Shutdown, Suspended, Watchdog};
    matches!(state, Debug | GuestPanicked | InternalError | IoError | Shutdown | Suspended | Watchdog)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_is_off_or_asleep_already_is_not_waited_for() {
        for state in [RunState::Suspended, RunState::Shutdown, RunState::GuestPanicked, RunState::IoError] {
            assert!(has_run(&state), "{state}");
        }
        for state in [RunState::Paused, RunState::InMigrate, RunState::Other("of-tomorrow".into())] {
            assert!(!has_run(&state), "{state}");
        }
    }
}
