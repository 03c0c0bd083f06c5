//! What all journals say together, for whoever asks: read not more often than is of use, however many ask.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Mutex;

use crate::error_chain::chain;
use crate::migrate::{Host, recover};

/// For how long a reading is good enough.
const FRESH: Duration = Duration::from_secs(15);

/// The last reading, and what it gave; `None` if they cannot be read.
#[derive(Debug, Default)]
pub(super) struct JournalsRead(Mutex<Option<(Instant, Option<usize>)>>);

impl JournalsRead {
    /// Ended migrations that have left something here.
    pub(super) async fn leftovers(&self, host: &Arc<Host>) -> Option<usize> {
        let mut last = self.0.lock().await;
        if let Some((at, count)) = &*last
            && at.elapsed() < FRESH
        {
            return *count;
        }
        let host = Arc::clone(host);
        let read = tokio::task::spawn_blocking(move || recover::leftovers_count(&host)).await.ok()?;
        let read = read.inspect_err(|e| tracing::debug!(error = chain(e), "the journals cannot be read"));
        let count = read.ok();
        *last = Some((Instant::now(), count));
        count
    }
}
