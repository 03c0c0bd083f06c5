//! What libvirt does not say of a failure: why connections came to nothing, and what became of the connection
//! between the hosts. In words, each once.

use super::state::Channel;
use crate::forward::Totals;
use crate::net::session::Session;

/// More would help nobody.
const CAUSES_MAX: usize = 16;

/// Adds a cause, if it has not been said.
pub(super) fn add(causes: &mut Vec<String>, cause: String) {
    if causes.len() < CAUSES_MAX && !causes.contains(&cause) {
        causes.push(cause);
    }
}

/// Why connections of one socket came to nothing.
pub(super) fn of_totals(channel: Channel, totals: &Totals, peer: &str) -> Vec<String> {
    totals
        .failed
        .keys()
        .map(|reason| format!("{}: {}", channel.file(), in_words(channel, reason, peer)))
        .collect()
}

/// By the reason's name in the metrics.
fn in_words(channel: Channel, reason: &str, peer: &str) -> String {
    let whose = if channel == Channel::Rpc { "libvirt" } else { "the domain's QEMU" };
    match reason {
        "no_target" | "denied" => format!("{peer} has taken away what it had prepared"),
        "target_absent" => format!("{whose} of {peer} has not made its socket, or has ended"),
        "target_refused" => format!("{whose} of {peer} does not listen any more"),
        "target_alone" => format!(
            "{whose} of {peer} waits for disks here and not for RAM: --migrateuri was changed or left out, and the \
             RAM would have gone past the tunnel, so the disks were refused"
        ),
        "target_timeout" => format!("{whose} of {peer} does not take connections"),
        "connect_failed" => format!(
            "the agent of {peer} may not connect to {whose}: see its log, and `vmferry libvirt check`"
        ),
        "session_lost" | "no_session" => format!("there was no connection to {peer}"),
        "timeout" => format!("{peer} did not answer in time"),
        "shutdown" => format!("the agent of {peer} was stopped"),
        other => format!("{peer} refused a connection ({other})"),
    }
}

/// What has become of the connection to the peer, if it is away or about to end.
pub(super) fn of_link(sessions: &[Session], peer: &str) -> Option<String> {
    let of_peer = sessions.iter().filter(|session| session.info().peer.as_str() == peer);
    let away = of_peer.filter_map(|session| session.link().away).next()?;
    Some(format!("the connection to {peer} was lost: {}", away.cause))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_has_words_for_its_operator() {
        let mut totals = Totals::default();
        assert_eq!(of_totals(Channel::Ram, &totals, "bravo"), Vec::<String>::new());
        totals.failed.insert("target_absent".into(), 3);
        let said = of_totals(Channel::Ram, &totals, "bravo");
        assert_eq!(said, ["ram.sock: the domain's QEMU of bravo has not made its socket, or has ended"]);
    }

    #[test]
    fn each_cause_is_kept_once_and_there_are_not_too_many() {
        let mut causes = Vec::new();
        for n in 0..100 {
            add(&mut causes, format!("cause {n}"));
            add(&mut causes, format!("cause {n}"));
        }
        assert_eq!(causes.len(), CAUSES_MAX);
    }
}
