//! What is broken, and when: drawn from the seed alone, before anything runs.

use std::fmt;

use super::rng::Rng;

/// A process that takes part in a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    SourceAgent,
    DestinationAgent,
    BothAgents,
    SourceQemu,
    DestinationQemu,
    CommandLine,
    /// The source's agent and QEMU at the same time.
    SourceHost,
    /// The destination's agent and QEMU at the same time.
    DestinationHost,
}

impl Who {
    fn name(self) -> &'static str {
        match self {
            Self::SourceAgent => "source agent",
            Self::DestinationAgent => "destination agent",
            Self::BothAgents => "both agents",
            Self::SourceQemu => "source QEMU",
            Self::DestinationQemu => "destination QEMU",
            Self::CommandLine => "command line",
            Self::SourceHost => "source host",
            Self::DestinationHost => "destination host",
        }
    }
}

/// What breaks. `Drawn` gives the times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The kernel ends the connection of the agents with a reset.
    Reset,
    /// Every packet is lost, or the cable is out.
    LinkDown,
    /// The same until the migration has ended.
    LinkDownForEver,
    /// Every packet towards the destination is lost, or towards the source.
    OneWay,
    Kill(Who),
    Stop(Who),
    Terminate(Who),
    /// Another process takes over: a planned restart.
    Replace(Who),
    /// No room for the source's journal.
    SourceStateFull,
    /// No room for the destination's journal.
    DestinationStateFull,
    /// No room for the destination's second disk.
    DestinationDiskFull,
    /// The file system of the destination's second disk stands still most of the time.
    SlowDisk,
    /// The link becomes very slow.
    SlowLink,
    /// The agent loses its connection to a monitor; that QEMU lives.
    MonitorCut(Who),
    /// The same, and somebody else uses that monitor for a while.
    MonitorTaken(Who),
    /// A QEMU has thousands of events to tell.
    EventFlood(Who),
    /// An operator pauses the guest.
    OperatorStops,
    /// An operator pauses the guest for a while.
    OperatorStopsAndContinues,
    /// An operator ends the source's QEMU.
    OperatorQuits,
    /// An operator gives the guest one more disk.
    HotPlug,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 38] = [
        Self::Reset,
        Self::LinkDown,
        Self::LinkDownForEver,
        Self::OneWay,
        Self::Kill(Who::SourceAgent),
        Self::Kill(Who::DestinationAgent),
        Self::Kill(Who::BothAgents),
        Self::Kill(Who::SourceQemu),
        Self::Kill(Who::DestinationQemu),
        Self::Kill(Who::CommandLine),
        Self::Kill(Who::SourceHost),
        Self::Kill(Who::DestinationHost),
        Self::Stop(Who::SourceAgent),
        Self::Stop(Who::DestinationAgent),
        Self::Stop(Who::SourceQemu),
        Self::Stop(Who::DestinationQemu),
        Self::Terminate(Who::SourceAgent),
        Self::Terminate(Who::DestinationAgent),
        Self::Terminate(Who::BothAgents),
        Self::Terminate(Who::DestinationQemu),
        Self::Replace(Who::SourceAgent),
        Self::Replace(Who::DestinationAgent),
        Self::Replace(Who::BothAgents),
        Self::SourceStateFull,
        Self::DestinationStateFull,
        Self::DestinationDiskFull,
        Self::SlowDisk,
        Self::SlowLink,
        Self::MonitorCut(Who::SourceQemu),
        Self::MonitorCut(Who::DestinationQemu),
        Self::MonitorTaken(Who::SourceQemu),
        Self::MonitorTaken(Who::DestinationQemu),
        Self::EventFlood(Who::SourceQemu),
        Self::EventFlood(Who::DestinationQemu),
        Self::OperatorStops,
        Self::OperatorStopsAndContinues,
        Self::OperatorQuits,
        Self::HotPlug,
    ];

    /// Whose QEMU it ends: the guest may be gone with it.
    pub fn ends_qemu(self) -> Option<Who> {
        match self {
            Self::Kill(Who::SourceQemu | Who::SourceHost)
            | Self::Terminate(Who::SourceQemu)
            | Self::OperatorQuits => Some(Who::SourceQemu),
            Self::Kill(Who::DestinationQemu | Who::DestinationHost)
            | Self::Terminate(Who::DestinationQemu) => Some(Who::DestinationQemu),
            _ => None,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reset => f.write_str("connection reset"),
            Self::LinkDown => f.write_str("link down 1-30 s"),
            Self::LinkDownForEver => f.write_str("link down until the end"),
            Self::OneWay => f.write_str("one direction only"),
            Self::Kill(who @ (Who::SourceHost | Who::DestinationHost)) => {
                write!(f, "{} lost", who.name())
            }
            Self::Kill(who) => write!(f, "SIGKILL {}", who.name()),
            Self::Stop(Who::DestinationQemu) => f.write_str("SIGSTOP destination QEMU (slow reader)"),
            Self::Stop(who) => write!(f, "SIGSTOP {}", who.name()),
            Self::Terminate(who) => write!(f, "SIGTERM {}", who.name()),
            Self::Replace(who) => write!(f, "planned restart of {}", who.name()),
            Self::SourceStateFull => f.write_str("source state disk full"),
            Self::DestinationStateFull => f.write_str("destination state disk full"),
            Self::DestinationDiskFull => f.write_str("destination disk full"),
            Self::SlowDisk => f.write_str("slow disk"),
            Self::SlowLink => f.write_str("slow link"),
            Self::MonitorCut(who) => write!(f, "monitor of {} cut", who.name()),
            Self::MonitorTaken(who) => write!(f, "monitor of {} taken by another", who.name()),
            Self::EventFlood(who) => write!(f, "12000 events of {}", who.name()),
            Self::OperatorStops => f.write_str("operator's stop"),
            Self::OperatorStopsAndContinues => f.write_str("operator's stop and cont"),
            Self::OperatorQuits => f.write_str("operator's quit"),
            Self::HotPlug => f.write_str("hot-plug"),
        }
    }
}

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

/// The agents wait a little longer than this for a connection while the guest is paused.
const WAITED_FOR_MS: u64 = 3_000;

impl Injection {
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
        for fault in Fault::ALL {
            deck.extend(PHASES.iter().chain(&AROUND_THE_HAND_OVER).map(|phase| (fault, *phase)));
        }
        rng.shuffle(&mut deck);
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
        Fault::DestinationDiskFull => rng.range(0, longest) / 20,
        _ => rng.range(0, longest),
    };
    let lasts_ms = match fault {
        // Mostly short: a full run is to be over within the hour.
        Fault::LinkDown | Fault::OneWay if rng.one_in(8) => rng.range(8_000, 30_000),
        Fault::LinkDown | Fault::OneWay => rng.range(1_000, 5_000),
        Fault::Stop(_) | Fault::SlowDisk | Fault::SlowLink => rng.range(500, 5_000),
        Fault::MonitorTaken(_) | Fault::OperatorStopsAndContinues => rng.range(100, 3_000),
        _ => rng.range(0, 2_500),
    };
    let variant = rng.one_in(2);
    let stretched = matches!(phase, "mirror" | "precopy") || rng.one_in(4);
    let speed = rng.pick(&[150, 250, 400]);
    let link_mbit = stretched.then_some(speed);
    Injection { number, fault, moment: Moment { phase, after_ms, held }, lasts_ms, variant, link_mbit }
}
