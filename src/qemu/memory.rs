//! How much RAM there is, and the files that it lies in: which file each is, and whether one keeps what the guest writes to it when QEMU ends.

use std::collections::BTreeMap;
use std::time::Duration;

use super::client::Qmp;
use super::commands::{Memdev, MemoryDevice, MemoryInfo, QomGet, QomList};
use super::error::QmpError;
use super::image::OpenFiles;

/// How long the file systems of those files may take to answer.
const SEE_DEADLINE: Duration = Duration::from_secs(5);
/// Back ends that are looked at.
const BACKENDS_MAX: usize = 1024;
/// Where back ends are in QEMU's tree of objects.
const OBJECTS: &str = "/objects/";
/// Devices whose memory the guest takes for storage.
const STORAGE: [&str; 2] = ["nvdimm", "virtio-pmem"];

/// The RAM that a machine has from its start, or since something was plugged in. What a guest takes of a `virtio-mem`
/// comes with the guest: a QEMU that waits for it has none of that yet.
pub(super) fn settled(memory: &MemoryInfo, devices: &[MemoryDevice]) -> u64 {
    let taken = devices.iter().filter(|device| device.kind == "virtio-mem").map(|device| device.data.size);
    let taken = taken.fold(0, u64::saturating_add);
    memory.base_memory.saturating_add(memory.plugged_memory).saturating_sub(taken)
}

/// Back ends of RAM.
#[derive(Debug, Default)]
pub(super) struct Backends {
    /// By their ids: whether other processes may map them.
    pub(super) shared: BTreeMap<String, bool>,
    /// The files that some of them lie in, by names that are the same wherever the same file is used.
    pub(super) files: BTreeMap<String, Vec<String>>,
    /// Devices whose memory the guest takes for storage: whether what it writes there is left when QEMU ends.
    pub(super) kept: BTreeMap<String, bool>,
}

/// Asks for the back ends of RAM, and looks at their files.
pub(super) async fn backends(qmp: &Qmp, told: Vec<Memdev>) -> Result<Backends, QmpError> {
    let mut found = Backends::default();
    let mut files = BTreeMap::new();
    for backend in told.into_iter().take(BACKENDS_MAX) {
        if let Some(path) = text(qmp, &format!("{OBJECTS}{}", backend.id), "mem-path").await? {
            files.insert(backend.id.clone(), path);
        }
        found.shared.insert(backend.id, backend.share);
    }
    let storage = storage(qmp).await?;
    let pid = qmp.process().pid();
    let look = tokio::task::spawn_blocking(move || {
        let open = pid.map(OpenFiles::of).unwrap_or_default();
        files.into_iter().map(|(id, path)| (id, seen(&path, &open))).collect::<BTreeMap<_, _>>()
    });
    let files = tokio::time::timeout(SEE_DEADLINE, look).await.ok().and_then(Result::ok).unwrap_or_default();
    for (device, backend) in storage {
        let is_shared = found.shared.get(&backend).is_some_and(|shared| *shared);
        let kept = is_shared && files.get(&backend).is_some_and(|file| file.kept);
        found.kept.insert(device, kept);
    }
    let named = files.into_iter().filter(|(_, file)| !file.keys.is_empty());
    found.files = named.map(|(id, file)| (id, file.keys)).collect();
    Ok(found)
}

/// A file of RAM.
struct File {
    /// It has a name, so that somebody finds it when QEMU has ended.
    kept: bool,
    /// Names that are the same wherever the same file is used.
    keys: Vec<String>,
}

fn seen(path: &str, open: &OpenFiles) -> File {
    let is_folder = open.metadata_of(path).is_some_and(|found| found.is_dir());
    // Names that only may be the same file's prove nothing.
    let keys = open.keys_of(path).into_iter().filter(|key| !key.starts_with("like:")).collect();
    File { kept: !is_folder, keys }
}

/// The devices that are storage to the guest, with the back end of each.
async fn storage(qmp: &Qmp) -> Result<Vec<(String, String)>, QmpError> {
    let mut found = Vec::new();
    for folder in ["/machine/peripheral", "/machine/peripheral-anon"] {
        for child in qmp.execute(QomList { path: folder.to_owned() }).await? {
            let kind = child.kind.trim_start_matches("child<");
            if !STORAGE.iter().any(|begin| kind.starts_with(begin)) {
                continue;
            }
            let path = format!("{folder}/{}", child.name);
            let backend = text(qmp, &path, "memdev").await?;
            if let Some(backend) = backend.as_deref().and_then(|path| path.strip_prefix(OBJECTS)) {
                found.push((child.name, backend.to_owned()));
            }
        }
    }
    Ok(found)
}

async fn text(qmp: &Qmp, path: &str, property: &str) -> Result<Option<String>, QmpError> {
    match qmp.execute(QomGet { path: path.to_owned(), property: property.to_owned() }).await {
        Ok(value) => Ok(value.as_str().map(str::to_owned).filter(|text| !text.is_empty())),
        Err(e) if e.desc().is_some() => Ok(None),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_a_guest_takes_by_itself_is_no_difference() {
        let told = |plugged: u64, devices| {
            let memory = json!({"base-memory": 512 << 20, "plugged-memory": plugged});
            settled(
                &serde_json::from_value(memory).unwrap(),
                &serde_json::from_value::<Vec<_>>(devices).unwrap(),
            )
        };
        let taken =
            |size: u64| json!([{"type": "virtio-mem", "data": {"size": size, "requested-size": 64 << 20}}]);
        assert_eq!(
            told(64 << 20, taken(64 << 20)),
            told(0, taken(0)),
            "a guest that runs, and a QEMU that waits"
        );
        let dimm = json!([{"type": "dimm", "data": {"size": 64 << 20}}]);
        assert_eq!(told(64 << 20, dimm), 576 << 20);
        assert_eq!(told(0, json!([{"type": "of-tomorrow", "data": {}}, {"type": "sgx-epc"}])), 512 << 20);
    }
}
