//! How long a migration waits while its session, or one of its lanes, has no connection.
//!
//! While the guest runs there is time: nothing is lost by waiting, and the session itself ends
//! when it has waited for long enough. While the guest is paused the waiting is downtime, so it is
//! given up sooner and the guest runs on where it was. Decides nothing after the hand-over: there
//! giving up wins nothing.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout};

use super::failure::Failure;
use crate::migrate::host::Host;
use crate::migrate::model::problem::chain;
use crate::migrate::model::progress::{ProgressSink, Reconnecting};
use crate::net::lanes::Lanes;
use crate::qemu::{Qmp, QmpError, Silence};

/// Between two words on a connection that is waited for.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// A QEMU that takes this long to answer is called slow.
const SLOW_AFTER: Duration = Duration::from_secs(5);

/// So often QEMU is looked at, or asked, again because the view of it was lost.
pub(super) const LOOKS_MAX: u32 = 100;

/// What is said of a QEMU that does not answer.
fn slow(silence: &Silence) -> String {
    let seconds = silence.since.elapsed().as_secs();
    let lost = silence.lost.as_ref().map_or_else(String::new, |lost| format!(" ({lost}; connecting again)"));
    format!("the source's QEMU is slow: its monitor has not answered for {seconds} s{lost}")
}

/// Asks until there is an answer: one that was lost with the monitor's connection says nothing, and a question
/// changes nothing.
async fn until_answered<T, F>(mut question: impl FnMut() -> F) -> Result<T, Failure>
where
    F: Future<Output = Result<T, QmpError>>,
{
    for _ in 0..LOOKS_MAX {
        match question().await {
            Err(e) if e.is_interrupted() => tracing::info!(error = chain(&e), "QEMU is asked again"),
            answered => return Ok(answered?),
        }
    }
    Err(Failure::MonitorUnsteady(LOOKS_MAX))
}

/// What a migration's waits have in common. Borrows nothing of it.
#[derive(Debug, Clone)]
pub(crate) struct ReconnectPolicy {
    host: Arc<Host>,
    lanes: Lanes,
    progress: ProgressSink,
    /// For how long at most; `None`: for as long as the session lives.
    limit: Option<Duration>,
    /// The source's QEMU, and for how long its monitor is missed.
    monitor: Option<(Qmp, Duration)>,
}

impl ReconnectPolicy {
    /// With a guest that stands still if `limit` is given.
    pub(crate) fn new(
        host: &Arc<Host>,
        lanes: &Lanes,
        progress: &ProgressSink,
        limit: Option<Duration>,
    ) -> Self {
        Self {
            host: Arc::clone(host),
            lanes: lanes.clone(),
            progress: progress.clone(),
            limit,
            monitor: None,
        }
    }

    /// Waits for a lost monitor as well, for so long.
    pub(crate) fn for_monitor(self, qmp: &Qmp, limit: Duration) -> Self {
        Self { monitor: Some((qmp.clone(), limit)), ..self }
    }

    /// Runs `work` for as long as it is waited for.
    pub(crate) async fn with<T, E>(self, work: impl Future<Output = Result<T, E>>) -> Result<T, Failure>
    where
        Failure: From<E>,
    {
        tokio::select! {
            biased;
            done = work => Ok(done?),
            failure = self.over() => Err(failure),
        }
    }

    /// As [`ReconnectPolicy::with`], for a question to QEMU: one whose answer was lost is asked again.
    pub(crate) async fn ask<T, F>(self, question: impl FnMut() -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, QmpError>>,
    {
        self.with(until_answered(question)).await
    }

    /// As [`ReconnectPolicy::with`], for work that must not stop half way when another process is to go
    /// on: it ends soon.
    pub(crate) async fn until_done<T, E>(self, work: impl Future<Output = Result<T, E>>) -> Result<T, Failure>
    where
        Failure: From<E>,
    {
        tokio::select! {
            biased;
            done = work => Ok(done?),
            failure = self.missed() => Err(failure),
        }
    }

    /// Tells the progress of a QEMU that does not answer, for as long as `work` takes.
    pub(crate) async fn tell_while<T>(self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        loop {
            match timeout(TELL_EVERY, &mut work).await {
                Ok(done) => return done,
                Err(_) => drop(self.look_at_monitor()),
            }
        }
    }

    /// Waits until it is waited for no longer, or another process is to go on.
    pub(crate) async fn over(self) -> Failure {
        let frozen = self.host.freeze.begun();
        tokio::select! {
            biased;
            () = frozen => Failure::Frozen,
            failure = self.missed() => failure,
        }
    }

    /// Waits until it is waited for no longer, and tells the progress of a connection that is missed.
    async fn missed(self) -> Failure {
        let mut links = self.lanes.watch();
        loop {
            let away = links.away();
            let word = away.as_ref().map(Reconnecting::from);
            if self.progress.now().reconnecting != word {
                self.progress.update(|p| p.reconnecting = word);
            }
            let end = away.as_ref().and_then(|away| Some(Instant::from_std(away.since) + self.limit?));
            if let Some(away) = away.as_ref().filter(|_| end.is_some_and(|end| end <= Instant::now())) {
                let seconds = away.since.elapsed().as_secs();
                return Failure::Away { seconds, cause: away.cause.clone() };
            }
            if let Some(failure) = self.look_at_monitor() {
                return failure;
            }
            let next = Instant::now() + TELL_EVERY;
            let looks = away.is_some() || self.monitor.is_some();
            tokio::select! {
                () = links.changed() => {}
                () = sleep_until(end.map_or(next, |end| end.min(next))), if looks => {}
            }
        }
    }

    /// Tells the progress of a QEMU that does not answer; a failure when it was away for too long.
    fn look_at_monitor(&self) -> Option<Failure> {
        let (qmp, limit) = self.monitor.as_ref()?;
        let silence = qmp.silence().filter(|s| s.since.elapsed() >= SLOW_AFTER);
        let word = silence.as_ref().map(slow);
        if self.progress.now().slow != word {
            if let (Some(word), None) = (&word, &self.progress.now().slow) {
                tracing::warn!("{word}");
            }
            self.progress.update(|p| p.slow = word);
        }
        let Silence { since, lost } = silence?;
        // A command that waits has a deadline of its own.
        let cause = lost?;
        (since.elapsed() > *limit).then(|| Failure::MonitorLost { seconds: since.elapsed().as_secs(), cause })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost() -> QmpError {
        QmpError::Disconnected { name: "qom-list", path: "/qmp".into(), source: None }
    }

    /// Asks a QEMU that gives these answers; how often it was asked, and what came of it.
    async fn asked(mut answers: Vec<Result<u32, QmpError>>) -> (usize, Result<u32, Failure>) {
        let before = answers.len();
        let question = || std::future::ready(answers.pop().unwrap_or_else(|| Err(lost())));
        let answered = until_answered(question).await;
        (before - answers.len(), answered)
    }

    #[tokio::test]
    async fn a_question_whose_answer_was_lost_is_asked_again() {
        let refused =
            || QmpError::Command { name: "qom-list", class: "GenericError".into(), desc: "no".into() };
        assert!(matches!(asked(vec![Ok(7), Err(lost()), Err(lost())]).await, (3, Ok(7))));
        assert!(
            matches!(asked(vec![Ok(7), Err(refused())]).await, (1, Err(Failure::Qmp(e))) if !e.is_over())
        );
        let (_, unsteady) = asked(Vec::new()).await;
        assert!(matches!(unsteady, Err(Failure::MonitorUnsteady(LOOKS_MAX))), "{unsteady:?}");
    }
}
