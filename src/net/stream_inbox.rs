//! What has been received on a stream and waits for its owner, in order. Short chunks are joined while they wait:
//! a peer that sends its bytes one by one makes them cost no more than their credit says. Knows no stream.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use tokio::sync::Notify;
use tokio::task::coop::consume_budget;

use crate::mux::Code;

/// Shorter chunks are joined: each for itself costs some dozens of bytes more than it has.
const JOIN_BELOW: usize = 2 * 1024;
/// Longest chunk that is made so.
const JOINED_MAX: usize = 64 * 1024;

/// What the driver tells a stream's receiving half.
#[derive(Debug)]
pub(super) enum Inbound {
    Data(Bytes),
    Finished,
    Reset(Code),
}

#[derive(Debug, Default)]
struct Waiting {
    queue: VecDeque<Inbound>,
    /// Short chunks after all of `queue`.
    joined: BytesMut,
    is_sender_gone: bool,
    is_receiver_gone: bool,
}

impl Waiting {
    fn push(&mut self, inbound: Inbound) {
        match inbound {
            // Where nothing waits, nothing is copied.
            Inbound::Data(chunk) if chunk.len() < JOIN_BELOW && !self.is_empty() => {
                if self.joined.len() + chunk.len() > JOINED_MAX {
                    self.end_joined();
                }
                self.joined.extend_from_slice(&chunk);
            }
            other => {
                self.end_joined();
                self.queue.push_back(other);
            }
        }
    }

    fn pop(&mut self) -> Option<Inbound> {
        if self.queue.is_empty() {
            self.end_joined();
        }
        self.queue.pop_front()
    }

    fn is_empty(&self) -> bool {
        self.queue.is_empty() && self.joined.is_empty()
    }

    /// What is joined comes before what follows.
    fn end_joined(&mut self) {
        if !self.joined.is_empty() {
            self.queue.push_back(Inbound::Data(std::mem::take(&mut self.joined).freeze()));
        }
    }
}

#[derive(Debug, Default)]
struct Inbox {
    waiting: Mutex<Waiting>,
    changed: Notify,
}

impl Inbox {
    fn locked(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The driver's side.
#[derive(Debug)]
pub(super) struct InboxSender(Arc<Inbox>);

/// The owner's side; there is one.
#[derive(Debug)]
pub(super) struct InboxReceiver(Arc<Inbox>);

/// Nobody takes it any more.
#[derive(Debug)]
pub(super) struct NobodyTakes;

/// Both sides of an empty one.
pub(super) fn inbox() -> (InboxSender, InboxReceiver) {
    let inbox = Arc::new(Inbox::default());
    (InboxSender(Arc::clone(&inbox)), InboxReceiver(inbox))
}

impl InboxSender {
    /// Errors: [`NobodyTakes`].
    pub(super) fn send(&self, inbound: Inbound) -> Result<(), NobodyTakes> {
        let mut waiting = self.0.locked();
        if waiting.is_receiver_gone {
            return Err(NobodyTakes);
        }
        waiting.push(inbound);
        drop(waiting);
        self.0.changed.notify_one();
        Ok(())
    }
}

impl Drop for InboxSender {
    fn drop(&mut self) {
        self.0.locked().is_sender_gone = true;
        self.0.changed.notify_one();
    }
}

impl InboxReceiver {
    /// Waits for the next; `None` when nothing waits and nothing more can come. Cancelling loses nothing.
    pub(super) async fn recv(&mut self) -> Option<Inbound> {
        consume_budget().await;
        loop {
            if let Some(known) = self.next_or_end() {
                return known;
            }
            self.0.changed.notified().await;
        }
    }

    /// One that is already there.
    pub(super) fn try_recv(&mut self) -> Option<Inbound> {
        self.0.locked().pop()
    }

    /// `None`: something may still come.
    fn next_or_end(&self) -> Option<Option<Inbound>> {
        let mut waiting = self.0.locked();
        let next = waiting.pop();
        (next.is_some() || waiting.is_sender_gone).then_some(next)
    }
}

impl Drop for InboxReceiver {
    fn drop(&mut self) {
        *self.0.locked() = Waiting { is_receiver_gone: true, ..Waiting::default() };
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn data(inbound: Option<Inbound>) -> Bytes {
        match inbound {
            Some(Inbound::Data(chunk)) => chunk,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn bytes_that_come_one_by_one_wait_together_and_in_order() {
        let (sender, mut receiver) = inbox();
        let all: Vec<u8> = (0..200_000u32).map(|n| (n % 251) as u8).collect();
        for byte in &all {
            sender.send(Inbound::Data(Bytes::copy_from_slice(&[*byte]))).unwrap();
        }
        assert!(receiver.0.locked().queue.len() <= 1 + all.len() / JOINED_MAX);
        let large = Bytes::from(vec![7; JOIN_BELOW]);
        sender.send(Inbound::Data(large.clone())).unwrap();
        sender.send(Inbound::Finished).unwrap();
        let mut taken = Vec::new();
        while taken.len() < all.len() {
            let chunk = data(receiver.try_recv());
            assert!(chunk.len() <= JOINED_MAX);
            taken.extend_from_slice(&chunk);
        }
        assert_eq!(taken, all);
        assert_eq!(data(receiver.try_recv()).as_ptr(), large.as_ptr(), "a large chunk is not copied");
        assert!(matches!(receiver.try_recv(), Some(Inbound::Finished)));
        assert!(receiver.try_recv().is_none());
    }

    #[tokio::test]
    async fn either_side_hears_of_the_others_end() {
        let (sender, mut receiver) = inbox();
        sender.send(Inbound::Data(Bytes::from_static(b"a"))).unwrap();
        drop(sender);
        assert_eq!(data(receiver.recv().await).as_ref(), b"a");
        assert!(receiver.recv().await.is_none());
        let (sender, receiver) = inbox();
        drop(receiver);
        assert!(sender.send(Inbound::Finished).is_err());
    }

    #[tokio::test]
    async fn who_waits_is_woken_by_what_comes_and_by_the_end() {
        let (sender, mut receiver) = inbox();
        let sends = async {
            tokio::task::yield_now().await;
            sender.send(Inbound::Reset(Code::Cancelled)).unwrap();
            tokio::task::yield_now().await;
            drop(sender);
        };
        let takes = async { (receiver.recv().await, receiver.recv().await) };
        let ((), taken) = tokio::join!(sends, takes);
        assert!(matches!(taken, (Some(Inbound::Reset(Code::Cancelled)), None)), "{taken:?}");
    }
}
