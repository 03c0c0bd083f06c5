//! A migration's share of what its session sends: what its operator wants, changed at any time,
//! kept over tries and processes. Whoever runs a try attaches its lanes; what is asked for then
//! counts from the next frame on.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use uuid::Uuid;

pub use crate::migrate::model::bandwidth::{Weight, WeightError, Wish};
use crate::migrate::model::options::Options;
use crate::migrate::model::progress::ProgressSink;
use crate::mux::{self, SharedLimit};
use crate::net::lanes::Lanes;
use crate::rate::Rate;

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
    pub fn new(options: &Options, progress: ProgressSink) -> Self {
        let wish = Wish { limit_bytes_per_s: options.limit_bytes_per_s, weight: options.weight };
        progress.update(|p| p.share = Some(wish));
        let state = State { wish, shared_limit: None, attached: None, ahead: false };
        Self { state: Arc::new(Mutex::new(state)), progress }
    }

    /// What is wanted now.
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
