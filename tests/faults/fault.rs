//! The faults. Each breaks one thing, lets it be broken for its time, and then repairs it as far as an
//! operator, a supervisor or the network would.

use std::fmt;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::Signal;

use super::cut::{Cut, cut_stream};
use super::stage::volume_folder;
use super::{Migration, Side, Stage};
use crate::support::Volume;
use crate::support::agent::PORT;
use crate::support::net::Way;
use crate::support::process::{SHORT, run, signal_pid};

const SLOW_MBIT: u32 = 4;
/// An agent that is told to stop must be gone within this time, whatever it is at.
const STOPS_WITHIN: Duration = Duration::from_secs(60);

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

    /// The sides of its agents and of its QEMUs, when the guest moves away from `source`.
    fn at(self, source: Side) -> (Vec<Side>, Vec<Side>) {
        let destination = source.other();
        match self {
            Self::SourceAgent => (vec![source], vec![]),
            Self::DestinationAgent => (vec![destination], vec![]),
            Self::BothAgents => (vec![source, destination], vec![]),
            Self::SourceQemu => (vec![], vec![source]),
            Self::DestinationQemu => (vec![], vec![destination]),
            Self::SourceHost => (vec![source], vec![source]),
            Self::DestinationHost => (vec![destination], vec![destination]),
            Self::CommandLine => (vec![], vec![]),
        }
    }

    fn side(self, source: Side) -> Side {
        let (agents, qemus) = self.at(source);
        agents.into_iter().chain(qemus).next().unwrap_or(source)
    }
}

/// What breaks.
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
    /// An operator cancels the migration.
    Cancel,
    /// One data stream between a QEMU and its agent is cut.
    StreamCut(Cut, Who),
    /// An agent's journal takes no further record.
    JournalFrozen(Who),
    /// Whatever command the destination's agent runs fails.
    CommandFails,
}

/// How long it is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lasts {
    For(Duration),
    /// Until the source has said the migration's end, for so long at most.
    UntilTheEnd(Duration),
    /// The same, and whatever holds the migration goes on holding it.
    Held(Duration),
}

impl Lasts {
    /// It is repaired at once.
    pub const INSTANT: Self = Self::For(Duration::ZERO);
}

impl Fault {
    /// Breaks and repairs. `variant`: one of two kinds of the same.
    ///
    /// # Errors
    /// The fault itself could not be made.
    pub fn inflict(
        self,
        stage: &mut Stage,
        migration: &Migration,
        lasts: Lasts,
        variant: bool,
    ) -> Result<()> {
        let source = stage.at;
        Breaking { stage, migration, lasts, variant, source }.by(self)
    }

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
            Self::Cancel => f.write_str("operator's cancel"),
            Self::StreamCut(which, who) => write!(f, "{which:?} stream of {} cut", who.name()),
            Self::JournalFrozen(who) => write!(f, "journal of {} frozen", who.name()),
            Self::CommandFails => f.write_str("destination's command fails"),
        }
    }
}

/// A thing that is being broken.
pub(super) struct Breaking<'s> {
    pub(super) stage: &'s mut Stage,
    pub(super) migration: &'s Migration,
    pub(super) lasts: Lasts,
    /// From where the guest moves.
    pub(super) source: Side,
    variant: bool,
}

impl Breaking<'_> {
    fn by(&mut self, fault: Fault) -> Result<()> {
        let (source, destination) = (self.source, self.source.other());
        let either = if self.variant { source } else { destination };
        match fault {
            Fault::Reset => self.stage.agent(either).host().reset_tcp(PORT).map(drop),
            Fault::LinkDown | Fault::LinkDownForEver => self.link_down(),
            Fault::OneWay => self.one_way(either),
            Fault::Kill(who) => self.kill(who),
            Fault::Stop(who) => self.stop(who),
            Fault::Terminate(who) => self.terminate(who),
            Fault::Replace(who) => self.replace(who),
            Fault::SourceStateFull => self.full(|stage| stage.state_volume(source)),
            Fault::DestinationStateFull => self.full(|stage| stage.state_volume(destination)),
            Fault::DestinationDiskFull => self.full(|stage| stage.disks[destination.index()].as_ref()),
            Fault::SlowDisk => self.slow_disk(destination),
            Fault::MonitorCut(who) => self.cut_monitor(who.side(source)).map(drop),
            Fault::MonitorTaken(who) => self.take_monitor(who.side(source)),
            Fault::EventFlood(who) => self.flood(who.side(source)),
            Fault::OperatorStops => self.stop_for_good(),
            Fault::OperatorStopsAndContinues => self.stop_and_cont(),
            Fault::OperatorQuits => self.quit(),
            Fault::HotPlug => self.hot_plug(),
            Fault::SlowLink => {
                self.stage.limit(SLOW_MBIT)?;
                self.pass()
            }
            Fault::Cancel => self.migration.cancel(self.stage.agent(source)),
            Fault::StreamCut(which, who) => self.cut_stream(which, who.side(source)),
            Fault::JournalFrozen(who) => self.freeze_journal(who.side(source)),
            Fault::CommandFails => self.command_fails(destination),
        }
    }

    /// Lets time go by while it is broken.
    pub(super) fn pass(&mut self) -> Result<()> {
        match self.lasts {
            Lasts::For(time) => sleep(time),
            Lasts::UntilTheEnd(within) => {
                // Whatever holds the migration lets it come to its end.
                self.stage.calm()?;
                self.migration.wait_end(self.stage.agent(self.source), within);
            }
            Lasts::Held(within) => {
                self.migration.wait_end(self.stage.agent(self.source), within);
            }
        }
        Ok(())
    }

    fn link_down(&mut self) -> Result<()> {
        if self.variant {
            self.stage.net.pull_cable()?;
            self.pass()?;
            self.stage.net.plug_cable()
        } else {
            self.stage.net.cut()?;
            self.pass()?;
            self.stage.net.restore()
        }
    }

    fn one_way(&mut self, deaf: Side) -> Result<()> {
        let way = if deaf == Side::Bravo { Way::ToBravo } else { Way::ToAlpha };
        self.stage.net.drop_way(way)?;
        self.pass()?;
        self.stage.net.restore()
    }

    fn kill(&mut self, who: Who) -> Result<()> {
        let (agents, qemus) = who.at(self.source);
        // First all are hit, then all are buried: a host that is lost loses them at once.
        self.signal(who, Signal::SIGKILL)?;
        for side in &agents {
            self.stage.agent_mut(*side).wait_end(SHORT)?;
        }
        for side in &qemus {
            self.stage.vm(*side).wait_ended()?;
        }
        self.restart(&agents)
    }

    fn terminate(&mut self, who: Who) -> Result<()> {
        let (agents, _) = who.at(self.source);
        self.signal(who, Signal::SIGTERM)?;
        for side in &agents {
            self.stage.agent_mut(*side).wait_end(STOPS_WITHIN)?;
        }
        self.restart(&agents)
    }

    /// After a while, as a supervisor would.
    fn restart(&mut self, agents: &[Side]) -> Result<()> {
        if !agents.is_empty() {
            self.pass()?;
        }
        agents.iter().try_for_each(|side| self.stage.agent_mut(*side).restart())
    }

    /// One after the other begins, and none waits for the other.
    fn replace(&mut self, who: Who) -> Result<()> {
        let (sides, _) = who.at(self.source);
        let both = [(Side::Alpha, &mut self.stage.alpha), (Side::Bravo, &mut self.stage.bravo)];
        let agents = both.into_iter().filter(|(side, _)| sides.contains(side));
        std::thread::scope(|scope| {
            let at_work: Vec<_> = agents.map(|(_, agent)| scope.spawn(|| agent.take_over())).collect();
            at_work.into_iter().try_for_each(|one| one.join().map_err(|_| anyhow!("it panicked"))?)
        })
    }

    fn stop(&mut self, who: Who) -> Result<()> {
        self.signal(who, Signal::SIGSTOP)?;
        self.pass()?;
        self.signal(who, Signal::SIGCONT)
    }

    /// A QEMU that has not been started yet, or has ended by itself, is not hit.
    fn signal(&self, who: Who, signal: Signal) -> Result<()> {
        let (agents, qemus) = who.at(self.source);
        agents.iter().try_for_each(|side| self.stage.agent(*side).signal(signal))?;
        let pids = qemus.iter().filter_map(|side| self.stage.vm(*side).pid());
        pids.into_iter().try_for_each(|pid| signal_pid(pid, signal))
    }

    fn full(&mut self, volume: impl Fn(&Stage) -> Option<&Volume>) -> Result<()> {
        volume(self.stage).context("this stage has no such volume")?.fill()?;
        self.pass()?;
        volume(self.stage).context("this stage has no such volume")?.empty()
    }

    /// The file system below the second disk takes nothing, three quarters of the time.
    fn slow_disk(&self, side: Side) -> Result<()> {
        let folder = volume_folder(self.stage.vm(side));
        let freeze = |flag: &str| run(Command::new("fsfreeze").arg(flag).arg(&folder), SHORT).map(drop);
        let Lasts::For(time) = self.lasts else { bail!("a disk that is slow for ever") };
        let end = Instant::now() + time;
        while Instant::now() < end {
            freeze("--freeze")?;
            sleep(Duration::from_millis(300));
            freeze("--unfreeze")?;
            sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    fn cut_stream(&self, which: Cut, side: Side) -> Result<()> {
        let disks = &self.stage.disk_streams[side.index()];
        cut_stream(self.stage.agent(side), self.stage.vm(side), disks, which)
    }

    fn command_fails(&mut self, side: Side) -> Result<()> {
        let gates = |stage: &Stage, fails| stage.gates(side).try_for_each(|gate| gate.fail(fails));
        gates(self.stage, true)?;
        self.pass()?;
        gates(self.stage, false)
    }

    fn freeze_journal(&mut self, side: Side) -> Result<()> {
        let role = if side == self.source { "source" } else { "destination" };
        let folder = self.stage.agent(side).host().dir.join("state/migrations");
        let journal = folder.join(format!("{}.{role}.journal", self.migration.id));
        let immutable = |flag: &str| run(Command::new("chattr").arg(flag).arg(&journal), SHORT).map(drop);
        immutable("+i")?;
        let passed = self.pass();
        immutable("-i")?;
        passed
    }
}
