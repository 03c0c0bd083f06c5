//! A migration that goes on in this process, and what both roles need to take one up.

use std::pin::Pin;

use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::config::VmConfig;
use crate::migrate::guest::life;
use crate::migrate::host::Host;
use crate::migrate::journal::{Journal, Past, Role};
use crate::migrate::model::phase::Phase;
use crate::migrate::model::problem::chain;
use crate::migrate::model::progress::ProgressSink;
use crate::migrate::transfer::bandwidth::ShareHandle;
use crate::qemu::{Events, Qmp};

/// A migration that goes on in this process.
pub struct TakenUp {
    pub progress: ProgressSink,
    /// Cancels it, where this host is the source.
    pub cancel: CancellationToken,
    /// What it may send, where this host is the source.
    pub share: Option<ShareHandle>,
    /// Its journal is this one.
    pub journal: (Uuid, Role),
    pub(crate) running: Pin<Box<dyn Future<Output = ()> + Send>>,
}

/// Its journal, which must be open still.
pub(crate) fn journal(host: &Host, id: Uuid, role: Role) -> Result<Journal, String> {
    let journal = host.journals.open(&host.journals.path(id, role)).map_err(|e| chain(&e))?;
    match journal.past().ended {
        None => Ok(journal),
        Some(_) => Err("its journal has ended".into()),
    }
}

/// The same of one that goes on: another process may have settled it since it was left.
pub(crate) fn journal_as_left(host: &Host, id: Uuid, role: Role) -> Result<Journal, String> {
    let journal = journal(host, id, role)?;
    let past = journal.past();
    // A source is left before its hand-over, and nobody is left in a roll-back.
    let is_decided = past.handed_over || past.never_ran || past.forced.is_some();
    if past.phase == Phase::RollBack || (role == Role::Source && is_decided) {
        return Err("another process has gone on with its journal".into());
    }
    Ok(journal)
}

/// Reaches a monitor whose QEMU may stand still until its streams move again.
pub(crate) async fn reach(past: &Past, config: &VmConfig) -> Option<(Qmp, Events)> {
    let reached = life::reach(past, config).await.inspect_err(|(known, error)| {
        let (qemu, error) = (known.in_words(), chain(error));
        tracing::error!(qemu, error, "QEMU cannot be reached; the migration is settled by its journal");
    });
    reached.ok()
}
