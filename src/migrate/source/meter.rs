//! What holds a migration up, measured over some seconds: who waits for whom, from look to look.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::migrate::model::label::Label;
use crate::migrate::model::slowness::{Copied, HeldUp, Measured, held_up_by};
use crate::net::cpu_time::CpuTime;
use crate::net::waits::Waited;

/// Over so long at least.
const OVER: Duration = Duration::from_secs(2);
/// Fewer looks say nothing of how often something was on its way.
const LOOKS_MIN: u64 = 4;

/// Counters at one moment.
#[derive(Debug, Default)]
pub(crate) struct Look {
    pub(crate) is_away: bool,
    pub(crate) outrun: bool,
    /// For how long a limit has kept what could have been sent, over all lanes; none where there is none.
    pub(crate) held: Option<Duration>,
    /// The other agent has not said yet that it has all that was sent.
    pub(crate) on_its_way: bool,
    /// Of each lane's thread.
    pub(crate) agent: Vec<Option<CpuTime>>,
    pub(crate) qemu: Option<CpuTime>,
    /// What the destination has said of itself since the look before, in thousandths.
    pub(crate) destination: Option<u64>,
    /// Of the streams that are at work.
    pub(crate) waited: BTreeMap<Label, Waited>,
}

/// The last looks.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    first: Option<(Instant, Look)>,
    looks: u64,
    on_its_way: u64,
    /// What the destination has said since the first of them.
    destination: Said,
}

/// The mean of what was said.
#[derive(Debug, Clone, Copy, Default)]
struct Said {
    times: u64,
    sum: u64,
}

impl Said {
    fn add(&mut self, permille: u64) {
        (self.times, self.sum) = (self.times + 1, self.sum.saturating_add(permille.min(1000)));
    }

    fn mean(self) -> Option<u64> {
        self.sum.checked_div(self.times)
    }
}

impl Meter {
    /// What it is held up by, whenever enough was seen.
    pub(crate) fn look(&mut self, now: Instant, look: Look) -> Option<HeldUp> {
        if look.is_away {
            *self = Self::default();
            return Some(HeldUp::Reconnecting);
        }
        self.looks += 1;
        self.on_its_way += u64::from(look.on_its_way);
        if let Some(permille) = look.destination {
            self.destination.add(permille);
        }
        let Some((since, first)) = &self.first else {
            *self = Self { first: Some((now, look)), ..Self::default() };
            return None;
        };
        let long = now.duration_since(*since);
        if long < OVER || self.looks < LOOKS_MIN {
            return None;
        }
        let on_its_way = self.on_its_way * 1000 / self.looks;
        let measured = measured(first, &look, long, (on_its_way, self.destination.mean()));
        *self = Self { first: Some((now, look)), ..Self::default() };
        Some(measured.map_or(HeldUp::Unknown, |measured| held_up_by(&measured)))
    }
}

/// None where no stream was at work all the time.
fn measured(
    first: &Look,
    last: &Look,
    long: Duration,
    (on_its_way, destination_busy): (u64, Option<u64>),
) -> Option<Measured> {
    let both =
        last.waited.iter().filter_map(|(label, now)| Some((label, now.since(*first.waited.get(label)?))));
    let streams: Vec<_> = both.collect();
    let count = u128::try_from(streams.len()).ok().filter(|count| *count > 0)?;
    let share = |part: fn(&Waited) -> Duration| {
        let sum: Duration = streams.iter().map(|(_, waited)| part(waited)).sum();
        let share = (sum.as_nanos() * 1000).checked_div(long.as_nanos() * count);
        share.map_or(0, |share| share.min(1000) as u64)
    };
    let held = last.held.map_or(Duration::ZERO, |held| held.saturating_sub(first.held.unwrap_or(held)));
    let lanes = first.agent.iter().zip(&last.agent);
    let busy =
        |(first, last): (&Option<CpuTime>, &Option<CpuTime>)| Some((*last)?.permille_since((*first)?, long));
    Some(Measured {
        copied: if streams.iter().any(|(label, _)| **label == Label::Ram) {
            Copied::Ram
        } else {
            Copied::Disks
        },
        is_away: false,
        outrun: last.outrun,
        limited: (held.as_nanos() * 1000)
            .checked_div(long.as_nanos())
            .map_or(0, |share| share.min(1000) as u64),
        agent_busy: lanes.filter_map(busy).max(),
        qemu_busy: busy((&first.qemu, &last.qemu)),
        destination_busy,
        session: share(|waited| waited.session),
        local: share(|waited| waited.local),
        answer: share(|waited| waited.answer),
        on_its_way,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUARTER: Duration = Duration::from_millis(250);

    /// Looks for some seconds at streams that wait so long of each second.
    fn run(name: &str, of_a_second: Waited, change: impl Fn(u32, &mut Look)) -> Vec<HeldUp> {
        let (mut meter, begin) = (Meter::default(), Instant::now());
        let looks = (0..24).filter_map(|n| {
            let long = QUARTER * n;
            let part = |wait: Duration| wait * n / 4;
            let Waited { session, local, answer } = of_a_second;
            let waited = Waited { session: part(session), local: part(local), answer: part(answer) };
            let label = if name == "RAM" { Label::Ram } else { Label::Disk(name.into()) };
            let mut look = Look { waited: BTreeMap::from([(label, waited)]), ..Look::default() };
            change(n, &mut look);
            meter.look(begin + long, look)
        });
        looks.collect()
    }

    #[test]
    fn counters_become_causes_every_two_seconds() {
        let ms = Duration::from_millis;
        let answers = Waited { answer: ms(900), ..Waited::default() };
        assert_eq!(run("vda", answers, |_, _| {}), [HeldUp::DestinationDisk; 2]);
        assert_eq!(run("vda", answers, |_, look| look.on_its_way = true), [HeldUp::Network; 2]);
        let held = |n, look: &mut Look| look.held = Some(QUARTER * n);
        assert_eq!(run("vda", answers, held), [HeldUp::Limit; 2]);
        let busy =
            |n, look: &mut Look| look.agent = vec![None, Some(CpuTime { used: QUARTER * n, waited: ms(0) })];
        assert_eq!(run("vda", answers, busy), [HeldUp::SourceCpu; 2]);
        let busy_there = |n: u32, look: &mut Look| look.destination = (n % 4 == 1).then_some(1000);
        assert_eq!(run("vda", answers, busy_there), [HeldUp::DestinationCpu; 2]);
        let half = |n: u32, look: &mut Look| look.destination = Some(if n % 2 == 1 { 1000 } else { 300 });
        assert_eq!(run("vda", answers, half), [HeldUp::DestinationDisk; 2], "busy half of the time");
        let was = |n: u32, look: &mut Look| look.destination = (n == 1).then_some(1000);
        assert_eq!(
            run("vda", answers, was),
            [HeldUp::DestinationCpu, HeldUp::DestinationDisk],
            "an old word does not count"
        );
        let gives = Waited { local: ms(800), ..Waited::default() };
        assert_eq!(run("vda", gives, |_, _| {}), [HeldUp::SourceDisk; 2]);
        assert_eq!(run("RAM", gives, |_, _| {}), [HeldUp::SourceCpu; 2]);
        assert_eq!(run("vda", gives, |_, look| look.waited.clear()), [HeldUp::Unknown; 2]);
        let away = run("vda", gives, |n, look| look.is_away = n < 12);
        assert_eq!(away[..12], [HeldUp::Reconnecting; 12]);
        assert_eq!(away[12..], [HeldUp::SourceDisk], "measured anew since");
    }
}
