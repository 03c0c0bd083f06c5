//! What storage is known by on every host that uses it: names that are equal if, and as far as can be
//! told only if, it is the same storage. Two names that differ prove nothing: a server may have
//! several addresses.
//!
//! ```text
//! inode:BOOT:DEV:INO       a file, within one running kernel
//! dev:BOOT:MAJ:MIN         a block device, within one running kernel
//! wwid:…  dm:…  rbd:…      a block device, wherever it is attached
//! nfs:SERVER:/EXPORT:INO   a file of a network or cluster file system
//! nbd:HOST:PORT/EXPORT     and the like: what QEMU reaches by itself
//! like:…                   may be the same: enough to refuse a copy, and not to take it for one storage
//! ```

use crate::printable::printable;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};
use serde_json::Value;

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Of replicated devices (DRBD).
const DRBD_MAJOR: u64 = 147;
/// Links to them, by their names.
const DRBD_RESOURCES: &str = "/dev/drbd/by-res";
/// Longer names are cut in their middle.
const KEY_BYTES_MAX: usize = 200;
/// The part of a longer name that is kept at its beginning.
const KEY_BYTES_BEGIN: usize = 48;

/// Of this kernel since it was started; none where it may not be read.
pub fn boot_id() -> Option<String> {
    let id = fs::read_to_string(BOOT_ID).ok()?;
    Some(id.trim().to_owned()).filter(|id| !id.is_empty())
}

/// The path that a node's image has on its host, if it has one.
pub(super) fn local_path(driver: &str, filename: &str) -> Option<String> {
    if !matches!(driver, "file" | "host_device" | "host_cdrom") {
        return None;
    }
    let path = match filename.strip_prefix("json:") {
        Some(json) => json_text(&serde_json::from_str(json).ok()?, "filename")?,
        None => filename.strip_prefix("file:").unwrap_or(filename).to_owned(),
    };
    (!path.is_empty()).then_some(path)
}

pub(super) fn keys_of_device(device: u64, depth: usize) -> Vec<String> {
    let number = format!("{}:{}", major(device), minor(device));
    let folder = PathBuf::from("/sys/dev/block").join(&number);
    let mut keys = device_names(&folder, depth);
    if major(device) == DRBD_MAJOR {
        let rdev = |path: &Path| Some(fs::metadata(path).ok()?.rdev());
        keys.extend(drbd_name(Path::new(DRBD_RESOURCES), device, &rdev));
    }
    keys.extend(boot_id().map(|boot| format!("dev:{boot}:{number}")));
    keys
}

/// A replicated device by its resource and volume: two hosts have the same one behind one name.
fn drbd_name(resources: &Path, device: u64, rdev: &dyn Fn(&Path) -> Option<u64>) -> Option<String> {
    let paths =
        |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let volumes = paths(resources).flat_map(|path| paths(&path).chain([path.clone()]).collect::<Vec<_>>());
    let volume = volumes.into_iter().find(|path| rdev(path) == Some(device))?;
    Some(format!("like:drbd:{}", volume.strip_prefix(resources).ok()?.display()))
}

fn device_names(folder: &Path, depth: usize) -> Vec<String> {
    let read = |file: &str| {
        let text = fs::read_to_string(folder.join(file)).ok()?;
        Some(text.trim().to_owned()).filter(|text| !text.is_empty())
    };
    if depth > 2 {
        return Vec::new();
    }
    if let Some(number) = read("partition") {
        let Some(whole) = fs::canonicalize(folder).ok().and_then(|f| f.parent().map(Path::to_owned)) else {
            return Vec::new();
        };
        let whole = device_names(&whole, depth + 1);
        return whole.into_iter().map(|key| format!("{key}:part{number}")).collect();
    }
    let mut keys: Vec<String> = ["wwid", "device/wwid"]
        .into_iter()
        .find_map(read)
        .map(|id| format!("wwid:{id}"))
        .into_iter()
        .collect();
    if let Some(id) = read("dm/uuid") {
        if id.starts_with("mpath-") {
            // Reached by one of its paths on the other host.
            let paths = fs::read_dir(folder.join("slaves")).into_iter().flatten().flatten();
            keys.extend(paths.take(1).flat_map(|path| device_names(&path.path(), depth + 1)));
        }
        keys.push(format!("dm:{id}"));
    }
    if let (Some(pool), Some(name)) = (read("device/pool"), read("device/name")) {
        keys.push(format!("rbd:{pool}/{}/{name}", read("device/pool_ns").unwrap_or_default()));
    }
    if let Some(file) = read("loop/backing_file")
        && let Ok(metadata) = fs::metadata(file)
        && metadata.is_file()
    {
        keys.extend(boot_id().map(|boot| format!("inode:{boot}:{}:{}", metadata.dev(), metadata.ino())));
    }
    keys
}

/// Of an image that QEMU reaches over a network by itself.
pub(super) fn keys_of_network(driver: &str, filename: &str) -> Vec<String> {
    let key = match filename.strip_prefix("json:") {
        Some(json) => serde_json::from_str(json).ok().and_then(|json| of_json(driver, &json)),
        None => of_uri(driver, filename),
    };
    key.map(bounded).into_iter().collect()
}

fn of_json(driver: &str, json: &Value) -> Option<String> {
    let text = |path: &str| json_text(json, path);
    let or_empty = |path: &str| text(path).unwrap_or_default();
    match driver {
        "nbd" => {
            let export = or_empty("export");
            match text("server.path").or_else(|| text("path")) {
                Some(path) => here(&format!("nbd-unix:{path}"), &export),
                None => {
                    let host = text("server.host").or_else(|| text("host"))?;
                    let port = text("server.port").or_else(|| text("port"));
                    at_host("nbd", &host, port.as_deref(), "10809", &export)
                }
            }
        }
        "rbd" => Some(format!("rbd:{}/{}/{}", text("pool")?, or_empty("namespace"), text("image")?)),
        "iscsi" => Some(format!("iscsi:{}:{}", text("target")?, text("lun").unwrap_or_else(|| "0".into()))),
        "gluster" => Some(format!("gluster:{}/{}", text("volume")?, text("path")?.trim_matches('/'))),
        "nfs" => at_host("nfs", &text("server.host")?, None, "", &text("path")?),
        "ssh" => {
            let host = text("server.host").or_else(|| text("host"))?;
            let port = text("server.port").or_else(|| text("port"));
            at_host("ssh", &host, port.as_deref(), "22", &text("path")?)
        }
        "http" | "https" | "ftp" | "ftps" => of_uri(driver, &text("url")?),
        _ => None,
    }
}

fn of_uri(driver: &str, uri: &str) -> Option<String> {
    if let Some(rest) = uri.strip_prefix("rbd:") {
        let image = rest.split([':', '@']).next()?;
        let mut parts: Vec<&str> = image.split('/').collect();
        if parts.len() == 2 {
            parts.insert(1, "");
        }
        return (parts.len() == 3).then(|| format!("rbd:{}", parts.join("/")));
    }
    let (scheme, rest) = uri.split_once("://")?;
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let authority = authority.rsplit('@').next().unwrap_or_default();
    let (host, port) = split_port(authority);
    let scheme = scheme.split('+').next().unwrap_or_default();
    let socket = query.split('&').find_map(|word| word.strip_prefix("socket="));
    match (scheme, socket) {
        ("nbd", Some(socket)) => here(&format!("nbd-unix:{socket}"), path),
        ("nbd", None) => at_host("nbd", host, port, "10809", path),
        ("iscsi", _) => {
            let (target, lun) = path.rsplit_once('/')?;
            Some(format!("iscsi:{target}:{lun}"))
        }
        ("gluster", _) => Some(format!("gluster:{}", path.trim_matches('/'))),
        ("nfs", _) => at_host("nfs", host, None, "", path),
        ("ssh" | "sftp", _) => at_host("ssh", host, port, "22", path),
        ("http" | "https" | "ftp" | "ftps", _) => at_host(driver, host, port, "", path),
        _ => None,
    }
}

pub(super) fn split_port(authority: &str) -> (&str, Option<&str>) {
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) => {
            (host, Some(port))
        }
        _ => (authority, None),
    }
}

fn at_host(kind: &str, host: &str, port: Option<&str>, usual: &str, path: &str) -> Option<String> {
    let host = host.trim_matches(['[', ']']).to_ascii_lowercase();
    let port = port.unwrap_or(usual);
    let path = path.trim_matches('/');
    if is_loopback(&host) {
        return here(&format!("{kind}:{port}"), path);
    }
    Some(format!("{kind}:{host}:{port}/{path}"))
}

/// Each host's own.
pub(super) fn is_loopback(host: &str) -> bool {
    let host = host.trim_matches(['[', ']']);
    host.eq_ignore_ascii_case("localhost") || host == "::1" || host.starts_with("127.")
}

/// What has its name within one running kernel only.
fn here(name: &str, path: &str) -> Option<String> {
    boot_id().map(|boot| format!("{name}:{boot}/{path}"))
}

/// A value of a JSON object by its path, which may be one key with dots in it.
pub(super) fn json_text(json: &Value, path: &str) -> Option<String> {
    let nested = || path.split('.').try_fold(json, |value, key| value.get(key));
    match json.get(path).or_else(nested)? {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

/// Where a raw node begins in what is below it, if that is not at the beginning: by its name, as QEMU makes it.
pub(super) fn offset(filename: &str) -> Option<String> {
    let json: Value = serde_json::from_str(filename.strip_prefix("json:")?).ok()?;
    json_text(&json, "offset").filter(|offset| offset != "0")
}

/// What a peer says comes without what is not printable, so ours is to be compared without it.
pub(super) fn bounded(key: String) -> String {
    let key = printable(&key);
    if key.len() <= KEY_BYTES_MAX {
        return key;
    }
    let bytes = key.as_bytes();
    let begin = String::from_utf8_lossy(&bytes[..KEY_BYTES_BEGIN]).into_owned();
    let end = String::from_utf8_lossy(&bytes[bytes.len() - (KEY_BYTES_MAX - KEY_BYTES_BEGIN - 16)..]);
    format!("{begin}..{}..{end}", key.len())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use super::*;

    #[test]
    fn one_export_has_one_name_however_it_is_written() {
        let same = [
            (
                "nbd",
                "nbd://Store/web1",
                r#"json:{"driver":"nbd","server.host":"store","server.port":"10809","server.type":"inet","export":"web1","tls-creds":"t0"}"#,
            ),
            (
                "rbd",
                "rbd:pool/web1:id=admin:conf=/etc/ceph.conf",
                r#"json:{"driver":"rbd","pool":"pool","image":"web1","server":[]}"#,
            ),
            (
                "iscsi",
                "iscsi://10.0.0.9/iqn.2026-11.org:store/3",
                r#"json:{"driver":"iscsi","portal":"[fd00::9]:3260","target":"iqn.2026-11.org:store","lun":3,"transport":"tcp"}"#,
            ),
            (
                "gluster",
                "gluster://one/vol/web1.raw",
                r#"json:{"driver":"gluster","volume":"vol","path":"web1.raw","server":[{"host":"two"}]}"#,
            ),
            (
                "nfs",
                "nfs://store/srv/web1.raw",
                r#"json:{"driver":"nfs","server":{"host":"store","type":"inet"},"path":"/srv/web1.raw"}"#,
            ),
            (
                "ssh",
                "ssh://root@store/srv/web1.raw",
                r#"json:{"driver":"ssh","server":{"host":"store","port":"22"},"path":"/srv/web1.raw","user":"me"}"#,
            ),
            (
                "nbd",
                "nbd+unix:///web1?socket=/run/s",
                r#"json:{"driver":"nbd","server":{"type":"unix","path":"/run/s"},"export":"web1"}"#,
            ),
        ];
        for (driver, uri, json) in same {
            let keys = keys_of_network(driver, uri);
            assert_eq!(keys.len(), 1, "{uri}");
            assert_eq!(keys, keys_of_network(driver, json), "{uri}");
        }
        let one = keys_of_network("nbd", "nbd://store/web1");
        for other in ["nbd://store/web2", "nbd://store:10810/web1", "nbd://other/web1"] {
            assert_ne!(one, keys_of_network("nbd", other));
        }
        assert_eq!(keys_of_network("null-co", "null-co://"), Vec::<String>::new());
        for nonsense in ["", "json:", "json:[]", "json:{\"driver\":\"nbd\"}", "nbd", "rbd:"] {
            assert_eq!(keys_of_network("nbd", nonsense), Vec::<String>::new(), "{nonsense}");
        }
    }

    #[test]
    fn a_loopback_address_is_another_one_on_each_host() {
        let boot = boot_id().unwrap();
        for uri in ["nbd://localhost/x", "nbd://127.0.0.1:10809/x", "nbd://[::1]/x"] {
            assert_eq!(keys_of_network("nbd", uri), [format!("nbd:10809:{boot}/x")]);
        }
    }

    #[test]
    fn a_replicated_device_is_known_by_its_resource() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("web1")).unwrap();
        for file in ["web1/0", "web1/1", "old"] {
            std::fs::write(folder.path().join(file), "").unwrap();
        }
        let rdev = |path: &Path| match path.file_name()?.to_str()? {
            "0" => Some(5),
            "old" => Some(6),
            _ => Some(0),
        };
        assert_eq!(drbd_name(folder.path(), 5, &rdev).unwrap(), "like:drbd:web1/0");
        assert_eq!(drbd_name(folder.path(), 6, &rdev).unwrap(), "like:drbd:old");
        assert_eq!(drbd_name(folder.path(), 7, &rdev), None);
        assert_eq!(drbd_name(Path::new("/nowhere"), 5, &rdev), None);
    }

    #[test]
    fn a_path_is_found_in_each_form() {
        let path = "/srv/web1.raw";
        assert_eq!(local_path("file", path).unwrap(), path);
        assert_eq!(local_path("file", "file:/srv/web1.raw").unwrap(), path);
        assert_eq!(local_path("file", r#"json:{"driver":"file","filename":"/srv/web1.raw"}"#).unwrap(), path);
        assert_eq!(local_path("nbd", path), None);
        assert_eq!(local_path("file", "json:{}"), None);
    }

    #[test]
    fn long_names_are_cut() {
        let long = format!("nbd:store:1/{}", "x".repeat(9000));
        assert!(bounded(long.clone()).len() <= KEY_BYTES_MAX);
        assert_eq!(bounded(long.clone()), bounded(long));
    }
}
