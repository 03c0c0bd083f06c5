//! Why a migration failed, in words: the other side's, or QEMU's, where the source's own are only their
//! echo.

use std::time::Duration;

use super::failure::Failure;
use super::peer::Peer;
use super::state::Source;
use crate::migrate::model::problem::chain;
use crate::migrate::protocol::message::Notice;
use crate::qemu::Qmp;

/// How long the other side's word is waited for when ours is only an echo of it, with a guest that runs:
/// it may have to be asked of systemd.
const EXPLANATION_DEADLINE: Duration = Duration::from_secs(3);
/// The same while the guest stands still.
const PAUSED_DEADLINE: Duration = Duration::from_millis(700);

/// The cause in words; the other side's when ours is only the echo of it.
pub(crate) async fn explain(source: &mut Source, failure: &Failure) -> String {
    if matches!(failure, Failure::QemuGone(_)) || matches!(failure, Failure::Qmp(error) if error.is_over()) {
        return source.guest.end_of_qemu().await;
    }
    let own = chain(failure);
    if !failure.is_echo() {
        return own;
    }
    // QEMU itself lets the guest of a failed migration run again.
    let stands = source.clock.paused_at.is_some() && !matches!(failure, Failure::Ram { .. });
    let deadline = if stands { PAUSED_DEADLINE } else { EXPLANATION_DEADLINE };
    let (qmp, name) = (&source.guest.qmp, &source.context.request.peer);
    let told = told_by_others(&mut source.peer, name, qmp, failure);
    let mut told = tokio::time::timeout(deadline, told).await.ok().flatten();
    if source.guest.qmp.is_closed() {
        told = Some(source.guest.end_of_qemu().await);
    }
    match told {
        Some(told) if own.contains(&told) => own,
        Some(told) => format!("{told} ({own})"),
        None => own,
    }
}

/// What QEMU, the destination or the session's end says first; `None`: nothing more will be said.
async fn told_by_others(peer: &mut Peer, name: &str, qmp: &Qmp, failure: &Failure) -> Option<String> {
    let (link, lanes) = (&mut peer.link, &peer.lanes);
    let lost = async {
        let end = lanes.ended().await;
        format!("the session with {name} was lost: {}", chain(&end.cause))
    };
    let heard = async {
        loop {
            match link.notice().await {
                Ok(Notice::Failed { text }) => return Some(format!("the destination failed: {text}")),
                Ok(Notice::Loaded) => {}
                // The session's end is a moment behind that of its streams.
                Err(e) if e.is_session_lost() || failure.is_session_lost() => std::future::pending().await,
                Err(_) => return None,
            }
        }
    };
    tokio::select! {
        biased;
        () = qmp.closed() => Some(Failure::of_monitor(qmp).to_string()),
        heard = heard => heard,
        lost = lost => Some(lost),
    }
}

/// What the destination has said of its failure by the time that the guest was taken back.
pub(crate) fn explained_late(peer: &mut Peer, failure: &Failure, cause: String) -> String {
    match peer.link.take_failure() {
        Some(text) if failure.is_echo() && !cause.contains(&text) => {
            format!("the destination failed: {text} ({cause})")
        }
        _ => cause,
    }
}
