//! A migration that a drain waits for, to its end: what that means for the drain.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use crate::agent::running::Agent;
use crate::drain::{After, End, Freed};
use crate::migrate::journal::Role;
use crate::migrate::phase::Phase;
use crate::migrate::problem::{Problem, ProblemKind};
use crate::migrate::progress::{Outcome, Progress, ProgressSink};
use crate::migrate::vm_state::Here;

/// Between two looks at a VM that somebody else has for the moment.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How often.
const LOOKS: u32 = 120;
/// Before a VM is begun with again that somebody else had, or whose peer had no place.
const BUSY_PAUSE: Duration = Duration::from_secs(2);

/// What is waited for.
#[derive(Debug, Clone)]
pub(super) struct Followed {
    pub(super) vm: String,
    /// The VM ran when the drain began.
    pub(super) ran: bool,
    pub(super) migration: Uuid,
    pub(super) whose: Whose,
}

/// Whose the migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Whose {
    /// The drain's, begun by this process.
    Ours,
    /// The drain's, begun by a process before.
    Found,
    /// The drain's, and undecided: only its decision is waited for.
    Undecided,
    Another,
}

/// What came of it.
#[derive(Debug)]
pub(super) enum Seen {
    Ended(End),
    Freed(Freed),
}

/// Waits for it.
pub(super) async fn follow(agent: Arc<Agent>, followed: Followed) -> (Followed, Seen) {
    let entry = agent.registry.get(followed.migration);
    // A migration that goes on in this process has a share; one that is settled by its journal has none.
    let was_cut = followed.whose == Whose::Found && entry.as_ref().is_none_or(|entry| entry.share.is_none());
    let over = match entry {
        Some(entry) => Some(end_of(&entry.progress, followed.whose == Whose::Undecided).await),
        None => None,
    };
    let seen = match followed.whose {
        Whose::Another => Seen::Freed(freed(&agent, &followed, over.as_ref()).await),
        _ => Seen::Ended(ended(&agent, &followed, over.as_ref(), was_cut).await),
    };
    (followed, seen)
}

/// Its last progress; an undecided one counts as ended unless its decision is waited for.
async fn end_of(progress: &ProgressSink, decided: bool) -> Progress {
    let mut watch = progress.watch();
    let is_over = |progress: &Progress| match &progress.outcome {
        Some(Outcome::Undecided { .. }) => !decided,
        outcome => outcome.is_some(),
    };
    let over = watch.wait_for(is_over).await.ok().map(|progress| progress.clone());
    match over {
        Some(over) => over,
        // Its process is at its end.
        None => std::future::pending().await,
    }
}

async fn freed(agent: &Arc<Agent>, followed: &Followed, over: Option<&Progress>) -> Freed {
    if over.is_some_and(|p| p.role == Role::Source && matches!(p.outcome, Some(Outcome::Moved { .. }))) {
        return Freed::Moved;
    }
    match here(agent, &followed.vm).await {
        Ok(Here::Runs | Here::Holds) => Freed::Here,
        Ok(_) => Freed::NotHere { cause: "the migration that had it has ended, and it is not here".into() },
        Err(cause) => Freed::NotHere { cause },
    }
}

async fn ended(agent: &Arc<Agent>, followed: &Followed, over: Option<&Progress>, was_cut: bool) -> End {
    let outcome = over.and_then(|progress| progress.outcome.clone());
    match outcome {
        // None that a drain has begun.
        Some(Outcome::Replicated { .. }) => {
            stayed(agent, followed, "only a replica of it was made".into(), After::Nowhere).await
        }
        Some(Outcome::Moved { leftovers }) => End::Moved { left: !leftovers.is_empty() },
        Some(Outcome::Undecided { cause }) => End::Undecided { cause },
        Some(Outcome::Failed { phase, cause, problems, cancelled, leftovers }) => {
            let after = match after(phase, &problems) {
                _ if cancelled || !leftovers.is_empty() => After::Nowhere,
                After::Nowhere => After::Nowhere,
                _ if was_cut => After::CutOff,
                after => after,
            };
            if matches!(after, After::CutOff | After::PeerFull) && !was_cut {
                tokio::time::sleep(BUSY_PAUSE).await;
            }
            stayed(agent, followed, cause, after).await
        }
        // Its journal was never begun, so nothing was changed anywhere.
        None => stayed(agent, followed, "the agent ended before it began".into(), After::CutOff).await,
    }
}

/// The guest is looked at before anybody tries anything further with it.
async fn stayed(agent: &Arc<Agent>, followed: &Followed, cause: String, after: After) -> End {
    if after == After::Nowhere {
        return End::Stayed { cause, after };
    }
    let why_not = match here(agent, &followed.vm).await {
        Ok(Here::Runs) => None,
        Ok(Here::Holds | Here::NotBegun) if !followed.ran => None,
        Ok(_) => Some("the guest is not as it was before".to_owned()),
        Err(why_not) => Some(why_not),
    };
    match why_not {
        None => End::Stayed { cause, after },
        Some(why_not) => {
            End::Stayed { cause: format!("{cause}; not tried again: {why_not}"), after: After::Nowhere }
        }
    }
}

/// What may follow a failure, by where it happened and what was found.
fn after(phase: Phase, problems: &[Problem]) -> After {
    if matches!(phase, Phase::HandOver | Phase::Confirm | Phase::Undecided) {
        return After::Nowhere;
    }
    let has = |kinds: &[ProblemKind]| problems.iter().any(|problem| kinds.contains(&problem.kind));
    match phase {
        _ if has(&[ProblemKind::PeerUnreachable, ProblemKind::PeerNotTrusted, ProblemKind::Draining]) => {
            After::PeerOut
        }
        // It does not know this host.
        Phase::Begin if has(&[ProblemKind::NotPermitted]) => After::PeerOut,
        Phase::Begin if has(&[ProblemKind::Busy]) => After::CutOff,
        Phase::Prepare if has(&[ProblemKind::Busy]) => After::PeerFull,
        _ => After::Elsewhere,
    }
}

/// What the VM's QEMU has of its guest, once nobody else has its monitor.
async fn here(agent: &Arc<Agent>, vm: &str) -> Result<Here, String> {
    let mut last = "it is not in the configuration".to_owned();
    for _ in 0..LOOKS {
        let states = agent.vm_states.look_anew(&agent.host).await;
        match states.into_iter().find(|state| state.vm == vm) {
            None => break,
            Some(state) => match state.here {
                Here::InMigration => "it is still part of a migration".clone_into(&mut last),
                Here::Unknown => last = state.cause.unwrap_or_default(),
                here => return Ok(here),
            },
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    Err(format!("what has become of the guest cannot be seen: {last}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_follows_a_failure() {
        use ProblemKind::{Busy, Cpu, Draining, NotPermitted, PeerUnreachable};
        let problem = |kind| Problem::new(kind, "", "");
        for (phase, kinds, expected) in [
            (Phase::Begin, &[PeerUnreachable][..], After::PeerOut),
            (Phase::Prepare, &[Draining], After::PeerOut),
            (Phase::Begin, &[NotPermitted], After::PeerOut),
            (Phase::Prepare, &[NotPermitted], After::Elsewhere),
            (Phase::Begin, &[Busy], After::CutOff),
            (Phase::Prepare, &[Busy], After::PeerFull),
            (Phase::Prepare, &[Cpu], After::Elsewhere),
            (Phase::Mirror, &[], After::Elsewhere),
            (Phase::Device, &[], After::Elsewhere),
            (Phase::HandOver, &[], After::Nowhere),
            (Phase::Confirm, &[], After::Nowhere),
        ] {
            let problems: Vec<_> = kinds.iter().copied().map(problem).collect();
            assert_eq!(after(phase, &problems), expected, "{phase:?} {kinds:?}");
        }
    }
}
