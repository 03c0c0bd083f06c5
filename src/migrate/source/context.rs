//! What a migration is asked to do, by whom, and where it tells how far it is.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::failure::Failure;
use super::request::SourceRequest;
use crate::migrate::host::Host;
use crate::migrate::model::problem::{self, Problem};
use crate::migrate::model::progress::ProgressSink;

/// What all of a migration's parts know, and whoever watches it.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    pub(crate) host: Arc<Host>,
    pub(crate) request: SourceRequest,
    pub(crate) progress: ProgressSink,
    /// Cancelled by an operator, or by the agent on its way out.
    pub(crate) cancel: CancellationToken,
}

impl Context {
    /// The failure of a migration that was cancelled.
    pub(crate) fn cancelled(&self) -> Failure {
        Failure::of_cancel(&self.host)
    }

    /// For how long nothing may move.
    pub(crate) fn stall(&self) -> Duration {
        self.host.config.deadlines.stall()
    }

    /// Whether a failure of this try may be followed by another one.
    pub(crate) fn has_successor(&self) -> bool {
        let number = self.request.retry.as_ref().map_or(1, |r| r.number);
        number < self.request.options.retry.tries()
    }

    /// Something that an operator should know.
    pub(crate) fn note(&self, text: String) {
        tracing::info!("{text}");
        self.progress.update(|p| p.notes.push(text));
    }

    /// The same, of findings that do not keep the migration from going on.
    pub(crate) fn note_findings(&self, findings: Vec<Problem>) {
        self.progress.update(|p| problem::note(findings, &mut p.notes));
    }
}
