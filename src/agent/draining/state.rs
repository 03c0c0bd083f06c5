//! The drain of this host, as whoever asks sees it, and the word to cancel it.

use std::path::Path;

use tokio::sync::{Mutex, watch};
use uuid::Uuid;

use crate::drain::{Drain, Record, RecordError};
use crate::migrate::problem::Problem;

/// A drain, and what keeps it from going on.
#[derive(Debug, Clone)]
pub(crate) struct Shown {
    pub(crate) drain: Drain,
    pub(crate) trouble: Option<String>,
}

/// The drain that is under way, or the last one.
#[derive(Debug)]
pub(crate) struct Draining {
    pub(super) record: Record,
    shown: watch::Sender<Option<Shown>>,
    /// Somebody wants it cancelled.
    cancel: watch::Sender<Option<Uuid>>,
    /// One at a time.
    pub(super) beginning: Mutex<()>,
}

/// Why a drain does not begin, or is not cancelled.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DrainError {
    #[error("the agent is shutting down")]
    Stopping,
    #[error("drain {0} is under way")]
    UnderWay(Uuid),
    #[error("{}", .0.text)]
    Peer(Problem),
    #[error("`at_once` is {asked}, which is outside 1–{most} (`drain.at_once` in the agent's configuration)")]
    AtOnce { asked: usize, most: usize },
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("no drain is under way")]
    None,
}

impl DrainError {
    pub(crate) fn remedy(&self) -> String {
        match self {
            Self::Stopping => "try again when it is back".into(),
            Self::UnderWay(_) => {
                "wait for it (`vmferry drain --status`), or cancel it (`vmferry drain --cancel`)".into()
            }
            Self::Peer(problem) => problem.remedy.clone(),
            Self::AtOnce { .. } => "ask for fewer, or raise it in the configuration".into(),
            Self::Record(_) => {
                "look at the agent's state folder: one that is damaged can be taken away when \
                                `vmferry list` shows no migration of the drain's"
                    .into()
            }
            Self::None => "see `vmferry drain --status` for the last one".into(),
        }
    }
}

impl Draining {
    /// `state_dir` is the agent's.
    pub(crate) fn new(state_dir: &Path) -> Self {
        Self {
            record: Record::new(state_dir),
            shown: watch::Sender::new(None),
            cancel: watch::Sender::new(None),
            beginning: Mutex::new(()),
        }
    }

    /// Shows it to whoever asks.
    pub(super) fn show(&self, drain: &Drain, trouble: Option<String>) {
        self.shown.send_replace(Some(Shown { drain: drain.clone(), trouble }));
    }

    /// The one that is under way, or the last one.
    pub(crate) fn now(&self) -> Option<Shown> {
        self.shown.borrow().clone()
    }

    /// Each change of it.
    pub(crate) fn watch(&self) -> watch::Receiver<Option<Shown>> {
        self.shown.subscribe()
    }

    /// The one that is under way.
    pub(crate) fn under_way(&self) -> Option<Drain> {
        self.now().map(|shown| shown.drain).filter(|drain| drain.ended_at.is_none())
    }

    /// Asks the one that is under way to begin nothing more, and to roll back what it can.
    pub(crate) fn cancel(&self) -> Result<Uuid, DrainError> {
        let drain = self.under_way().ok_or(DrainError::None)?;
        self.cancel.send_replace(Some(drain.id));
        Ok(drain.id)
    }

    /// Waits until somebody wants this one cancelled.
    pub(super) async fn cancelled(&self, drain: Uuid) {
        // It cannot end: the sender is here.
        let _ = self.cancel.subscribe().wait_for(|wanted| *wanted == Some(drain)).await;
    }
}
