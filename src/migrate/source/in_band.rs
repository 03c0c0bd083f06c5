//! How far QEMU is with disks that it carries inside its own stream, as far as it tells: how much of all of them
//! it has gone over once, one after the other, and in which blocks of which disk the guest has written since.

use super::failure::Failure;
use super::state::Source;
use crate::migrate::model::label::Label;
use crate::migrate::model::progress::{DiskProgress, Progress};
use crate::qemu::{BlockInfo, MigrationInfo, QueryBlock};

/// The last block of each disk is never counted.
const BLOCK_BYTES: u64 = 1 << 20;

/// Brings them into the progress.
pub(crate) async fn look(source: &Source, info: &MigrationInfo) -> Result<(), Failure> {
    let (Some(_), Some(disk)) = (source.copy.plan.in_band(), &info.disk) else { return Ok(()) };
    let blocks = source.query(QueryBlock).await?;
    let of_ram = info.ram.as_ref().map_or(0, |ram| ram.transferred);
    let carried = source.copy.streams.bytes(&Label::Ram).saturating_sub(of_ram);
    let passed = disk.total.saturating_sub(disk.remaining);
    source.context.progress.update(|p| learn(p, &in_order(source, &blocks), passed, carried));
    Ok(())
}

/// The disks in QEMU's order, with the bytes of blocks that were written since they were sent.
fn in_order(source: &Source, blocks: &[BlockInfo]) -> Vec<(String, u64)> {
    let nodes = blocks.iter().filter_map(|block| block.inserted.as_ref());
    let disks = nodes.filter_map(|node| {
        let mut plans = source.copy.plan.disks.iter();
        let plan = plans.find(|plan| plan.disk.node_name == node.node_name)?;
        // QEMU's own has no name.
        let written = node.dirty_bitmaps.iter().filter(|bitmap| bitmap.name.is_empty());
        Some((plan.disk.name.clone(), written.map(|bitmap| bitmap.count).sum()))
    });
    disks.collect()
}

/// `passed` bytes of all disks were gone over, and `carried` bytes of them have crossed.
fn learn(p: &mut Progress, disks: &[(String, u64)], mut passed: u64, carried: u64) {
    let mut carried = carried.saturating_sub(p.disks.iter().map(|disk| disk.stream_bytes).sum());
    for (name, written) in disks {
        let Some(disk) = p.disks.iter_mut().find(|disk| disk.name == *name) else { continue };
        let counted = disk.virtual_bytes.saturating_sub(BLOCK_BYTES);
        let of_it = passed.min(counted);
        passed -= of_it;
        let is_over = of_it == counted;
        disk.passed_in_band(if is_over { disk.virtual_bytes } else { of_it }, *written);
        if !is_over {
            disk.stream_bytes += std::mem::take(&mut carried);
        }
    }
    // All were gone over: of which disk it was is not known.
    let last = p.disks.iter_mut().max_by_key(|disk| disk.left_bytes);
    last.into_iter().for_each(|disk: &mut DiskProgress| disk.stream_bytes += carried);
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::migrate::model::role::Role;

    const MIB: u64 = 1 << 20;

    #[test]
    fn one_disk_after_the_other_and_then_what_was_written() {
        let mut p = Progress::new(Uuid::nil(), "web1", Role::Source, "bravo");
        p.disks = vec![DiskProgress::new("a", 8 * MIB, None), DiskProgress::new("b", 4 * MIB, Some(2 * MIB))];
        let mut seen = |passed, carried, written: [u64; 2]| {
            let disks = [("a".to_owned(), written[0]), ("b".to_owned(), written[1])];
            learn(&mut p, &disks, passed, carried);
            let told = p
                .disks
                .iter()
                .map(|d| (d.done_bytes / MIB, d.left_bytes.unwrap() / MIB, d.stream_bytes / MIB));
            told.collect::<Vec<_>>()
        };
        assert_eq!(seen(0, 0, [0, 0]), [(0, 8, 0), (0, 2, 0)]);
        assert_eq!(seen(3 * MIB, 3 * MIB, [MIB, 0]), [(3, 6, 3), (0, 2, 0)]);
        assert_eq!(seen(7 * MIB, 8 * MIB, [MIB, 0]), [(8, 1, 3), (0, 2, 5)], "the second has begun");
        assert_eq!(seen(10 * MIB, 12 * MIB, [0, MIB]), [(8, 0, 3), (4, 1, 9)]);
        assert_eq!(seen(10 * MIB, 13 * MIB, [0, 0]), [(8, 0, 3), (4, 0, 10)]);
        assert_eq!(seen(10 * MIB, 5 * MIB, [0, 0]), [(8, 0, 3), (4, 0, 10)], "never less");
    }
}
