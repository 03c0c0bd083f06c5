//! What a session reports, in the order in which it happened.

use super::{Code, Open, StreamId};

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The peer opened a stream; answer with [`Session::accept`](super::Session::accept) or [`Session::refuse`](super::Session::refuse).
    Opened {
        /// The stream.
        id: StreamId,
        /// What it is for.
        open: Open,
    },
    /// The peer accepted a stream.
    Accepted {
        /// The stream.
        id: StreamId,
    },
    /// There is something to [`Session::recv`](super::Session::recv); take all of it.
    Readable {
        /// The stream.
        id: StreamId,
    },
    /// There is room to send again after the queue was full.
    Writable {
        /// The stream.
        id: StreamId,
    },
    /// The peer sends no more; what it has sent is still to be received first.
    Finished {
        /// The stream.
        id: StreamId,
    },
    /// The peer does not want what we send; the other direction goes on.
    Stopped {
        /// The stream.
        id: StreamId,
        /// Why.
        code: Code,
    },
    /// Both directions ended at once: by the peer, or because it did not answer.
    Reset {
        /// The stream.
        id: StreamId,
        /// Why.
        code: Code,
    },
    /// Both directions have ended and the stream is forgotten.
    Closed {
        /// The stream.
        id: StreamId,
    },
    /// The peer ends the session: no new streams.
    GoAway {
        /// Why.
        code: Code,
        /// In its words, without control characters.
        text: String,
    },
}
