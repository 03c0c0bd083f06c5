//! The guest's start at its destination: the record before, `cont`, the word after.

use tokio::time::Instant;

use super::error::Trouble;
use super::{Destination, RUNNING_DEADLINE};
use crate::migrate::guest::process;
use crate::migrate::handover::{Ask, DestinationEffect, DestinationInput, DestinationState, Ran};
use crate::migrate::host::decisions::{Decision, Order};
use crate::migrate::journal::JournalError;
use crate::migrate::model::phase::Phase;
use crate::migrate::model::problem::chain;
use crate::migrate::protocol::message::Started;
use crate::migrate::protocol::server::Control;
use crate::migrate::{decide, source};
use crate::qemu::{Cont, QmpError, QueryStatus, RunState};

impl Destination {
    /// The guest is ours from the record on, unless its QEMU turns out to be gone before it was
    /// told to run it: then it surely never ran here.
    pub(crate) async fn start_guest(&mut self, control: &mut Control) -> Result<(), Trouble> {
        self.qmp.execute(QueryStatus).await?;
        let effects = self.handover.step(DestinationInput::Asked(Ask::Start))?;
        if let Some(error) = self.write(effects) {
            return Err(error.into());
        }
        self.run_guest(Some(control)).await
    }

    /// An operator decides while the source is away.
    pub(crate) async fn obey(&mut self, order: Order) -> Result<(), Trouble> {
        let Some(order) = order.claim() else { return Ok(()) };
        tracing::warn!(vm = self.vm, uid = order.uid, side = ?order.side, "an operator decides whose the guest is");
        let effects = match self.handover.step(DestinationInput::Forced(order.side)) {
            Ok(effects) => effects,
            Err(e) => {
                order.answer(Decision::Refused(chain(&e)));
                return Ok(());
            }
        };
        let (handover, journal) = (&mut self.handover, &mut self.journal);
        let (_, error) = decide::write_destination(handover, journal, effects, order.uid);
        let state = self.handover.state();
        let here = matches!(state, DestinationState::Starting { .. });
        order.answer(match state {
            // Nothing leads back from here, and a restart goes on with it.
            DestinationState::GivingUp { .. } => Decision::Unknown(
                "the guest is being given up here; the disk has not taken the record of it yet, which is \
                 tried every second"
                    .into(),
            ),
            _ => decide::decision(here || state == DestinationState::NeverRan, &self.journal, error),
        });
        match here {
            true => self.run_guest(None).await,
            false if matches!(state, DestinationState::Waiting { .. }) => Ok(()),
            false => Err(Trouble::Forced),
        }
    }

    /// The guest's start, once `starting` is on the disk.
    async fn run_guest(&mut self, control: Option<&mut Control>) -> Result<(), Trouble> {
        self.enter(Phase::HandOver);
        let mut warnings = Vec::new();
        let hook_ms = self.run_hook(&mut warnings).await;
        // Whoever asks has looked a moment ago, if no hook has run since.
        let looked = control.is_some() && hook_ms.is_none();
        let (ran, trouble) = self.let_run(looked, &mut warnings).await;
        let effects = self.handover.step(DestinationInput::Ran(ran))?;
        if let Some(trouble) = trouble {
            self.write(effects);
            return Err(trouble);
        }
        self.enter(Phase::Confirm);
        tracing::info!(vm = self.vm, "the guest runs here");
        // Said before it is written: `starting` is on the disk, and says the same after a crash.
        self.said_started = Some(Started { hook_ms, warnings });
        if let Some(control) = control {
            control.answer(self.word()).await;
        }
        self.write(effects);
        Ok(())
    }

    /// Writes the records of these effects, and of those that follow from them. The rest is done
    /// where the guest's start or end is.
    pub(crate) fn write(&mut self, effects: Vec<DestinationEffect>) -> Option<JournalError> {
        let effects = effects.into_iter().filter(|e| matches!(e, DestinationEffect::Write(_))).collect();
        decide::write_destination(&mut self.handover, &mut self.journal, effects, None).1
    }

    async fn let_run(&mut self, looked: bool, warnings: &mut Vec<String>) -> (Ran, Option<Trouble>) {
        // Also of a guest that stays paused: it must be there.
        if !looked && let Err(e) = self.qmp.execute(QueryStatus).await {
            return (Ran::No, Some(e.into()));
        }
        if !self.journal.past().running() {
            return (Ran::Yes, None);
        }
        let mut told = self.qmp.execute(Cont).await;
        while told.as_ref().is_err_and(QmpError::is_interrupted) {
            // Whether it was heard is asked; if it was not, the guest is ours to start all the same.
            told = match self.qmp.execute(QueryStatus).await {
                Ok(info) if info.status == RunState::Paused => self.qmp.execute(Cont).await,
                Ok(_) => break,
                Err(e) => Err(e),
            };
        }
        match told {
            Err(e) if e.is_interrupted() => {}
            Err(source) if source.desc().is_some() => {
                return (Ran::No, Some(Trouble::NotStarted { vm: self.vm.clone(), source }));
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
        let hook = &self.host.config.vms.get(&self.vm)?.before_start;
        if hook.is_empty() {
            return None;
        }
        let since = Instant::now();
        let ran = process::run_hook(hook, &self.vm, self.host.config.deadlines.hook()).await;
        warnings.extend(ran.err());
        Some(since.elapsed().as_millis() as u64)
    }

    /// A warning when QEMU does not say that the guest runs.
    async fn wait_running(&self) -> Result<Option<String>, Trouble> {
        let until = Instant::now() + RUNNING_DEADLINE;
        loop {
            let info = self.qmp.execute(QueryStatus).await?;
            if info.running {
                return Ok(None);
            }
            if Instant::now() > until {
                return Ok(Some(format!("VM {} was started and is in state {}", self.vm, info.status)));
            }
            source::pause().await;
        }
    }
}
