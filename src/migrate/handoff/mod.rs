//! Hand-off: migrations stop between two steps, are left to another process of the agent as plain data,
//! and are taken up there where they were.
//!
//! A migration stops only while it waits: for the copy to get on, for an answer, for the other
//! side. Each phase can be begun again: it looks at what is there already. What happened in QEMU
//! while nobody listened is asked for. From the hand-over of its guest on nothing is left but the
//! journal, which has all that settling needs.

pub(crate) mod state;
pub(crate) mod taken_up;

pub use state::FrozenMigrations;
pub use taken_up::TakenUp;

use std::sync::Arc;

use super::host::Host;
use super::{destination, settle, source};
use crate::net::identity::Identity;
use crate::net::stream_owner::{Descriptors, ThawedStreams};

/// What has been left by migrations that have stopped, once their sessions have, too.
pub fn settle_stopped(host: &Host, fds: &mut Descriptors) -> FrozenMigrations {
    let mut left = FrozenMigrations::default();
    host.freeze.take_all().into_iter().for_each(|stopped| stopped.settle(&mut left, fds));
    left
}

/// Takes up what an earlier process has left. What cannot be taken up is logged; its journal is
/// open, and is settled as after a crash. QEMU is not asked yet: its main loop may hang on a stream
/// that moves only when peers can reach us again.
pub fn take_up(
    host: &Arc<Host>,
    left: FrozenMigrations,
    streams: &mut ThawedStreams,
    fds: &mut Descriptors,
) -> Vec<TakenUp> {
    let mut taken = Vec::new();
    let mut note = |vm: String, id, one: Result<TakenUp, String>| match one {
        Ok(one) => taken.push(one),
        Err(why) => tracing::error!(vm, migration = %id, why, "not taken up; its journal is settled"),
    };
    // The configuration may be another one than that under which it began.
    for frozen in left.sources {
        let (vm, id) = (frozen.vm.clone(), frozen.id);
        let may = host.may_go(&vm, &frozen.peer).map_err(|p| p.to_string());
        note(vm, id, may.and_then(|()| source::handoff::take_up(host, frozen, streams, fds)));
    }
    for frozen in left.destinations {
        let (vm, id) = (frozen.vm.clone(), frozen.id);
        let may = may_come(host, &frozen.vm, &frozen.peer);
        note(vm, id, may.and_then(|()| destination::handoff::take_up(host, frozen, streams, fds)));
    }
    for frozen in left.waiting {
        note(frozen.vm.clone(), frozen.id, source::handoff::take_up_wait(host, frozen));
    }
    taken
}

fn may_come(host: &Host, vm: &str, peer: &str) -> Result<(), String> {
    let peer: Identity = peer.parse().map_err(|e| format!("{e}"))?;
    host.vm_from(&peer, vm).map(drop).map_err(|p| p.to_string())
}

/// Runs a migration that was taken up to its end. One whose QEMU cannot be reached any more is settled by
/// its journal.
pub async fn go_on(host: &Arc<Host>, taken: TakenUp) {
    let TakenUp { progress, journal, running, .. } = taken;
    running.await;
    if progress.now().outcome.is_none()
        && !host.freeze.is_on()
        && let Some(open) = settle::reopen(host, journal, progress)
    {
        settle::settle(Arc::clone(host), open).await;
    }
}
