use std::collections::BTreeMap;

use super::*;
use crate::migrate::model::problem::{Policy, Severity};
use crate::migrate::protocol::message::{DiskPlace, DiskSpec, Offer};
use crate::qemu::Device;

fn offer(disks: Vec<DiskSpec>) -> Offer {
    let (vm, qemu) = ("web1".into(), String::new());
    Offer {
        vm,
        disks,
        running: true,
        qemu,
        machine: None,
        audit_head: None,
        witness: None,
        in_band: None,
        hears_busy: false,
        needs: std::collections::BTreeSet::new(),
        after: None,
        compress: false,
        policy: Policy::default(),
        flash: Vec::new(),
    }
}

fn device(kind: &str, id: &str, address: &str) -> Device {
    let word = |word: &str| (!word.is_empty()).then(|| word.to_owned());
    Device { kind: kind.into(), id: word(id), address: word(address), ..Device::default() }
}

fn with(mut device: Device, settings: &[(&str, &str)]) -> Device {
    device.differs = settings.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
    device
}

fn built_in(kind: &str, address: &str) -> Device {
    Device { built_in: true, ..device(kind, "", address) }
}

fn machine_of(devices: Vec<Device>) -> Machine {
    Machine {
        qemu: "10.0.2".into(),
        kind: "pc-q35-7.2".into(),
        kvm: Some(false),
        ram_bytes: 128 << 20,
        cpus: 1,
        cpu: BTreeMap::from([("type".to_owned(), "qemu64-x86_64-cpu".to_owned())]),
        cpu_features: BTreeMap::from([("1 ECX".to_owned(), 0b1001)]),
        ram_blocks: BTreeMap::from([
            ("pc.ram".to_owned(), 128 << 20),
            ("/rom@etc/acpi/rsdp".to_owned(), 4096),
        ]),
        devices,
        ..Machine::default()
    }
}

fn found(source: &Machine, here: &Machine) -> Vec<(ProblemKind, Severity, String)> {
    let found = compare(source, here, &offer(Vec::new()));
    found.into_iter().map(|p| (p.kind, p.severity, p.text)).collect()
}

/// The one problem between two machines of these devices.
fn only(source: Vec<Device>, here: Vec<Device>) -> String {
    let found = found(&machine_of(source), &machine_of(here));
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!((found[0].0, found[0].1), (ProblemKind::Device, Severity::Problem));
    found[0].2.clone()
}

#[test]
fn two_machines_alike_differ_in_nothing() {
    let devices = vec![device("virtio-rng-pci", "", "0000:00:05.0"), built_in("mch", "0000:00:00.0")];
    assert_eq!(found(&machine_of(devices.clone()), &machine_of(devices)), []);
}

#[test]
fn a_device_is_missing_moved_or_another_one() {
    let (rng, net) = (device("virtio-rng-pci", "", "0000:00:05.0"), device("e1000", "net0", "0000:00:04.0"));
    let text = only(vec![net.clone(), rng.clone()], vec![net.clone()]);
    assert_eq!(text, "device virtio-rng-pci, at 0000:00:05.0 at the source, is missing at the destination");
    let text = only(vec![net.clone()], vec![rng.clone(), net.clone()]);
    assert_eq!(text, "device virtio-rng-pci, at 0000:00:05.0 at the destination, is missing at the source");
    let moved = device("e1000", "net0", "0000:00:06.0");
    let text = only(vec![net.clone()], vec![moved]);
    assert_eq!(
        text,
        "device net0 (e1000) is at 0000:00:04.0 at the source and at 0000:00:06.0 at the destination"
    );
    let other = device("rtl8139", "net0", "0000:00:04.0");
    let text = only(vec![net], vec![other]);
    assert_eq!(text, "0000:00:04.0 is net0 (e1000) at the source and net0 (rtl8139) at the destination");
}

#[test]
fn what_a_machine_has_inside_may_differ_between_versions_and_what_is_plugged_in_may_not() {
    let inside = vec![built_in("i8257", "0000:00:1f.0/isa"), built_in("hpet", "")];
    let (mut source, here) = (machine_of(inside), machine_of(vec![built_in("mch", "0000:00:00.0")]));
    source.devices.push(built_in("mch", "0000:00:00.0"));
    assert_eq!(found(&source, &here).len(), 2, "the same QEMU has the same inside");
    source.qemu = "7.2.22".into();
    assert_eq!(found(&source, &here), []);
    source.devices.push(built_in("VGA", "0000:00:01.0"));
    assert_eq!(found(&source, &here).len(), 1);
}

#[test]
fn ram_that_is_shared_on_one_side_only_is_noted() {
    let machine =
        |shared| Machine { memory_shared: [("ram".to_owned(), shared)].into(), ..machine_of(Vec::new()) };
    assert_eq!(found(&machine(true), &machine(true)), []);
    let noted = compare(&machine(true), &machine(false), &offer(Vec::new()));
    assert_eq!((noted.len(), noted[0].severity), (1, Severity::Note), "{noted:?}");
}

#[test]
fn a_drive_that_was_offered_is_the_disks_matter() {
    let drive = Device { drive: true, ..device("virtio-blk-pci", "disk0", "0000:00:02.0") };
    let place = DiskPlace { id: drive.id.clone(), address: drive.address.clone(), ..DiskPlace::default() };
    let (name, format) = ("disk0".into(), "raw".into());
    let spec = DiskSpec {
        name,
        virtual_size: 1,
        format,
        read_only: false,
        left_out: false,
        incremental: false,
        bitmaps: None,
        place: Some(place),
    };
    let rest = || vec![device("e1000", "", "0000:00:04.0")];
    let (mut source, here) = (machine_of(rest()), machine_of(rest()));
    source.devices.push(drive.clone());
    assert_eq!(compare(&source, &here, &offer(vec![spec])), []);
    // An empty drive is nobody else's.
    assert_eq!(compare(&source, &here, &offer(Vec::new())).len(), 1);
}

#[test]
fn settings_of_one_device_are_compared_by_what_they_do() {
    let net = || device("virtio-net-pci", "net0", "0000:00:04.0");
    let source = machine_of(vec![with(net(), &[("mq", "true"), ("mac", "a"), ("guest_csum", "false")])]);
    let here =
        machine_of(vec![with(net(), &[("mq", "false"), ("mac", "b"), ("guest_csum", "true"), ("new", "1")])]);
    let found = found(&source, &here);
    let weights: Vec<_> = found.iter().map(|f| (f.0, f.1)).collect();
    let (kind, problem, warning) = (ProblemKind::DeviceSettings, Severity::Problem, Severity::Warning);
    assert_eq!(weights, [(kind, problem), (kind, warning)]);
    assert!(found[0].2.ends_with(": mq true and false"), "{}", found[0].2);
    assert!(found[1].2.ends_with(": guest_csum false and true, mac a and b"), "{}", found[1].2);
}

#[test]
fn memory_processors_and_type_are_compared() {
    let one = machine_of(vec![built_in("mch", "0000:00:00.0")]);
    let kinds = |change: &dyn Fn(&mut Machine)| {
        let mut other = one.clone();
        change(&mut other);
        found(&one, &other).into_iter().map(|f| (f.0, f.1)).collect::<Vec<_>>()
    };
    use Severity::{Note, Problem, Warning};
    assert_eq!(kinds(&|m| m.kind = "pc-q35-10.0".into()), [(ProblemKind::MachineType, Problem)]);
    assert_eq!(kinds(&|m| m.kvm = Some(true)), [(ProblemKind::Accelerator, Problem)]);
    assert_eq!(kinds(&|m| m.kvm = None), []);
    assert_eq!(kinds(&|m| m.ram_bytes += 1 << 20), [(ProblemKind::Memory, Problem)]);
    assert_eq!(
        kinds(&|m| m.ram_blocks.extend([("pc.ram".to_owned(), 4097)])),
        [(ProblemKind::Memory, Problem)]
    );
    assert_eq!(kinds(&|m| m.ram_blocks.extend([("/rom@etc/acpi/rsdp".to_owned(), 4097)])), []);
    assert_eq!(kinds(&|m| m.ram_blocks.retain(|name, _| name != "pc.ram")), [(ProblemKind::Memory, Problem)]);
    assert_eq!(kinds(&|m| m.cpus = 2), [(ProblemKind::CpuCount, Problem)]);
    assert_eq!(
        kinds(&|m| m.cpu_features.get_mut("1 ECX").map_or((), |w| *w = 1)),
        [(ProblemKind::Cpu, Problem)]
    );
    assert_eq!(kinds(&|m| m.cpu_features.extend([("7.0 EBX".to_owned(), 1)])), [(ProblemKind::Cpu, Warning)]);
    assert_eq!(
        kinds(&|m| m.cpu.extend([("type".to_owned(), "max".to_owned())])),
        [(ProblemKind::Cpu, Warning)]
    );
    assert_eq!(kinds(&|m| m.uuid = Some("1".into())), [], "an older agent does not tell");
    assert_eq!(kinds(&|m| m.unseen.push("x".into())), [(ProblemKind::NotSeen, Note)]);
}

#[test]
fn a_peers_words_are_bounded_and_tame() {
    let evil = "\u{1b}]0;\u{7}".repeat(100);
    let devices = (0..500).map(|n| device(&evil, "", &format!("{n}"))).collect();
    let found = compare(&machine_of(devices), &machine_of(vec![device("a", "", "x")]), &offer(Vec::new()));
    assert_eq!(found.len(), FINDINGS_MAX + 1);
    assert!(found.iter().all(|p| p.text.len() < 400 && !p.text.chars().any(char::is_control)));
}

#[test]
fn what_is_switched_on_inside_and_who_it_is_are_compared() {
    let with = |hpet: &str, uuid: &str| Machine {
        switches: [("hpet".to_owned(), hpet.to_owned())].into(),
        uuid: Some(uuid.into()),
        ..machine_of(Vec::new())
    };
    let one = with("on", "1");
    assert_eq!(found(&one, &one), []);
    let kinds = |source: &Machine, here: &Machine| {
        found(source, here).into_iter().map(|f| (f.0, f.1)).collect::<Vec<_>>()
    };
    assert_eq!(kinds(&one, &with("off", "1")), [(ProblemKind::DeviceSettings, Severity::Problem)]);
    assert_eq!(kinds(&with("off", "1"), &one), [(ProblemKind::DeviceSettings, Severity::Warning)]);
    assert_eq!(kinds(&one, &with("on", "2")), [(ProblemKind::Identity, Severity::Problem)]);
}

#[test]
fn ram_in_a_file_and_processors_in_places_are_compared() {
    let places = |socket: u32| [format!("socket-id {socket}"), "socket-id 0".to_owned()].into();
    let with = |key: &str, kept, socket| Machine {
        memory_shared: [("mem".to_owned(), true)].into(),
        memory_files: [("mem".to_owned(), vec![key.to_owned()])].into(),
        memory_kept: [("nv0".to_owned(), kept)].into(),
        cpu_places: places(socket),
        ..machine_of(Vec::new())
    };
    let (one, other) = (with("inode:a:1:1", true, 1), with("inode:b:1:1", true, 1));
    let kinds = |source: &Machine, here: &Machine| {
        found(source, here).into_iter().map(|f| (f.0, f.1)).collect::<Vec<_>>()
    };
    let memory = (ProblemKind::Memory, Severity::Problem);
    assert_eq!(kinds(&one, &other), []);
    assert_eq!(kinds(&one, &one), [memory], "one file");
    let private = Machine { memory_shared: [("mem".to_owned(), false)].into(), ..one.clone() };
    assert_eq!(kinds(&private, &private), [], "nothing is written to it");
    assert_eq!(kinds(&one, &with("inode:b:1:1", false, 1)), [memory]);
    assert_eq!(kinds(&with("inode:b:1:1", false, 1), &one), []);
    assert_eq!(kinds(&one, &with("inode:b:1:1", true, 2)), [(ProblemKind::CpuCount, Severity::Problem)]);
}

#[test]
fn a_clock_that_counts_instructions_does_so_on_both_sides() {
    let with = |counts| Machine { counts_instructions: counts, ..machine_of(Vec::new()) };
    for (source, here, refused) in [
        (Some(true), Some(false), true),
        (Some(false), Some(true), true),
        (Some(true), Some(true), false),
        (Some(true), None, false),
        (None, Some(true), false),
    ] {
        let found = found(&with(source), &with(here));
        let refusals = found.iter().filter(|f| (f.0, f.1) == (ProblemKind::Accelerator, Severity::Problem));
        assert_eq!(refusals.count() == 1, refused, "{found:?}");
    }
}
