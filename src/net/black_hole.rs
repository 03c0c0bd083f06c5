//! Path MTU black holes: a path that passes small packets and swallows full-size ones lets every handshake
//! through and no data. Connections over it come back and move nothing. What they last counts to the time
//! that a session may be without a connection. Knows no socket and no clock.

use std::time::Instant;

/// Since when nothing has been acknowledged, over however many connections.
#[derive(Debug, Default)]
pub(super) struct BlackHole(Option<At>);

#[derive(Debug)]
struct At {
    since: Instant,
    /// The first frame that the peer has not acknowledged.
    frame: u64,
    losses: u32,
}

impl BlackHole {
    /// A connection is lost, and `frame` is the first that is not acknowledged; none when all are.
    /// Since when the session counts as without one.
    pub(super) fn lost(&mut self, now: Instant, frame: Option<u64>) -> Instant {
        self.look(frame);
        let Some(frame) = frame else { return now };
        let at = self.0.get_or_insert(At { since: now, frame, losses: 0 });
        at.losses += 1;
        at.since
    }

    /// Where the peer's acknowledgements are now, while there is a connection.
    pub(super) fn look(&mut self, frame: Option<u64>) {
        if self.0.as_ref().is_some_and(|at| Some(at.frame) != frame) {
            self.0 = None;
        }
    }

    /// What to say of it, once it has happened more than once.
    pub(super) fn words(&self) -> Option<String> {
        let losses = self.0.as_ref().map(|at| at.losses).filter(|losses| *losses > 1)?;
        Some(format!(
            "{losses} connections in a row were lost without anything being acknowledged over them: \
             handshakes pass and data does not, as where full-size packets are dropped on the way (MTU)"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn only_what_moves_nothing_counts_together() {
        let began = Instant::now();
        let at = |s| began + Duration::from_secs(s);
        let mut path = BlackHole::default();
        assert_eq!(path.lost(at(0), Some(7)), at(0));
        assert!(path.words().is_none(), "once is no pattern");
        assert_eq!(path.lost(at(5), Some(7)), at(0));
        assert!(path.words().is_some_and(|words| words.starts_with("2 connections")));
        // Something was acknowledged in between.
        assert_eq!(path.lost(at(9), Some(8)), at(9));
        // All was acknowledged at some time since, though the same frame is the first again.
        path.look(None);
        assert_eq!(path.lost(at(20), Some(8)), at(20));
        // Nothing waits to be sent: nothing is stuck.
        assert_eq!(path.lost(at(30), None), at(30));
        assert_eq!(path.lost(at(40), None), at(40));
    }
}
