//! What a migration has been through: its phases, how its streams got on, and what it has waited for. Bounded:
//! what becomes too much is thinned out or counted. Knows no clock.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::phase::Phase;
use super::slowness::HeldUp;

/// Samples that are kept. When there are more, every second one goes.
const SAMPLES_MAX: usize = 240;
/// Milliseconds between two samples at first.
const SAMPLE_EVERY_MS: u64 = 250;
/// Streams that are told apart; the disks after these are one.
const STREAMS_MAX: usize = 32;
/// Phases, waits and restarts that are kept, of each; the first ones.
const EVENTS_MAX: usize = 200;

/// What a migration waits for while nothing moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Waiting {
    /// For the connection to the other host.
    Connection,
    /// For QEMU, which does not answer.
    Qemu,
    /// For its next try.
    NextTry,
}

impl Waiting {
    pub const ALL: [Self; 3] = [Self::Connection, Self::Qemu, Self::NextTry];

    /// A label for metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Connection => "connection",
            Self::Qemu => "qemu",
            Self::NextTry => "next_try",
        }
    }
}

/// A migration at one moment, as far as it is of interest here.
#[derive(Debug, Clone)]
pub struct Moment<'a> {
    pub phase: Phase,
    /// What it waits for, and in words.
    pub waiting: Option<(Waiting, Option<&'a str>)>,
    /// Why the copying that it is at is not faster.
    pub held_up_by: Option<HeldUp>,
    pub rate_bytes_per_s: u64,
    /// By name.
    pub disks: Vec<(&'a str, StreamSample)>,
    pub ram: Option<StreamSample>,
    /// Whether it has ended.
    pub is_over: bool,
}

impl Moment<'_> {
    fn carried(&self) -> Carried {
        Carried {
            disk: self.disks.iter().fold(0, |sum, (_, disk)| sum.saturating_add(disk.stream_bytes)),
            ram: self.ram.map_or(0, |ram| ram.stream_bytes),
        }
    }
}

/// The beginning of a phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Entered {
    pub phase: Phase,
    /// Milliseconds after the migration's beginning, as everywhere here.
    pub at_ms: u64,
}

/// A time in which it waited.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Wait {
    /// What for.
    pub cause: Waiting,
    pub from_ms: u64,
    /// None while it lasts.
    pub to_ms: Option<u64>,
    /// In words, where there are any.
    pub text: Option<String>,
}

/// One stream at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StreamSample {
    pub done_bytes: u64,
    pub remaining_bytes: u64,
    /// On the wire, both directions.
    pub stream_bytes: u64,
}

/// All streams at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Sample {
    pub at_ms: u64,
    pub rate_bytes_per_s: u64,
    /// In the order of [`Timeline::streams`].
    pub streams: Vec<StreamSample>,
}

/// Bytes on the wire by what they carry, both directions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carried {
    pub disk: u64,
    pub ram: u64,
}

/// What nobody has counted yet.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Uncounted {
    pub bytes: Carried,
    /// Milliseconds.
    pub waited: BTreeMap<Waiting, u64>,
    /// Milliseconds.
    pub held_up: BTreeMap<HeldUp, u64>,
    /// Phases that are over, in milliseconds.
    pub phases: Vec<(Phase, u64)>,
}

/// All of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    pub phases: Vec<Entered>,
    pub waits: Vec<Wait>,
    /// When another process of the agent went on with it.
    pub restarts_ms: Vec<u64>,
    /// Phases and waits that are not among those above.
    pub left_out: u64,
    /// Names of the streams; disks first.
    pub streams: Vec<String>,
    pub samples: Vec<Sample>,
    /// Milliseconds between two samples, about.
    pub sample_every_ms: u64,
    /// Milliseconds of copying by what held it up, as it was measured last; the part that lasts is not in it.
    #[serde(default)]
    pub held_up_ms: BTreeMap<HeldUp, u64>,
    #[serde(default)]
    account: Account,
}

/// For whoever counts: what there is in all, and what of it was counted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Account {
    in_all: Carried,
    /// Of this try, as it was seen last.
    of_try: Carried,
    counted: Carried,
    waited_ms: BTreeMap<Waiting, u64>,
    waited_counted_ms: BTreeMap<Waiting, u64>,
    #[serde(default)]
    held_up_counted_ms: BTreeMap<HeldUp, u64>,
    #[serde(default)]
    held_up: Option<(HeldUp, u64)>,
    phases: Vec<(Phase, u64)>,
    /// When the phase, a byte or a word of its progress changed last.
    moved_at_ms: u64,
    phase: Option<(Phase, u64)>,
    waiting: Option<(Waiting, u64)>,
}

impl Timeline {
    /// One that begins now. What has moved before is not counted.
    pub fn begin(now_ms: u64, now: &Moment<'_>) -> Self {
        let account = Account { of_try: now.carried(), moved_at_ms: now_ms, ..Account::default() };
        let mut timeline = Self { account, ..Self::default() };
        timeline.note(now_ms, now);
        timeline
    }

    /// Takes note of how it is now, `now_ms` after its beginning.
    pub fn note(&mut self, now_ms: u64, now: &Moment<'_>) {
        self.note_phase(now_ms, now.phase);
        self.note_wait(now_ms, now.waiting);
        self.note_held_up(now_ms, now.held_up_by);
        self.note_bytes(now_ms, now.carried());
        let due = self.samples.last().is_none_or(|last| now_ms >= last.at_ms + self.sample_every_ms);
        if due && !now.is_over {
            self.sample(now_ms, now);
        }
    }

    /// Another process has gone on with it.
    pub fn note_restart(&mut self, now_ms: u64) {
        push(&mut self.restarts_ms, now_ms, &mut self.left_out);
    }

    /// Milliseconds in which neither phase nor bytes have changed.
    pub fn idle_ms(&self, now_ms: u64) -> u64 {
        now_ms.saturating_sub(self.account.moved_at_ms)
    }

    /// Milliseconds in the phase that it is in.
    pub fn phase_ms(&self, now_ms: u64) -> u64 {
        self.account.phase.map_or(0, |(_, since)| now_ms.saturating_sub(since))
    }

    /// What nobody has counted yet, and from now on somebody has.
    pub fn take_uncounted(&mut self, now_ms: u64) -> Uncounted {
        let account = &mut self.account;
        let Carried { disk, ram } = account.in_all;
        let bytes = Carried { disk: disk - account.counted.disk, ram: ram - account.counted.ram };
        account.counted = account.in_all;
        let waited = with_open(&account.waited_ms, account.waiting, now_ms);
        let held_up = with_open(&self.held_up_ms, account.held_up, now_ms);
        Uncounted {
            bytes,
            waited: grown(&mut account.waited_counted_ms, waited),
            held_up: grown(&mut account.held_up_counted_ms, held_up),
            phases: std::mem::take(&mut account.phases),
        }
    }

    /// Milliseconds of copying by what held it up, what lasts included.
    pub fn held_up_until(&self, now_ms: u64) -> BTreeMap<HeldUp, u64> {
        with_open(&self.held_up_ms, self.account.held_up, now_ms)
    }

    fn note_held_up(&mut self, now_ms: u64, now: Option<HeldUp>) {
        let before = self.account.held_up;
        if before.map(|(cause, _)| cause) != now {
            self.held_up_ms = with_open(&self.held_up_ms, before, now_ms);
            self.account.held_up = now.map(|cause| (cause, now_ms));
        }
    }

    fn note_phase(&mut self, now_ms: u64, phase: Phase) {
        let before = self.account.phase;
        if before.is_some_and(|(last, _)| last == phase) {
            return;
        }
        if let Some((last, since)) = before
            && self.account.phases.len() < EVENTS_MAX
        {
            self.account.phases.push((last, now_ms.saturating_sub(since)));
        }
        (self.account.phase, self.account.moved_at_ms) = (Some((phase, now_ms)), now_ms);
        push(&mut self.phases, Entered { phase, at_ms: now_ms }, &mut self.left_out);
    }

    fn note_wait(&mut self, now_ms: u64, now: Option<(Waiting, Option<&str>)>) {
        let before = self.account.waiting;
        if before.map(|(cause, _)| cause) == now.map(|(cause, _)| cause) {
            return;
        }
        if let Some((cause, since)) = before {
            *self.account.waited_ms.entry(cause).or_default() += now_ms.saturating_sub(since);
            if let Some(open) = self.waits.last_mut().filter(|wait| wait.to_ms.is_none()) {
                open.to_ms = Some(now_ms);
            }
        }
        self.account.waiting = now.map(|(cause, _)| (cause, now_ms));
        if let Some((cause, text)) = now {
            let wait = Wait { cause, from_ms: now_ms, to_ms: None, text: text.map(str::to_owned) };
            push(&mut self.waits, wait, &mut self.left_out);
        }
    }

    fn note_bytes(&mut self, now_ms: u64, now: Carried) {
        let account = &mut self.account;
        // A further try counts from zero.
        let grown = |now: u64, before: u64| if now < before { now } else { now - before };
        account.in_all.disk += grown(now.disk, account.of_try.disk);
        account.in_all.ram += grown(now.ram, account.of_try.ram);
        if now != account.of_try {
            (account.of_try, account.moved_at_ms) = (now, now_ms);
        }
    }

    fn sample(&mut self, at_ms: u64, now: &Moment<'_>) {
        self.sample_every_ms = self.sample_every_ms.max(SAMPLE_EVERY_MS);
        let ram = now.ram.map(|ram| (RAM, ram));
        let all: Vec<_> = now.disks.iter().copied().chain(ram).collect();
        let places: Vec<usize> = all.iter().map(|(name, _)| self.place(name)).collect();
        let mut streams = vec![StreamSample::default(); self.streams.len()];
        for ((_, stream), at) in all.into_iter().zip(places) {
            if let Some(sum) = streams.get_mut(at) {
                sum.done_bytes = sum.done_bytes.saturating_add(stream.done_bytes);
                sum.remaining_bytes = sum.remaining_bytes.saturating_add(stream.remaining_bytes);
                sum.stream_bytes = sum.stream_bytes.saturating_add(stream.stream_bytes);
            }
        }
        self.samples.push(Sample { at_ms, rate_bytes_per_s: now.rate_bytes_per_s, streams });
        if self.samples.len() > SAMPLES_MAX {
            let mut number = 0;
            self.samples.retain(|_| {
                number += 1;
                number % 2 == 1
            });
            self.sample_every_ms *= 2;
        }
    }

    /// The place of a stream; those beyond the last share it.
    fn place(&mut self, name: &str) -> usize {
        match self.streams.iter().position(|known| known == name) {
            Some(at) => at,
            None if self.streams.len() < STREAMS_MAX => {
                self.streams.push(name.to_owned());
                self.streams.len() - 1
            }
            None => STREAMS_MAX - 1,
        }
    }
}

/// Milliseconds by cause, with those of a cause that lasts.
fn with_open<T: Copy + Ord>(
    done: &BTreeMap<T, u64>,
    open: Option<(T, u64)>,
    now_ms: u64,
) -> BTreeMap<T, u64> {
    let mut all = done.clone();
    if let Some((cause, since)) = open {
        *all.entry(cause).or_default() += now_ms.saturating_sub(since);
    }
    all
}

/// What has come to what was counted, which is all from now on.
fn grown<T: Copy + Ord>(counted: &mut BTreeMap<T, u64>, mut now: BTreeMap<T, u64>) -> BTreeMap<T, u64> {
    let before = std::mem::replace(counted, now.clone());
    for (cause, ms) in &mut now {
        *ms = ms.saturating_sub(before.get(cause).copied().unwrap_or(0));
    }
    now
}

/// The name of the RAM's stream.
pub const RAM: &str = "RAM";

fn push<T>(list: &mut Vec<T>, item: T, left_out: &mut u64) {
    if list.len() < EVENTS_MAX { list.push(item) } else { *left_out += 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(phase: Phase, stream_bytes: u64) -> Moment<'static> {
        let remaining_bytes = 1000_u64.saturating_sub(stream_bytes);
        let disk = StreamSample { done_bytes: stream_bytes, remaining_bytes, stream_bytes };
        let disks = vec![("vda", disk)];
        Moment {
            phase,
            waiting: None,
            held_up_by: None,
            rate_bytes_per_s: 7,
            disks,
            ram: None,
            is_over: false,
        }
    }

    #[test]
    fn every_byte_wait_and_phase_is_counted_once_over_tries_and_restarts() {
        let mut timeline = Timeline::default();
        timeline.note(0, &at(Phase::Begin, 0));
        timeline.note(100, &at(Phase::Mirror, 0));
        timeline.note(600, &at(Phase::Mirror, 300));
        let first = timeline.take_uncounted(600);
        assert_eq!(first.bytes, Carried { disk: 300, ram: 0 });
        assert_eq!(first.phases, [(Phase::Begin, 100)]);
        let away = (Waiting::Connection, Some("reset"));
        timeline.note(700, &Moment { waiting: Some(away), ..at(Phase::Mirror, 300) });
        assert_eq!(timeline.take_uncounted(900).waited, [(Waiting::Connection, 200)].into());
        // The next process goes on with the same account.
        timeline.note_restart(900);
        timeline.note(1000, &at(Phase::Mirror, 400));
        assert_eq!(timeline.idle_ms(1500), 500);
        // A further try begins at zero again.
        timeline.note(1200, &Moment { waiting: Some((Waiting::NextTry, None)), ..at(Phase::Begin, 50) });
        let second = timeline.take_uncounted(1300);
        assert_eq!(second.bytes, Carried { disk: 150, ram: 0 });
        assert_eq!(second.waited, [(Waiting::Connection, 100), (Waiting::NextTry, 100)].into());
        assert_eq!(second.phases, [(Phase::Mirror, 1100)]);
        let none = [(Waiting::Connection, 0), (Waiting::NextTry, 0)].into();
        assert_eq!(timeline.take_uncounted(1300), Uncounted { waited: none, ..Uncounted::default() });
        assert_eq!(timeline.restarts_ms, [900]);
        assert_eq!(timeline.waits[0].to_ms, Some(1000));
    }

    #[test]
    fn what_held_the_copying_up_is_counted_once_and_only_while_it_copies() {
        let held = |by, bytes| Moment { held_up_by: Some(by), ..at(Phase::Mirror, bytes) };
        let mut timeline = Timeline::default();
        timeline.note(0, &at(Phase::Begin, 0));
        timeline.note(1000, &held(HeldUp::Limit, 0));
        timeline.note(3000, &held(HeldUp::Limit, 10));
        assert_eq!(timeline.take_uncounted(3500).held_up, [(HeldUp::Limit, 2500)].into());
        timeline.note(5000, &held(HeldUp::DestinationCpu, 20));
        // The next process goes on with the same account.
        let left = serde_json::to_string(&timeline).unwrap_or_default();
        let mut timeline: Timeline = serde_json::from_str(&left).unwrap_or_default();
        assert_eq!(
            timeline.held_up_until(6000),
            [(HeldUp::Limit, 4000), (HeldUp::DestinationCpu, 1000)].into()
        );
        timeline.note(6000, &at(Phase::Switchover, 20));
        let all = [(HeldUp::Limit, 1500), (HeldUp::DestinationCpu, 1000)].into();
        assert_eq!(timeline.take_uncounted(9000).held_up, all);
        assert_eq!(timeline.held_up_until(9000), timeline.held_up_ms);
    }

    #[test]
    fn however_long_it_takes_the_samples_are_few_and_cover_all_of_it() {
        let mut timeline = Timeline::default();
        for n in 0..100_000_u64 {
            timeline.note(n * 250, &at(Phase::Mirror, n));
        }
        let samples = &timeline.samples;
        assert!((SAMPLES_MAX / 2 - 1..=SAMPLES_MAX).contains(&samples.len()), "{}", samples.len());
        assert_eq!(samples[0].at_ms, 0);
        assert!(samples[samples.len() - 1].at_ms + 2 * timeline.sample_every_ms >= 99_999 * 250);
        assert!(samples.windows(2).all(|two| two[0].at_ms < two[1].at_ms));
    }

    #[test]
    fn what_is_too_much_is_counted_and_not_kept() {
        let mut timeline = Timeline::default();
        for n in 0..1000 {
            let phase = if n % 2 == 0 { Phase::Begin } else { Phase::Mirror };
            timeline.note(n, &at(phase, 0));
        }
        assert_eq!((timeline.phases.len(), timeline.left_out), (EVENTS_MAX, 800));
        let names: Vec<String> = (0..100).map(|n| format!("d{n}")).collect();
        let one = StreamSample { done_bytes: 1, ..StreamSample::default() };
        let disks = names.iter().map(|name| (name.as_str(), one)).collect();
        timeline.note(10_000, &Moment { disks, ..at(Phase::Mirror, 1) });
        assert_eq!(timeline.streams.len(), STREAMS_MAX);
        let last = timeline.samples.last().map(|sample| sample.streams.clone()).unwrap_or_default();
        // One that was there before is among them.
        assert_eq!(last.iter().map(|stream| stream.done_bytes).sum::<u64>(), 100);
        assert_eq!(last[STREAMS_MAX - 1].done_bytes, 70);
    }
}
