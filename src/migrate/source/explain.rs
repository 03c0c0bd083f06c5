//! Why a migration failed, in words: the other side's, or QEMU's, where the source's own are only their
//! echo.

use std::time::Duration;

use super::Source;
use super::failure::Failure;
use crate::migrate::model::problem::chain;
use crate::migrate::protocol::message::Notice;

/// How long the other side's word is waited for when ours is only an echo of it, with a guest that runs:
/// it may have to be asked of systemd.
const EXPLANATION_DEADLINE: Duration = Duration::from_secs(3);
/// The same while the guest stands still.
const PAUSED_DEADLINE: Duration = Duration::from_millis(700);

impl Source {
    /// The cause in words; the other side's when ours is only the echo of it.
    pub(crate) async fn explain(&mut self, failure: &Failure) -> String {
        if let Failure::Qmp(error) = failure
            && error.is_over()
        {
            return self.end_of_qemu().await;
        }
        if !failure.is_echo() {
            return match failure {
                Failure::QemuGone(_) => self.end_of_qemu().await,
                other => chain(other),
            };
        }
        let own = chain(failure);
        let (link, lanes, peer) = (&mut self.link, &self.lanes, &self.request.peer);
        let lost = async {
            let end = lanes.ended().await;
            format!("the session with {peer} was lost: {}", chain(&end.cause))
        };
        let heard = async {
            loop {
                match link.notice().await {
                    Ok(Notice::Failed { text }) => return Some(format!("the destination failed: {text}")),
                    Ok(Notice::Loaded) => {}
                    // The session's end is a moment behind that of its streams.
                    Err(e) if e.is_session_lost() || failure.is_session_lost() => {
                        std::future::pending().await
                    }
                    Err(_) => return None,
                }
            }
        };
        let either = async {
            tokio::select! {
                biased;
                () = self.qmp.closed() => Some(Failure::of_monitor(&self.qmp).to_string()),
                heard = heard => heard,
                lost = lost => Some(lost),
            }
        };
        // QEMU itself lets the guest of a failed migration run again.
        let stands = self.paused_at.is_some() && !matches!(failure, Failure::Ram { .. });
        let deadline = if stands { PAUSED_DEADLINE } else { EXPLANATION_DEADLINE };
        let mut told = tokio::time::timeout(deadline, either).await.ok().flatten();
        if self.qmp.is_closed() {
            told = Some(self.end_of_qemu().await);
        }
        match told {
            Some(told) if own.contains(&told) => own,
            Some(told) => format!("{told} ({own})"),
            None => own,
        }
    }

    /// How the source's own QEMU ended, with its last words if that is proved.
    async fn end_of_qemu(&self) -> String {
        match Failure::of_monitor(&self.qmp) {
            gone @ Failure::QemuGone(_) => format!("{gone}{}", self.last_words.heard(None).await),
            other => other.to_string(),
        }
    }

    /// What the destination has said of its failure by the time that the guest was taken back.
    pub(crate) fn explained_late(&mut self, failure: &Failure, cause: String) -> String {
        match self.link.take_failure() {
            Some(text) if failure.is_echo() && !cause.contains(&text) => {
                format!("the destination failed: {text} ({cause})")
            }
            _ => cause,
        }
    }
}
