//! The source's hooks for further tries: follows each disk's changes while there may be one, and
//! decides of each disk whether a further try copies the whole or what changed since.
//!
//! What is copied, and why that is enough, is in `delta.rs`. What becomes of the bitmaps between
//! two tries is in `retry.rs`.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering::Relaxed;

use super::Source;
use super::failure::Failure;
use crate::migrate::guest::nbd_server::NbdServer;
use crate::migrate::journal::Undo;
use crate::migrate::model::label::Label;
use crate::migrate::model::plan::CopiedDisk;
use crate::migrate::model::problem::chain;
use crate::migrate::protocol::message::Export;
use crate::migrate::transfer::disk::delta::{Bitmaps, Followed};
use crate::migrate::transfer::streams::socket_pair;
use crate::mux::purpose;
use crate::qemu::{QueryMigrateCapabilities, names, nbd_server_runs};

const MIB: u64 = 1 << 20;

impl Source {
    /// Whether a failure of this try may be followed by another one.
    pub(crate) fn has_successor(&self) -> bool {
        let number = self.request.retry.as_ref().map_or(1, |r| r.number);
        number < self.request.options.retry.tries()
    }

    /// The disks of which only what changed is copied. Says why of those that it is not.
    pub(crate) async fn choose(&mut self) -> Result<BTreeSet<String>, Failure> {
        let mut chosen = BTreeSet::new();
        if self.request.retry.is_none() {
            return Ok(chosen);
        }
        for disk in self.disks.clone() {
            match self.doubt(&disk).await? {
                None => drop(chosen.insert(disk.name)),
                Some(doubt) => self.note(format!("{}: the whole disk is copied again: {doubt}", disk.name)),
            }
        }
        if !chosen.is_empty()
            && let Some(doubt) = self.serve_changes().await?
        {
            for disk in std::mem::take(&mut chosen) {
                self.note(format!("{disk}: the whole disk is copied again: {doubt}"));
            }
        }
        Ok(chosen)
    }

    /// Why a disk must be copied as a whole.
    async fn doubt(&self, disk: &CopiedDisk) -> Result<Option<String>, Failure> {
        let Some(followed) = self.tracking.disks.get(&disk.name) else {
            return Ok(Some("there is no whole copy of it whose changes were recorded".into()));
        };
        if !followed.in_step {
            return Ok(Some("its copy was not whole when the try before failed".into()));
        }
        if followed.disk != *disk {
            return Ok(Some("it is another image at the source, or has another size".into()));
        }
        if let Some(doubt) = followed.bitmaps.doubt(&self.qmp).await? {
            return Ok(Some(doubt.into()));
        }
        let states = self.grant.as_ref().map_or(&[][..], |g| &g.since);
        Ok(match states.iter().find(|s| s.disk == disk.name) {
            None => Some("the destination does not say whether its image is as it was left".into()),
            Some(state) => state.doubt.clone(),
        })
    }

    /// Starts the server from which this agent reads what changed; why it cannot.
    async fn serve_changes(&mut self) -> Result<Option<String>, Failure> {
        if nbd_server_runs(&self.qmp).await? {
            return Ok(Some("the source's QEMU has an NBD server of somebody else's".into()));
        }
        let folder = self.host.config.runtime_dir.join("nbd");
        match NbdServer::start(&self.qmp, &mut self.journal, &folder, &[]).await {
            Ok(server) => {
                self.delta.serve(server);
                Ok(None)
            }
            Err(trouble) => Ok(Some(format!("the source's QEMU gives no NBD server: {}", chain(&trouble)))),
        }
    }

    /// Copies what changed of a disk, from now until the guest is paused.
    pub(crate) async fn start_delta(&mut self, disk: &CopiedDisk, export: &Export) -> Result<(), Failure> {
        let Some(followed) = self.tracking.disks.get(&disk.name) else { return Ok(()) };
        let bitmaps = followed.bitmaps.clone();
        let label = Label::Disk(disk.name.clone());
        let (lane, stream) = self.open(&label, purpose::NBD, export.channel).await?;
        let (ours, theirs) = socket_pair().map_err(Failure::Socket)?;
        self.streams.start_coded(label, &lane, ours, stream, self.disk_coding());
        self.journal.will_make(Undo::Export(names::export_id(&disk.name)))?;
        self.delta.start(&self.qmp, &disk.name, bitmaps, &export.export, theirs);
        tracing::info!(disk = disk.name, "only what changed since the try before is copied");
        Ok(())
    }

    /// Follows a disk from before its copy begins, if there may be a further try. A QEMU that does
    /// not let us is no reason to fail.
    pub(crate) async fn follow(&mut self, disk: &CopiedDisk) -> Result<(), Failure> {
        self.tracking.disks.remove(&disk.name);
        if !self.has_successor() {
            return Ok(());
        }
        if self.sends_bitmaps().await? {
            // They would go along, to a QEMU that knows nothing of them.
            tracing::info!("QEMU is set to migrate dirty bitmaps: none of ours is made");
            return Ok(());
        }
        let id = self.request.retry.as_ref().map_or(self.request.id, |r| r.first);
        let bitmaps = Bitmaps::new(&disk.node_name, id);
        for undo in bitmaps.undo() {
            self.journal.will_make(undo)?;
        }
        match bitmaps.begin(&self.qmp).await {
            Ok(()) => {
                let followed = Followed { disk: disk.clone(), bitmaps, in_step: false };
                self.tracking.disks.insert(disk.name.clone(), followed);
            }
            Err(e) if e.desc().is_some() => {
                tracing::info!(disk = disk.name, error = chain(&e), "a further try will copy the whole disk");
            }
            Err(e) => return Err(e.into()),
        }
        Ok(())
    }

    async fn sends_bitmaps(&self) -> Result<bool, Failure> {
        let capabilities = self.qmp.execute(QueryMigrateCapabilities).await?;
        Ok(capabilities.iter().any(|c| c.capability == "dirty-bitmaps" && c.state))
    }

    /// A mirror has become ready: what is at the destination is worth keeping from now on.
    pub(crate) fn in_step(&mut self, job: &str) {
        let of_job = |(name, _): &(&String, &mut Followed)| names::job_id(name) == job;
        if let Some((_, followed)) = self.tracking.disks.iter_mut().find(of_job) {
            followed.in_step = true;
        }
    }

    /// Brings the copies of changes into the progress; what they still have to copy.
    pub(crate) fn look_at_delta(&self) -> u64 {
        let mut remaining = 0;
        self.progress.update(|p| {
            for (name, copied) in &self.delta.disks {
                let (done, left) = (copied.bytes.load(Relaxed), copied.left.load(Relaxed));
                remaining += left;
                if let Some(disk) = p.disks.iter_mut().find(|d| d.name == *name) {
                    disk.total_bytes = done.saturating_add(left);
                    (disk.done_bytes, disk.ready) = (done, copied.once.load(Relaxed));
                }
            }
        });
        remaining
    }

    /// Says how much was copied again.
    pub(crate) fn note_delta(&self) {
        for (name, copied) in &self.delta.disks {
            let size = self.disks.iter().find(|d| d.name == *name).map_or(0, |d| d.virtual_size);
            let bytes = copied.bytes.load(Relaxed);
            self.note(format!("{name}: {} MiB of {} MiB copied again", bytes.div_ceil(MIB), size / MIB));
        }
    }

    fn note(&self, text: String) {
        tracing::info!("{text}");
        self.progress.update(|p| p.notes.push(text));
    }
}
