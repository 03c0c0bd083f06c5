//! The QMP client, the typed commands and the clean-up against QEMU itself, in two versions.
//!
//! `VMFERRY_QEMU72` and `VMFERRY_QEMU10` name the binaries of a QEMU 7.2 and a QEMU 10.0.

pub(crate) mod machine;
mod pair;

use machine::{Machine, PATIENCE, binary, connect, image, nameless_listener, refused};
use pair::{NEW_CAPABILITIES, Pair, drive};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use tokio::task::JoinSet;
use vmferry::qemu::*;

const MIB: u64 = 1 << 20;

/// Runs each of these functions with both versions.
macro_rules! on_both {
    ($($test:ident),+ $(,)?) => {
        mod qemu72 {
            $(#[tokio::test] async fn $test() { super::$test("VMFERRY_QEMU72").await })+
        }
        mod qemu10 {
            $(#[tokio::test] async fn $test() { super::$test("VMFERRY_QEMU10").await })+
        }
    };
}

on_both!(
    abilities_are_asked_for,
    disks_have_the_same_names_on_both_sides,
    devices_of_the_host_are_found,
    a_monitor_serves_one_client,
    refusals_are_understood,
    many_descriptors_are_handed_over_at_once,
    the_end_of_qemu_is_noticed,
    a_whole_migration_leaves_nothing,
    a_broken_migration_is_cleaned_up_and_can_be_repeated,
    what_changed_is_read_and_written,
    a_clock_that_counts_instructions_is_seen,
);

async fn abilities_are_asked_for(variable: &str) {
    let folder = tempfile::tempdir().unwrap();
    let machine = Machine::start(&binary(variable), folder.path(), "vm", &[]).await;
    let abilities = Abilities::ask(&machine.qmp).await.unwrap();
    let new = variable == "VMFERRY_QEMU10";
    let first_two = (abilities.version.0, abilities.version.1);
    assert_eq!(first_two, if new { (10, 0) } else { (7, 2) }, "another QEMU in {variable}");
    let on_both = [
        abilities.nbd_server_fd,
        abilities.block_export_add,
        abilities.blockdev_mirror,
        abilities.migrate_incoming,
    ];
    assert_eq!(on_both, [true; 4], "{abilities:?}");
    let on_new = [
        abilities.handshake_max_seconds,
        abilities.exit_on_error,
        abilities.migrate_channels,
        abilities.block_job_change,
        abilities.export_allow_inactive,
    ];
    assert_eq!(on_new, [new; 5], "{abilities:?}");
    assert_eq!([abilities.migrate_blk, abilities.migrate_inc], [!new; 2], "{abilities:?}");
    assert!(!abilities.mirror_target_is_zero);
    assert!(NEW_CAPABILITIES.iter().all(|name| abilities.capability(name)));
    assert_eq!(abilities.capability("block"), !new);
    assert!(!abilities.capability("of-tomorrow"));
    let name = machine.qmp.execute(QueryName).await.unwrap().name;
    assert_eq!(name.as_deref(), Some("vm"));
    assert_eq!(machine.qmp.execute(QueryUuid).await.unwrap().uuid.len(), 36);
    let memory = machine.qmp.execute(QueryMemorySizeSummary).await.unwrap();
    assert_eq!(memory.base_memory, 64 * MIB);
    assert_eq!(machine.qmp.execute(QueryCpusFast).await.unwrap().len(), 1);
    let kind = QomGet { path: "/machine".into(), property: "type".into() };
    let kind = machine.qmp.execute(kind).await.unwrap();
    assert!(kind.as_str().unwrap().starts_with("pc-q35-"), "{kind}");
    let status = machine.qmp.execute(QueryStatus).await.unwrap();
    assert_eq!((status.running, status.status), (false, RunState::Prelaunch));
    assert_eq!(machine.qmp.execute(QueryBlockJobs).await.unwrap(), []);
    let migration = machine.qmp.execute(QueryMigrate).await.unwrap();
    assert_eq!(migration.status, MigrationStatus::None);
}

async fn a_clock_that_counts_instructions_is_seen(variable: &str) {
    let folder = tempfile::tempdir().unwrap();
    let counting = ["-icount", "shift=auto"].map(String::from);
    for (name, more, counts) in [("plain", &[][..], false), ("counting", &counting, true)] {
        let qemu = Machine::start(&binary(variable), folder.path(), name, more).await;
        assert_eq!(vmferry::qemu::machine(&qemu.qmp).await.unwrap().counts_instructions, Some(counts));
    }
}

async fn disks_have_the_same_names_on_both_sides(variable: &str) {
    let folder = tempfile::tempdir().unwrap();
    let mut sides = Vec::new();
    for (side, incoming) in [("source", ""), ("destination", "-incoming defer")] {
        let image = |name: &str, size| {
            image(folder.path(), &format!("{side}.{name}"), size, b"x").display().to_string()
        };
        let arguments = format!(
            "-blockdev raw,node-name={side}-n0,cache.no-flush=on,file.driver=file,file.filename={} \
             -device virtio-blk-pci,id=disk0,drive={side}-n0,write-cache=off \
             -drive if=virtio,format=raw,snapshot=on,file={} \
             -drive if=none,id=d2,format=raw,readonly=on,file={} -device virtio-scsi-pci -device scsi-hd,drive=d2,id=scsi0-0-0,write-cache=off \
             -drive if=none,id=empty -device ide-cd,bus=ide.0,drive=empty,id=cd0 \
             -drive if=none,id=full,format=raw,file={} -device ide-cd,bus=ide.1,drive=full,id=cd1 \
             -drive if=pflash,format=raw,file={} {incoming}",
            image("a", 8 * MIB),
            image("b", 4 * MIB),
            image("c", 2 * MIB),
            image("d", MIB),
            image("e", 4 * MIB),
        );
        let arguments: Vec<String> = arguments.split_whitespace().map(str::to_owned).collect();
        let machine = Machine::start(&binary(variable), folder.path(), side, &arguments).await;
        sides.push(disks(&machine.qmp).await.unwrap());
    }
    for side in &sides {
        let of = |name: &str| {
            let found = side.iter().find(|disk| disk.name == name);
            found.unwrap_or_else(|| panic!("no {name} in {side:#?}")).clone()
        };
        assert_eq!(side.len(), 5, "{side:#?}");
        let first = of("disk0");
        assert_eq!((first.virtual_size, first.format.as_str()), (8 * MIB, "raw"), "{first:?}");
        assert!(first.node_name.ends_with("-n0") && first.actual_size.is_some(), "{first:?}");
        assert!(!(first.read_only || first.removable || first.backing || first.firmware), "{first:?}");
        // It has no id: its place on the bus names it.
        let over_another = of("0000-00-03.0");
        // QEMU flushes no temporary image.
        assert!(first.no_flush && over_another.no_flush && !of("scsi0-0-0").no_flush, "{first:?}");
        assert!(first.held_back && over_another.held_back && !of("scsi0-0-0").held_back, "{first:?}");
        // The guest has not run: no driver of virtio has read anything.
        let through = [&first, &of("scsi0-0-0"), &over_another].map(|disk| disk.write_through);
        assert_eq!(through, [Some(WriteThrough::Driver), Some(WriteThrough::Here), None]);
        assert_eq!((over_another.backing, over_another.format.as_str()), (true, "qcow2"));
        assert!(over_another.node_name.starts_with('#'), "{over_another:?}");
        assert!(of("scsi0-0-0").read_only);
        // Whatever its node allows.
        assert!(of("cd1").removable && of("cd1").read_only);
        assert!(of("pflash0").firmware);
    }
    let names = |side: &[Disk]| side.iter().map(|disk| disk.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&sides[0]), names(&sides[1]));
}

/// No such device is on the host; whoever plugs one in has it in the guest.
async fn devices_of_the_host_are_found(variable: &str) {
    let folder = tempfile::tempdir().unwrap();
    let arguments = format!(
        "-device qemu-xhci,id=usb -device usb-host,id=stick,bus=usb.0,vendorid=0x1234,productid=0x5678 \
         -chardev socket,id=far,path={}/far,server=on,wait=off -device usb-redir,id=idle,bus=usb.0,chardev=far \
         -device usb-tablet,bus=usb.0",
        folder.path().display()
    );
    let arguments: Vec<String> = arguments.split_whitespace().map(str::to_owned).collect();
    let machine = Machine::start(&binary(variable), folder.path(), "vm", &arguments).await;
    let found = outside(&machine.qmp).await.unwrap();
    let expected = Outside { name: "stick".into(), device: "usb-host".into(), contents: Contents::HostUsb };
    assert_eq!(found, [expected]);
}

async fn a_monitor_serves_one_client(variable: &str) {
    let folder = tempfile::tempdir().unwrap();
    let machine = Machine::start(&binary(variable), folder.path(), "vm", &[]).await;
    let mut others = JoinSet::new();
    for _ in 0..5 {
        let monitor = machine.monitor.clone();
        others.spawn(async move { Qmp::connect(&monitor, Duration::from_millis(200)).await });
    }
    while let Some(result) = others.join_next().await {
        let error = result.unwrap().unwrap_err();
        assert!(matches!(error, QmpError::Busy { .. }), "{error:?}");
    }
    machine.qmp.execute(QueryStatus).await.unwrap();
}

/// Every sentence of QEMU's that the predicates know, from QEMU's own mouth.
async fn refusals_are_understood(variable: &str) {
    let folder = tempfile::tempdir().unwrap();
    let args = drive(&image(folder.path(), "a", MIB, b"x"));
    let machine = Machine::start(&binary(variable), folder.path(), "vm", &args).await;
    let qmp = &machine.qmp;
    let none = || "vmferry-none".to_owned();

    let error = refused(qmp.execute(Closefd { fdname: none() }).await);
    assert!(error.is_not_found_fd(), "{error}");
    let error = refused(qmp.execute(Migrate::to_fd("vmferry-none")).await);
    assert!(error.is_not_found_fd(), "{error}");
    let error = refused(qmp.execute(NbdServerStop).await);
    assert!(error.is_nbd_server_not_running(), "{error}");
    let mode = BlockExportRemoveMode::Hard;
    let error = refused(qmp.execute(BlockExportDel { id: none(), mode }).await);
    assert!(error.is_not_found_export(), "{error}");
    let error = refused(qmp.execute(BlockJobCancel { device: none(), force: true }).await);
    assert!(error.is_not_found_job(), "{error}");
    let error = refused(qmp.execute(JobDismiss { id: none() }).await);
    assert!(error.is_not_found_job(), "{error}");
    let error = refused(qmp.execute(BlockdevDel { node_name: none() }).await);
    assert!(error.is_not_found_node(), "{error}");
    let error = refused(qmp.execute(BlockdevDel { node_name: "n0".into() }).await);
    assert!(error.is_node_in_use(), "{error}");
    let sync = MirrorSyncMode::Full;
    let error = refused(qmp.execute(BlockdevMirror::new("j", "vmferry-none", "x", sync)).await);
    assert!(error.is_not_found_node(), "{error}");
    let error = refused(qmp.execute(MigrateIncoming::from_fd("vmferry-none")).await);
    assert!(error.is_not_incoming(), "{error}");
    let error = refused(qmp.execute(MigrateContinue::from_pre_switchover()).await);
    assert!(error.is_not_in_expected_state(), "{error}");

    let copy_mode = MirrorCopyMode::WriteBlocking;
    let error = refused(qmp.execute(BlockJobChange { id: none(), copy_mode }).await);
    if variable == "VMFERRY_QEMU72" {
        assert!(error.is_command_not_found(), "{error}");
        let limited = NbdServerStart { handshake_max_seconds: Some(0), ..NbdServerStart::on_fd("x") };
        let error = refused(qmp.execute(limited).await);
        assert!(error.is_unexpected_parameter(), "{error}");
    } else {
        assert!(error.is_not_found_job(), "{error}");
        let blk = Migrate { blk: true, ..Migrate::to_fd("x") };
        let error = refused(qmp.execute(blk).await);
        assert!(error.is_unexpected_parameter(), "{error}");
    }

    let (listener, _handle) = nameless_listener(folder.path());
    qmp.getfd(names::NBD_LISTEN_FDNAME, listener).await.unwrap();
    let start = NbdServerStart::on_fd(names::NBD_LISTEN_FDNAME);
    qmp.execute(start.clone()).await.unwrap();
    let error = refused(qmp.execute(start).await);
    assert!(error.is_nbd_server_already_running(), "{error}");
    assert!(leftovers(qmp).await.unwrap().nbd_server);
    qmp.execute(NbdServerStop).await.unwrap();
    assert!(leftovers(qmp).await.unwrap().is_empty());
}

async fn many_descriptors_are_handed_over_at_once(variable: &str) {
    let folder = tempfile::tempdir().unwrap();
    let machine = Machine::start(&binary(variable), folder.path(), "vm", &[]).await;
    let mut tasks = JoinSet::new();
    for number in 0..50 {
        let qmp = machine.qmp.clone();
        tasks.spawn(async move {
            let fdname = format!("vmferry-{number}");
            let (ours, theirs) = UnixStream::pair().unwrap();
            qmp.getfd(&fdname, theirs.into()).await?;
            ours.set_nonblocking(true).unwrap();
            let open = std::io::Read::read(&mut &ours, &mut [0]).unwrap_err();
            assert_eq!(open.kind(), std::io::ErrorKind::WouldBlock, "{fdname}");
            qmp.execute(Closefd { fdname }).await?;
            assert_eq!(std::io::Read::read(&mut &ours, &mut [0]).unwrap(), 0);
            Ok::<_, QmpError>(())
        });
    }
    while let Some(result) = tasks.join_next().await {
        result.unwrap().unwrap();
    }
}

async fn the_end_of_qemu_is_noticed(variable: &str) {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = Machine::start(&binary(variable), folder.path(), "killed", &[]).await;
    assert!(!machine.qmp.is_closed());
    machine.kill().await;
    tokio::time::timeout(PATIENCE, machine.qmp.closed()).await.unwrap();
    let error = machine.qmp.execute(QueryStatus).await.unwrap_err();
    assert!(matches!(error, QmpError::Ended { .. }), "{error:?}");

    let mut machine = Machine::start(&binary(variable), folder.path(), "asked", &[]).await;
    machine.qmp.execute(Quit).await.unwrap();
    machine.event(|kind| matches!(kind, EventKind::Shutdown { guest: false, .. })).await;
    tokio::time::timeout(PATIENCE, machine.qmp.closed()).await.unwrap();
    assert!(machine.ended().await.success());
}

async fn a_whole_migration_leaves_nothing(variable: &str) {
    let mut pair = Pair::start(variable).await;
    migrate(&mut pair).await;
    pair.clean(RunState::PostMigrate).await;
}

async fn migrate(pair: &mut Pair) {
    pair.export().await;
    pair.mirror(None).await;
    pair.all_ready().await;
    let found = leftovers(&pair.source.qmp).await.unwrap();
    let expected = ["vmferry-disk0", "vmferry-disk1"];
    let sorted = |mut names: Vec<String>| {
        names.sort();
        names
    };
    assert_eq!(
        (sorted(found.jobs), sorted(found.nodes)),
        (expected.map(Into::into).to_vec(), expected.map(Into::into).to_vec())
    );
    let found = leftovers(&pair.destination.qmp).await.unwrap();
    assert_eq!((sorted(found.exports), found.nbd_server), (expected.map(Into::into).to_vec(), true));
    pair.ram_until_pause().await;
    pair.finish_mirrors().await;
    pair.assert_same_disks();
    pair.switch_over().await;
}

async fn a_broken_migration_is_cleaned_up_and_can_be_repeated(variable: &str) {
    let mut pair = Pair::start(variable).await;
    pair.source.qmp.execute(Cont).await.unwrap();

    // Broken while the mirrors copy: both QEMUs can be used again.
    pair.export().await;
    let streams = pair.mirror(Some(64 << 10)).await;
    for stream in &streams {
        stream.shutdown(std::net::Shutdown::Both).unwrap();
    }
    pair.clean(RunState::Running).await;
    pair.at_destination = DestinationLeftovers::default();

    // Taken back at the pause before switchover: the destination is used up.
    pair.export().await;
    pair.mirror(None).await;
    pair.all_ready().await;
    pair.ram_until_pause().await;
    pair.clean(RunState::Running).await;
    let migration = pair.source.qmp.execute(QueryMigrate).await.unwrap();
    assert!(migration.status.is_terminal(), "{migration:?}");

    // The destination dies while the mirrors are ready.
    pair.destination = Pair::destination(&pair.binary, pair.folder.path()).await;
    pair.at_destination = DestinationLeftovers::default();
    pair.export().await;
    pair.mirror(None).await;
    pair.all_ready().await;
    pair.destination.kill().await;
    pair.destination.qmp.closed().await;
    pair.clean(RunState::Running).await;
    let report = destination_cleanup(&pair.destination.qmp, &pair.at_destination).await;
    assert!(report.is_connection_lost() && !report.is_clean());

    // And then it works.
    pair.destination = Pair::destination(&pair.binary, pair.folder.path()).await;
    pair.at_destination = DestinationLeftovers::default();
    pair.at_source.jobs.clear();
    migrate(&mut pair).await;
    pair.clean(RunState::PostMigrate).await;
}

/// The bitmap commands and the NBD client, on a disk that an export of its own writes to.
async fn what_changed_is_read_and_written(variable: &str) {
    const CHUNK: u64 = 64 << 10;
    let folder = tempfile::tempdir().unwrap();
    let files = ["from.raw", "to.raw"].map(|name| image(folder.path(), name, 3 * MIB + 512, b"old"));
    let arguments = format!(
        "-blockdev raw,node-name=n0,file.driver=file,file.filename={} -device virtio-blk-pci,id=disk0,drive=n0,share-rw=on \
         -blockdev raw,node-name=n1,file.driver=file,file.filename={}",
        files[0].display(),
        files[1].display()
    );
    let arguments: Vec<String> = arguments.split_whitespace().map(str::to_owned).collect();
    let machine = Machine::start(&binary(variable), folder.path(), "vm", &arguments).await;
    let qmp = &machine.qmp;
    let (listener, handle) = nameless_listener(folder.path());
    qmp.getfd(names::NBD_LISTEN_FDNAME, listener).await.unwrap();
    qmp.execute(NbdServerStart::on_fd(names::NBD_LISTEN_FDNAME)).await.unwrap();
    let export = |node: &str, name: &str, writable, bitmaps| BlockExportAdd {
        id: format!("vmferry-{name}"),
        node_name: node.into(),
        name: name.into(),
        writable,
        bitmaps,
        allocation_depth: false,
    };
    qmp.execute(export("n0", "guest", true, vec![])).await.unwrap();
    qmp.execute(export("n1", "to", true, vec![])).await.unwrap();

    let [a, b] = ['a', 'b'].map(|which| names::bitmap("7", which));
    let (node, granularity) = ("n0".to_owned(), CHUNK as u32);
    for name in [&a, &b] {
        let (node, name) = (node.clone(), name.clone());
        qmp.execute(BlockDirtyBitmapAdd { node, name, granularity }).await.unwrap();
    }
    let again = BlockDirtyBitmapAdd { node: node.clone(), name: a.clone(), granularity };
    refused(qmp.execute(again).await);

    let mut guest = NbdWriter::connect(connect(&handle).into(), "guest").await.unwrap();
    assert_eq!(guest.size(), 3 * MIB + 512);
    guest.write(CHUNK + 4096, b"new data").await.unwrap();
    guest.write(2 * MIB, &[0; 8192]).await.unwrap();
    // More at once than may be on the way.
    for number in 0..40 {
        guest.write(3 * MIB - CHUNK + number * 512, &[number as u8; 512]).await.unwrap();
    }
    guest.write(3 * MIB, &[9; 512]).await.unwrap();
    guest.flush().await.unwrap();

    let disable = BlockDirtyBitmapDisable { node: node.clone(), name: a.clone() };
    qmp.execute(disable).await.unwrap();
    guest.write(0, b"after it was disabled").await.unwrap();
    guest.flush().await.unwrap();
    let recording = export("n0", "from", false, vec![b.clone()]);
    refused(qmp.execute(recording).await);
    qmp.execute(export("n0", "from", false, vec![a.clone()])).await.unwrap();
    let mut from = NbdReader::connect(connect(&handle).into(), "from", &a).await.unwrap();
    let (dirty, end) = from.dirty(0).await.unwrap();
    assert_eq!(end, from.size());
    assert_eq!(dirty, [CHUNK..2 * CHUNK, 2 * MIB..2 * MIB + CHUNK, 3 * MIB - CHUNK..3 * MIB + 512]);
    let busy = qmp.execute(BlockDirtyBitmapRemove { node: node.clone(), name: a.clone() }).await;
    assert!(!refused(busy).is_not_found_bitmap());

    let mut to = NbdWriter::connect(connect(&handle).into(), "to").await.unwrap();
    for range in dirty {
        let mut data = vec![1; (range.end - range.start) as usize];
        from.read(range.start, &mut data).await.unwrap();
        to.write(range.start, &data).await.unwrap();
    }
    to.flush().await.unwrap();
    drop((from, to, guest));
    for name in ["from", "guest", "to"] {
        delete_export(qmp, &format!("vmferry-{name}")).await.unwrap();
    }
    let [mut source, copy] = files.map(|file| std::fs::read(file).unwrap());
    assert_ne!(source, copy, "what was written later was copied as well");
    source[..21].copy_from_slice(&copy[..21]);
    assert!(source == copy);

    // What both hold is one set, and only ours is found missing.
    let merge = BlockDirtyBitmapMerge { node: node.clone(), target: b.clone(), bitmaps: vec![a.clone()] };
    qmp.execute(merge).await.unwrap();
    delete_bitmap(qmp, "n0", &a).await.unwrap();
    let nodes = qmp.execute(QueryNamedBlockNodes { flat: true }).await.unwrap();
    let bitmaps: Vec<_> = nodes.into_iter().flat_map(|n| n.dirty_bitmaps).collect();
    assert_eq!(bitmaps.len(), 1, "{bitmaps:?}");
    assert_eq!((bitmaps[0].name.as_str(), bitmaps[0].recording, bitmaps[0].busy), (b.as_str(), true, false));
    assert!(bitmaps[0].count >= 4 * CHUNK, "{bitmaps:?}");
    assert_eq!(leftovers(qmp).await.unwrap().bitmaps, [("n0".to_owned(), b.clone())]);
    for (node, name) in [("n0", &a), ("vmferry-none", &b)] {
        let remove = BlockDirtyBitmapRemove { node: node.into(), name: name.clone() };
        assert!(refused(qmp.execute(remove).await).is_not_found_bitmap());
    }
    let what = SourceLeftovers {
        nbd_server: true,
        bitmaps: vec![("n0".into(), a), ("n0".into(), b)],
        fdnames: vec![names::NBD_LISTEN_FDNAME.into()],
        ..SourceLeftovers::default()
    };
    let report = source_cleanup(qmp, &what).await;
    assert!(report.is_clean(), "{report:?}");
    assert!(leftovers(qmp).await.unwrap().is_empty());
}

#[tokio::test]
async fn what_is_no_nbd_server_is_refused() {
    use std::io::Write;
    for said in [&b"HTTP/1.0 200 OK, and here is your page\r\n"[..], b"NBDMAGIC", b"NBDMAGICIHAVEOPT\0\0\0\0"]
    {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(said).unwrap();
        drop(theirs);
        let refused = NbdWriter::connect(ours.into(), "disk0").await.unwrap_err();
        assert!(matches!(refused, NbdError::Protocol(_) | NbdError::Io(_)), "{refused:?}");
    }
    // An answer without end.
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(b"NBDMAGICIHAVEOPT\0\x03").unwrap();
    let mut reply = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
    reply.extend_from_slice(&[0, 0, 0, 7, 0, 0, 0, 3, 0xff, 0xff, 0xff, 0xff]);
    theirs.write_all(&reply).unwrap();
    let refused = NbdWriter::connect(ours.into(), "disk0").await.unwrap_err();
    assert!(matches!(refused, NbdError::Protocol("a reply that is too long")), "{refused:?}");
}
