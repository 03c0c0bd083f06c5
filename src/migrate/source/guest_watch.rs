//! The guest's watch: what the guest and others at its QEMU do while a migration is under way, and
//! whether the guest is to run where it ends up.
//!
//! QEMU's events only say that something happened; what it comes to is asked (`query-status`). A
//! guest that somebody has paused arrives paused, and stays paused when the migration is rolled
//! back. What is known of that is in the journal before anybody acts on it, at both sides.
//!
//! Not seen, because QEMU does not show it: a `stop` while the guest stands still for the
//! switchover, or in the instant before. It has no effect there.

use tokio::time::Instant;

use super::Source;
use super::failure::Failure;
use crate::migrate::guest::inventory::Inventory;
use crate::migrate::journal::Record;
use crate::migrate::model::meanwhile::{Meanwhile, Standing};
use crate::migrate::model::phase::Phase;
use crate::migrate::model::problem::chain;
use crate::migrate::protocol::message::Request;
use crate::qemu::{EventKind, IoStatus, MigrationStatus, QueryBlock, QueryStatus, RunState};

/// How long the destination may take to write down whether the guest is to run.
const NOTED_WITHIN: std::time::Duration = std::time::Duration::from_secs(30);

impl Source {
    /// What an event of QEMU's means, in every phase that waits.
    pub(crate) async fn on_guest_event(&mut self, event: &EventKind) -> Result<(), Failure> {
        if let Some(meanwhile) = Meanwhile::told_by(event) {
            return Err(meanwhile.into());
        }
        // From the pause for the switchover on, nobody can continue the guest but QEMU.
        let may_change = self.phase < Phase::Switchover;
        match event {
            EventKind::Migration { status: MigrationStatus::Failed } => Err(self.ram_failed().await),
            EventKind::Stop if may_change => self.on_stop().await,
            EventKind::Resume | EventKind::Suspend | EventKind::Wakeup if may_change => {
                self.look_at_guest().await.map(drop)
            }
            EventKind::GuestPanicked => {
                self.say("the guest has panicked at the source".into());
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// The guest stands still: for the switchover, by somebody's will, or because it must.
    async fn on_stop(&mut self) -> Result<(), Failure> {
        let before = self.paused_at;
        // While QEMU is asked it counts as paused: only so long is a lost connection waited for.
        self.paused_at.get_or_insert_with(Instant::now);
        let standing = self.look_at_guest().await;
        match standing {
            Ok(Standing::Passing) if self.phase == Phase::Precopy => self.guest_stands_still(),
            _ => self.paused_at = before,
        }
        standing.map(drop)
    }

    /// The same, when nobody has listened to QEMU for a while.
    pub(crate) async fn look_if_missed(&mut self) -> Result<(), Failure> {
        match self.missed_events {
            true => self.look_at_guest().await.map(drop),
            false => Ok(()),
        }
    }

    /// Asks QEMU how the guest is, and takes note if somebody has paused or continued it.
    pub(crate) async fn look_at_guest(&mut self) -> Result<Standing, Failure> {
        let state = self.query(QueryStatus).await?.status;
        let standing = Standing::of(&state);
        match standing {
            Standing::Runs => self.is_to_run(true)?,
            Standing::Paused => self.is_to_run(false)?,
            Standing::Passing => {}
            Standing::Fell => return Err(self.fell(state).await.into()),
        }
        Ok(standing)
    }

    /// Takes note of whether the guest is to run where it ends up: durably, because a restarted
    /// agent must not resume a guest that somebody has paused.
    fn is_to_run(&mut self, running: bool) -> Result<(), Failure> {
        if self.journal.past().running() == running {
            return Ok(());
        }
        self.journal.record(Record::ToRun { running })?;
        self.progress.update(|p| p.paused = !running);
        let vm = &self.request.vm;
        self.say(match running {
            true => format!("somebody continued VM {vm} at the source: it is to run where it ends up"),
            false => format!("somebody paused VM {vm} at the source: it stays paused where it ends up"),
        });
        Ok(())
    }

    async fn fell(&self, state: RunState) -> Meanwhile {
        if state != RunState::IoError {
            return Meanwhile::Fell { state, failing: Vec::new() };
        }
        let blocks = self.query(QueryBlock).await.unwrap_or_default();
        let failing = blocks.into_iter().filter_map(|block| {
            let why = match block.io_status? {
                IoStatus::Ok => return None,
                IoStatus::NoSpace => " (no space left)",
                _ => "",
            };
            let node = block.inserted.map(|i| i.node_name);
            let ours = self.disks.iter().find(|d| Some(&d.node_name) == node.as_ref());
            let name = ours.map_or(block.qdev, |d| format!("disk {}", d.name));
            Some(format!("{name}{why}"))
        });
        Meanwhile::Fell { state, failing: failing.collect() }
    }

    /// That the machine is still the one of the plan.
    pub(crate) async fn is_as_planned(&mut self) -> Result<(), Failure> {
        let found = match &self.inventory {
            Some(inventory) => self.patience().with(inventory.unchanged(&self.qmp)).await?,
            // Of an earlier version of this agent: what it was is not known.
            None => {
                self.inventory = Some(self.patience().with(Inventory::of(&self.qmp)).await?);
                None
            }
        };
        found.map_or(Ok(()), |meanwhile| Err(meanwhile.into()))
    }

    /// Tells the destination whether the guest is to run there, if that has changed since the offer.
    /// It is durable there before the disks are given up here.
    pub(crate) async fn tell_whether_it_runs(&mut self) -> Result<(), Failure> {
        match self.journal.past().to_run {
            Some(running) => self.demand(Request::ToRun { running }, NOTED_WITHIN).await,
            None => Ok(()),
        }
    }

    /// The failure that explains this one, if QEMU has said so meanwhile; with its words.
    pub(crate) async fn overruled(&mut self, failure: Failure, cause: String) -> (Failure, String) {
        let is_own_decision = matches!(
            failure,
            Failure::Cancelled
                | Failure::Stopping
                | Failure::Frozen
                | Failure::Meanwhile(_)
                | Failure::Problems(_)
        );
        if is_own_decision {
            return (failure, cause);
        }
        let mut told = None;
        while let Some(event) = self.events.try_recv() {
            told = told.or_else(|| Meanwhile::told_by(&event.kind));
        }
        let told = match told {
            Some(told) => Some(told.into()),
            None => self.is_our_qemus(&failure).await,
        };
        match told {
            Some(failure) => {
                tracing::info!(first = cause, "what failed first is explained by what QEMU says");
                let cause = chain(&failure);
                (failure, cause)
            }
            None => (failure, cause),
        }
    }

    fn say(&self, text: String) {
        tracing::info!("{text}");
        self.progress.update(|p| p.notes.push(text));
    }
}
