//! Journals as sets of records: what is in the file, what would be read of it, and what of it a loss of power may
//! leave.

use vmferry_handover::handover::{Ended, Known, Mark, Side as Whose, Written};

use super::world::{Kind, Scope};

/// Records, as a set. Their order does not matter to the machines.
pub type Records = u8;
pub const HANDED_OVER: Records = 1;
pub const STARTING: Records = 2;
pub const RUNS: Records = 4;
pub const NEVER_RAN: Records = 8;
pub const CONFIRMED: Records = 16;
pub const MOVED: Records = 32;
pub const STAYED: Records = 64;

pub fn bit(mark: Mark, at_source: bool) -> Records {
    match mark {
        Mark::HandedOver => HANDED_OVER,
        Mark::Starting => STARTING,
        Mark::Runs => RUNS,
        Mark::NeverRan => NEVER_RAN,
        Mark::Confirmed => CONFIRMED,
        // Neither side writes these otherwise.
        Mark::Forced(Whose::Here) if !at_source => HANDED_OVER,
        Mark::Forced(Whose::There) if !at_source => 0,
        Mark::Forced(Whose::Here) => STARTING,
        Mark::Forced(Whose::There) => CONFIRMED,
    }
}

pub fn end_bit(ended: Ended) -> Records {
    match ended {
        Ended::Moved => MOVED,
        Ended::Stayed => STAYED,
    }
}

pub fn known(records: Records, at_source: bool) -> Known {
    let has = |bit| records & bit != 0;
    let moved = has(MOVED).then_some(Ended::Moved);
    Known {
        handed_over: at_source && has(HANDED_OVER),
        starting: !at_source && has(STARTING),
        runs: has(RUNS),
        never_ran: has(NEVER_RAN),
        forced: match at_source {
            true if has(STARTING) => Some(Whose::Here),
            true if has(CONFIRMED) => Some(Whose::There),
            false if has(HANDED_OVER) => Some(Whose::Here),
            _ => None,
        },
        ended: moved.or(has(STAYED).then_some(Ended::Stayed)),
    }
}

/// One journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Disk {
    /// What the running agent knows to be in the file.
    pub whole: Records,
    /// What a process would read now.
    pub cached: Records,
    /// What may be there after a loss of power: one bit for each set of records.
    pub perhaps: u128,
}

impl Disk {
    pub const EMPTY: Self = Self { whole: 0, cached: 0, perhaps: 1 };

    fn add_perhaps(&mut self, records: Records) {
        self.perhaps |= 1 << records;
    }

    /// Whether one of these records may be there now or after a loss of power.
    pub fn may_have(&self, records: Records) -> bool {
        self.cached & records != 0
            || (0..128).any(|set: Records| self.perhaps >> set & 1 != 0 && set & records != 0)
    }

    /// What whoever looks at the journal is told of its end.
    pub fn says_ended(&self) -> Option<Ended> {
        known(self.cached, true).ended
    }

    pub fn certain(&self) -> Option<Records> {
        self.perhaps.is_power_of_two().then(|| self.perhaps.trailing_zeros() as Records)
    }

    pub fn durable(&mut self, records: Records) {
        *self = Self { whole: records, cached: records, perhaps: 1 << records };
    }

    /// Every way in which a write can end. `None`: the agent crashes before it knows.
    pub fn write(self, bit: Records, scope: Scope) -> Vec<(Self, Option<Written>, Kind, &'static str)> {
        let (without, with) = (self.whole, self.whole | bit);
        let [mut durable, mut failed, mut absent, mut unsynced] = [self; 4];
        durable.durable(with);
        failed.durable(without);
        absent.cached = without;
        absent.add_perhaps(without);
        absent.add_perhaps(with);
        unsynced.cached = with;
        unsynced.add_perhaps(without);
        unsynced.add_perhaps(with);
        let mut present = unsynced;
        present.whole = without;
        let mut outcomes = vec![
            (durable, Some(Written::Durable), Kind::Step, "is written"),
            (unsynced, None, Kind::Fault, "is written, and the agent crashes before the sync"),
        ];
        if !scope.disks_fail() {
            return outcomes;
        }
        outcomes.extend([
            (failed, Some(Written::Failed), Kind::Fault, "fails without a trace"),
            (absent, Some(Written::InDoubt), Kind::Fault, "fails in doubt, not to be read"),
            (present, Some(Written::InDoubt), Kind::Fault, "fails in doubt, to be read"),
        ]);
        outcomes
    }
}

impl Disk {
    /// The journal's end is written until the disk takes it, and nothing depends on when.
    pub fn end(
        self,
        ended: Ended,
        scope: Scope,
    ) -> impl Iterator<Item = (Self, Option<Written>, Kind, &'static str)> {
        let outcomes = self.write(end_bit(ended), scope).into_iter();
        outcomes.filter(|(_, written, ..)| matches!(written, Some(Written::Durable) | None))
    }
}
