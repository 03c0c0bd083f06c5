//! A replica of a VM's disks at a peer: brought into step by a run of its own, and used by a migration.
//!
//! A run is a migration that ends before the RAM: its disks are copied as ever, and then the destination is told to
//! give up, which it does by its journal. So no guest of it can ever run there. What a replica needs beyond that is
//! this: dirty bitmaps that stay in the source's QEMU, and a record on each host. Why what they say is enough is
//! what `transfer/disk/delta.rs` says of tries.
//!
//! What the record promises is true at each moment. It is written before anything is copied, and says then that the
//! disks which are copied whole are in step no more; it says that they are in step when their copies have ended. A
//! bitmap loses its bits only when all of them are at the destination, flushed. And the record names the run or
//! migration that last had these images, whose end the destination compares them with: whoever writes to them in
//! any other way makes a whole copy of the next run.

use super::failure::Failure;
use super::state::Source;
use crate::migrate::host::Host;
use crate::migrate::model::problem::chain;
use crate::migrate::model::replica::{ReplicaDisk, SourceReplica};
use crate::migrate::transfer::disk::bitmaps::Bitmaps;
use crate::migrate::transfer::disk::tracking::{Followed, Tracking};
use crate::net::identity::Identity;
use crate::qemu::Process;

/// What is known of the VM's replica at that peer, if there is one, or is to be (`replicates`).
pub(crate) fn known(
    host: &Host,
    (vm, peer): (&str, &Identity),
    replicates: bool,
    qemu: &Process,
) -> Tracking {
    let Some(replica) = host.replicas.source(vm, peer.as_str()) else {
        let replica = replicates.then(|| SourceReplica::new(vm, peer.as_str(), now()));
        return Tracking { replica, ..Tracking::default() };
    };
    if replica.qemu.is_none() || replica.qemu.as_ref() != qemu.id() {
        let stale = match (&replica.qemu, qemu.id()) {
            (Some(_), Some(_)) => {
                "the VM's QEMU was started since, and what recorded its changes has gone with the one before"
            }
            _ => "it is not known whether the VM's QEMU is the one that recorded its changes",
        };
        // Its images may be there: they are copied to.
        let replica = replicates.then_some(SourceReplica { disks: Vec::new(), ..replica });
        return Tracking { replica, stale: Some(stale.into()), ..Tracking::default() };
    }
    let followed = |one: &ReplicaDisk| {
        let bitmaps = Bitmaps::replica(&one.disk.node_name, replica.id);
        (one.disk.name.clone(), Followed::new(&one.disk, bitmaps, one.in_step))
    };
    Tracking {
        disks: replica.disks.iter().map(followed).collect(),
        after: replica.after,
        replica: Some(replica),
        stale: None,
    }
}

pub(super) fn now() -> i64 {
    time::OffsetDateTime::now_utc().unix_timestamp()
}

/// Writes down what is true of the replica from now on, if there is one.
pub(crate) fn remember(source: &mut Source) -> Result<(), Failure> {
    let Source { copy, context, guest, .. } = source;
    let tracking = &mut copy.tracking;
    let Some(replica) = &mut tracking.replica else { return Ok(()) };
    let followed = &tracking.disks;
    let in_step = |name: &str| followed.get(name).is_some_and(|f| f.in_step && f.bitmaps.is_replicas());
    if context.request.options.replicate {
        replica.qemu = guest.qmp.process().id().cloned();
        let disks = copy.plan.disks.iter().map(|plan| plan.disk.clone());
        replica.disks = disks.map(|disk| ReplicaDisk { in_step: in_step(&disk.name), disk }).collect();
    } else {
        for one in &mut replica.disks {
            one.in_step &= in_step(&one.disk.name);
        }
    }
    replica.after = tracking.after;
    Ok(context.host.replicas.remember(replica)?)
}

/// The same of one that failed, which may have come further than its record says.
pub(crate) fn remember_late(source: &mut Source) {
    if let Err(e) = remember(source) {
        tracing::warn!(error = chain(&e), "the next run of the replica copies whole disks");
    }
}

/// The guest has moved to where its replica was: there is none any more.
pub(crate) async fn became_the_guests(source: &Source) -> Vec<String> {
    let Source { context, copy, guest, journal, .. } = source;
    let header = &journal.past().header;
    let mut left = Vec::new();
    // Else they go with that QEMU.
    if let Some(replica) = copy.tracking.replica.as_ref().filter(|_| context.request.options.keep_source) {
        for one in &replica.disks {
            let bitmaps = Bitmaps::replica(&one.disk.node_name, replica.id);
            if let Err(e) = bitmaps.end(&guest.qmp).await {
                left.push(format!("dirty bitmaps of a replica in the source's QEMU: {}", chain(&e)));
            }
        }
    }
    if let Err(e) = context.host.replicas.forget_source(&header.vm, &header.peer) {
        left.push(chain(&e));
    }
    left
}
