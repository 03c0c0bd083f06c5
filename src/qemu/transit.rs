//! Whether what QEMU sends to an image over a network can be read on the way.

use serde_json::Value;

use super::client::Qmp;
use super::commands::{QomGet, QomList};
use super::error::QmpError;
use super::storage::{is_loopback, json_text, split_port};

/// Where QOM has what was made by `-object`.
const OBJECTS: &str = "/objects";

/// Drivers of what is on this host, or nowhere.
const LOCAL: [&str; 11] = [
    "file",
    "host_cdrom",
    "host_device",
    "io_uring",
    "null-aio",
    "null-co",
    "nvme",
    "nvme-io_uring",
    "virtio-blk-vfio-pci",
    "virtio-blk-vhost-vdpa",
    "vvfat",
];

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Transit {
    /// By no network that QEMU knows of: a file, a device, a socket of this host.
    #[default]
    None,
    /// By TLS or SSH.
    Encrypted,
    /// By NBD from a QEMU with a client's TLS credentials, which does not tell whether it is by these.
    Untold,
    InClear,
    /// Others than QEMU's options decide, such as a cluster's own configuration; or the driver is not known.
    Unknown,
}

/// By a node's driver and its name. Of NBD see [`is_untold`].
pub(super) fn transit(driver: &str, filename: &str) -> Transit {
    let json = filename.strip_prefix("json:");
    let options: Option<Value> = json.and_then(|json| serde_json::from_str(json).ok());
    // QEMU cuts long ones.
    let is_cut = json.is_some() && options.is_none();
    match driver {
        "nbd" if is_cut => Transit::Unknown,
        "nbd" => options.as_ref().map_or_else(|| nbd_uri(filename), nbd),
        "ssh" | "https" | "ftps" => Transit::Encrypted,
        "iscsi" | "nfs" | "http" | "ftp" => {
            in_clear(&host_of(filename, options.as_ref()).unwrap_or_default())
        }
        driver if LOCAL.contains(&driver) => Transit::None,
        _ => Transit::Unknown,
    }
}

/// Whether a node's name leaves open if it is reached by TLS: QEMU names what it can by a URI, which has no place for
/// the credentials (`nbd_refresh_filename`; tried with 7.2 and 10.0).
pub(super) fn is_untold(driver: &str, filename: &str) -> bool {
    driver == "nbd" && !filename.starts_with("json:")
}

/// Whether QEMU has TLS credentials of a client. One that does not say so may have them.
pub(super) async fn has_credentials(qmp: &Qmp) -> Result<bool, QmpError> {
    match find_credentials(qmp).await {
        Err(e) if e.desc().is_some() => Ok(true),
        found => found,
    }
}

async fn find_credentials(qmp: &Qmp) -> Result<bool, QmpError> {
    for object in qmp.execute(QomList { path: OBJECTS.into() }).await? {
        if object.kind.starts_with("child<tls-creds-") {
            let (path, property) = (format!("{OBJECTS}/{}", object.name), "endpoint".into());
            if qmp.execute(QomGet { path, property }).await? == "client" {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

fn nbd(options: &Value) -> Transit {
    let text =
        |name: &str| json_text(options, &format!("server.{name}")).or_else(|| json_text(options, name));
    if json_text(options, "tls-creds").is_some() {
        return Transit::Encrypted;
    }
    match (text("path"), text("host")) {
        (Some(_), _) => Transit::None,
        (None, Some(host)) => in_clear(&host),
        // A `vsock` ends at this host, too. Else it is a descriptor that somebody has passed.
        (None, None) if text("type").as_deref() == Some("vsock") => Transit::None,
        (None, None) => Transit::Unknown,
    }
}

/// Which cannot say that TLS is wanted.
fn nbd_uri(uri: &str) -> Transit {
    match uri.split_once("://") {
        Some((scheme, _)) if scheme.ends_with("+unix") => Transit::None,
        _ => in_clear(&host_of(uri, None).unwrap_or_default()),
    }
}

fn in_clear(host: &str) -> Transit {
    if is_loopback(host) { Transit::None } else { Transit::InClear }
}

fn host_of(filename: &str, options: Option<&Value>) -> Option<String> {
    let text = |name: &str| options.and_then(|options| json_text(options, name));
    let with_port = || {
        let url = text("url");
        let url = url.as_deref().unwrap_or(filename);
        Some(split_port(&text("portal").or_else(|| authority(url).map(str::to_owned))?).0.to_owned())
    };
    text("server.host").or_else(|| text("host")).or_else(with_port)
}

fn authority(uri: &str) -> Option<&str> {
    let rest = uri.split_once("://")?.1;
    rest.split(['/', '?']).next()?.rsplit('@').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_read_on_the_way_is_told_by_each_form_of_a_name() {
        let nbd_tls = r#"json:{"driver":"nbd","server.host":"store","server.port":"10809","server.type":"inet","export":"web1","tls-creds":"t0"}"#;
        let nested =
            r#"json:{"driver":"nbd","server":{"type":"inet","host":"store","port":"1"},"tls-creds":"t0"}"#;
        for (expected, driver, name) in [
            (Transit::Encrypted, "nbd", nbd_tls),
            (Transit::Encrypted, "nbd", nested),
            (Transit::InClear, "nbd", &*nbd_tls.replace(r#","tls-creds":"t0""#, "")),
            (Transit::InClear, "nbd", &*nested.replace(r#","tls-creds":"t0""#, "")),
            (Transit::InClear, "nbd", "nbd://store:10809/web1"),
            (Transit::InClear, "nbd", "nbd://[fd00::9]:10809/web1"),
            (Transit::None, "nbd", "nbd://localhost:10809/web1"),
            (Transit::None, "nbd", "nbd://[::1]:10809/web1"),
            (Transit::None, "nbd", "nbd+unix:///web1?socket=/run/s"),
            (Transit::None, "nbd", r#"json:{"driver":"nbd","server":{"type":"unix","path":"/run/s"}}"#),
            // Somebody carries it on from there.
            (Transit::Encrypted, "nbd", r#"json:{"server.type":"unix","server.path":"/s","tls-creds":"t0"}"#),
            (Transit::None, "nbd", r#"json:{"server.type":"vsock","server.cid":"3","server.port":"9"}"#),
            (Transit::Unknown, "nbd", r#"json:{"server.type":"fd","server.str":"s0"}"#),
            (Transit::Unknown, "nbd", r#"json:{"driver":"nbd","server.host":"sto..."#),
            (Transit::Encrypted, "ssh", r#"json:{"driver":"ssh","server.host":"store","path":"/x"}"#),
            (Transit::Encrypted, "https", "https://store/golden.qcow2"),
            (Transit::InClear, "http", "http://store/golden.qcow2"),
            (Transit::InClear, "iscsi", "iscsi://10.0.0.9/iqn.2026-11.org:store/3"),
            (
                Transit::None,
                "iscsi",
                r#"json:{"driver":"iscsi","portal":"127.0.0.1:3260","target":"t","lun":3}"#,
            ),
            (Transit::InClear, "nfs", r#"json:{"driver":"nfs","server":{"host":"store","type":"inet"}}"#),
            (Transit::None, "nfs", r#"json:{"driver":"nfs","server":{"host":"::1","type":"inet"}}"#),
            (Transit::InClear, "http", r#"json:{"driver":"http","url":"http://store:80/golden.qcow2"}"#),
            (Transit::Unknown, "rbd", "rbd:pool/web1"),
            (Transit::Unknown, "gluster", "gluster://one/vol/web1.raw"),
            (Transit::None, "file", "/srv/web1.raw"),
            (Transit::None, "null-co", "null-co://"),
            (Transit::Unknown, "of-tomorrow", "x"),
        ] {
            assert_eq!(transit(driver, name), expected, "{driver} {name}");
        }
    }
}
