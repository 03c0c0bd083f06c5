//! The RAM by QEMU's precopy: pass after pass while the guest runs, the rest in its pause. Disks that go in band
//! are between.

use std::os::fd::OwnedFd;

use crate::migrate::journal::{Journal, JournalError, Undo};
use crate::migrate::model::in_band::InBand;
use crate::migrate::model::label::Label;
use crate::qemu::{Migrate, MigrateIncoming, Qmp, QmpError, names};

/// A stream that carries RAM.
pub(crate) struct RamChannel {
    /// Its number among the migration's streams; disks have theirs from
    /// [`FIRST_DISK_CHANNEL`](crate::migrate::model::plan::FIRST_DISK_CHANNEL) on.
    pub(crate) channel: u16,
    pub(crate) label: Label,
    /// QEMU's name for its end of it.
    fdname: &'static str,
}

/// The streams of one migration's RAM.
pub(crate) const CHANNELS: [RamChannel; 1] =
    [RamChannel { channel: 0, label: Label::Ram, fdname: names::RAM_FDNAME }];

impl RamChannel {
    /// The channel of that number.
    pub(crate) fn numbered(channel: u16) -> Option<Self> {
        CHANNELS.into_iter().find(|c| c.channel == channel)
    }

    /// Gives QEMU its end; the journal knows before.
    pub(crate) async fn give<E>(&self, qmp: &Qmp, journal: &mut Journal, socket: OwnedFd) -> Result<(), E>
    where
        E: From<QmpError> + From<JournalError>,
    {
        journal.will_make(Undo::Fd(self.fdname.into()))?;
        qmp.getfd(self.fdname, socket).await?;
        Ok(())
    }
}

/// Begins at the source, once QEMU has its end of every channel.
pub(crate) fn send(in_band: Option<InBand>) -> Migrate {
    let (blk, inc) = (in_band.is_some(), in_band == Some(InBand::Inc));
    Migrate { blk, inc, ..Migrate::to_fd(names::RAM_FDNAME) }
}

/// Begins at the destination, the same.
pub(crate) fn receive() -> MigrateIncoming {
    MigrateIncoming::from_fd(names::RAM_FDNAME)
}
