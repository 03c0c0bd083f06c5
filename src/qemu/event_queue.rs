//! The queue between a monitor's connection and whoever takes its events. It is bounded and never
//! full: events that nobody acts on are not queued, an event that says the same as one that waits
//! already is dropped where that changes nothing, and where there is no room left the queue says
//! [`EventKind::Missed`] once instead. Events never cost the connection.

use super::event::{Event, EventKind};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// So many events wait for [`Events::recv`]; of more is only said that they were missed.
pub const EVENT_QUEUE_MAX: usize = 4096;

/// The events that wait together came in so many bytes; of more is only said that they were missed.
pub const EVENT_QUEUE_BYTES_MAX: usize = 8 << 20;

#[derive(Debug, Default)]
struct Waiting {
    events: VecDeque<(Event, usize)>,
    bytes: usize,
    closed: bool,
    /// Nobody takes events any more.
    unwanted: bool,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Notify,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The events of one monitor, in QEMU's order. Dropping it means that nobody wants them.
#[derive(Debug)]
pub struct Events {
    queue: Arc<Queue>,
}

/// The connection's end of the queue. Dropping it ends the events.
pub(super) struct EventSink {
    queue: Arc<Queue>,
}

/// A queue within [`EVENT_QUEUE_MAX`] and [`EVENT_QUEUE_BYTES_MAX`].
pub(super) fn event_queue() -> (EventSink, Events) {
    let queue = Arc::new(Queue::default());
    (EventSink { queue: Arc::clone(&queue) }, Events { queue })
}

impl Waiting {
    fn is_full(&self, bytes: usize) -> bool {
        self.events.len() >= EVENT_QUEUE_MAX || self.bytes + bytes > EVENT_QUEUE_BYTES_MAX
    }

    fn last(&self) -> Option<&EventKind> {
        self.events.back().map(|(event, _)| &event.kind)
    }

    /// A fault that is repeated says nothing new while its first word is unheard.
    fn says(&self, kind: &EventKind) -> bool {
        match kind {
            EventKind::BlockJobError { .. } | EventKind::BlockIoError { .. } => {
                self.events.iter().any(|(waiting, _)| waiting.kind == *kind)
            }
            EventKind::Missed => self.last() == Some(kind),
            _ => false,
        }
    }

    fn push(&mut self, event: Event, bytes: usize) {
        self.bytes += bytes;
        self.events.push_back((event, bytes));
    }

    fn take(&mut self) -> Option<Event> {
        let (event, bytes) = self.events.pop_front()?;
        self.bytes -= bytes;
        Some(event)
    }
}

impl EventSink {
    /// Hands over an event that came in a line of so many bytes.
    pub(super) fn put(&self, event: Event, bytes: usize) {
        if event.kind.is_for_nobody() {
            return;
        }
        let mut waiting = self.queue.lock();
        if waiting.unwanted || waiting.says(&event.kind) {
            return;
        }
        if !waiting.is_full(bytes) {
            waiting.push(event, bytes);
        } else if waiting.last() != Some(&EventKind::Missed) {
            tracing::warn!(
                event = event.name,
                "QEMU's events are not taken in time: what happened is asked for"
            );
            waiting.push(Event::missed(), 0);
        }
        drop(waiting);
        self.queue.changed.notify_one();
    }

    /// Says that events may be missing from here on.
    pub(super) fn missed(&self) {
        let mut waiting = self.queue.lock();
        if !waiting.unwanted && !waiting.says(&EventKind::Missed) {
            waiting.push(Event::missed(), 0);
        }
        drop(waiting);
        self.queue.changed.notify_one();
    }
}

impl Drop for EventSink {
    fn drop(&mut self) {
        self.queue.lock().closed = true;
        self.queue.changed.notify_one();
    }
}

impl Events {
    /// The next event; `None` when the connection is over and all its events have been taken.
    /// May be cancelled without losing one.
    pub async fn recv(&mut self) -> Option<Event> {
        loop {
            {
                let mut waiting = self.queue.lock();
                match waiting.take() {
                    None if !waiting.closed => {}
                    taken => return taken,
                }
            }
            self.queue.changed.notified().await;
        }
    }

    /// The next event if it has already come.
    pub fn try_recv(&mut self) -> Option<Event> {
        self.queue.lock().take()
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let mut waiting = self.queue.lock();
        waiting.unwanted = true;
        waiting.events.clear();
        waiting.bytes = 0;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use super::super::event::Timestamp;
    use super::*;
    use serde_json::{Value, json};

    fn event(name: &str, data: Value) -> Event {
        Event::new(name.into(), data, Timestamp { seconds: 1, microseconds: 2 })
    }

    fn stop() -> Event {
        event("STOP", Value::Null)
    }

    fn kinds(events: &mut Events) -> Vec<EventKind> {
        std::iter::from_fn(|| events.try_recv()).map(|e| e.kind).collect()
    }

    #[test]
    fn bytes_count_as_well_as_events_and_taking_makes_room() {
        let (sink, mut events) = event_queue();
        let half = EVENT_QUEUE_BYTES_MAX / 2;
        for _ in 0..5 {
            sink.put(stop(), half);
            sink.put(event("RESUME", Value::Null), half);
            assert_eq!(kinds(&mut events), [EventKind::Stop, EventKind::Resume]);
        }
        sink.put(stop(), half);
        sink.put(stop(), half + 1);
        sink.put(event("RESUME", Value::Null), half + 1);
        assert_eq!(kinds(&mut events), [EventKind::Stop, EventKind::Missed]);
    }

    #[test]
    fn what_finds_no_room_is_said_to_be_missing_once_and_in_its_place() {
        let (sink, mut events) = event_queue();
        for _ in 0..3 * EVENT_QUEUE_MAX {
            sink.put(stop(), 1);
        }
        assert_eq!(events.try_recv().unwrap().kind, EventKind::Stop);
        assert_eq!(events.try_recv().unwrap().kind, EventKind::Stop);
        sink.put(event("RESUME", Value::Null), 1);
        let all = kinds(&mut events);
        assert_eq!(all.len(), EVENT_QUEUE_MAX);
        assert_eq!(all[all.len() - 2..], [EventKind::Missed, EventKind::Resume]);
        assert!(all[..all.len() - 2].iter().all(|kind| *kind == EventKind::Stop));
    }

    #[test]
    fn what_nobody_acts_on_and_repeated_faults_take_no_place() {
        let (sink, mut events) = event_queue();
        let fault = json!({"device": "j", "operation": "write", "action": "report"});
        for _ in 0..10_000 {
            sink.put(event("JOB_STATUS_CHANGE", json!({"id": "j", "status": "ready"})), 100);
            sink.put(event("OF_TOMORROW", json!({"x": 1})), 100);
            sink.put(event("BLOCK_JOB_ERROR", fault.clone()), 100);
        }
        sink.put(stop(), 100);
        let all = kinds(&mut events);
        assert!(matches!(all[..], [EventKind::BlockJobError { .. }, EventKind::Stop]), "{all:?}");
    }
}
