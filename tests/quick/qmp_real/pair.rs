//! Two QEMUs and the steps of a migration between them, without an agent: the streams connect
//! them directly.

use super::machine::{Machine, PATIENCE, binary, connect, image, nameless_listener};
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use vmferry::qemu::*;

/// What the source's migration has switched on; the destination the first two.
pub(crate) const NEW_CAPABILITIES: [&str; 3] = ["events", "return-path", "pause-before-switchover"];

const MIB: u64 = 1 << 20;

pub(crate) fn drive(image: &Path) -> Vec<String> {
    drives(&[image.to_owned()])
}

/// Arguments for disks `disk0`... on nodes `n0`...
pub(crate) fn drives(images: &[PathBuf]) -> Vec<String> {
    let one = |(number, image): (usize, &PathBuf)| {
        let file = format!("file.driver=file,file.filename={},discard=unmap", image.display());
        let node = format!("raw,node-name=n{number},{file}");
        let device = format!("virtio-blk-pci,id=disk{number},drive=n{number}");
        ["-blockdev".to_owned(), node, "-device".to_owned(), device]
    };
    images.iter().enumerate().flat_map(one).collect()
}

/// Two QEMUs and what one migration has put into them.
pub(crate) struct Pair {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) binary: PathBuf,
    pub(crate) source: Machine,
    pub(crate) destination: Machine,
    pub(crate) disks: Vec<Disk>,
    pub(crate) listener: Option<File>,
    pub(crate) at_source: SourceLeftovers,
    pub(crate) at_destination: DestinationLeftovers,
}

impl Pair {
    pub(crate) async fn start(variable: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let binary = binary(variable);
        let pattern: Vec<u8> = (0..3 * MIB).map(|at| (at / 512 * 7 + at) as u8).collect();
        let images = [
            image(folder.path(), "s0", 8 * MIB, &pattern),
            image(folder.path(), "s1", 64 * MIB, &pattern[MIB as usize..]),
        ];
        let source = Machine::start(&binary, folder.path(), "source", &drives(&images)).await;
        let destination = Self::destination(&binary, folder.path()).await;
        let disks = disks(&source.qmp).await.unwrap();
        let at_source = SourceLeftovers {
            capabilities_before: source.qmp.execute(QueryMigrateCapabilities).await.unwrap(),
            parameters_before: Some(source.qmp.execute(QueryMigrateParameters).await.unwrap()),
            ..SourceLeftovers::default()
        };
        let at_destination = DestinationLeftovers::default();
        Self { folder, binary, source, destination, disks, listener: None, at_source, at_destination }
    }

    pub(crate) async fn destination(binary: &Path, folder: &Path) -> Machine {
        let images = [image(folder, "d0", 8 * MIB, b"rubbish"), image(folder, "d1", 64 * MIB, &[0x55; 4096])];
        let mut arguments = drives(&images);
        arguments.extend(["-incoming".to_owned(), "defer".to_owned()]);
        let machine = Machine::start(binary, folder, "destination", &arguments).await;
        let status = machine.qmp.execute(QueryStatus).await.unwrap().status;
        assert_eq!(status, RunState::InMigrate);
        machine
    }

    pub(crate) async fn export(&mut self) {
        let qmp = &self.destination.qmp;
        let (listener, handle) = nameless_listener(self.folder.path());
        self.at_destination.fdnames.push(names::NBD_LISTEN_FDNAME.into());
        qmp.getfd(names::NBD_LISTEN_FDNAME, listener).await.unwrap();
        self.at_destination.nbd_server = true;
        qmp.execute(NbdServerStart::on_fd(names::NBD_LISTEN_FDNAME)).await.unwrap();
        self.listener = Some(handle);
        for disk in disks(qmp).await.unwrap() {
            let id = names::export_id(&disk.name);
            self.at_destination.exports.push(id.clone());
            let (node_name, name) = (disk.node_name, disk.name);
            qmp.execute(BlockExportAdd {
                id,
                node_name,
                name,
                writable: true,
                bitmaps: Vec::new(),
                allocation_depth: false,
            })
            .await
            .unwrap();
        }
    }

    /// Starts all mirrors; returns a second descriptor of each stream, to cut it by.
    pub(crate) async fn mirror(&mut self, speed: Option<u64>) -> Vec<UnixStream> {
        let mut streams = Vec::new();
        for disk in &self.disks {
            let (fdname, node) = (names::nbd_fdname(&disk.name), names::node_name(&disk.name));
            let stream = connect(self.listener.as_ref().unwrap());
            streams.push(stream.try_clone().unwrap());
            self.at_source.fdnames.push(fdname.clone());
            self.source.qmp.getfd(&fdname, stream.into()).await.unwrap();
            self.at_source.nodes.push(node.clone());
            let add = BlockdevAdd::nbd_on_fd(&node, &fdname, &disk.name);
            self.source.qmp.execute(add).await.unwrap();
            let job = names::job_id(&disk.name);
            self.at_source.jobs.push(job.clone());
            let sync = MirrorSyncMode::Full;
            let mirror = BlockdevMirror::new(&job, &disk.node_name, &node, sync);
            self.source.qmp.execute(BlockdevMirror { speed, ..mirror }).await.unwrap();
        }
        streams
    }

    pub(crate) async fn all_ready(&mut self) {
        for _ in 0..self.disks.len() {
            self.source.event(|kind| matches!(kind, EventKind::BlockJobReady { .. })).await;
        }
        for job in self.source.qmp.execute(QueryBlockJobs).await.unwrap() {
            assert!(job.ready && job.error.is_none(), "{job:?}");
        }
    }

    /// Migrates the RAM up to the pause before switchover.
    pub(crate) async fn ram_until_pause(&mut self) {
        let (one, other) = UnixStream::pair().unwrap();
        let (source, destination) = (&self.source.qmp, &self.destination.qmp);
        let on = MigrateSetCapabilities::on(&NEW_CAPABILITIES);
        source.execute(on).await.unwrap();
        let on = MigrateSetCapabilities::on(&NEW_CAPABILITIES[..2]);
        destination.execute(on).await.unwrap();
        let limits = MigrationParameters { downtime_limit: Some(123), ..Default::default() };
        source.execute(MigrateSetParameters(limits)).await.unwrap();
        self.at_source.fdnames.push(names::RAM_FDNAME.into());
        self.at_source.migration = true;
        self.at_destination.fdnames.push(names::RAM_FDNAME.into());
        source.getfd(names::RAM_FDNAME, one.into()).await.unwrap();
        destination.getfd(names::RAM_FDNAME, other.into()).await.unwrap();
        destination.execute(MigrateIncoming::from_fd(names::RAM_FDNAME)).await.unwrap();
        source.execute(Migrate::to_fd(names::RAM_FDNAME)).await.unwrap();
        self.source.event(|kind| is_status(kind, MigrationStatus::PreSwitchover)).await;
        let migration = self.source.qmp.execute(QueryMigrate).await.unwrap();
        assert!(migration.status.is_live() && !migration.status.is_terminal());
        let ram = migration.ram.unwrap();
        assert!(ram.total >= 64 * MIB && ram.dirty_sync_count > 0, "{ram:?}");
    }

    /// Ends the mirrors in the good way, and the NBD server.
    pub(crate) async fn finish_mirrors(&mut self) {
        for job in &self.at_source.jobs {
            let cancel = BlockJobCancel { device: job.clone(), force: false };
            self.source.qmp.execute(cancel).await.unwrap();
        }
        for _ in 0..self.at_source.jobs.len() {
            let end = |kind: &EventKind| {
                matches!(kind, EventKind::BlockJobCompleted { .. } | EventKind::BlockJobCancelled { .. })
            };
            let end = self.source.event(end).await.kind;
            let good = matches!(&end, EventKind::BlockJobCompleted { error: None, .. });
            assert!(good, "{end:?}");
        }
        self.destination.qmp.execute(NbdServerStop).await.unwrap();
        let mut gone = Vec::new();
        for _ in 0..self.at_destination.exports.len() {
            let deleted = |kind: &EventKind| matches!(kind, EventKind::BlockExportDeleted { .. });
            gone.push(self.destination.event(deleted).await.data["id"].clone());
        }
        gone.sort_by_key(|id| id.to_string());
        assert_eq!(gone, self.at_destination.exports);
    }

    pub(crate) async fn switch_over(&mut self) {
        self.source.qmp.execute(MigrateContinue::from_pre_switchover()).await.unwrap();
        self.source.event(|kind| is_status(kind, MigrationStatus::Completed)).await;
        self.destination.event(|kind| is_status(kind, MigrationStatus::Completed)).await;
        // QEMU 10.0 can say `completed` a moment before the state of the guest follows.
        let state = async || self.source.qmp.execute(QueryStatus).await.unwrap().status;
        let settled = async { while state().await == RunState::FinishMigrate {} };
        tokio::time::timeout(PATIENCE, settled).await.unwrap();
        assert_eq!(state().await, RunState::PostMigrate);
        self.destination.qmp.execute(Cont).await.unwrap();
        self.destination.event(|kind| *kind == EventKind::Resume).await;
        assert!(self.destination.qmp.execute(QueryStatus).await.unwrap().running);
    }

    /// Cleans both sides twice: the second time there is nothing to do, and that is no error.
    pub(crate) async fn clean(&self, guest: RunState) {
        for _ in 0..2 {
            let report = source_cleanup(&self.source.qmp, &self.at_source).await;
            assert!(report.is_clean(), "{report:#?} {}", self.source.complaints());
            assert_eq!(report.guest, Some(guest.clone()));
        }
        assert!(leftovers(&self.source.qmp).await.unwrap().is_empty());
        let now = self.source.qmp.execute(QueryMigrateCapabilities).await.unwrap();
        assert_eq!(now, self.at_source.capabilities_before);
        let now = self.source.qmp.execute(QueryMigrateParameters).await.unwrap();
        assert_eq!(Some(now), self.at_source.parameters_before);
        if !self.destination.qmp.is_closed() {
            self.clean_destination().await;
        }
    }

    pub(crate) async fn clean_destination(&self) {
        for _ in 0..2 {
            let report = destination_cleanup(&self.destination.qmp, &self.at_destination).await;
            // A destination whose stream broke ends by itself, perhaps at this moment.
            if report.is_connection_lost() {
                self.destination.qmp.closed().await;
                return;
            }
            assert!(report.is_clean(), "{report:#?} {}", self.destination.complaints());
        }
        assert!(leftovers(&self.destination.qmp).await.unwrap().is_empty());
    }

    pub(crate) fn assert_same_disks(&self) {
        for number in 0..2 {
            let read = |side| std::fs::read(self.folder.path().join(format!("{side}{number}"))).unwrap();
            assert!(read("s") == read("d"), "disk{number} differs");
        }
    }
}

pub(crate) fn is_status(kind: &EventKind, wanted: MigrationStatus) -> bool {
    matches!(kind, EventKind::Migration { status } if *status == wanted)
}
