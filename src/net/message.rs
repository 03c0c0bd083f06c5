//! Messages over a stream: a length and JSON, for what two agents say to each other.
//!
//! The length is four bytes, big-endian, at most [`MESSAGE_BYTES_MAX`]. Every text in a message that was
//! received is bounded and printable. Knows no meaning.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::frozen::FrozenStream;
use super::message_budget::{MessageBudget, Part};
use super::session::Session;
use super::stream::{RecvHalf, SendHalf, StoppedStream, Stream, StreamEnded};
use crate::mux::Code;
use crate::printable;

/// Longest message, without its length.
pub const MESSAGE_BYTES_MAX: usize = 256 * 1024;

/// Why a message could not be sent or understood.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    #[error(transparent)]
    Ended(#[from] StreamEnded),
    #[error("the stream ended within a message")]
    Truncated,
    #[error("a message of {0} bytes exceeds the limit of {MESSAGE_BYTES_MAX}")]
    TooLong(usize),
    #[error("a message could not be understood")]
    Json(#[from] serde_json::Error),
}

#[derive(Debug)]
pub struct MessageSender(SendHalf);

#[derive(Debug)]
pub struct MessageReceiver {
    recv: RecvHalf,
    buffer: BytesMut,
    /// Of `buffer`, what the peer has no credit for again.
    held_bytes: usize,
    budget: MessageBudget,
    /// For the long message that is under way, or was taken last: whoever has it may keep it until it asks for the
    /// next one.
    part: Option<Part>,
    /// The last one was taken.
    is_taken: bool,
}

/// A channel whose owner has stopped, between two messages or within one.
#[derive(Debug)]
pub struct StoppedChannel {
    stream: StoppedStream,
    buffer: BytesMut,
}

/// A channel of messages as one process leaves it to the next.
#[derive(Debug, Serialize, Deserialize)]
pub struct FrozenChannel {
    pub stream: FrozenStream,
    /// The beginning of a message.
    buffer: Bytes,
}

pub fn stop(sender: MessageSender, receiver: MessageReceiver) -> StoppedChannel {
    StoppedChannel {
        stream: StoppedStream::new(sender.0, receiver.recv, Vec::new()),
        buffer: receiver.buffer,
    }
}

impl StoppedChannel {
    /// The session has stopped as well.
    pub fn settle(self) -> FrozenChannel {
        FrozenChannel { stream: self.stream.settle(), buffer: self.buffer.freeze() }
    }
}

/// Takes up a channel of an earlier process; `buffer` is what [`FrozenChannel::into_parts`] gave.
pub fn take_up(stream: Stream, session: &Session, buffer: &Bytes) -> (MessageSender, MessageReceiver) {
    let (sender, mut receiver) = split(stream, session);
    receiver.buffer.extend_from_slice(buffer);
    // Whatever credit was returned for it: more than was received is never consumed.
    receiver.held_bytes = buffer.len();
    (sender, receiver)
}

impl FrozenChannel {
    /// The stream, and what [`take_up`] needs beside it.
    pub fn into_parts(self) -> (FrozenStream, Bytes) {
        (self.stream, self.buffer)
    }
}

/// Takes a stream of `session` as a channel of messages.
pub fn split(stream: Stream, session: &Session) -> (MessageSender, MessageReceiver) {
    let Stream { send, recv, .. } = stream;
    let budget = session.info().messages.clone();
    (
        MessageSender(send),
        MessageReceiver { recv, buffer: BytesMut::new(), held_bytes: 0, budget, part: None, is_taken: false },
    )
}

impl MessageSender {
    /// Sends one message.
    /// Errors: [`MessageError::TooLong`] or the stream's end.
    pub async fn send<T: Serialize>(&mut self, message: &T) -> Result<(), MessageError> {
        let json = serde_json::to_vec(message)?;
        if json.len() > MESSAGE_BYTES_MAX {
            return Err(MessageError::TooLong(json.len()));
        }
        let mut framed = BytesMut::with_capacity(4 + json.len());
        framed.put_u32(json.len() as u32);
        framed.put_slice(&json);
        Ok(self.0.send(framed.freeze()).await?)
    }

    /// Ends the stream at once; what waits to be sent is dropped.
    pub fn reset(&mut self) {
        self.0.reset(Code::Cancelled);
    }

    /// Ends this direction in order.
    pub fn finish(&mut self) {
        let _ = self.0.finish();
    }
}

impl MessageReceiver {
    /// The next message; `None` when the peer has finished.
    /// Errors: [`MessageError`]; the channel is of no use afterwards. Cancelling loses nothing.
    pub async fn recv<T: DeserializeOwned>(&mut self) -> Result<Option<T>, MessageError> {
        if std::mem::take(&mut self.is_taken) {
            self.part = None;
        }
        loop {
            if let Some(json) = self.take()? {
                return Ok(Some(printable::of_peer(&json)?));
            }
            self.afford().await?;
            match self.recv.recv().await? {
                Some(chunk) => {
                    self.buffer.extend_from_slice(&chunk);
                    match self.part {
                        Some(_) => self.recv.consumed(chunk.len()),
                        None => self.held_bytes += chunk.len(),
                    }
                }
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(MessageError::Truncated),
            }
        }
    }

    /// Returns credit for the beginning of a long message once the rest of it can be afforded.
    async fn afford(&mut self) -> Result<(), MessageError> {
        let Some(head) = self.buffer.first_chunk::<4>() else { return Ok(()) };
        let bytes = 4 + u32::from_be_bytes(*head) as usize;
        if self.part.is_none() && !self.budget.is_short(bytes) {
            self.part = Some(self.budget.part(bytes).await.ok_or(MessageError::TooLong(bytes))?);
            self.recv.consumed(std::mem::take(&mut self.held_bytes));
        }
        Ok(())
    }

    /// A message that is whole. Its credit is returned.
    fn take(&mut self) -> Result<Option<Bytes>, MessageError> {
        let Some(json) = take_whole(&mut self.buffer)? else { return Ok(None) };
        self.is_taken = true;
        if self.buffer.is_empty() {
            // An idle channel holds no message's memory.
            self.buffer = BytesMut::new();
        }
        let held = self.held_bytes.min(4 + json.len());
        if held > 0 {
            self.held_bytes -= held;
            self.recv.consumed(held);
        }
        Ok(Some(json))
    }
}

/// Takes a message that is whole out of what has come, without its length.
#[doc(hidden)]
pub fn take_whole(buffer: &mut BytesMut) -> Result<Option<Bytes>, MessageError> {
    let Some(head) = buffer.first_chunk::<4>() else { return Ok(None) };
    let length = u32::from_be_bytes(*head) as usize;
    if length > MESSAGE_BYTES_MAX {
        return Err(MessageError::TooLong(length));
    }
    if buffer.len() < 4 + length {
        return Ok(None);
    }
    buffer.advance(4);
    Ok(Some(buffer.split_to(length).freeze()))
}
