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
        // Whoever asks has looked a moment ago, if no hook has run since.
        let looked = self.serving.asked && hook_ms.is_none();
        let (ran, trouble) = self.let_run(looked, &mut warnings).await;
        if trouble.is_none() {
            self.host.replicas.guest_is_here(&self.vm);
            self.enter(Phase::Confirm);
            tracing::info!(vm = self.vm, "the guest runs here");
            self.said_started = Some(Started { hook_ms, warnings });
        }
        (ran, trouble)
    }

    async fn let_run(&mut self, looked: bool, warnings: &mut Vec<String>) -> (Ran, Option<Error>) {
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
            Ok(warning) => {
                warnings.extend(warning);
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

    /// A warning when QEMU does not say that the guest runs.
    async fn wait_running(&self) -> Result<Option<String>, Error> {
        let until = Instant::now() + RUNNING_DEADLINE;
        loop {
            let info = self.guest.qmp.execute(QueryStatus).await?;
            if info.running {
                return Ok(None);
            }
            if Instant::now() > until {
                return Ok(Some(format!("VM {} was started and is in state {}", self.vm, info.status)));
            }
            sleep(LOOK_EVERY).await;
        }
    }
}
