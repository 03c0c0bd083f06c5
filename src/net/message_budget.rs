//! What the unfinished messages of one peer may hold, over all its sessions and streams.
//!
//! A short message is within what its stream is entitled to anyway, and its credit is returned once it is
//! whole. A long one needs more credit before it is whole: it gets it only with a part of the peer's budget, and
//! waits for that while others of the same peer have it.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes in one permit.
const PERMIT_BYTES: usize = 1024;

/// A peer's budget; clones share it.
#[derive(Debug, Clone)]
pub struct MessageBudget {
    permits: Arc<Semaphore>,
    /// Longest message that needs none of it.
    short_bytes: usize,
}

/// A part of a budget, for one message.
#[derive(Debug)]
pub(super) struct Part(#[expect(dead_code, reason = "held")] OwnedSemaphorePermit);

impl MessageBudget {
    /// Of so many bytes. `window_bytes`: what a stream may hold at least; half of it may be held back,
    /// because credit is returned by the quarter.
    pub(super) fn new(bytes: usize, window_bytes: u64) -> Self {
        let short_bytes = usize::try_from(window_bytes / 2).unwrap_or(usize::MAX);
        Self { permits: Arc::new(Semaphore::new(bytes.div_ceil(PERMIT_BYTES))), short_bytes }
    }

    pub(super) fn is_short(&self, bytes: usize) -> bool {
        bytes <= self.short_bytes
    }

    /// Waits for a part of so many bytes; none when the budget is less than that.
    pub(super) async fn part(&self, bytes: usize) -> Option<Part> {
        let permits = u32::try_from(bytes.div_ceil(PERMIT_BYTES)).ok()?;
        Arc::clone(&self.permits).acquire_many_owned(permits).await.ok().map(Part)
    }
}
