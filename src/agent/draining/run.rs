//! A drain's one task: begins what its machine wants, once that is on the disk, waits for ends, and tells all of it.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use uuid::Uuid;

use super::follow::{Followed, Seen, Whose, follow};
use super::plan::planned;
use super::state::{DrainError, Shown};
use crate::agent::running::Agent;
use crate::api::MigrateRequest;
use crate::audit::Event;
use crate::drain::{Drain, End, GuestState, Request};
use crate::error_chain::chain;
use crate::migrate::vm_state::Here;

/// Before a record that could not be written is tried again.
const WRITE_AGAIN: Duration = Duration::from_secs(5);

/// Begins a drain. A request that is the same as that of the drain under way is that drain's.
pub(crate) async fn begin(agent: &Arc<Agent>, request: Request) -> Result<(Shown, bool), DrainError> {
    let _one_at_a_time = agent.draining.beginning.lock().await;
    if let Some(shown) = agent.draining.now().filter(|shown| shown.drain.ended_at.is_none()) {
        let same = serde_json::to_value(&shown.drain.request).ok() == serde_json::to_value(&request).ok();
        return if same { Ok((shown, false)) } else { Err(DrainError::UnderWay(shown.drain.id)) };
    }
    if agent.is_leaving() {
        return Err(DrainError::Stopping);
    }
    // What is there and cannot be understood may tell of a drain: it is not written over.
    agent.draining.record.load()?;
    // What comes from now on would be left behind.
    agent.host.set_draining(true);
    let begun = match planned(agent, request).await {
        Ok(drain) => agent.draining.record.save(&drain).map(|()| drain).map_err(DrainError::from),
        Err(e) => Err(e),
    };
    let drain = begun.inspect_err(|_| agent.host.set_draining(false))?;
    let order: Vec<_> = drain.guests.iter().map(|guest| guest.vm.as_str()).collect();
    tracing::info!(drain = %drain.id, order = order.join(", "), "this host is being emptied");
    record(agent, &drain, "begins", None);
    agent.draining.show(&drain, None);
    let shown = Shown { drain, trouble: None };
    go_on(agent);
    Ok((shown, true))
}

/// Finds what an earlier process has left. From here on no VM is received if a drain is under way.
pub(crate) fn find(agent: &Agent) {
    match agent.draining.record.load() {
        Ok(Some(drain)) => {
            agent.host.set_draining(drain.ended_at.is_none());
            agent.draining.show(&drain, None);
        }
        Ok(None) => {}
        Err(e) => tracing::error!(error = chain(&e), "no drain is gone on with; its migrations are settled"),
    }
}

/// Goes on with the drain that there is, if it has not ended. The migrations of this host are known by now.
pub(crate) fn go_on(agent: &Arc<Agent>) {
    let Some(drain) = agent.draining.under_way() else { return };
    let agent = Arc::clone(agent);
    let frozen = agent.host.freeze.begun();
    let tasks = agent.sources.clone();
    tasks.spawn(async move {
        let stopping = agent.stopping.clone();
        tokio::select! {
            biased;
            // Whoever comes next goes on with it.
            () = stopping.cancelled() => {}
            () = frozen => {}
            () = Run { agent, drain, followed: FuturesUnordered::new() }.run() => {}
        }
    });
}

/// Nothing new is begun before it is.
struct NotWritten;

struct Run {
    agent: Arc<Agent>,
    drain: Drain,
    followed: FuturesUnordered<BoxFuture<'static, (Followed, Seen)>>,
}

impl Run {
    async fn run(mut self) {
        self.follow_found();
        loop {
            let written = self.begin_wanted();
            if self.drain.is_done() {
                return self.finish().await;
            }
            let agent = Arc::clone(&self.agent);
            tokio::select! {
                () = agent.draining.cancelled(self.drain.id), if !self.drain.cancelled => self.cancel(),
                () = tokio::time::sleep(WRITE_AGAIN), if written.is_err() => {}
                Some((followed, seen)) = self.followed.next() => self.seen(followed, seen),
            }
        }
    }

    /// What an earlier process waited for.
    fn follow_found(&mut self) {
        let open = self.drain.guests.iter().filter_map(|guest| {
            let whose = match &guest.state {
                GuestState::Busy { .. } => Whose::Another,
                GuestState::Moving { .. } => Whose::Found,
                GuestState::Undecided { .. } => Whose::Undecided,
                _ => return None,
            };
            Some(Followed { vm: guest.vm.clone(), ran: guest.ran, migration: guest.migration()?, whose })
        });
        let open: Vec<_> = open.collect();
        open.into_iter().for_each(|followed| self.follow(followed));
    }

    fn follow(&self, followed: Followed) {
        self.followed.push(Box::pin(follow(Arc::clone(&self.agent), followed)));
    }

    /// Begins all that is wanted now.
    fn begin_wanted(&mut self) -> Result<(), NotWritten> {
        while let Some(wanted) = self.drain.wanted() {
            let (vm, peer, migration) = (wanted.vm.to_owned(), wanted.peer.to_owned(), Uuid::new_v4());
            let mut next = self.drain.clone();
            if !next.begin(&vm, &peer, migration) {
                break;
            }
            // On the disk before it begins: whoever comes next knows whose it is.
            if let Err(e) = self.agent.draining.record.save(&next) {
                self.agent.draining.show(&self.drain, Some(chain(&e)));
                tracing::error!(
                    error = chain(&e),
                    "the drain begins nothing until its record can be written"
                );
                return Err(NotWritten);
            }
            self.drain = next;
            record(&self.agent, &self.drain, "moves", Some((&vm, &peer, migration)));
            tracing::info!(drain = %self.drain.id, vm, peer, %migration, "the drain moves a VM");
            let ran = self.drain.guests.iter().any(|guest| guest.vm == vm && guest.ran);
            let options = self.drain.request.options.clone();
            let request = MigrateRequest { vm: vm.clone(), to: peer, options };
            if self.agent.migrate_as(migration, request).is_none() {
                // This process is at its end; the next one finds that it never began.
                break;
            }
            self.follow(Followed { vm, ran, migration, whose: Whose::Ours });
            self.agent.draining.show(&self.drain, None);
        }
        Ok(())
    }

    fn seen(&mut self, followed: Followed, seen: Seen) {
        let Followed { vm, migration, .. } = &followed;
        match seen {
            Seen::Freed(freed) => self.drain.freed(*migration, freed),
            Seen::Ended(end) => {
                match &end {
                    End::Stayed { cause, after } => {
                        tracing::warn!(drain = %self.drain.id, vm, %migration, cause, ?after, "a VM was not moved");
                    }
                    End::Undecided { .. } => {
                        self.follow(Followed { whose: Whose::Undecided, ..followed.clone() });
                    }
                    End::Moved { .. } => {}
                }
                self.drain.ended(*migration, end);
            }
        }
        self.keep();
    }

    fn cancel(&mut self) {
        tracing::info!(drain = %self.drain.id, "the drain is cancelled");
        record(&self.agent, &self.drain, "cancelled", None);
        let moving = self.drain.cancel();
        self.keep();
        for migration in moving {
            // What is handed over already arrives.
            let _ = self.agent.registry.cancel(migration);
        }
    }

    /// Writes what is known now. What is not written is found out again by the next process: the journals know it.
    fn keep(&self) {
        let saved = self.agent.draining.record.save(&self.drain);
        let trouble = saved.err().map(|e| chain(&e));
        if let Some(error) = &trouble {
            tracing::error!(error, "the record of the drain is older than the drain");
        }
        self.agent.draining.show(&self.drain, trouble);
    }

    async fn finish(mut self) {
        let states = self.agent.vm_states.look_anew(&self.agent.host).await;
        let is_here = |here| {
            matches!(here, Here::Runs | Here::Holds | Here::NotBegun | Here::InMigration | Here::Unknown)
        };
        let here = states.into_iter().filter(|state| is_here(state.here)).map(|state| state.vm);
        self.drain.here_at_end = here.collect();
        self.drain.ended_at = Some(time::OffsetDateTime::now_utc().unix_timestamp());
        while let Err(e) = self.agent.draining.record.save(&self.drain) {
            let shown = Drain { ended_at: None, ..self.drain.clone() };
            self.agent.draining.show(&shown, Some(chain(&e)));
            tracing::error!(error = chain(&e), "the end of the drain cannot be written; it is tried again");
            tokio::time::sleep(WRITE_AGAIN).await;
        }
        self.agent.host.set_draining(false);
        let moved = self.drain.count(|state| matches!(state, GuestState::Moved { .. }));
        let left = self.drain.here_at_end.join(", ");
        let drain = self.drain.id;
        match left.as_str() {
            "" => tracing::info!(%drain, moved, "the drain has ended: this host is empty"),
            left => tracing::warn!(%drain, moved, left, "the drain has ended: this host is not empty"),
        }
        record(&self.agent, &self.drain, "ends", None);
        self.agent.draining.show(&self.drain, None);
        self.agent.metrics.drain.count_end(&self.drain);
    }
}

/// A line of the audit record.
fn record(agent: &Agent, drain: &Drain, step: &'static str, moved: Option<(&str, &str, Uuid)>) {
    let (vm, peer, migration) = match moved {
        Some((vm, peer, migration)) => (Some(vm.to_owned()), Some(peer.to_owned()), Some(migration)),
        None => (None, None, None),
    };
    agent.host.audit.record(Event::Drain { drain: drain.id, step, vm, peer, migration });
}
