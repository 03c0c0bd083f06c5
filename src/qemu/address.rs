//! Where a guest's device is plugged in. QEMU's migration stream pairs the devices of two machines by
//! that (`qdev_get_dev_path`), and neither by their ids nor by the order of options.
//!
//! ```text
//! 0000:00:05.0            PCI slot and function, behind bridges one pair for each
//! 0000:00:09.0/0:3:7      channel, target and LUN behind a SCSI adapter
//! 0000:00:1f.2/5:0        bus and unit behind an IDE or SATA adapter
//! ```

use std::collections::HashMap;

use serde_json::Value;

use super::client::Qmp;
use super::commands::QomGet;
use super::error::QmpError;

/// Buses between a device and its machine.
const DEPTH_MAX: usize = 16;

/// Asks for addresses; what several devices have in common is asked once.
#[derive(Debug)]
pub(super) struct Addresses<'a> {
    qmp: &'a Qmp,
    known: HashMap<String, Option<String>>,
}

/// One step from a device towards its machine.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    /// A place on a bus of the device that owns it.
    Place {
        on: String,
        place: String,
        separator: char,
    },
    /// The same place as the device that owns the bus.
    Same {
        on: String,
    },
    Root(String),
    /// Nothing that would be the same on another host.
    Unknown,
}

impl<'a> Addresses<'a> {
    pub(super) fn new(qmp: &'a Qmp) -> Self {
        Self { qmp, known: HashMap::new() }
    }

    /// The type of an object, such as `scsi-hd`.
    pub(super) async fn type_of(&self, path: &str) -> Result<Option<String>, QmpError> {
        Ok(self.get(path, "type").await?.and_then(|value| value.as_str().map(str::to_owned)))
    }

    /// Whether an object has this property and it is true.
    pub(super) async fn is_on(&self, path: &str, property: &str) -> Result<bool, QmpError> {
        Ok(self.get(path, property).await? == Some(Value::Bool(true)))
    }

    /// The address of the device at this path; none when it has none that another host would know.
    pub(super) async fn of(&mut self, path: &str) -> Result<Option<String>, QmpError> {
        let mut device = path.to_owned();
        let mut steps = Vec::new();
        let mut address = None;
        for _ in 0..DEPTH_MAX {
            if let Some(known) = self.known.get(&device) {
                address.clone_from(known);
                break;
            }
            let step = self.step(&device).await?;
            match &step {
                Step::Root(root) => {
                    address = Some(root.clone());
                    break;
                }
                Step::Unknown => break,
                Step::Same { on } | Step::Place { on, .. } => {
                    let on = on.clone();
                    steps.push((std::mem::replace(&mut device, on), step));
                }
            }
        }
        self.known.entry(device).or_insert_with(|| address.clone());
        for (device, step) in steps.into_iter().rev() {
            if let Step::Place { place, separator, .. } = step {
                address = address.map(|address| format!("{address}{separator}{place}"));
            }
            self.known.insert(device, address.clone());
        }
        Ok(address)
    }

    async fn step(&self, device: &str) -> Result<Step, QmpError> {
        let bus = self.get(device, "parent_bus").await?;
        let Some(bus) = bus.as_ref().and_then(Value::as_str).filter(|bus| !bus.is_empty()) else {
            return Ok(Step::Unknown);
        };
        let Some((on, bus_name)) = bus.rsplit_once('/') else { return Ok(Step::Unknown) };
        let on = on.to_owned();
        let kind = self.type_of(bus).await?.unwrap_or_default();
        let number = trailing_number(bus_name);
        let place = match kind.as_str() {
            "PCI" | "PCIE" | "CXL" => return self.pci(device, on, bus_name).await,
            "SCSI" => self.numbers(device, &["channel", "scsi-id", "lun"]).await?,
            "IDE" => {
                self.numbers(device, &["unit"]).await?.map(|unit| format!("{}:{unit}", number.unwrap_or("")))
            }
            "nvme-bus" => self.numbers(device, &["nsid"]).await?,
            "floppy-bus" => self.numbers(device, &["unit"]).await?.map(|unit| format!("floppy{unit}")),
            // The port of a device that was given none is not told.
            "usb-bus" => self.text(device, "port").await?,
            "virtual-css-bus" => {
                return Ok(self.text(device, "dev_id").await?.map_or(Step::Unknown, Step::Root));
            }
            "virtio-mmio-bus" => {
                return Ok(number.map_or(Step::Unknown, |n| Step::Root(format!("virtio-mmio{n}"))));
            }
            "ISA" => Some("isa".to_owned()),
            kind if kind.starts_with("virtio-") => return Ok(Step::Same { on }),
            _ => None,
        };
        Ok(place.map_or(Step::Unknown, |place| Step::Place { on, place, separator: '/' }))
    }

    async fn pci(&self, device: &str, on: String, bus: &str) -> Result<Step, QmpError> {
        let Some(place) = self.get(device, "addr").await?.as_ref().and_then(slot) else {
            return Ok(Step::Unknown);
        };
        let bridge = self.get(&on, "addr").await?;
        if bridge.is_some() {
            return Ok(Step::Place { on, place, separator: ':' });
        }
        // The machine's own, and one that an expander adds, whose name is made of its id.
        let indexed = on.contains("/peripheral-anon/") || on.contains("/unattached/");
        Ok(match bus {
            "pci.0" | "pcie.0" | "pci" => Step::Root(format!("0000:00:{place}")),
            _ if !indexed => Step::Root(format!("{bus}:{place}")),
            _ => Step::Unknown,
        })
    }

    async fn numbers(&self, device: &str, properties: &[&str]) -> Result<Option<String>, QmpError> {
        let mut numbers = Vec::new();
        for property in properties {
            match self.get(device, property).await?.as_ref().and_then(Value::as_u64) {
                Some(number) => numbers.push(number.to_string()),
                None => return Ok(None),
            }
        }
        Ok(Some(numbers.join(":")))
    }

    async fn text(&self, device: &str, property: &str) -> Result<Option<String>, QmpError> {
        let value = self.get(device, property).await?;
        Ok(value.and_then(|v| v.as_str().map(str::to_owned)).filter(|text| !text.is_empty()))
    }

    /// A property; none when the object has no such one, or there is no such object.
    async fn get(&self, path: &str, property: &str) -> Result<Option<Value>, QmpError> {
        match self.qmp.execute(QomGet { path: path.to_owned(), property: property.to_owned() }).await {
            Ok(value) => Ok(Some(value)),
            Err(e) if e.desc().is_some() => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// A PCI device's `addr` as `05.0`.
fn slot(addr: &Value) -> Option<String> {
    if let Some(text) = addr.as_str() {
        let (slot, function) = text.split_once('.').unwrap_or((text, "0"));
        let slot = u8::from_str_radix(slot, 16).ok()?;
        return Some(format!("{slot:02x}.{}", function.parse::<u8>().ok()?));
    }
    let devfn = addr.as_u64().filter(|devfn| *devfn < 256)?;
    Some(format!("{:02x}.{:x}", devfn >> 3, devfn & 7))
}

fn trailing_number(name: &str) -> Option<&str> {
    let digits = name.len() - name.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    (digits > 0).then(|| &name[name.len() - digits..])
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_slot_is_read_from_a_number_and_from_words() {
        assert_eq!(slot(&json!(40)).unwrap(), "05.0");
        assert_eq!(slot(&json!(250)).unwrap(), "1f.2");
        assert_eq!(slot(&json!("1f.2")).unwrap(), "1f.2");
        assert_eq!(slot(&json!("5")).unwrap(), "05.0");
        assert_eq!(slot(&json!(-1)), None);
        assert_eq!(slot(&json!(256)), None);
        assert_eq!(slot(&json!("x")), None);
    }

    #[test]
    fn a_bus_is_told_by_the_number_at_its_end() {
        assert_eq!(trailing_number("ide.5"), Some("5"));
        assert_eq!(trailing_number("ahci0.13"), Some("13"));
        assert_eq!(trailing_number("pcie"), None);
        assert_eq!(trailing_number(""), None);
    }
}
