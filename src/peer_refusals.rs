//! What was refused to peers on their streams: counted by peer and reason, recorded, and said once in a while,
//! however often it happens.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::audit::Audit;
use crate::net::identity::Identity;

/// The same is said once in this time, with how often it happened.
const SAID_EVERY: Duration = Duration::from_secs(300);

/// Why something was refused to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// Its certificate would not be accepted any more.
    NotTrusted,
    /// It has too many control streams.
    ControlStreams,
    /// A stream of messages that is not urgent: it would have more credit than a message needs.
    WrongClass,
    /// It has opened a control stream and asked for nothing.
    NothingAsked,
    /// What it asked for cannot be understood.
    NotUnderstood,
    /// It may not.
    NotPermitted,
    /// It may, but not so much at once or in all.
    Quota,
    /// This host is being emptied.
    Draining,
    /// What it asked for is not to be had here, or not so.
    NotPossible,
    /// There is no target of the name that it said.
    NoTarget,
    /// A stream of a migration that was granted to nobody.
    NoGrant,
    /// … to another peer.
    AnothersGrant,
    /// … whose deadline is over.
    GrantOver,
    /// … for a disk that is not in the grant, or a second time.
    OutsideGrant,
}

impl Reason {
    /// As metrics and the audit record have it.
    pub fn label(self) -> &'static str {
        match self {
            Self::NotTrusted => "not_trusted",
            Self::ControlStreams => "control_streams",
            Self::WrongClass => "wrong_class",
            Self::NothingAsked => "nothing_asked",
            Self::NotUnderstood => "not_understood",
            Self::NotPermitted => "not_permitted",
            Self::Quota => "quota",
            Self::Draining => "draining",
            Self::NotPossible => "not_possible",
            Self::NoTarget => "no_target",
            Self::NoGrant => "no_grant",
            Self::AnothersGrant => "anothers_grant",
            Self::GrantOver => "grant_over",
            Self::OutsideGrant => "outside_grant",
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::NotTrusted => "a request of a peer that is not trusted any more was refused",
            Self::ControlStreams => "a control stream too many was refused",
            Self::WrongClass => "a control stream that is not urgent was refused",
            Self::NothingAsked => "a control stream without a request was ended",
            Self::NotUnderstood => "a request that cannot be understood was refused",
            Self::NotPermitted => "a request for what the peer may not do was refused",
            Self::Quota => "a request beyond what the peer may do was refused",
            Self::Draining => "a VM was refused: this host is being emptied",
            Self::NotPossible => "a request for what cannot be done here was refused",
            Self::NoTarget => "a connection to a target that is not there was refused",
            Self::NoGrant => "a stream without a grant was refused",
            Self::AnothersGrant => "a stream with another peer's grant was refused",
            Self::GrantOver => "a stream of a grant whose deadline is over was refused",
            Self::OutsideGrant => "a stream outside the grant was refused",
        }
    }
}

#[derive(Debug, Default)]
struct Tally {
    count: u64,
    said: Option<Instant>,
    unsaid: u64,
}

/// Those since the agent's start, of peers that are in the configuration.
#[derive(Debug)]
pub struct PeerRefusals {
    tallies: Tallies,
    audit: Audit,
}

impl PeerRefusals {
    pub fn new(audit: Audit) -> Self {
        Self { tallies: Tallies::default(), audit }
    }

    /// Something was refused to a peer: counted, recorded, and said if the same was not said lately.
    pub(crate) fn refused(&self, peer: &Identity, reason: Reason, what: impl Fn() -> String) {
        if let Some(before) = self.to_be_said(peer, reason, &what) {
            let what = what();
            tracing::warn!(%peer, reason = reason.label(), what, unsaid_before = before, "{}", reason.words());
        }
    }

    /// The same for who says it in words of its own: how many were not said before, if this one is to be.
    pub(crate) fn to_be_said(
        &self,
        peer: &Identity,
        reason: Reason,
        what: impl FnOnce() -> String,
    ) -> Option<u64> {
        self.audit.refused(peer.as_str(), &reason.label().replace('_', "-"), what);
        self.tallies.count(peer, reason, Instant::now())
    }

    /// The same for who also records it, under a reason of its own.
    pub(crate) fn to_be_told(&self, peer: &Identity, reason: Reason) -> Option<u64> {
        self.tallies.count(peer, reason, Instant::now())
    }

    /// How many of each.
    pub fn counts(&self) -> Vec<(Identity, Reason, u64)> {
        self.tallies.counts()
    }
}

#[derive(Debug, Default)]
struct Tallies(Mutex<BTreeMap<(Identity, Reason), Tally>>);

impl Tallies {
    /// How many were not said before, if this one is to be said.
    fn count(&self, peer: &Identity, reason: Reason, now: Instant) -> Option<u64> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let tally = all.entry((peer.clone(), reason)).or_default();
        tally.count += 1;
        if tally.said.is_some_and(|said| now.saturating_duration_since(said) < SAID_EVERY) {
            tally.unsaid += 1;
            return None;
        }
        tally.said = Some(now);
        Some(std::mem::take(&mut tally.unsaid))
    }

    fn counts(&self) -> Vec<(Identity, Reason, u64)> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().map(|((peer, reason), tally)| (peer.clone(), *reason, tally.count)).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn each_is_counted_and_the_same_is_said_once_in_a_while() {
        let (refusals, now) = (Tallies::default(), Instant::now());
        let (bravo, charlie) = ("bravo".parse().unwrap(), "charlie".parse().unwrap());
        assert_eq!(refusals.count(&bravo, Reason::NoGrant, now), Some(0));
        for _ in 0..1000 {
            assert_eq!(refusals.count(&bravo, Reason::NoGrant, now + SAID_EVERY / 2), None);
        }
        assert_eq!(refusals.count(&charlie, Reason::NoGrant, now), Some(0), "another peer");
        assert_eq!(refusals.count(&bravo, Reason::Quota, now), Some(0), "another reason");
        assert_eq!(refusals.count(&bravo, Reason::NoGrant, now + SAID_EVERY), Some(1000));
        let counts: Vec<_> = refusals.counts().into_iter().map(|(_, reason, n)| (reason, n)).collect();
        assert_eq!(counts, [(Reason::Quota, 1), (Reason::NoGrant, 1002), (Reason::NoGrant, 1)]);
    }
}
