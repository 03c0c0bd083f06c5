//! The guest's data at its destination: the streams that carry it, and what they flow into.

use tokio::time::Instant;

use super::error::Error;
use super::state::Destination;
use crate::migrate::checks::disks::bitmaps;
use crate::migrate::guest::nbd_server::{self, NbdServer};
use crate::migrate::guest::settings::{self, Settings};
use crate::migrate::handover::{self, DestinationState};
use crate::migrate::journal::{Record, Undo};
use crate::migrate::model::label::Label;
use crate::migrate::model::phase::Phase;
use crate::migrate::transfer::ram::precopy::{self, RamChannel};
use crate::migrate::transfer::streams::socket_pair;
use crate::mux::{Code, purpose};
use crate::net::compress::{Coding, Undelivered};
use crate::net::pump::PumpState;
use crate::net::session::IncomingStream;
use crate::peer_refusals::Reason;
use crate::qemu::{Abilities, BitmapNode, Stop};

/// How often a source may say in one migration that its guest runs now, or does not: each is a record in the journal.
const TO_RUN_MAX: u32 = 4096;

impl Destination {
    /// Attaches a data stream that the source opened under this grant.
    pub(crate) async fn attach(&mut self, stream: IncomingStream) {
        let (kind, channel) = (stream.open.purpose, stream.open.channel);
        // It may have waited here.
        if Instant::now() >= self.served.until {
            self.host.refused(&self.peer, Reason::GrantOver, || format!("of VM {}", self.vm));
            return stream.refuse(Code::Denied);
        }
        let label = match kind {
            purpose::RAM => RamChannel::numbered(channel).map(|channel| channel.label),
            purpose::NBD => {
                self.data.exports.iter().find(|e| e.channel == channel).map(|e| Label::Disk(e.disk.clone()))
            }
            _ => None,
        };
        let Some(label) = label.filter(|l| !self.data.streams.has(l)) else {
            let what = || format!("purpose {kind}, number {channel}, of VM {}", self.vm);
            self.host.refused(&self.peer, Reason::OutsideGrant, what);
            return stream.refuse(Code::Denied);
        };
        let local = match label {
            Label::Ram => self.data.ram.take().map(Ok),
            Label::Disk(_) => self.data.nbd.as_ref().map(NbdServer::connect),
        };
        let local = match local {
            Some(Ok(local)) => local,
            None => {
                let what = || format!("{label} of VM {}, which is not taken now", self.vm);
                self.host.refused(&self.peer, Reason::OutsideGrant, what);
                return stream.refuse(Code::ConnectFailed);
            }
            Some(Err(e)) => {
                tracing::warn!(stream = %label, error = %e, "the local end cannot be connected");
                return stream.refuse(Code::ConnectFailed);
            }
        };
        let session = stream.session().clone();
        match stream.accept().await {
            Ok(stream) => {
                let is_disk = matches!(label, Label::Disk(_));
                if is_disk {
                    self.enter(Phase::Mirror);
                }
                let state = match &self.granted {
                    Some((_, grant)) if grant.compress && is_disk => {
                        PumpState::new(Coding::Decompress(Undelivered::default()))
                    }
                    _ => PumpState::default(),
                };
                let state = if is_disk { state.to_nbd_server() } else { state };
                self.data.streams.start_as(label, &session, local, stream, state);
            }
            // Its source knows.
            Err(e) => tracing::debug!(stream = %label, error = %e, "the stream ended before it began"),
        }
    }

    pub(crate) async fn accept_ram(&mut self) -> Result<(), Error> {
        self.guest.incoming = true;
        let before = settings::remember::<Error>(&self.guest.qmp, &mut self.journal).await?;
        let mut on = vec!["events", "return-path"];
        // Else QEMU would lock what both hosts share when the guest is loaded, and the source's guest could not
        // go on after a failure. `cont` activates it.
        if self.granted.as_ref().is_some_and(|(offer, _)| offer.disks.iter().any(|disk| disk.left_out)) {
            on.push("late-block-activate");
        }
        let taken = self.bitmaps().await?;
        if !taken.is_empty() {
            on.push(bitmaps::CAPABILITY);
        }
        before.state(&self.guest.qmp, &on, None).await?;
        if !taken.is_empty() {
            Settings::map_bitmaps(&self.guest.qmp, taken).await?;
        }
        for channel in precopy::CHANNELS {
            let (ours, theirs) = socket_pair()?;
            channel.give::<Error>(&self.guest.qmp, &mut self.journal, theirs).await?;
            self.data.ram = Some(ours);
        }
        let incoming = precopy::receive();
        // A QEMU that stays tells why it failed; it is ended in `undo`.
        let stays = Abilities::ask(&self.guest.qmp).await?.exit_on_error;
        self.guest.qmp.execute(if stays { incoming.and_stay() } else { incoming }).await?;
        Ok(())
    }

    /// The dirty bitmaps that come with the RAM.
    async fn bitmaps(&self) -> Result<Vec<BitmapNode>, Error> {
        let Some((offer, grant)) = &self.granted else { return Ok(Vec::new()) };
        let Some(accepted) = grant.bitmaps.as_ref().filter(|accepted| !accepted.is_empty()) else {
            return Ok(Vec::new());
        };
        let present = crate::qemu::disks(&self.guest.qmp).await?;
        Ok(bitmaps::to_receive(&offer.disks, &present, accepted))
    }

    /// On the disk before it is answered, and so before the guest can be handed over.
    pub(crate) fn note_to_run(&mut self, running: bool) -> Result<(), Error> {
        if self.journal.past().running() != running {
            self.serving.to_run += 1;
            if self.serving.to_run > TO_RUN_MAX {
                return Err(Error::OutOfOrder("to-run"));
            }
            self.journal.record(Record::ToRun { running })?;
            self.progress.update(|p| p.paused = !running);
        }
        Ok(())
    }

    /// What the guest has flushed at the source has to be as safe here before it can be handed over. QEMU has
    /// written what came inside its own stream and flushes it when it is told to stop.
    pub(crate) async fn flush_in_band(&self) -> Result<(), Error> {
        if self.granted.as_ref().is_some_and(|(offer, _)| offer.in_band.is_some()) {
            self.guest.qmp.execute_until_answered_within(Stop, self.host.config.deadlines.stall()).await?;
        }
        Ok(())
    }

    /// The disks become the guest's alone.
    pub(crate) async fn close_exports(&mut self, machine: handover::Destination) -> Result<(), Error> {
        // Somebody's `cont` meanwhile would have QEMU start the guest when it is loaded, unasked.
        if machine.state() == (DestinationState::Waiting { loaded: false }) {
            self.guest.qmp.execute_until_answered(Stop).await?;
        }
        self.data.nbd = None;
        // The journal knows of a server that an earlier process has started.
        if self.journal.past().undo.contains(&Undo::NbdServer) {
            nbd_server::close(&self.guest.qmp, &self.data.exports).await?;
        }
        Ok(())
    }
}
