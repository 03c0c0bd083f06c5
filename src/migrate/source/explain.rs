//! Why a migration failed, in words: the other side's, or QEMU's, where the source's own are only their
//! echo.

use std::time::Duration;

use super::Source;
use crate::migrate::failure::Failure;
use crate::migrate::message::Notice;
use crate::migrate::problem::chain;

/// How long the other side's word is waited for when ours is only an echo of it.
const EXPLANATION_DEADLINE: Duration = Duration::from_millis(700);

impl Source {
    /// The cause in words; the other side's when ours is only the echo of it.
    pub(super) async fn explain(&mut self, failure: &Failure) -> String {
        if let Failure::Qmp(error) = failure
            && error.is_over()
        {
            return Failure::of_monitor(&self.qmp).to_string();
        }
        if !failure.is_echo() {
            return chain(failure);
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
        let told = tokio::time::timeout(EXPLANATION_DEADLINE, either).await.ok().flatten();
        match told {
            Some(told) if own.contains(&told) => own,
            Some(told) => format!("{told} ({own})"),
            None => own,
        }
    }
}
