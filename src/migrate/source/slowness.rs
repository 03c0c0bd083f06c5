//! Looks at what holds a migration up: sessions, pumps and the source's QEMU are asked for their counters.

use std::time::Duration;

use tokio::time::Instant;

use super::meter::Look;
use super::state::Source;
use crate::migrate::model::label::Label;
use crate::migrate::model::phase::Phase;
use crate::migrate::protocol::message::Busy;
use crate::net::cpu_time::CpuTime;

/// So little is on its way between two frames, too.
const LITTLE_BYTES: usize = 16 * 1024;

pub(crate) async fn look(source: &mut Source) {
    let mut look = counters(source).await;
    look.destination = source.peer.link.take_busy().and_then(Busy::most);
    if let Some(held_up_by) = source.copy.meter.look(Instant::now(), look) {
        source.context.progress.update(|p| p.held_up_by = Some(held_up_by));
    }
}

async fn counters(source: &Source) -> Look {
    let Source { copy, peer, context, guest, clock, .. } = source;
    let mut look = Look { is_away: peer.is_away(), outrun: copy.is_outrun(), ..Look::default() };
    if look.is_away {
        return look;
    }
    let (mut held, mut limited) = (Duration::ZERO, context.request.share.wish().limit_bytes_per_s.is_some());
    for lane in peer.lanes.all() {
        let stats = lane.stats().await;
        held += stats.held;
        limited |= stats.limit.is_some();
        look.on_its_way |= stats.log_bytes > LITTLE_BYTES;
        look.agent.push(lane.cpu_time().await);
    }
    look.held = limited.then_some(held);
    look.qemu = guest.qmp.process().pid().and_then(CpuTime::of_process);
    let progress = context.progress.now();
    // A disk that is in step waits for the guest's writes.
    let copying = progress.disks.iter().filter(|disk| !disk.ready).map(|disk| Label::Disk(disk.name.clone()));
    let ram = (clock.phase == Phase::Precopy).then_some(Label::Ram);
    let at_work = if ram.is_some() { ram.into_iter().collect::<Vec<_>>() } else { copying.collect() };
    look.waited =
        at_work.into_iter().filter_map(|label| Some((label.clone(), copy.streams.waited(&label)?))).collect();
    look
}
