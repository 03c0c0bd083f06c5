//! What of vmferry is still inside a QEMU: the proof that a clean-up was complete.

use super::client::Qmp;
use super::commands::{
    BlockExportInfo, NbdServerStart, NbdServerStop, QueryBlockExports, QueryJobs, QueryNamedBlockNodes,
};
use super::error::QmpError;
use super::names;

/// The things in a QEMU that bear our names. Descriptors can't be asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Leftovers {
    pub jobs: Vec<String>,
    pub exports: Vec<String>,
    pub nodes: Vec<String>,
    /// Dirty bitmaps, with their nodes.
    pub bitmaps: Vec<(String, String)>,
    /// The process has an NBD server, ours or another.
    pub nbd_server: bool,
}

impl Leftovers {
    /// Nothing is left.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Asks what is left. Changes nothing.
pub async fn leftovers(qmp: &Qmp) -> Result<Leftovers, QmpError> {
    let ours = |name: &String| names::is_ours(name);
    let jobs = qmp.execute(QueryJobs).await?;
    let exports = block_exports(qmp).await?;
    let nodes = qmp.execute(QueryNamedBlockNodes { flat: true }).await?;
    let bitmaps = nodes.iter().flat_map(|node| {
        node.dirty_bitmaps.iter().map(|bitmap| (node.node_name.clone(), bitmap.name.clone()))
    });
    let bitmaps = bitmaps.filter(|(_, name)| ours(name)).collect();
    Ok(Leftovers {
        jobs: jobs.into_iter().map(|job| job.id).filter(ours).collect(),
        exports: exports.into_iter().map(|export| export.id).filter(ours).collect(),
        nodes: nodes.into_iter().map(|node| node.node_name).filter(ours).collect(),
        bitmaps,
        nbd_server: nbd_server_runs(qmp).await?,
    })
}

/// The exports of all kinds; none where QEMU has no such thing.
pub async fn block_exports(qmp: &Qmp) -> Result<Vec<BlockExportInfo>, QmpError> {
    match qmp.execute(QueryBlockExports).await {
        Err(error) if error.is_command_not_found() => Ok(Vec::new()),
        exports => exports,
    }
}

/// Whether the process has an NBD server. Changes nothing.
///
/// QEMU has no query for this. It looks for a running server before it looks for the socket, so
/// to start one on a descriptor that isn't there answers the question and changes nothing.
pub async fn nbd_server_runs(qmp: &Qmp) -> Result<bool, QmpError> {
    match qmp.execute(NbdServerStart::on_fd(names::ABSENT_FDNAME)).await {
        Err(error) if error.is_nbd_server_already_running() => Ok(true),
        Err(error) if error.is_not_found_fd() || error.is_command_not_found() => Ok(false),
        Err(error) => Err(error),
        Ok(_) => qmp.execute(NbdServerStop).await.map(|_| false),
    }
}
