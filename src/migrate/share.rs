//! A migration's share of what its session sends: what its operator wants, changed at any time,
//! kept over tries and processes. Whoever runs a try attaches its session; what is asked for then
//! counts from the next frame on.

use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::progress::ProgressSink;
use super::request::Options;
use crate::mux::{self, SHARE_WEIGHT_DEFAULT};
use crate::net::session::Session;
use crate::rate::Rate;

/// A migration's part among those that have something to send: 1 to [`Weight::MAX`], ordinarily
/// 100. Twice the weight is twice the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
pub struct Weight(u16);

/// No weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} is no weight; write 1 to {max}, 100 being ordinary", max = Weight::MAX)]
pub struct WeightError(u16);

impl Weight {
    /// The largest.
    pub const MAX: u16 = 1000;
}

impl Default for Weight {
    fn default() -> Self {
        Self(SHARE_WEIGHT_DEFAULT)
    }
}

impl TryFrom<u16> for Weight {
    type Error = WeightError;

    fn try_from(weight: u16) -> Result<Self, WeightError> {
        if (1..=Self::MAX).contains(&weight) { Ok(Self(weight)) } else { Err(WeightError(weight)) }
    }
}

impl From<Weight> for u16 {
    fn from(weight: Weight) -> Self {
        weight.0
    }
}

/// What an operator wants.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wish {
    /// Bytes per second over RAM and disks together; none for no limit.
    pub limit_bytes_per_s: Option<Rate>,
    /// Its part among others.
    pub weight: Weight,
}

/// A migration's share, for all who may change it or depend on it.
#[derive(Debug, Clone)]
pub struct ShareHandle {
    state: Arc<Mutex<State>>,
    progress: ProgressSink,
}

#[derive(Debug)]
struct State {
    wish: Wish,
    /// The try that is under way.
    attached: Option<(Session, Uuid)>,
    /// Its guest stands still.
    ahead: bool,
}

impl State {
    fn apply(&self) {
        let Some((session, migration)) = &self.attached else { return };
        let share = mux::Share {
            weight: self.wish.weight.into(),
            limit: self.wish.limit_bytes_per_s.map(Rate::get),
            ahead: self.ahead,
        };
        session.share(*migration.as_bytes(), share);
    }
}

impl ShareHandle {
    /// As the migration's options have it.
    #[must_use]
    pub fn new(options: &Options, progress: ProgressSink) -> Self {
        let wish = Wish { limit_bytes_per_s: options.limit_bytes_per_s, weight: options.weight };
        progress.update(|p| p.share = Some(wish));
        let state = State { wish, attached: None, ahead: false };
        Self { state: Arc::new(Mutex::new(state)), progress }
    }

    /// What is wanted now.
    #[must_use]
    pub fn wish(&self) -> Wish {
        self.locked().wish
    }

    /// Wants something else from now on.
    pub fn change(&self, change: impl FnOnce(&mut Wish)) -> Wish {
        let mut state = self.locked();
        change(&mut state.wish);
        state.apply();
        let wish = state.wish;
        drop(state);
        self.progress.update(|p| p.share = Some(wish));
        wish
    }

    /// A try sends over `session` under this name.
    pub(super) fn attach(&self, session: &Session, migration: Uuid) -> Attached {
        let mut state = self.locked();
        state.attached = Some((session.clone(), migration));
        state.ahead = false;
        state.apply();
        Attached(self.clone())
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A try's hold on its share; dropped, the session forgets it.
#[derive(Debug)]
pub(super) struct Attached(ShareHandle);

impl Attached {
    /// The guest stands still: everything of it goes first.
    pub(super) fn go_ahead(&self) {
        let mut state = self.0.locked();
        if !std::mem::replace(&mut state.ahead, true) {
            state.apply();
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if let Some((session, migration)) = self.0.locked().attached.take() {
            session.share(*migration.as_bytes(), mux::Share::default());
        }
    }
}
