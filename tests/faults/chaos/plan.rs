//! What is broken, and when: drawn from the seed alone, before anything runs.

use std::fmt;
use std::time::Duration;

use super::rng::Rng;
use crate::faults::fault::Lasts;
use crate::faults::{Fault, Who};

/// All kinds.
pub const KINDS: [Fault; 38] = [
    Fault::Reset,
    Fault::LinkDown,
    Fault::LinkDownForEver,
    Fault::OneWay,
    Fault::Kill(Who::SourceAgent),
    Fault::Kill(Who::DestinationAgent),
    Fault::Kill(Who::BothAgents),
    Fault::Kill(Who::SourceQemu),
    Fault::Kill(Who::DestinationQemu),
    Fault::Kill(Who::CommandLine),
    Fault::Kill(Who::SourceHost),
    Fault::Kill(Who::DestinationHost),
    Fault::Stop(Who::SourceAgent),
    Fault::Stop(Who::DestinationAgent),
    Fault::Stop(Who::SourceQemu),
    Fault::Stop(Who::DestinationQemu),
    Fault::Terminate(Who::SourceAgent),
    Fault::Terminate(Who::DestinationAgent),
    Fault::Terminate(Who::BothAgents),
    Fault::Terminate(Who::DestinationQemu),
    Fault::Replace(Who::SourceAgent),
    Fault::Replace(Who::DestinationAgent),
    Fault::Replace(Who::BothAgents),
    Fault::SourceStateFull,
    Fault::DestinationStateFull,
    Fault::DestinationDiskFull,
    Fault::SlowDisk,
    Fault::SlowLink,
    Fault::MonitorCut(Who::SourceQemu),
    Fault::MonitorCut(Who::DestinationQemu),
    Fault::MonitorTaken(Who::SourceQemu),
    Fault::MonitorTaken(Who::DestinationQemu),
    Fault::EventFlood(Who::SourceQemu),
    Fault::EventFlood(Who::DestinationQemu),
    Fault::OperatorStops,
    Fault::OperatorStopsAndContinues,
    Fault::OperatorQuits,
    Fault::HotPlug,
];

/// The phases in which faults are to hit, in their order.
pub const PHASES: [&str; 7] =
    ["prepare", "mirror", "precopy", "switchover", "device", "hand-over", "confirm"];
const AROUND_THE_HAND_OVER: [&str; 4] = ["switchover", "device", "hand-over", "confirm"];

/// When it breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// Once the source is in this phase, as its agent says, or in a later one.
    pub phase: &'static str,
    /// So long after that.
    pub after_ms: u64,
    /// The migration is held: before the destination's QEMU is started, or before the guest is.
    pub held: bool,
}

/// One fault to inject.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Injection {
    pub number: usize,
    pub fault: Fault,
    pub moment: Moment,
    /// How long it lasts, or how long something that was ended stays away.
    pub lasts_ms: u64,
    /// One of two kinds of the same: the cable or a black hole, this way or that.
    pub variant: bool,
    /// The link's speed until the end of the migration: it stretches the copying.
    pub link_mbit: Option<u32>,
}

/// What is broken "for ever" is repaired after this time even if the migration does not end: longer than any
/// deadline of the agents.
const FOR_EVER: Duration = Duration::from_secs(16);
/// The agents wait a little longer than this for a connection while the guest is paused.
const WAITED_FOR_MS: u64 = 3_000;

impl Injection {
    /// How long it is broken.
    pub fn lasts(&self) -> Lasts {
        match self.fault {
            Fault::LinkDownForEver
            | Fault::SourceStateFull
            | Fault::DestinationStateFull
            | Fault::DestinationDiskFull => Lasts::UntilTheEnd(FOR_EVER),
            _ => Lasts::For(Duration::from_millis(self.lasts_ms)),
        }
    }

    /// Whether the migration has to move the guest all the same, at the first try: what is broken is
    /// nothing but a connection for a short time, somebody who is slow or only looks on, or somebody who has a
    /// successor.
    pub fn must_move(&self) -> bool {
        match self.fault {
            Fault::Reset | Fault::Kill(Who::CommandLine) | Fault::SlowDisk | Fault::SlowLink => true,
            Fault::Stop(Who::SourceQemu | Who::DestinationQemu) | Fault::Replace(_) => true,
            Fault::EventFlood(_) | Fault::OperatorStopsAndContinues => true,
            // Before, the reply to a command that makes something may be lost with it: then all is undone.
            Fault::MonitorCut(_) => AROUND_THE_HAND_OVER.contains(&self.moment.phase),
            Fault::LinkDown | Fault::OneWay | Fault::Stop(_) => self.lasts_ms <= WAITED_FOR_MS,
            _ => false,
        }
    }
}

impl fmt::Display for Injection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Moment { phase, after_ms, held } = self.moment;
        write!(f, "#{} {}, {phase}+{after_ms} ms", self.number, self.fault)?;
        if held {
            f.write_str(" held")?;
        }
        let kind = if self.variant { "b" } else { "a" };
        write!(f, ", kind {kind} for {} ms", self.lasts_ms)?;
        self.link_mbit.map_or(Ok(()), |mbit| write!(f, ", {mbit} Mbit/s"))
    }
}

/// All pairs of fault and phase, those around the hand-over twice, in a seeded order.
pub fn draw(seed: u64, count: usize) -> Vec<Injection> {
    let mut rng = Rng::new(seed);
    let mut drawn = Vec::new();
    while drawn.len() < count {
        let mut deck: Vec<(Fault, &'static str)> = Vec::new();
        for fault in KINDS {
            deck.extend(PHASES.iter().chain(&AROUND_THE_HAND_OVER).map(|phase| (fault, *phase)));
        }
        shuffle(&mut rng, &mut deck);
        for (fault, phase) in deck {
            let number = drawn.len() + 1;
            drawn.push(details(&mut rng, number, fault, phase));
        }
    }
    drawn.truncate(count);
    drawn
}

/// Every kind of fault once, most of them around the hand-over, none for long: what `make test` takes.
pub fn subset() -> Vec<Injection> {
    let mut rng = Rng::new(20_261_124);
    let chosen = [
        (Fault::Reset, "device"),
        (Fault::LinkDown, "switchover"),
        (Fault::OneWay, "hand-over"),
        (Fault::LinkDownForEver, "mirror"),
        (Fault::Kill(Who::SourceAgent), "hand-over"),
        (Fault::Kill(Who::DestinationAgent), "device"),
        (Fault::Kill(Who::BothAgents), "hand-over"),
        (Fault::Kill(Who::DestinationQemu), "hand-over"),
        (Fault::Kill(Who::CommandLine), "mirror"),
        (Fault::Stop(Who::DestinationAgent), "confirm"),
        (Fault::Terminate(Who::SourceAgent), "switchover"),
        (Fault::Replace(Who::BothAgents), "device"),
        (Fault::Kill(Who::DestinationHost), "precopy"),
        (Fault::SourceStateFull, "device"),
        (Fault::DestinationDiskFull, "prepare"),
        (Fault::MonitorCut(Who::SourceQemu), "switchover"),
        (Fault::MonitorCut(Who::DestinationQemu), "precopy"),
        (Fault::EventFlood(Who::SourceQemu), "mirror"),
        (Fault::OperatorStops, "precopy"),
        (Fault::HotPlug, "mirror"),
        (Fault::Kill(Who::SourceHost), "device"),
    ];
    let numbered = chosen.into_iter().enumerate();
    let short = |injection: Injection| Injection { lasts_ms: injection.lasts_ms.min(2_000), ..injection };
    numbered.map(|(at, (fault, phase))| short(details(&mut rng, at + 1, fault, phase))).collect()
}

fn details(rng: &mut Rng, number: usize, fault: Fault, phase: &'static str) -> Injection {
    let longest = match phase {
        "prepare" => 600,
        "mirror" => 900,
        "precopy" => 1200,
        "switchover" | "device" => 40,
        "hand-over" => 300,
        _ => 8,
    };
    let held = matches!(phase, "prepare" | "hand-over") && rng.one_in(3);
    let after_ms = match fault {
        // Before the disk has all the room that it needs.
        Fault::DestinationDiskFull => ms(rng, 0, longest) / 20,
        _ => ms(rng, 0, longest),
    };
    let lasts_ms = match fault {
        // Mostly short: a full run is to be over within the hour.
        Fault::LinkDown | Fault::OneWay if rng.one_in(8) => ms(rng, 8_000, 30_000),
        Fault::LinkDown | Fault::OneWay => ms(rng, 1_000, 5_000),
        Fault::Stop(_) | Fault::SlowDisk | Fault::SlowLink => ms(rng, 500, 5_000),
        Fault::MonitorTaken(_) | Fault::OperatorStopsAndContinues => ms(rng, 100, 3_000),
        _ => ms(rng, 0, 2_500),
    };
    let variant = rng.one_in(2);
    let stretched = matches!(phase, "mirror" | "precopy") || rng.one_in(4);
    let speed = rng.pick(&[150, 250, 400]).copied();
    let link_mbit = speed.filter(|_| stretched);
    Injection { number, fault, moment: Moment { phase, after_ms, held }, lasts_ms, variant, link_mbit }
}

fn shuffle<T>(rng: &mut Rng, all: &mut [T]) {
    for last in (1..all.len()).rev() {
        all.swap(last, rng.range(0, last));
    }
}

fn ms(rng: &mut Rng, least: usize, most: usize) -> u64 {
    rng.range(least, most) as u64
}
