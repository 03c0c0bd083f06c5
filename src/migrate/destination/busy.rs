//! How busy a destination is: the threads that decrypt what comes, and the QEMU that takes it in.

use std::time::Duration;

use tokio::time::Instant;

use crate::migrate::protocol::message::Busy;
use crate::net::cpu_time::CpuTime;

/// A share of less time says little.
const OVER: Duration = Duration::from_millis(500);

/// What was measured at one moment.
#[derive(Debug)]
pub(crate) struct Look {
    pub(super) at: Instant,
    /// Of each session's thread, in an order that stays while no session comes or goes.
    pub(super) agent: Vec<Option<CpuTime>>,
    pub(super) qemu: Option<CpuTime>,
}

impl Look {
    /// What happened since an earlier look; none when that was just now, or of other sessions.
    pub(super) fn since(&self, before: &Self) -> Option<Busy> {
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
