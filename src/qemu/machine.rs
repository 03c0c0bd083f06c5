//! The virtual machine as its guest sees it: what must be the same on both hosts. Works on a running
//! source as on a destination that waits in `inmigrate`. Compares nothing.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::address::Addresses;
use super::client::{Command, Qmp};
use super::commands::{
    ObjectPropertyInfo, QomGet, QomList, QueryHotpluggableCpus, QueryKvm, QueryMemdev, QueryMemoryDevices,
    QueryMemorySizeSummary, QueryUuid, QueryVersion, XQueryJit, XQueryRamblock,
};
use super::error::QmpError;
use super::memory;

/// Objects that are looked into.
const OBJECTS_MAX: usize = 4096;
/// Devices that are told.
const DEVICES_MAX: usize = 512;
/// Properties that are asked for.
const PROPERTIES_MAX: usize = 32 * 1024;
/// Properties of the machine itself that are told.
const SWITCHES_MAX: usize = 64;
/// Places of processors that are told.
const PLACES_MAX: usize = 512;
/// RAM blocks that are told.
const BLOCKS_MAX: usize = 1024;
/// Commands under way at once.
const AT_ONCE: usize = 32;
/// How deep devices lie in each other.
const DEPTH_MAX: usize = 4;
/// The longest value that is told.
const VALUE_BYTES_MAX: usize = 64;
/// What all of it may take as JSON; the properties are left out first.
const BYTES_MAX: usize = 96 * 1024;

type Properties = BTreeMap<String, String>;

/// A machine. What could not be asked is empty, and named in `unseen`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Machine {
    /// QEMU's version, for people and to tell whether two are the same.
    pub qemu: String,
    /// The machine's type with its version, such as `pc-q35-7.2`.
    pub kind: String,
    pub kvm: Option<bool>,
    /// The guest's clock goes by the instructions that were executed (`-icount`).
    pub counts_instructions: Option<bool>,
    /// What of the machine itself is `on` or `off`: hpet, vmport, i8042 ...
    pub switches: Properties,
    /// The identity that the guest's firmware tells it (`-uuid`), zeroes if it was given none.
    pub uuid: Option<String>,
    /// RAM, in bytes, that was added later included, but for what the guest takes and gives back by itself.
    pub ram_bytes: u64,
    /// The machine's properties `memory` and `smp`: sizes, slots, sockets, cores ...
    pub shape: BTreeMap<String, u64>,
    pub cpus: u32,
    /// Where the processors are plugged in, if there are places without one.
    pub cpu_places: BTreeSet<String>,
    /// What the processors are: type, vendor, family, model, stepping.
    pub cpu: Properties,
    /// The bits of the processors' CPUID, by leaf and register.
    pub cpu_features: BTreeMap<String, u32>,
    /// RAM blocks by QEMU's names, in bytes: the guest's RAM, firmware, ROMs.
    pub ram_blocks: BTreeMap<String, u64>,
    /// Back ends of RAM by their ids: whether other processes may map them.
    pub memory_shared: BTreeMap<String, bool>,
    /// The files that some of them lie in, by names that are the same wherever the same file is used.
    pub memory_files: BTreeMap<String, Vec<String>>,
    /// Devices whose memory the guest takes for storage: whether what it writes there is left when QEMU ends.
    pub memory_kept: BTreeMap<String, bool>,
    /// What devices of a type have in common, by type.
    pub models: BTreeMap<String, Properties>,
    pub devices: Vec<Device>,
    /// What could not be asked.
    pub unseen: Vec<String>,
}

/// A device of the guest's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Device {
    /// Its type, such as `virtio-net-pci`.
    pub kind: String,
    /// The id that somebody gave it.
    pub id: Option<String>,
    /// Where it is plugged in, as QEMU's migration stream has it.
    pub address: Option<String>,
    /// The machine brings it along.
    pub built_in: bool,
    /// It is a drive: a disk, or a place for media.
    pub drive: bool,
    /// Where it differs from its [`Machine::models`].
    pub differs: Properties,
}

impl Machine {
    pub fn properties(&self, device: &Device) -> BTreeMap<String, String> {
        let mut all = self.models.get(&device.kind).cloned().unwrap_or_default();
        all.extend(device.differs.clone());
        all
    }

    /// Makes it small enough to be told.
    fn fit(&mut self) {
        let size = |machine: &Self| serde_json::to_string(machine).map_or(usize::MAX, |text| text.len());
        if size(self) > BYTES_MAX && !self.cpu_places.is_empty() {
            self.cpu_places.clear();
            self.unseen.push("where processors are plugged in: there are too many".into());
        }
        if size(self) > BYTES_MAX {
            self.models.clear();
            self.devices.iter_mut().for_each(|device| device.differs.clear());
            self.unseen.push("the devices' properties, of which there are too many".into());
        }
        while size(self) > BYTES_MAX && !self.devices.is_empty() {
            self.devices.truncate(self.devices.len() / 2);
            self.unseen.push("some devices, of which there are too many".into());
        }
    }
}

/// Asks for everything.
/// Errors: those of [`Qmp::execute`], but for what this QEMU refuses to tell.
pub async fn machine(qmp: &Qmp) -> Result<Machine, QmpError> {
    let mut machine =
        Machine { qemu: qmp.execute(QueryVersion).await?.qemu.to_string(), ..Machine::default() };
    let kind = get(qmp, "/machine", "type").await?;
    let kind = kind.as_ref().and_then(Value::as_str).unwrap_or_default();
    machine.kind = kind.strip_suffix("-machine").unwrap_or(kind).to_owned();
    machine.kvm = told(qmp.execute(QueryKvm).await)?.map(|kvm| kvm.enabled);
    if machine.kvm == Some(false) {
        let jit = told(qmp.execute(XQueryJit).await)?;
        machine.counts_instructions = jit.map(|jit| counts_instructions(&jit.human_readable_text));
    }
    if let Some(memory) = told(qmp.execute(QueryMemorySizeSummary).await)? {
        let devices = told(qmp.execute(QueryMemoryDevices).await)?.unwrap_or_default();
        machine.ram_bytes = memory::settled(&memory, &devices);
    }
    for property in ["memory", "smp"] {
        match get(qmp, "/machine", property).await? {
            Some(Value::Object(numbers)) => {
                let numbers = numbers.into_iter().filter_map(|(name, n)| Some((name, n.as_u64()?)));
                machine.shape.extend(numbers.take(AT_ONCE));
            }
            _ => machine.unseen.push(format!("the machine's `{property}`")),
        }
    }
    machine.switches = switches(qmp).await?;
    machine.uuid = told(qmp.execute(QueryUuid).await)?.map(|told| told.uuid);
    processors(qmp, &mut machine).await?;
    match told(qmp.execute(XQueryRamblock).await)? {
        Some(table) => machine.ram_blocks = ram_blocks(&table.human_readable_text),
        None => machine.unseen.push("the RAM blocks".into()),
    }
    if let Some(memory) = told(qmp.execute(QueryMemdev).await)? {
        let backends = memory::backends(qmp, memory).await?;
        machine.memory_shared = backends.shared;
        machine.memory_files = backends.files;
        machine.memory_kept = backends.kept;
    }
    devices(qmp, &mut machine).await?;
    machine.fit();
    Ok(machine)
}

/// What QEMU refuses to tell is none.
fn told<T>(answer: Result<T, QmpError>) -> Result<Option<T>, QmpError> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(e) if e.desc().is_some() => Ok(None),
        Err(e) => Err(e),
    }
}

async fn get(qmp: &Qmp, path: &str, property: &str) -> Result<Option<Value>, QmpError> {
    told(qmp.execute(QomGet { path: path.to_owned(), property: property.to_owned() }).await)
}

/// Executes commands of one kind, some at a time.
async fn all<C: Command>(qmp: &Qmp, commands: Vec<C>) -> Result<Vec<Option<C::Return>>, QmpError> {
    let mut answers = Vec::with_capacity(commands.len());
    let mut commands = commands.into_iter().peekable();
    while commands.peek().is_some() {
        let some = commands.by_ref().take(AT_ONCE).map(|command| qmp.execute(command));
        for answer in join_all(some).await {
            answers.push(told(answer)?);
        }
    }
    Ok(answers)
}

/// What of the machine is on or off. What is left to QEMU (`auto`) is not told.
async fn switches(qmp: &Qmp) -> Result<Properties, QmpError> {
    // The host's matter.
    const LEFT_OUT: [&str; 4] = ["aux-ram-share", "dump-guest-core", "mem-merge", "suppress-vmdesc"];
    let properties = told(qmp.execute(QomList { path: "/machine".into() }).await)?.unwrap_or_default();
    let is_switch = |p: &&ObjectPropertyInfo| {
        let is_asked = !p.name.starts_with("x-") && !LEFT_OUT.contains(&p.name.as_str());
        is_asked && matches!(p.kind.as_str(), "bool" | "OnOffAuto")
    };
    let asked: Vec<&ObjectPropertyInfo> = properties.iter().filter(is_switch).take(SWITCHES_MAX).collect();
    let ask = |p: &&ObjectPropertyInfo| QomGet { path: "/machine".into(), property: p.name.clone() };
    let values = all(qmp, asked.iter().map(ask).collect()).await?;
    let word =
        |value: Value| match value.as_str().or(value.as_bool().map(|on| if on { "on" } else { "off" }))? {
            word @ ("on" | "off") => Some(word.to_owned()),
            _ => None,
        };
    let named = asked.into_iter().zip(values);
    Ok(named.filter_map(|(p, value)| Some((p.name.clone(), word(value?)?))).collect())
}

async fn processors(qmp: &Qmp, machine: &mut Machine) -> Result<(), QmpError> {
    let Some(slots) = told(qmp.execute(QueryHotpluggableCpus).await)? else {
        machine.unseen.push("the processors".into());
        return Ok(());
    };
    let present: Vec<_> = slots.iter().filter(|slot| slot.qom_path.is_some()).collect();
    let count = present.iter().map(|slot| slot.vcpus_count).fold(0, u32::saturating_add);
    machine.cpus = count;
    if present.len() < slots.len() {
        machine.cpu_places = present.iter().filter_map(|slot| place(&slot.props)).take(PLACES_MAX).collect();
    }
    let Some(first) = present.first() else { return Ok(()) };
    machine.cpu.insert("type".into(), first.kind.clone());
    let path = first.qom_path.as_deref().unwrap_or_default();
    for property in ["vendor", "family", "model", "stepping"] {
        if let Some(value) = get(qmp, path, property).await?.as_ref().and_then(scalar) {
            machine.cpu.insert(property.to_owned(), value);
        }
    }
    match get(qmp, path, "feature-words").await? {
        Some(Value::Array(words)) => machine.cpu_features = words.iter().filter_map(feature_word).collect(),
        _ => machine.unseen.push("the processors' features".into()),
    }
    Ok(())
}

/// A place for a processor, as `core-id 0, socket-id 3, thread-id 0`.
fn place(numbers: &BTreeMap<String, Value>) -> Option<String> {
    let numbers = numbers.iter().filter_map(|(name, number)| Some(format!("{name} {}", scalar(number)?)));
    Some(numbers.collect::<Vec<_>>().join(", ")).filter(|place| !place.is_empty())
}

fn feature_word(word: &Value) -> Option<(String, u32)> {
    let number = |name: &str| word[name].as_u64();
    let bits = u32::try_from(number("features")?).ok().filter(|bits| *bits != 0)?;
    let register = word["cpuid-register"].as_str()?;
    let leaf = number("cpuid-input-eax")?;
    let name = match number("cpuid-input-ecx") {
        Some(sub) => format!("{leaf:x}.{sub} {register}"),
        None => format!("{leaf:x} {register}"),
    };
    Some((name, bits))
}

/// Reads QEMU's table: name, page size with its unit, offset, used and total, in hexadecimal.
fn ram_blocks(table: &str) -> BTreeMap<String, u64> {
    let block = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = words.iter().position(|word| word.starts_with("0x"))?;
        let used = words.get(number + 1)?.strip_prefix("0x")?;
        let name = words.first().filter(|_| number >= 3)?;
        Some(((*name).to_owned(), u64::from_str_radix(used, 16).ok()?))
    };
    table.lines().filter_map(block).take(BLOCKS_MAX).collect()
}

/// QEMU compares the two clocks only where the guest's is not the host's.
fn counts_instructions(jit: &str) -> bool {
    jit.lines().any(|line| line.starts_with("Host - Guest clock"))
}

/// An object on the way down.
struct Found {
    path: String,
    kind: String,
    built_in: bool,
    properties: Vec<ObjectPropertyInfo>,
}

async fn devices(qmp: &Qmp, machine: &mut Machine) -> Result<(), QmpError> {
    let (found, complete) = walk(qmp).await?;
    if !complete || found.len() > DEVICES_MAX {
        machine.unseen.push("some devices, of which there are too many".into());
    }
    let mut addresses = Addresses::new(qmp);
    let mut asked = 0;
    for object in found.into_iter().take(DEVICES_MAX) {
        let id = object.path.strip_prefix("/machine/peripheral/");
        let mut device = Device {
            id: id.map(str::to_owned),
            address: addresses.of(&object.path).await?,
            built_in: object.built_in,
            drive: object.properties.iter().any(|p| p.name == "drive"),
            kind: object.kind,
            differs: Properties::new(),
        };
        let told: Vec<&ObjectPropertyInfo> = match object.built_in {
            true => Vec::new(),
            false => object.properties.iter().filter(|p| is_told(p)).collect(),
        };
        asked += told.len();
        if asked > PROPERTIES_MAX {
            machine.unseen.push(format!("the properties of {} and of later ones", device.kind));
            asked = PROPERTIES_MAX;
        } else {
            let ask =
                |p: &&ObjectPropertyInfo| QomGet { path: object.path.clone(), property: p.name.clone() };
            let values = all(qmp, told.iter().map(ask).collect()).await?;
            let named = told.iter().zip(values);
            let properties: Properties =
                named.filter_map(|(p, v)| Some((p.name.clone(), scalar(v.as_ref()?)?))).collect();
            if device.address.is_none() {
                device.address = memory_slot(&properties);
            }
            device.differs = properties;
        }
        machine.devices.push(device);
    }
    factor_out(machine);
    Ok(())
}

/// Where a memory module is; it is on no bus.
fn memory_slot(properties: &Properties) -> Option<String> {
    let (slot, address) = (properties.get("slot")?, properties.get("addr")?);
    Some(format!("memory slot {slot} at {address}"))
}

/// Keeps of each device only where it differs from the first of its type.
fn factor_out(machine: &mut Machine) {
    for device in &mut machine.devices {
        if device.built_in {
            continue;
        }
        match machine.models.get(&device.kind) {
            None => {
                machine.models.insert(device.kind.clone(), std::mem::take(&mut device.differs));
            }
            // A property that is missing cannot be told by a difference; then all are repeated.
            Some(model) if model.keys().all(|name| device.differs.contains_key(name)) => {
                device.differs.retain(|name, value| model.get(name) != Some(value));
            }
            Some(_) => {}
        }
    }
}

/// All devices, by QEMU's tree of objects; whether these are all.
async fn walk(qmp: &Qmp) -> Result<(Vec<Found>, bool), QmpError> {
    let mut devices = Vec::new();
    let mut level = vec![("/machine".to_owned(), String::new(), true)];
    let mut seen = 0;
    for _ in 0..DEPTH_MAX {
        seen += level.len();
        if seen > OBJECTS_MAX {
            return Ok((devices, false));
        }
        let ask = |(path, _, _): &(String, String, bool)| QomList { path: path.clone() };
        let answers = all(qmp, level.iter().map(ask).collect()).await?;
        let mut next = Vec::new();
        for ((path, kind, built_in), properties) in std::mem::take(&mut level).into_iter().zip(answers) {
            // It may have been unplugged meanwhile.
            let Some(properties) = properties else { continue };
            for child in &properties {
                let Some(kind) = child_kind(&child.kind) else { continue };
                let is_own = !matches!(path.as_str(), "/machine/peripheral" | "/machine/peripheral-anon");
                next.push((format!("{path}/{}", child.name), kind.to_owned(), built_in && is_own));
            }
            let is_nested = !built_in && path.matches('/').count() > 3;
            if !is_nested && properties.iter().any(|p| p.name == "parent_bus") {
                devices.push(Found { path, kind, built_in, properties });
            }
        }
        level = next;
    }
    devices.sort_by(|a, b| (a.built_in, &a.path).cmp(&(b.built_in, &b.path)));
    Ok((devices, true))
}

/// The type of a child that may be a device, or hold some.
fn child_kind(kind: &str) -> Option<&str> {
    let kind = kind.strip_prefix("child<")?.strip_suffix('>')?;
    let dull = matches!(kind, "memory-region" | "irq" | "System") || kind.ends_with("-cpu");
    (!dull).then_some(kind)
}

/// Properties that say how a device is set up, and not what is behind it or how it is at the moment.
fn is_told(property: &ObjectPropertyInfo) -> bool {
    const TYPES: [&str; 11] = [
        "bool",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "size",
        "OnOffAuto",
    ];
    const WORDS: [&str; 2] = ["mac", "serial"];
    // What is part of the address, belongs to the host, or changes while the guest runs.
    const LEFT_OUT: [&str; 36] = [
        "realized",
        "hotplugged",
        "hotpluggable",
        "legacy-addr",
        "busnr",
        "rombar",
        "romsize",
        "bootindex",
        "channel",
        "scsi-id",
        "lun",
        "unit",
        "nr",
        "port",
        "attached",
        "ioeventfd",
        "write-cache",
        "account-invalid",
        "account-failed",
        "share-rw",
        "cyls",
        "heads",
        "secs",
        "lcyls",
        "lheads",
        "lsecs",
        "guest-stats-polling-interval",
        "size",
        "vhost",
        "vhostforce",
        "poll-max-ns",
        "use-started",
        "use-disabled-flag",
        "msg",
        "full_path",
        "pcap",
    ];
    let name = property.name.as_str();
    let is_setting = match property.kind.as_str() {
        "str" => WORDS.contains(&name),
        kind => TYPES.contains(&kind),
    };
    is_setting
        && !name.starts_with("x-")
        && !LEFT_OUT.contains(&name)
        && (name != "addr" || property.kind == "uint64")
}

fn scalar(value: &Value) -> Option<String> {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        _ => return None,
    };
    (text.len() <= VALUE_BYTES_MAX).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_blocks_are_read_from_the_tables_of_both_qemus() {
        let of_7 = "  Block Name    PSize              Offset               Used              Total\n \
                    pc.ram    4 KiB  0x0000000000000000 0x0000000008000000 0x0000000008000000\n\
                    0000:00:06.0/vga.vram    4 KiB  0x00000000100c0000 0x0000000001000000 0x0000000001000000\n";
        let of_10 = " Block Name PSize Offset Used Total HVA RO\n\
                     pc.ram 2 MiB 0x0000000000000000 0x0000000008000000 0x0000000008000000 0x7f rw\n broken 0x\n";
        let sizes = ram_blocks(of_7);
        assert_eq!(sizes["pc.ram"], 128 << 20);
        assert_eq!(sizes["0000:00:06.0/vga.vram"], 16 << 20);
        let sizes = ram_blocks(of_10);
        assert_eq!(sizes, BTreeMap::from([("pc.ram".to_owned(), 128 << 20)]));
    }

    #[test]
    fn what_devices_of_a_type_have_in_common_is_said_once_and_nothing_gets_lost() {
        let device = |id: &str, mac: &str| Device {
            kind: "virtio-net-pci".into(),
            id: Some(id.into()),
            differs: BTreeMap::from([("mac".into(), mac.into()), ("mq".into(), "false".into())]),
            ..Device::default()
        };
        let mut machine = Machine { devices: vec![device("a", "1"), device("b", "2")], ..Machine::default() };
        let before: Vec<_> = machine.devices.iter().map(|d| d.differs.clone()).collect();
        factor_out(&mut machine);
        assert_eq!(machine.devices[1].differs, BTreeMap::from([("mac".to_owned(), "2".to_owned())]));
        let after: Vec<_> = machine.devices.iter().map(|d| machine.properties(d)).collect();
        assert_eq!(after, before);
    }

    #[test]
    fn a_machine_that_is_too_large_loses_its_properties_first() {
        let device = |n: usize| Device {
            kind: format!("kind-{n}"),
            differs: (0..40).map(|p| (format!("property-{n}-{p}"), "value".into())).collect(),
            ..Device::default()
        };
        let mut machine = Machine { devices: (0..200).map(device).collect(), ..Machine::default() };
        machine.fit();
        assert_eq!(machine.devices.len(), 200);
        assert!(machine.devices.iter().all(|d| d.differs.is_empty()));
        assert_eq!(machine.unseen.len(), 1);
    }
}
