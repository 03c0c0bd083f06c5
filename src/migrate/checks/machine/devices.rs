//! The devices of both machines, paired as QEMU's stream pairs them: by type and address. Disks that
//! were offered are compared by `disks`; here only how their devices are set up.

use std::collections::BTreeMap;

use super::shown;
use crate::migrate::model::problem::{Problem, ProblemKind};
use crate::migrate::protocol::message::Offer;
use crate::qemu::{Device, Machine};

const REMEDY: &str = "give both QEMUs the same devices at the same addresses (`bus=`, `addr=`)";
/// Settings that are shown of one device.
const SETTINGS_MAX: usize = 6;

pub(crate) fn compare(source: &Machine, here: &Machine, offer: &Offer) -> Vec<Problem> {
    if source.devices.is_empty() || here.devices.is_empty() {
        return Vec::new();
    }
    let alike = source.qemu == here.qemu;
    let (pairs, only_there, only_here) = pair(source, here, alike);
    let only_there: Vec<&Device> = only_there.into_iter().filter(|d| !is_offered(d, offer)).collect();
    let only_here: Vec<&Device> = only_here.into_iter().filter(|d| !is_offered(d, offer)).collect();
    let mut found = differing(only_there, only_here);
    found.extend(pairs.iter().flat_map(|(d, d_here)| settings((source, d), (here, d_here))));
    found
}

/// Whether it is a drive that the comparison of disks speaks about.
fn is_offered(device: &Device, offer: &Offer) -> bool {
    let places = || offer.disks.iter().filter_map(|disk| disk.place.as_ref());
    device.drive
        && (places().any(|p| p.id.is_some() && p.id == device.id)
            || places().any(|p| p.address.is_some() && p.address == device.address))
}

/// Whether it is compared at all: what a machine has inside of itself differs from version to version.
fn counts(device: &Device, alike: bool) -> bool {
    let is_plugged = device.address.as_ref().is_some_and(|address| !address.ends_with("/isa"));
    !device.built_in || is_plugged || alike
}

type Paired<'a> = (Vec<(&'a Device, &'a Device)>, Vec<&'a Device>, Vec<&'a Device>);

fn pair<'a>(source: &'a Machine, here: &'a Machine, alike: bool) -> Paired<'a> {
    let mut by_place: BTreeMap<(Option<&str>, &str), Vec<&Device>> = BTreeMap::new();
    for device in here.devices.iter().filter(|d| counts(d, alike)) {
        by_place.entry((device.address.as_deref(), &device.kind)).or_default().push(device);
    }
    let (mut pairs, mut only_there) = (Vec::new(), Vec::new());
    for device in source.devices.iter().filter(|d| counts(d, alike)) {
        let at_place = by_place.entry((device.address.as_deref(), &device.kind)).or_default();
        // Where an address is not told, the id tells them apart.
        let same_id = at_place.iter().position(|d| d.id == device.id);
        match same_id.or((!at_place.is_empty()).then_some(0)) {
            Some(at) => pairs.push((device, at_place.swap_remove(at))),
            None => only_there.push(device),
        }
    }
    (pairs, only_there, by_place.into_values().flatten().collect())
}

fn differing(only_there: Vec<&Device>, mut only_here: Vec<&Device>) -> Vec<Problem> {
    let (mut missing, mut moved) = (Vec::new(), Vec::new());
    let mut take = |fits: &dyn Fn(&Device) -> bool| -> Option<Device> {
        let at = only_here.iter().position(|device| fits(device))?;
        Some(only_here.remove(at).clone())
    };
    for device in only_there {
        let same_place = |d: &Device| d.address.is_some() && d.address == device.address;
        let same_device = |d: &Device| d.kind == device.kind && d.id == device.id;
        if let Some(other) = take(&same_place) {
            let place = place(device);
            missing.push(format!(
                "{place} is {} at the source and {} at the destination",
                name(device),
                name(&other)
            ));
        } else if let Some(other) = take(&same_device) {
            let text = format!(
                "device {} is {} at the source and {} at the destination",
                name(device),
                at(device),
                at(&other)
            );
            moved.push(text);
        } else {
            missing.push(format!(
                "device {}, {} at the source, is missing at the destination",
                name(device),
                at(device)
            ));
        }
    }
    for device in only_here {
        missing.push(format!(
            "device {}, {} at the destination, is missing at the source",
            name(device),
            at(device)
        ));
    }
    // A device that is missing moves those after it: that comes first.
    let texts = missing.into_iter().chain(moved);
    texts.map(|text| Problem::new(ProblemKind::Device, text, REMEDY)).collect()
}

fn name(device: &Device) -> String {
    match &device.id {
        Some(id) => format!("{} ({})", shown(id), shown(&device.kind)),
        None => shown(&device.kind),
    }
}

fn place(device: &Device) -> String {
    device.address.as_deref().map_or_else(|| "a place without an address".into(), shown)
}

fn at(device: &Device) -> String {
    device.address.as_deref().map_or_else(|| "without an address".into(), |a| format!("at {}", shown(a)))
}

/// How two devices are set up that are the same.
fn settings((source, device): (&Machine, &Device), (here, device_here): (&Machine, &Device)) -> Vec<Problem> {
    let (properties, properties_here) = (source.properties(device), here.properties(device_here));
    let (mut refused, mut other) = (Vec::new(), Vec::new());
    for (setting, value) in &properties {
        let Some(value_here) = properties_here.get(setting).filter(|value_here| *value_here != value) else {
            continue;
        };
        // As the image has it: some versions tell what that is.
        if setting.ends_with("_block_size") && [value, value_here].into_iter().any(|value| value == "0") {
            continue;
        }
        let words = format!("{} {} and {}", shown(setting), shown(value), shown(value_here));
        if would_fail(&device.kind, setting, value) { refused.push(words) } else { other.push(words) }
    }
    let text = |differing: &[String]| {
        let more = differing.len().saturating_sub(SETTINGS_MAX);
        let shown = differing.iter().take(SETTINGS_MAX).cloned().collect::<Vec<_>>().join(", ");
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        format!(
            "device {}, {}, is set up differently at source and destination: {shown}{more}",
            name(device),
            at(device)
        )
    };
    let mut found = Vec::new();
    if !refused.is_empty() {
        let remedy = "use the same settings of the device on both sides: QEMU refuses the guest's state if it \
                      uses what the destination has not";
        found.push(Problem::new(ProblemKind::DeviceSettings, text(&refused), remedy));
    }
    if !other.is_empty() {
        let remedy = "use the same settings of the device on both sides: the guest may notice the change";
        found.push(Problem::warning(ProblemKind::DeviceSettings, text(&other), remedy));
    }
    found
}

/// Whether QEMU may refuse the state of a device that is set up in another way: other numbers of
/// queues and vectors, and features that only the source has.
fn would_fail(kind: &str, setting: &str, value: &str) -> bool {
    const SHAPE: [&str; 20] = [
        "vectors",
        "num-queues",
        "num_queues",
        "queue-size",
        "virtqueue_size",
        "rx_queue_size",
        "tx_queue_size",
        "max_ports",
        "queues",
        "msi",
        "msix",
        "disable-legacy",
        "disable-modern",
        "multifunction",
        "logical_block_size",
        "vgamem_mb",
        "vram_size_mb",
        "ram_size_mb",
        "max_outputs",
        "host_mtu",
    ];
    let is_virtio = kind.starts_with("virtio-") || kind.starts_with("vhost-");
    SHAPE.contains(&setting) || (is_virtio && matches!(value, "true" | "on"))
}
