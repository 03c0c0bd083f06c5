//! Exports of a guest's disks that are still open after it has arrived: a restart at the wrong moment
//! left them so, in versions before this one. The guest cannot be moved on with them, and whoever has
//! the socket can write to its disks.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::time::timeout;

use super::ask::QEMU_DEADLINE;
use crate::migrate::guest::process;
use crate::migrate::host::Host;
use crate::migrate::journal::{Past, Role, Undo};
use crate::migrate::model::problem::chain;
use crate::qemu::{DestinationLeftovers, QueryBlockExports, destination_cleanup};

/// Closes those of which the last journal of a VM tells. `pasts` are all journals, newest last.
pub(crate) async fn close_exports(host: &Arc<Host>, pasts: &[Past]) {
    let mut seen = BTreeSet::new();
    let newest = pasts.iter().rev().filter(|past| seen.insert(past.header.vm.as_str()));
    for past in newest.filter(|past| has_arrived(past)) {
        if let Err(why) = close(host, past).await {
            tracing::warn!(vm = past.header.vm, why, "whether exports of its disks are open is not known");
        }
    }
}

fn has_arrived(past: &Past) -> bool {
    past.header.role == Role::Destination && past.has_moved() && past.undo.contains(&Undo::NbdServer)
}

async fn close(host: &Arc<Host>, past: &Past) -> Result<(), String> {
    let Some(config) = host.config.vm(&past.header.vm) else { return Ok(()) };
    // Nothing else may happen to that VM meanwhile; a migration would find them.
    let Ok(_reservation) = host.reserve(&past.header.vm, past.header.migration) else { return Ok(()) };
    let (qmp, _events) = match timeout(QEMU_DEADLINE * 5, process::connect(&config)).await {
        Ok(Ok(reached)) => reached,
        Ok(Err(e)) if e.is_not_listening() => return Ok(()),
        Ok(Err(e)) => return Err(chain(&e)),
        Err(_) => return Err("its monitor does not answer".into()),
    };
    if !past.is_of(qmp.process()) {
        return Ok(());
    }
    let open = qmp.execute(QueryBlockExports).await.map_err(|e| chain(&e))?;
    let ours = |id: &String| past.undo.contains(&Undo::Export(id.clone()));
    let exports: Vec<String> = open.into_iter().map(|export| export.id).filter(ours).collect();
    if exports.is_empty() {
        return Ok(());
    }
    tracing::warn!(
        vm = past.header.vm,
        ?exports,
        "exports of an earlier migration are still open; they are closed"
    );
    let left = DestinationLeftovers { nbd_server: true, exports, ..DestinationLeftovers::default() };
    match destination_cleanup(&qmp, &left).await.left.first() {
        None => Ok(()),
        Some(left) => Err(format!("{left}: {}", chain(&left.source))),
    }
}
