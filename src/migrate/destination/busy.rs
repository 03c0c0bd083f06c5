//! Tells the source how busy this side is: the threads that decrypt what comes, and the QEMU that takes it in.

use std::time::Duration;

use tokio::time::Instant;

use super::state::Destination;
use crate::migrate::model::phase::Phase;
use crate::migrate::protocol::message::{Busy, Reply};
use crate::net::cpu_time::CpuTime;

/// A share of less time says little.
const OVER: Duration = Duration::from_millis(500);

/// What was measured at one moment.
#[derive(Debug)]
pub(crate) struct Look {
    at: Instant,
    /// Of each session's thread, in an order that stays while no session comes or goes.
    agent: Vec<Option<CpuTime>>,
    qemu: Option<CpuTime>,
}

impl Look {
    /// What happened since an earlier look; none when that was just now, or of other sessions.
    fn since(&self, before: &Self) -> Option<Busy> {
        let long = self.at.duration_since(before.at);
        if long < OVER || self.agent.len() != before.agent.len() {
            return None;
        }
        let share = |now: Option<CpuTime>, before: Option<CpuTime>| Some(now?.permille_since(before?, long));
        let agent =
            self.agent.iter().zip(&before.agent).filter_map(|(now, before)| share(*now, *before)).max();
        Some(Busy { agent, qemu: share(self.qemu, before.qemu) })
    }
}

impl Destination {
    /// Says it to a source that wants to know, while there is something to be slow with.
    pub(crate) async fn tell_busy(&mut self) {
        let hears = self.granted.as_ref().is_some_and(|(offer, _)| offer.hears_busy);
        let comes = matches!(self.progress.now().phase, Phase::Mirror | Phase::Precopy);
        // What a source does not read would be kept here.
        let reads = self.serving.control.as_ref().is_some_and(|control| control.away().is_none());
        if !(hears && comes && reads) {
            self.serving.busy = None;
            return;
        }
        let mut agent = Vec::new();
        for session in self.data.streams.sessions() {
            agent.push(session.cpu_time().await);
        }
        let qemu = self.guest.qmp.process().pid().and_then(CpuTime::of_process);
        let now = Look { at: Instant::now(), agent, qemu };
        let Some(before) = &self.serving.busy else {
            self.serving.busy = Some(now);
            return;
        };
        let busy = now.since(before);
        if busy.is_some() || now.agent.len() != before.agent.len() {
            self.serving.busy = Some(now);
        }
        if let (Some(busy), Some(control)) = (busy, &mut self.serving.control) {
            control.say(Reply::Busy(busy)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_busiest_thread_counts_over_long_enough_a_time() {
        let ms = Duration::from_millis;
        let begin = Instant::now();
        let look = |after, agent: &[Option<u64>], qemu: Option<u64>| {
            let time = |used: u64| CpuTime { used: ms(used), waited: ms(used) };
            Look {
                at: begin + ms(after),
                agent: agent.iter().map(|used| used.map(time)).collect(),
                qemu: qemu.map(time),
            }
        };
        let first = look(0, &[Some(10), Some(20), None], Some(5));
        let later = look(1000, &[Some(110), Some(420), Some(900)], Some(55));
        assert_eq!(later.since(&first), Some(Busy { agent: Some(800), qemu: Some(100) }));
        assert_eq!(look(400, &[Some(110), None, None], None).since(&first), None, "too short");
        assert_eq!(look(1000, &[Some(110)], Some(5)).since(&first), None, "other sessions");
        let unknown = look(1000, &[None, None, None], None);
        assert_eq!(unknown.since(&first), Some(Busy::default()), "the kernel does not tell");
    }
}
