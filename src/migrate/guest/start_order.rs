//! What the start of a destination's QEMU is told of its virtual machine: its name, its monitor, and where its disks
//! are. A command has it in its arguments and its environment, a systemd unit in a file that it names
//! (`EnvironmentFile=-/run/vmferry/start/%i.env`), which is there while the unit starts.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::config::{Start, VmConfig};

/// The agent's alone, and systemd's.
const PRIVATE: u32 = 0o600;

/// A disk of the guest that comes, and where it is here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PlacedDisk {
    name: String,
    path: PathBuf,
    format: &'static str,
    /// As many as the guest sees.
    bytes: u64,
    /// Slot and function on the first PCI bus, as QEMU's `addr=` has it.
    address: Option<String>,
}

impl PlacedDisk {
    /// `at_source` is QEMU's address of the guest's device there.
    pub(crate) fn new(
        name: &str,
        path: PathBuf,
        format: &'static str,
        bytes: u64,
        at_source: Option<&str>,
    ) -> Self {
        Self { name: name.to_owned(), path, format, bytes, address: at_source.and_then(slot) }
    }
}

/// `0000:00:05.0` is `05.0`; nothing else is one.
fn slot(address: &str) -> Option<String> {
    let slot = address.strip_prefix("0000:00:")?;
    let (device, function) = slot.split_once('.')?;
    let is_hex = |text: &str| text.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f'));
    let fits = device.len() == 2 && function.len() == 1 && is_hex(device) && is_hex(function);
    fits.then(|| slot.to_owned())
}

/// Which QEMU is to be started, and how.
pub(crate) struct StartOrder<'a> {
    pub(crate) vm: &'a str,
    pub(crate) config: &'a VmConfig,
    pub(crate) how: &'a Start,
    /// Those that this host has a place for.
    pub(crate) disks: &'a [PlacedDisk],
}

impl StartOrder<'_> {
    /// The disk whose address is asked for and which has none that can be told.
    pub(crate) fn without_address(&self) -> Option<&str> {
        let is_asked = self.config.disk_arguments.iter().any(|word| word.contains("{address}"));
        let mut disks = self.disks.iter().filter(|disk| is_asked && disk.address.is_none());
        disks.next().map(|disk| disk.name.as_str())
    }

    /// QEMU's words for all disks.
    pub(crate) fn disk_words(&self) -> Vec<String> {
        let words = |(number, disk): (usize, &PlacedDisk)| {
            // The braces of one value are not looked into for another.
            let values = [
                ("{vm}", self.vm.to_owned()),
                ("{disk}", disk.name.clone()),
                ("{format}", disk.format.to_owned()),
                ("{bytes}", disk.bytes.to_string()),
                ("{number}", number.to_string()),
                ("{address}", disk.address.clone().unwrap_or_default()),
                ("{path}", disk.path.display().to_string()),
            ];
            let filled =
                |word: &String| values.iter().fold(word.clone(), |w, (name, value)| w.replace(name, value));
            self.config.disk_arguments.iter().map(filled).collect::<Vec<_>>()
        };
        self.disks.iter().enumerate().flat_map(words).collect()
    }

    /// The same and more, by names.
    pub(crate) fn environment(&self) -> Vec<(String, String)> {
        let mut all = vec![
            ("VMFERRY_VM".to_owned(), self.vm.to_owned()),
            ("VMFERRY_QMP".to_owned(), self.config.qmp.display().to_string()),
            ("VMFERRY_DISKS".to_owned(), self.disks.len().to_string()),
            ("VMFERRY_DISK_ARGUMENTS".to_owned(), self.disk_words().join(" ")),
        ];
        for (number, disk) in self.disks.iter().enumerate() {
            let values = [
                ("NAME", disk.name.clone()),
                ("PATH", disk.path.display().to_string()),
                ("FORMAT", disk.format.to_owned()),
                ("BYTES", disk.bytes.to_string()),
                ("ADDRESS", disk.address.clone().unwrap_or_default()),
            ];
            all.extend(values.map(|(key, value)| (format!("VMFERRY_DISK{number}_{key}"), value)));
        }
        all
    }
}

/// A unit's environment, in a file that is gone when this is dropped.
pub(crate) struct UnitEnvironment(PathBuf);

impl UnitEnvironment {
    pub(crate) fn write(runtime: &Path, order: &StartOrder<'_>) -> io::Result<Self> {
        let folder = runtime.join("start");
        DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        let path = folder.join(format!("{}.env", order.vm));
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut file = File::options().write(true).create_new(true).mode(PRIVATE).open(&path)?;
        let written = Self(path);
        for (key, value) in order.environment() {
            writeln!(file, "{key}={}", quoted(&value))?;
        }
        Ok(written)
    }
}

impl Drop for UnitEnvironment {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// As systemd reads a value back (systemd.exec(5), `EnvironmentFile=`).
fn quoted(value: &str) -> String {
    let escaped = |c: char| if "\\\"`$".contains(c) { vec!['\\', c] } else { vec![c] };
    format!("\"{}\"", value.chars().flat_map(escaped).collect::<String>())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_told_only_of_the_first_pci_bus() {
        for (address, expected) in [
            ("0000:00:05.0", Some("05.0")),
            ("0000:00:1f.7", Some("1f.7")),
            ("0000:01:05.0", None),
            ("0000:00:05.0/0:3:7", None),
            ("0000:00:05.0,x=y", None),
            ("0000:00:5.0", None),
            ("0000:00:05", None),
            ("", None),
        ] {
            assert_eq!(slot(address).as_deref(), expected, "{address}");
        }
        let mut config: VmConfig =
            toml::from_str("qmp = '/x'\ndisk_arguments = ['addr={address}']\n").unwrap();
        let disks = [("a", "0000:00:05.0"), ("b", "0000:00:05.0/0:3:7")]
            .map(|(name, at)| PlacedDisk::new(name, "/x".into(), "raw", 1, Some(at)));
        let how = Start::Command(vec!["x".into()]);
        let without = |config: &VmConfig| {
            let order = StartOrder { vm: "v", config, how: &how, disks: &disks };
            order.without_address().map(str::to_owned)
        };
        assert_eq!(without(&config).as_deref(), Some("b"));
        config.disk_arguments.clear();
        assert_eq!(without(&config), None);
    }

    #[test]
    fn a_start_is_told_where_the_disks_are() {
        let config: VmConfig = toml::from_str(
            "qmp = '/run/qemu/web1/agent.qmp'\nstart = { unit = 'x@web1.service' }\n\
             disk_arguments = ['-blockdev', '{format},node-name={disk},size={bytes},file={path}', '-device', 'd{number}']\n",
        )
        .unwrap();
        let disks = [
            PlacedDisk::new("vda", "/srv/{bytes}\"web1\".raw".into(), "raw", 4096, Some("0000:00:1f.2")),
            PlacedDisk::new("vdb", "/srv/b.qcow2".into(), "qcow2", 512, Some("0000:01:00.0")),
        ];
        let how = config.start.clone().unwrap();
        let order = StartOrder { vm: "web1", config: &config, how: &how, disks: &disks };
        let words = "-blockdev raw,node-name=vda,size=4096,file=/srv/{bytes}\"web1\".raw -device d0 \
                     -blockdev qcow2,node-name=vdb,size=512,file=/srv/b.qcow2 -device d1";
        assert_eq!(order.disk_words().join(" "), words);
        let folder = tempfile::tempdir().unwrap();
        let environment = UnitEnvironment::write(folder.path(), &order).unwrap();
        let text = fs::read_to_string(folder.path().join("start/web1.env")).unwrap();
        for line in [
            "VMFERRY_QMP=\"/run/qemu/web1/agent.qmp\"",
            "VMFERRY_DISKS=\"2\"",
            "VMFERRY_DISK0_PATH=\"/srv/{bytes}\\\"web1\\\".raw\"",
            "VMFERRY_DISK1_NAME=\"vdb\"",
            "VMFERRY_DISK1_FORMAT=\"qcow2\"",
            "VMFERRY_DISK1_BYTES=\"512\"",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} not in {text}");
        }
        drop(environment);
        assert!(!folder.path().join("start/web1.env").exists());
    }
}
