//! What an event means in every phase that waits.

use super::event::Event;
use super::failure::Failure;
use super::guest_watch;
use super::state::Source;
use crate::migrate::model::meanwhile::Meanwhile;
use crate::migrate::model::phase::Phase;
use crate::qemu::EventKind;

/// What means the same in every phase.
pub(crate) async fn on_event(source: &mut Source, event: Event) -> Result<(), Failure> {
    match event {
        Event::Qemu(EventKind::BlockJobReady { device }) => {
            source.copy.mirror_is_ready(&device);
            Ok(())
        }
        Event::Qemu(EventKind::BlockJobCompleted { device, error, .. }) => {
            let Some(disk) = source.copy.disk_of(&device) else { return Ok(()) };
            match error {
                Some(error) => Err(Failure::Mirror { disk, error }),
                // We end none before the guest is paused.
                None if source.clock.phase < Phase::Switchover => {
                    Err(Meanwhile::MirrorEnded { disk, what: "ended" }.into())
                }
                // Ours, and known by a question already: asked and told at the same time, after a restart.
                None => Ok(()),
            }
        }
        Event::Qemu(EventKind::BlockJobCancelled { device, .. }) => match source.copy.disk_of(&device) {
            Some(disk) => Err(Meanwhile::MirrorEnded { disk, what: "cancelled" }.into()),
            None => Ok(()),
        },
        Event::Copied(disk, Err(source)) => Err(Failure::Delta { disk, source }),
        Event::StreamEnded(label, source) => Err(Failure::Stream { stream: label.to_string(), source }),
        Event::Qemu(event) => guest_watch::on_guest_event(source, &event).await,
        Event::Tick | Event::Loaded | Event::Copied(_, Ok(())) => Ok(()),
    }
}
