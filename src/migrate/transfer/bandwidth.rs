//! A migration's share of what its session sends: what its operator wants, changed at any time,
//! kept over tries and processes. Whoever runs a try attaches its lanes; what is asked for then
//! counts from the next frame on.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::migrate::model::progress::ProgressSink;
use crate::migrate::model::request::Options;
use crate::mux::{self, SHARE_WEIGHT_DEFAULT, SharedLimit};
use crate::net::lanes::Lanes;
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
    /// The limit of `wish`, as all lanes draw on it.
    shared_limit: Option<SharedLimit>,
    /// The try that is under way.
    attached: Option<(Lanes, Uuid)>,
    /// Its guest stands still.
    ahead: bool,
}

impl State {
    fn apply(&mut self) {
        let limit = self.wish.limit_bytes_per_s.map(Rate::get);
        let before = self.shared_limit.take();
        self.shared_limit = limit.map(|rate| SharedLimit::renewed(before, rate, Instant::now()));
        let share = mux::Share {
            weight: self.wish.weight.into(),
            limit: self.shared_limit.clone(),
            ahead: self.ahead,
        };
        self.tell(&share);
    }

    /// Tells all lanes.
    fn tell(&self, share: &mux::Share) {
        let Some((lanes, migration)) = &self.attached else { return };
        lanes.all().iter().for_each(|session| session.share(*migration.as_bytes(), share.clone()));
    }
}

impl ShareHandle {
    /// As the migration's options have it.
    #[must_use]
    pub fn new(options: &Options, progress: ProgressSink) -> Self {
        let wish = Wish { limit_bytes_per_s: options.limit_bytes_per_s, weight: options.weight };
        progress.update(|p| p.share = Some(wish));
        let state = State { wish, shared_limit: None, attached: None, ahead: false };
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

    /// A try sends over `lanes` under this name.
    pub(crate) fn attach(&self, lanes: &Lanes, migration: Uuid) -> Attached {
        let mut state = self.locked();
        state.attached = Some((lanes.clone(), migration));
        state.ahead = false;
        state.apply();
        Attached(self.clone())
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A try's hold on its share; dropped, its sessions forget it.
#[derive(Debug)]
pub(crate) struct Attached(ShareHandle);

impl Attached {
    /// There is another lane: it counts there, too.
    pub(crate) fn spread(&self) {
        self.0.locked().apply();
    }

    /// The guest stands still: everything of it goes first.
    pub(crate) fn go_ahead(&self) {
        let mut state = self.0.locked();
        if !std::mem::replace(&mut state.ahead, true) {
            state.apply();
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let mut state = self.0.locked();
        state.tell(&mux::Share::default());
        state.attached = None;
    }
}
