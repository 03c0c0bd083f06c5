//! Why a connection came to nothing, for people; and how often that is said.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::mux::Code;

/// What a peer's refusal, or the want of an answer, means to an operator.
pub(super) fn in_words(code: Code) -> &'static str {
    match code {
        Code::NoTarget => "the peer has no target of that name",
        Code::Denied => "the peer does not let this host use that target",
        Code::TargetAbsent => "the target's socket is not there",
        Code::TargetRefused => "nobody listens at the target's socket",
        Code::TargetTimeout => "the target does not take connections",
        Code::TargetAlone => "the socket that belongs beside the target's is not there",
        Code::ConnectFailed => "the peer cannot connect to the target; its log says why",
        Code::Limit => "there are too many connections",
        Code::Unsupported => "the peer's version has no forwarding",
        Code::Timeout => "the peer did not answer in time",
        Code::SessionLost => "the session with the peer ended",
        Code::NoSession => "there is no session with the peer",
        Code::Shutdown => "the peer's agent ends",
        _ => "the peer refused it",
    }
}

/// The same is said once in this time, with how often it happened.
const SAID_EVERY: Duration = Duration::from_secs(1);

/// Keeps a crowd of failures from filling the log.
#[derive(Debug, Default)]
pub(super) struct Throttle(Mutex<BTreeMap<Code, (Instant, u64)>>);

impl Throttle {
    /// Whether a failure of this kind is to be said now: then how many of its kind were not said before it.
    pub(super) fn say(&self, code: Code) -> Option<u64> {
        self.say_at(code, Instant::now())
    }

    fn say_at(&self, code: Code, now: Instant) -> Option<u64> {
        // A peer's own numbers are one kind.
        let kind = if let Code::Other(_) = code { Code::Other(0) } else { code };
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match said.get_mut(&kind) {
            Some((at, unsaid)) if now.saturating_duration_since(*at) < SAID_EVERY => {
                *unsaid += 1;
                None
            }
            Some(entry) => Some(std::mem::replace(entry, (now, 0)).1),
            None => {
                said.insert(kind, (now, 0));
                Some(0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_is_said_once_a_second_and_what_was_not_said_is_counted() {
        let (throttle, now) = (Throttle::default(), Instant::now());
        assert_eq!(throttle.say_at(Code::Denied, now), Some(0));
        assert_eq!(throttle.say_at(Code::NoTarget, now), Some(0));
        assert_eq!(throttle.say_at(Code::Denied, now), None);
        assert_eq!(throttle.say_at(Code::Denied, now + SAID_EVERY / 2), None);
        assert_eq!(throttle.say_at(Code::Denied, now + SAID_EVERY), Some(2));
        assert_eq!(throttle.say_at(Code::Other(77), now), Some(0));
        assert_eq!(throttle.say_at(Code::Other(78), now), None);
    }
}
