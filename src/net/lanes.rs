//! The sessions with one peer that one migration uses: that of its control stream, and those that
//! its data streams go through when the peer has several lanes. Each has a connection of its own, and
//! is resumed for itself; what waits for all of them waits here.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::{FutureExt, select_all};
use tokio::sync::watch;

use super::session::{Away, LinkState, Session, SessionEnd};

/// Lanes in use; clones share them.
#[derive(Debug, Clone)]
pub struct Lanes {
    first: Session,
    /// All of them, `first` included; never empty.
    used: Arc<Mutex<Vec<Session>>>,
}

impl From<Session> for Lanes {
    fn from(first: Session) -> Self {
        let used = Arc::new(Mutex::new(vec![first.clone()]));
        Self { first, used }
    }
}

impl Lanes {
    /// The one with the control stream.
    pub fn first(&self) -> &Session {
        &self.first
    }

    /// From now on this one counts, too.
    pub fn add(&self, session: &Session) {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        if !used.iter().any(|other| other.id() == session.id()) {
            used.push(session.clone());
        }
    }

    /// All of them.
    pub fn all(&self) -> Vec<Session> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether one of them has no connection.
    pub fn is_away(&self) -> bool {
        self.all().iter().any(|session| session.away_since().is_some())
    }

    /// Watches the connections of all that there are now.
    pub fn watch(&self) -> LinksWatch {
        LinksWatch(self.all().iter().map(Session::watch_link).collect())
    }

    /// Waits for the end of the first that ends.
    pub async fn ended(&self) -> Arc<SessionEnd> {
        let all = self.all();
        select_all(all.iter().map(|session| Box::pin(session.ended()))).await.0
    }

    /// Runs `work` within `deadline`, on a clock that stands still while one of them has no
    /// connection: a pause of the link is nobody's fault. `None` when the time is over.
    pub async fn within<T>(&self, deadline: Duration, work: impl Future<Output = T>) -> Option<T> {
        let mut links = self.watch();
        tokio::pin!(work);
        let mut left = deadline;
        loop {
            let is_away = links.away().is_some();
            let began = Instant::now();
            tokio::select! {
                biased;
                done = &mut work => return Some(done),
                () = links.changed() => {}
                () = tokio::time::sleep(left), if !is_away => return None,
            }
            if !is_away {
                left = left.saturating_sub(began.elapsed());
            }
        }
    }
}

/// The connections of several sessions.
#[derive(Debug)]
pub struct LinksWatch(Vec<watch::Receiver<LinkState>>);

impl LinksWatch {
    /// The one that has been without a connection for longest. Its state counts as seen.
    pub fn away(&mut self) -> Option<Away> {
        let away = self.0.iter_mut().filter_map(|link| link.borrow_and_update().away.clone());
        away.min_by_key(|away| away.since)
    }

    /// Waits for a change since. A session that has ended changes no more, and its streams say so to
    /// whoever waits on them.
    pub async fn changed(&mut self) {
        if self.0.is_empty() {
            return std::future::pending().await;
        }
        let changed = select_all(self.0.iter_mut().map(|link| Box::pin(link.changed())));
        let (change, at) = changed.map(|(change, at, _)| (change, at)).await;
        // One that has ended may be the one that was missed: that is a change as well.
        if change.is_err() {
            self.0.swap_remove(at);
        }
    }
}
