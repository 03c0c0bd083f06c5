//! The machine itself: its type, RAM and processors.

use std::collections::{BTreeMap, BTreeSet};

use super::shown;
use crate::migrate::model::problem::{Problem, ProblemKind};
use crate::qemu::Machine;

/// Names that are shown of a longer list.
const NAMES_MAX: usize = 8;

pub(crate) fn compare(source: &Machine, here: &Machine) -> Vec<Problem> {
    let mut found = Vec::new();
    if source.kind != here.kind {
        let (there, kind) = (shown(&source.kind), shown(&here.kind));
        let text = format!("the machine is {there} at the source and {kind} at the destination");
        let remedy = format!("start the destination's QEMU with `-machine {there}`: QEMU takes no other");
        found.push(Problem::new(ProblemKind::MachineType, text, remedy));
    }
    if let (Some(kvm), Some(kvm_here)) = (source.kvm, here.kvm)
        && kvm != kvm_here
    {
        let by = |kvm| if kvm { "KVM" } else { "TCG" };
        let text =
            format!("the guest runs by {} at the source and by {} at the destination", by(kvm), by(kvm_here));
        found.push(Problem::new(ProblemKind::Accelerator, text, "use the same `-accel` on both sides"));
    }
    found.extend(clock(source, here));
    if source.kind == here.kind {
        found.extend(switches(source, here));
    }
    found.extend(identity(source, here));
    found.extend(memory(source, here));
    found.extend(processors(source, here));
    found
}

/// A QEMU that does not count instructions aborts when it reads the state of one that does. The other way round all goes
/// well, but for the guest's clock, which stands still there.
fn clock(source: &Machine, here: &Machine) -> Option<Problem> {
    let (counts, counts_here) = (source.counts_instructions?, here.counts_instructions?);
    let side = match (counts, counts_here) {
        (true, false) => "source",
        (false, true) => "destination",
        _ => return None,
    };
    let text = format!(
        "the guest's clock goes by the instructions that it executes (`-icount`) at the {side} only: the guest would \
         not go on"
    );
    Some(Problem::new(ProblemKind::Accelerator, text, "use `-icount` on both sides, or on none"))
}

/// What a machine has inside of itself, switched on or off.
fn switches(source: &Machine, here: &Machine) -> Vec<Problem> {
    let differing = source.switches.iter().filter_map(|(name, value)| {
        let value_here = here.switches.get(name).filter(|value_here| *value_here != value)?;
        let words = format!("{} {} and {}", shown(name), shown(value), shown(value_here));
        Some((value == "on", words))
    });
    let (lost, new): (Vec<_>, Vec<_>) = differing.partition(|(is_lost, _)| *is_lost);
    let text = |differing: Vec<(bool, String)>| {
        let words: Vec<String> = differing.into_iter().map(|(_, words)| words).collect();
        format!("the machine is set up differently at source and destination: {}", some(&words))
    };
    let mut found = Vec::new();
    if !lost.is_empty() {
        let remedy =
            "switch the same on with `-machine` on both sides: QEMU refuses the state of what it has not";
        found.push(Problem::new(ProblemKind::DeviceSettings, text(lost), remedy));
    }
    if !new.is_empty() {
        let remedy = "use the same `-machine` on both sides: the guest may notice the change";
        found.push(Problem::warning(ProblemKind::DeviceSettings, text(new), remedy));
    }
    found
}

/// Two identities are mostly two VMs. The guest sees the other one when it boots the next time.
fn identity(source: &Machine, here: &Machine) -> Option<Problem> {
    let (there, uuid) = (source.uuid.as_deref()?, here.uuid.as_deref()?);
    if there == uuid {
        return None;
    }
    let text = format!(
        "the VM's identity (`-uuid`) is {} at the source and {} at the destination: after its next reboot the guest is \
         another machine to its licences and to what configures it",
        shown(there),
        shown(uuid)
    );
    let remedy = "use the same `-uuid` on both sides; make sure that it is the same VM";
    Some(Problem::new(ProblemKind::Identity, text, remedy))
}

fn memory(source: &Machine, here: &Machine) -> Vec<Problem> {
    if source.ram_bytes != here.ram_bytes {
        let text = format!(
            "the guest has {} of RAM at the source and {} at the destination",
            mib(source.ram_bytes),
            mib(here.ram_bytes)
        );
        return vec![Problem::new(ProblemKind::Memory, text, "use the same `-m` on both sides")];
    }
    let mut found = Vec::new();
    for name in ["slots", "max-size"] {
        let of = |machine: &Machine| machine.shape.get(name).copied().unwrap_or(0);
        if !source.shape.is_empty() && !here.shape.is_empty() && of(source) != of(here) {
            let (there, here) = (of(source), of(here));
            let text = format!("`-m` has {name} {there} at the source and {here} at the destination");
            found.push(Problem::new(ProblemKind::Memory, text, "use the same `-m` on both sides"));
        }
    }
    found.extend(blocks(source, here));
    found.extend(shared(source, here));
    found.extend(one_file(source, here));
    found.extend(not_kept(source, here));
    found
}

/// RAM that comes in is written into the destination's RAM: where that is the source's, over what its guest has
/// written since.
fn one_file(source: &Machine, here: &Machine) -> Option<Problem> {
    let is_shared = |id: &str| here.memory_shared.get(id).is_some_and(|shared| *shared);
    let theirs: BTreeSet<&String> = source.memory_files.values().flatten().collect();
    let mut files = here.memory_files.iter().filter(|(id, _)| is_shared(id));
    let (id, name) =
        files.find_map(|(id, names)| Some((id, names.iter().find(|name| theirs.contains(name))?)))?;
    let text = format!(
        "both hosts have the guest's RAM {} in one and the same file (known as {}): what comes in would be written over \
         the running guest's RAM",
        shown(id),
        shown(name)
    );
    let remedy = "give the destination's QEMU a file of its own (`mem-path`), or RAM without a file";
    Some(Problem::new(ProblemKind::Memory, text, remedy))
}

/// What the guest writes to a disk in memory (nvdimm, virtio-pmem) is to outlive QEMU, as at the source.
fn not_kept(source: &Machine, here: &Machine) -> Option<Problem> {
    let kept = source.memory_kept.iter().filter(|(_, kept)| **kept).map(|(name, _)| name);
    let lost: Vec<String> =
        kept.filter(|name| here.memory_kept.get(*name).is_some_and(|kept| !kept)).map(|n| shown(n)).collect();
    if lost.is_empty() {
        return None;
    }
    let text = format!(
        "what the guest writes to its persistent memory goes to a file at the source, and would be gone at the \
         destination when its QEMU ends: {}",
        some(&lost)
    );
    let remedy = "give it a `memory-backend-file` with `share=on` and a file there";
    Some(Problem::new(ProblemKind::Memory, text, remedy))
}

/// A device outside of QEMU (vhost-user) needs RAM that it may map.
fn shared(source: &Machine, here: &Machine) -> Option<Problem> {
    let differs = |(id, shared): &(&String, &bool)| here.memory_shared.get(*id).is_some_and(|h| h != *shared);
    let ids: Vec<String> = source.memory_shared.iter().filter(differs).map(|(id, _)| shown(id)).collect();
    if ids.is_empty() {
        return None;
    }
    let text = format!("memory back ends are shared (`share=on`) on one side only: {}", some(&ids));
    Some(Problem::note(ProblemKind::Memory, text, "use the same memory back ends on both sides"))
}

/// QEMU finds RAM by the blocks' names, and takes those of the same size only. Tables that it makes
/// for the firmware may differ in size.
fn blocks(source: &Machine, here: &Machine) -> Vec<Problem> {
    if source.ram_blocks.is_empty() || here.ram_blocks.is_empty() || source.kind != here.kind {
        return Vec::new();
    }
    let of_devices = |name: &str| name.starts_with("0000:");
    let (mut missing, mut other) = (Vec::new(), Vec::new());
    for (name, size) in &source.ram_blocks {
        match here.ram_blocks.get(name) {
            // The device itself is missing, which is said.
            None if of_devices(name) => {}
            None => missing.push(format!("{} of {}", shown(name), mib(*size))),
            Some(size_here) if size_here != size && !name.starts_with("/rom@") => {
                other.push(format!("{}: {} and {}", shown(name), mib(*size), mib(*size_here)));
            }
            Some(_) => {}
        }
    }
    let mut found = Vec::new();
    if !missing.is_empty() {
        let text = format!("RAM that only the source has: {}", some(&missing));
        let remedy = "use the same firmware and the same ids of memory back ends on both sides";
        found.push(Problem::new(ProblemKind::Memory, text, remedy));
    }
    if !other.is_empty() {
        let text = format!("RAM or ROM of another size at the destination: {}", some(&other));
        let remedy = "use the same firmware and ROM files (`romfile`), and the same sizes, on both sides";
        found.push(Problem::new(ProblemKind::Memory, text, remedy));
    }
    found
}

fn processors(source: &Machine, here: &Machine) -> Vec<Problem> {
    let mut found = Vec::new();
    if source.cpus != here.cpus && source.cpus > 0 && here.cpus > 0 {
        let text = format!(
            "the guest has {} processors at the source and {} at the destination",
            source.cpus, here.cpus
        );
        found.push(Problem::new(ProblemKind::CpuCount, text, "use the same `-smp` on both sides"));
    }
    let (places, places_here) = (&source.cpu_places, &here.cpu_places);
    if found.is_empty() && places != places_here && !places.is_empty() && !places_here.is_empty() {
        let only = |of: &BTreeSet<String>, other: &BTreeSet<String>| {
            some(&of.difference(other).map(|place| shown(place)).collect::<Vec<_>>())
        };
        let text = format!(
            "processors are plugged in at other places at source and destination: {} at the source only, {} at the \
             destination only",
            only(places, places_here),
            only(places_here, places)
        );
        let remedy = "plug the destination's processors in where the source's are: QEMU takes no others";
        found.push(Problem::new(ProblemKind::CpuCount, text, remedy));
    }
    let (shape, shape_here) = (&source.shape, &here.shape);
    let differing = |name: &&&str| match (shape.get(**name), shape_here.get(**name)) {
        (Some(n), Some(m)) => n != m,
        _ => false,
    };
    const TOPOLOGY: [&str; 6] = ["maxcpus", "sockets", "dies", "clusters", "cores", "threads"];
    let differing: Vec<String> = TOPOLOGY
        .iter()
        .filter(differing)
        .map(|name| format!("{name} {} and {}", shape[*name], shape_here[*name]))
        .collect();
    if !differing.is_empty() && found.is_empty() {
        let text = format!("the processors' topology differs: {}", differing.join(", "));
        found.push(Problem::new(ProblemKind::CpuCount, text, "use the same `-smp` on both sides"));
    }
    // Some features only say how many there are.
    if found.is_empty() { model(source, here) } else { found }
}

/// QEMU itself does not compare models: the guest would find out.
fn model(source: &Machine, here: &Machine) -> Vec<Problem> {
    let mut found = Vec::new();
    let remedy = "use the same `-cpu` on both sides: a named model that both hosts have";
    let bits = |of: &BTreeMap<String, u32>, without: &BTreeMap<String, u32>| -> Vec<String> {
        let missing = of.iter().map(|(word, bits)| (word, bits & !without.get(word).copied().unwrap_or(0)));
        missing.filter(|(_, bits)| *bits != 0).map(|(word, bits)| numbered(word, bits)).collect()
    };
    if !source.cpu_features.is_empty() && !here.cpu_features.is_empty() {
        let missing = bits(&source.cpu_features, &here.cpu_features);
        if !missing.is_empty() {
            let text = format!(
                "the destination's processors lack features that the guest may use, by leaf of CPUID: {}",
                some(&missing)
            );
            found.push(Problem::new(ProblemKind::Cpu, text, remedy));
        }
        let more = bits(&here.cpu_features, &source.cpu_features);
        if !more.is_empty() {
            let text = format!("the destination's processors have more features: {}", some(&more));
            found.push(Problem::warning(ProblemKind::Cpu, text, remedy));
        }
    }
    let differing: Vec<String> = source
        .cpu
        .iter()
        .filter_map(|(name, value)| {
            let value_here = here.cpu.get(name)?;
            let words = || format!("{} {} and {}", shown(name), shown(value), shown(value_here));
            (value != value_here).then(words)
        })
        .collect();
    if !differing.is_empty() {
        let text = format!("the processors differ at source and destination: {}", some(&differing));
        found.push(Problem::warning(ProblemKind::Cpu, text, remedy));
    }
    found
}

fn numbered(word: &str, bits: u32) -> String {
    let numbers: Vec<String> = (0..32).filter(|n| bits >> n & 1 == 1).map(|n| n.to_string()).collect();
    format!("{} bit {}", shown(word), numbers.join(" "))
}

fn some(names: &[String]) -> String {
    match names.len().checked_sub(NAMES_MAX) {
        Some(more) if more > 0 => format!("{} and {more} more", names[..NAMES_MAX].join(", ")),
        _ => names.join(", "),
    }
}

fn mib(bytes: u64) -> String {
    const MIB: u64 = 1 << 20;
    if bytes.is_multiple_of(MIB) { format!("{} MiB", bytes / MIB) } else { format!("{bytes} bytes") }
}
