//! Tries: a migration that failed for a reason that may pass is begun again, from a clean state.
//!
//! Each try is a migration of its own to the journals and to the destination, with an id of its
//! own: what a destination durably says of one try can never be taken for another's. To whoever
//! asked for it they are one migration, under the id of the first.
//!
//! [`verdict`] decides and is pure. The loop around it owns the VM's reservation from the first
//! try to the last, so that nobody else migrates the VM while it waits.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::attempt::{attempt, not_begun};
use super::awaited_try::AwaitedTry;
use super::context::Context;
use super::failure::Failure;
use super::further_try::{Ended, Held, add_leftovers};
use super::request::SourceRequest;
use crate::migrate::checks::disks::in_band;
use crate::migrate::host::Host;
use crate::migrate::journal::RetryOf;
use crate::migrate::model::options::Options;
use crate::migrate::model::phase::Phase;
use crate::migrate::model::problem::Problem;
use crate::migrate::model::progress::{Outcome, Progress, ProgressSink, Tries};

/// The longest wait before a try, jitter aside.
const BACK_OFF_MAX_S: u64 = 60;
/// How often a wait is shown to be shorter.
const SHOW_EVERY: Duration = Duration::from_secs(1);

/// What follows a try.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// Nothing; and why, where a retry had been asked for and is not made.
    Over(Option<&'static str>),
    /// A further try, after a wait.
    Again,
}

/// Runs a migration from Begin to its end, in as many tries as it takes and may take.
/// Everything that becomes of it is in `progress`.
pub async fn migrate(
    host: Arc<Host>,
    request: SourceRequest,
    progress: ProgressSink,
    cancel: CancellationToken,
) {
    let _reservation = match host.reserve(&request.vm, request.id) {
        Ok(reservation) => reservation,
        Err(problem) => {
            let ended = not_begun(&Failure::Problems(vec![problem]));
            return progress.end(ended.phase, ended.outcome);
        }
    };
    begin_try(&progress, 1, request.options.retry.tries(), request.id);
    let context = Context { host, request, progress, cancel };
    let first = attempt(context.clone(), None);
    go_on(context, Box::pin(first)).await;
}

/// A try under way; `None`: another process goes on with it.
pub(crate) type Try = Pin<Box<dyn Future<Output = Option<Ended>> + Send>>;

/// Goes on with the try that the request names, and begins further ones. The caller has reserved
/// the VM.
pub(crate) async fn go_on(mut context: Context, mut running: Try) {
    let of = context.request.options.retry.tries();
    let mut number = context.request.retry.as_ref().map_or(1, |retry| retry.number);
    let first = context.request.retry.as_ref().map_or(context.request.id, |retry| retry.first);
    let mut no_nbd = Vec::new();
    loop {
        let Some(mut ended) = running.await else { return };
        let found = std::mem::take(&mut no_nbd);
        if let Some(way) = other_way(&ended, &context) {
            for said in &way.said {
                tracing::warn!("{said}");
            }
            no_nbd = way.found;
            context.request.options = way.options;
            context.note_findings(way.said);
            running = next_try(&context, (first, number), ended.held);
            continue;
        }
        say_both(&mut ended.outcome, found);
        if let Verdict::Over(why) = verdict(&ended, number, of) {
            note_end(&context.progress, number, of, why);
            release(&context, ended.held, &mut ended.outcome).await;
            return context.progress.end(ended.phase, ended.outcome);
        }
        note_failure(&context.progress, number, of, &ended.outcome);
        number += 1;
        let (failed, held) = (ended.outcome, ended.held);
        let wait = back_off(number - 1, random());
        let Some(next) = wait_for_next(&context, AwaitedTry { first, number, failed, held, wait }).await
        else {
            return;
        };
        running = next;
    }
}

/// Waits, and begins it; `None`: another process waits on, or nobody wants it any more.
pub(crate) async fn wait_for_next(context: &Context, waiting: AwaitedTry) -> Option<Try> {
    let (host, progress, number) = (&context.host, &context.progress, waiting.number);
    let until = Instant::now() + waiting.wait;
    let waited = tokio::select! {
        waited = wait_until(until, progress, number, &context.cancel) => waited,
        () = host.freeze.begun() => {
            AwaitedTry { wait: until.saturating_duration_since(Instant::now()), ..waiting }.leave(context);
            return None;
        }
    };
    if waited.is_ok() {
        return Some(next_try(context, (waiting.first, number), waiting.held));
    }
    let mut outcome = given_up(host, number, context.request.options.retry.tries(), &waiting.failed);
    release(context, waiting.held, &mut outcome).await;
    progress.end(Phase::Failed, outcome);
    None
}

fn next_try(context: &Context, (first, number): (Uuid, u32), held: Option<Held>) -> Try {
    let id = Uuid::new_v4();
    begin_try(&context.progress, number, context.request.options.retry.tries(), id);
    let retry = Some(RetryOf { first, number, kept: Vec::new() });
    let request = SourceRequest { id, retry, ..context.request.clone() };
    Box::pin(attempt(Context { request, ..context.clone() }, held))
}

/// Another way for the disks.
struct OtherWay {
    options: Options,
    said: Vec<Problem>,
    /// Why there is not the first one.
    found: Vec<Problem>,
}

/// In band, where a try was refused because a QEMU has no usable NBD, and nobody forbids it. It does not count as a
/// further try: nothing was begun.
fn other_way(ended: &Ended, context: &Context) -> Option<OtherWay> {
    let Outcome::Failed { cancelled: false, leftovers, problems, .. } = &ended.outcome else { return None };
    let (options, said) = in_band::instead(problems, &context.request.options)?;
    if !leftovers.is_empty() {
        return None;
    }
    let said = options.policy().judge(vec![said]).ok()?;
    Some(OtherWay { options, said, found: problems.clone() })
}

/// Where the other way is refused as well, both reasons.
fn say_both(outcome: &mut Outcome, found: Vec<Problem>) {
    let Outcome::Failed { cause, problems, .. } = outcome else { return };
    if let (Some(first), true) = (found.first(), problems.iter().any(Problem::is_refusal)) {
        *cause = format!("{first}; and inside QEMU's own stream: {cause}");
        problems.splice(0..0, found);
    }
}

/// There is no further try: what was held for one goes.
async fn release(context: &Context, held: Option<Held>, outcome: &mut Outcome) {
    if let Some(held) = held {
        add_leftovers(outcome, held.release(&context.host, &context.request.vm).await);
    }
}

/// Whether there is a further try after the `number`th of `of`.
fn verdict(ended: &Ended, number: u32, of: u32) -> Verdict {
    let Outcome::Failed { cancelled, leftovers, .. } = &ended.outcome else { return Verdict::Over(None) };
    if *cancelled || number >= of {
        return Verdict::Over(None);
    }
    if ended.handed_over {
        return Verdict::Over(Some("the guest had been handed over already"));
    }
    if !ended.may_pass {
        return Verdict::Over(Some("what it failed of does not pass by itself"));
    }
    if !leftovers.is_empty() {
        return Verdict::Over(Some("the roll-back did not leave everything as it was"));
    }
    Verdict::Again
}

/// The wait after `failed` tries: 1, 2, 4 … 60 s, a quarter more or less as `random` has it, so
/// that hosts which failed together do not come back together.
fn back_off(failed: u32, random: u32) -> Duration {
    let base =
        Duration::from_secs(1_u64.checked_shl(failed - 1).map_or(BACK_OFF_MAX_S, |s| s.min(BACK_OFF_MAX_S)));
    base.mul_f64(0.75 + 0.5 * f64::from(random) / f64::from(u32::MAX))
}

fn begin_try(progress: &ProgressSink, number: u32, of: u32, migration: Uuid) {
    progress.update(|p| {
        let last = p.tries.take();
        let earlier_stream_bytes = if number > 1 { p.stream_bytes() } else { 0 };
        if of > 1 {
            let last_failure = last.as_ref().and_then(|t| t.last_failure.clone());
            let before = last.map_or(0, |t| t.earlier_stream_bytes);
            let earlier_stream_bytes = before + earlier_stream_bytes;
            p.tries =
                Some(Tries { number, of, migration, next_in_ms: None, last_failure, earlier_stream_bytes });
        }
        p.phase = Phase::Begin;
        p.disks.clear();
        p.ram = None;
        p.rate_bytes_per_s = 0;
    });
    if number > 1 {
        tracing::info!(number, of, %migration, "a further try");
    }
}

/// The failure of a try that is not the last.
fn note_failure(progress: &ProgressSink, number: u32, of: u32, outcome: &Outcome) {
    let Outcome::Failed { phase, cause, .. } = outcome else { return };
    tracing::warn!(number, of, phase = phase.name(), cause, "this try failed; there is a further one");
    progress.update(|p| {
        p.notes.push(format!("try {number} of {of} failed in phase {}: {cause}", phase.name()));
        if let Some(tries) = &mut p.tries {
            tries.last_failure = Some(cause.clone());
        }
    });
}

/// Of what the journals tell of tries, what their operator is shown: the last one of each, under
/// the id of the first.
pub(crate) fn only_last(told: Vec<Progress>) -> Vec<Progress> {
    let is_last = |at: usize| told[at + 1..].iter().all(|p| (p.id, p.role) != (told[at].id, told[at].role));
    let last: Vec<_> = (0..told.len()).map(is_last).collect();
    told.into_iter().zip(last).filter_map(|(p, is_last)| is_last.then_some(p)).collect()
}

fn note_end(progress: &ProgressSink, number: u32, of: u32, why: Option<&str>) {
    if let Some(why) = why {
        progress.update(|p| p.notes.push(format!("not tried again after try {number} of {of}: {why}")));
    }
}

/// Somebody cancelled while the next try was waited for.
struct Interrupted;

fn random() -> u32 {
    let mut random = [0; 4];
    // Without randomness all hosts wait alike, which is no reason to give up.
    let _ = getrandom::fill(&mut random);
    u32::from_le_bytes(random)
}

async fn wait_until(
    until: Instant,
    progress: &ProgressSink,
    number: u32,
    cancel: &CancellationToken,
) -> Result<(), Interrupted> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        progress.update(|p| {
            p.phase = Phase::Begin;
            if let Some(tries) = &mut p.tries {
                (tries.number, tries.next_in_ms) = (number, Some(left.as_millis() as u64));
            }
        });
        tokio::select! {
            biased;
            () = cancel.cancelled() => return Err(Interrupted),
            () = sleep_until(until.min(Instant::now() + SHOW_EVERY)) => {}
        }
        if Instant::now() >= until {
            return Ok(());
        }
    }
}

fn given_up(host: &Host, number: u32, of: u32, last: &Outcome) -> Outcome {
    let failure = Failure::of_cancel(host);
    let before = match last {
        Outcome::Failed { cause, .. } => cause.as_str(),
        _ => "",
    };
    let cause =
        format!("{failure} while try {number} of {of} was waited for; the one before failed: {before}");
    failure.outcome(Phase::Begin, cause, Vec::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(may_pass: bool) -> Ended {
        let outcome = Outcome::Failed {
            phase: Phase::Mirror,
            cause: "the destination failed: it has gone".into(),
            problems: Vec::new(),
            cancelled: false,
            leftovers: Vec::new(),
        };
        Ended { phase: Phase::Failed, outcome, may_pass, handed_over: false, held: None }
    }

    #[test]
    fn only_what_may_pass_from_a_clean_state_is_tried_again() {
        assert_eq!(verdict(&ended(true), 1, 3), Verdict::Again);
        assert_eq!(verdict(&ended(true), 2, 3), Verdict::Again);
        assert_eq!(verdict(&ended(true), 3, 3), Verdict::Over(None), "exhausted");
        assert_eq!(verdict(&ended(true), 1, 1), Verdict::Over(None), "none was asked for");
        assert!(matches!(verdict(&ended(false), 1, 3), Verdict::Over(Some(_))));
        let handed = Ended { handed_over: true, ..ended(true) };
        assert!(matches!(verdict(&handed, 1, 3), Verdict::Over(Some(_))), "handed over");
        let mut unclean = ended(true);
        let mut asked = ended(true);
        if let (Outcome::Failed { leftovers, .. }, Outcome::Failed { cancelled, .. }) =
            (&mut unclean.outcome, &mut asked.outcome)
        {
            leftovers.push("job vmferry-disk0".to_owned().into());
            *cancelled = true;
        }
        assert!(matches!(verdict(&unclean, 1, 3), Verdict::Over(Some(_))), "something is left");
        assert_eq!(verdict(&asked, 1, 3), Verdict::Over(None), "cancelled");
        let moved = Ended { outcome: Outcome::Moved { leftovers: Vec::new() }, ..ended(true) };
        assert_eq!(verdict(&moved, 1, 3), Verdict::Over(None), "moved");
    }

    #[test]
    fn waits_double_up_to_a_minute_and_never_agree() {
        let middle = u32::MAX / 2;
        let seconds: Vec<_> = (1..=100).map(|n| back_off(n, middle).as_secs_f64().round() as u64).collect();
        assert_eq!(seconds[..8], [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(seconds[99], 60);
        assert_eq!((back_off(3, 0).as_millis(), back_off(3, u32::MAX).as_millis()), (3000, 5000));
    }
}
