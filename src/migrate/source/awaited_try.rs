//! A further try that is waited for, by this process or by the next.

use std::time::Duration;

use uuid::Uuid;

use super::context::Context;
use super::further_try::Held;
use crate::migrate::handoff::state::{FrozenHeld, FrozenWait, Stopped};
use crate::migrate::model::options::Options;
use crate::migrate::model::progress::Outcome;
use crate::migrate::transfer::bandwidth::Wish;

/// A further try that is waited for.
#[derive(Debug)]
pub(crate) struct AwaitedTry {
    pub(crate) first: Uuid,
    pub(crate) number: u32,
    /// How the one before ended.
    pub(crate) failed: Outcome,
    /// What that one has left for it.
    pub(crate) held: Option<Held>,
    pub(crate) wait: Duration,
}

impl AwaitedTry {
    /// Leaves it to the next process.
    pub(crate) fn leave(self, context: &Context) {
        let Context { host, request, progress, .. } = context;
        let AwaitedTry { first, number, failed, held, wait } = self;
        tracing::info!(vm = request.vm, number, "the wait for a further try is left to the next process");
        let Wish { limit_bytes_per_s, weight } = request.share.wish();
        host.freeze.add(Stopped::Waiting(Box::new(FrozenWait {
            id: first,
            vm: request.vm.clone(),
            peer: request.peer.clone(),
            options: Options { limit_bytes_per_s, weight, ..request.options.clone() },
            progress: progress.now(),
            number,
            failed,
            held: held.map(|held| FrozenHeld {
                migration: held.journal.past().header.migration,
                outcome: held.outcome,
                tracking: held.tracking,
            }),
            wait,
        })));
    }
}
