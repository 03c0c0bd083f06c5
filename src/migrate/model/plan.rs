//! The plan: which disks are copied, and how. Pure.

use serde::{Deserialize, Serialize};

use super::disk_choice::{DiskChoice, is_copyable};
use super::in_band::InBand;
use super::incremental::Incremental;
use super::phase::{IllegalStep, Phase, Step};
use crate::qemu::{self, Disk};

/// The first channel number for disks; RAM has channels of its own below.
pub const FIRST_DISK_CHANNEL: u16 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopiedDisk {
    /// Its name on both hosts.
    pub name: String,
    pub node_name: String,
    /// Bytes that the guest sees.
    pub virtual_size: u64,
    /// What its topmost image stands on, if only that image is copied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Base>,
}

impl CopiedDisk {
    /// How it is copied, where nothing is known of an earlier try.
    fn way(&self) -> Way {
        if self.base.is_some() { Way::Top } else { Way::Whole }
    }

    /// Whether it is the same image of the same size, however much of it is copied.
    pub(crate) fn is_same_image(&self, other: &Self) -> bool {
        let image = |disk: &Self| (disk.name.clone(), disk.node_name.clone(), disk.virtual_size);
        image(self) == image(other)
    }

    /// In a sentence.
    pub(crate) fn all_of_it(&self) -> &'static str {
        if self.base.is_some() { "all of its topmost image" } else { "the whole disk" }
    }
}

/// The source's nodes of a disk whose base the destination has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// The topmost image.
    pub top_node: String,
    /// What it stands on.
    pub node_name: String,
}

/// How a disk's bytes get to the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// All of it and then what the guest writes: QEMU's `blockdev-mirror`.
    Whole,
    /// What its topmost image has, and then what the guest writes: the same, with another beginning.
    Top,
    /// What changed since an earlier try had copied all of it: this agent reads it by a dirty bitmap.
    Changes,
    /// Inside QEMU's own stream, before and between its RAM. It has no export and no stream of its own.
    InBand(InBand),
}

impl Way {
    /// Whether QEMU copies it, by a mirror.
    pub fn is_mirror(self) -> bool {
        matches!(self, Self::Whole | Self::Top)
    }
}

/// One disk of the grant: where it goes at the destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Export {
    pub disk: String,
    /// Its name at the NBD server.
    pub export: String,
    /// The channel that its stream is opened with.
    pub channel: u16,
    /// The image was made for this migration, and reads as zeroes by the word of the QEMU that has it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_fresh: bool,
}

/// A disk that is copied, where to, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskPlan {
    pub disk: CopiedDisk,
    /// None until the destination has granted it, and of one that goes in band.
    pub target: Option<Export>,
    pub way: Way,
}

/// What a migration copies beside the RAM. Its phases follow from it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    pub disks: Vec<DiskPlan>,
}

impl Plan {
    /// Each disk by its own way; all of them in band if that is asked for.
    pub fn of(disks: Vec<CopiedDisk>, in_band: Option<InBand>) -> Self {
        let way = |disk: &CopiedDisk| in_band.map_or(disk.way(), Way::InBand);
        let planned = |disk: CopiedDisk| DiskPlan { way: way(&disk), disk, target: None };
        Self { disks: disks.into_iter().map(planned).collect() }
    }

    /// How QEMU's own stream carries the disks, if it does.
    pub fn in_band(&self) -> Option<InBand> {
        self.disks.iter().find_map(|plan| match plan.way {
            Way::InBand(how) => Some(how),
            Way::Whole | Way::Top | Way::Changes => None,
        })
    }

    /// Whether the destination has a place for each disk, which is taken note of.
    pub(crate) fn is_granted(&mut self, exports: &[Export]) -> bool {
        for plan in &mut self.disks {
            plan.target = exports.iter().find(|e| e.disk == plan.disk.name).cloned();
        }
        self.disks.iter().all(|plan| plan.target.is_some() != matches!(plan.way, Way::InBand(_)))
    }

    /// The phase that follows when one has done what it is for.
    ///
    /// Errors: [`IllegalStep`] where the table has none.
    pub fn after(&self, phase: Phase) -> Result<Phase, IllegalStep> {
        match phase.after(Step::Done)? {
            Phase::Mirror if self.disks.is_empty() || self.in_band().is_some() => {
                Phase::Mirror.after(Step::Done)
            }
            next => Ok(next),
        }
    }

    /// All of its phases, if nothing fails.
    pub fn phases(&self) -> impl Iterator<Item = Phase> {
        std::iter::successors(Some(Phase::Begin), |phase| self.after(*phase).ok())
    }
}

/// The base of a disk of which only the topmost image is to be copied; none where it has none.
pub(crate) fn base<'a>(disk: &'a Disk, incremental: Option<&Incremental>) -> Option<&'a qemu::Base> {
    disk.base.as_ref().filter(|_| incremental.is_some_and(|wanted| wanted.takes(&disk.name)))
}

/// The source's disks that a migration copies, in the order of copying: of those that the guest can write to,
/// those that were chosen.
pub fn copied(disks: &[Disk], choice: &DiskChoice, incremental: Option<&Incremental>) -> Vec<CopiedDisk> {
    let mut chosen: Vec<_> = disks.iter().filter(|d| is_copyable(d) && choice.takes(&d.name)).collect();
    chosen.sort_by_key(|disk| choice.place(&disk.name));
    chosen
        .into_iter()
        .map(|d| CopiedDisk {
            name: d.name.clone(),
            node_name: d.node_name.clone(),
            virtual_size: d.virtual_size,
            base: base(d, incremental)
                .map(|base| Base { top_node: base.top_node.clone(), node_name: base.node_name.clone() }),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chosen_disks_are_copied_in_the_order_of_their_choice() {
        let disk = |name: &str| Disk { name: name.into(), ..Disk::default() };
        let disks = [disk("a"), Disk { firmware: true, ..disk("flash") }, disk("b"), disk("c")];
        let names = |choice| {
            let copied = copied(&disks, &choice, None).into_iter();
            copied.map(|disk| disk.name).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(names(DiskChoice::All), "a b c");
        assert_eq!(names(DiskChoice::Only(vec!["c".into(), "a".into()])), "c a");
        assert_eq!(names(DiskChoice::Except(["b".to_owned()].into())), "a c");
    }

    #[test]
    fn only_a_disk_that_stands_on_something_is_copied_by_its_top() {
        let base = qemu::Base {
            top_node: "t".into(),
            top_format: "qcow2".into(),
            node_name: "b".into(),
            virtual_size: 1,
        };
        let disk = |name: &str, base: Option<&qemu::Base>| Disk {
            name: name.into(),
            base: base.cloned(),
            ..Disk::default()
        };
        let disks = [disk("a", Some(&base)), disk("b", None), disk("c", Some(&base))];
        let ways = |incremental: Option<Incremental>| {
            let plan = Plan::of(copied(&disks, &DiskChoice::All, incremental.as_ref()), None);
            plan.disks.iter().map(|plan| plan.way).collect::<Vec<_>>()
        };
        assert_eq!(ways(None), [Way::Whole; 3]);
        assert_eq!(ways(Some(Incremental::All)), [Way::Top, Way::Whole, Way::Top]);
        let only = Incremental::Only(["c".to_owned()].into());
        assert_eq!(ways(Some(only)), [Way::Whole, Way::Whole, Way::Top]);
    }

    #[test]
    fn the_phases_follow_from_the_disks() {
        let disk = CopiedDisk { name: "vda".into(), node_name: "n".into(), virtual_size: 1, base: None };
        let names = |plan: &Plan| plan.phases().map(Phase::name).collect::<Vec<_>>().join(" ");
        let with = Plan::of(vec![disk.clone()], None);
        let all = "begin prepare mirror precopy switchover device hand-over confirm done";
        assert_eq!(names(&with), all);
        assert_eq!(names(&Plan::default()), all.replace("mirror ", ""));
        assert_eq!(names(&Plan::of(vec![disk], Some(InBand::Blk))), all.replace("mirror ", ""));
        assert_eq!(with.after(Phase::Undecided), Ok(Phase::Confirm), "decided late");
    }
}
