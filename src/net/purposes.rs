//! Who takes the streams that peers open: one acceptor for each purpose.
//!
//! ```text
//! OPEN of a peer ──► session ──► Purposes ──► the acceptor that is registered for its purpose
//!                                        └──► refused: there is none
//! ```
//! Knows no purpose and nothing of what an acceptor does.

use std::collections::BTreeMap;

use futures_util::future::{BoxFuture, FutureExt};

use super::session::IncomingStream;
use crate::mux::Code;

type Acceptor = Box<dyn Fn(IncomingStream) -> BoxFuture<'static, ()> + Send + Sync>;

/// The acceptors of an agent, by purpose.
#[derive(Default)]
pub struct Purposes(BTreeMap<u16, Acceptor>);

impl Purposes {
    /// Gives the streams of `purpose` to `acceptor`. Each purpose has one acceptor.
    pub fn register<F: Future<Output = ()> + Send + 'static>(
        &mut self,
        purpose: u16,
        acceptor: impl Fn(IncomingStream) -> F + Send + Sync + 'static,
    ) {
        let before = self.0.insert(purpose, Box::new(move |stream| acceptor(stream).boxed()));
        debug_assert!(before.is_none(), "purpose {purpose} has two acceptors");
    }

    /// Whether streams of `purpose` have an acceptor.
    pub fn has(&self, purpose: u16) -> bool {
        self.0.contains_key(&purpose)
    }

    /// Gives a stream to its acceptor, which is called at once, so that it sees streams in the order in
    /// which they are given; then it works on until it is done with it. A stream of a purpose without an
    /// acceptor is refused.
    pub fn accept(&self, stream: IncomingStream) -> BoxFuture<'static, ()> {
        match self.0.get(&stream.open.purpose) {
            Some(acceptor) => acceptor(stream),
            None => {
                stream.refuse(Code::Unsupported);
                std::future::ready(()).boxed()
            }
        }
    }
}
