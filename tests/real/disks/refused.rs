//! Guests whose disks must not be moved as they are: each is wrong in one way.

use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};

use super::machine::{Place, SECRET, blockdev, device, file_node, raw};
use crate::support::Qmp;

pub(super) type Words = Result<Vec<String>>;

/// One thing that is wrong, and how it must be told.
pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) source: fn(&Place) -> Words,
    pub(super) target: fn(&Place) -> Words,
    /// What somebody does to the running source.
    pub(super) prepare: Option<fn(&mut Qmp, &Place) -> Result<()>>,
    pub(super) kind: &'static str,
    pub(super) words: &'static [&'static str],
}

pub(super) const fn case(
    name: &'static str,
    source: fn(&Place) -> Words,
    target: fn(&Place) -> Words,
    kind: &'static str,
    words: &'static [&'static str],
) -> Case {
    Case { name, source, target, prepare: None, kind, words }
}

pub(super) const ALL: &[Case] = &[
    case("qcow2-luks", encrypted_qcow2, plain_qcow2, "disk-format", &["disk0", "luks", "in clear as qcow2"]),
    case("filter-luks", luks_below_filter, plain_below_filter, "disk-format", &["disk0", "luks", "throttle"]),
    case("same-file", shared_file, shared_file, "same-image", &["disk0", "both hosts", "shared.raw"]),
    case("link-to-it", shared_file, linked_file, "same-image", &["disk0", "both hosts", "link.raw"]),
    case("two-nodes", two_nodes_one_file, two_disks, "disk-shared", &["disk0 and disk1", "source"]),
    case("one-node", one_node_two_devices, two_disks, "disk-shared", &["disk0 and disk1", "source"]),
    case("two-there", two_disks, two_nodes_one_file, "disk-shared", &["disk0 and disk1", "destination"]),
    case("snapshot", drive, drive_with_snapshot, "disk-temporary", &["disk0", "destination", "gone"]),
    case(
        "ids-swapped",
        two_disks,
        two_disks_swapped,
        "disk-address",
        &["disk0", "0000:00:05.0", "0000:00:06.0"],
    ),
    case("elsewhere", nameless, nameless_elsewhere, "disk-missing", &["0000:00:05.0"]),
    case("no-address", usb_nameless, usb_nameless, "disk-unpaired", &["cannot be told"]),
    case("one-export", on_one_export, on_same_export, "same-storage", &["disk0", "both hosts", "nbd"]),
    case(
        "vhost-user",
        vhost_user,
        one_disk,
        "device-data",
        &["share0", "vhost-user-blk-pci", "nobody copies"],
    ),
    case("folder", folder, one_disk, "device-data", &["virtio-9p-pci", "folder"]),
    Case {
        prepare: Some(export_writable),
        ..case("exported", writable_by_others, one_disk, "disk-exported", &["disk0", "errand", "others"])
    },
    Case {
        prepare: Some(export_bitmap),
        ..case("bitmap-busy", one_qcow2, one_disk, "busy", &["disk0", "nightly", "guest"])
    },
];

const AT_5: &str = "virtio-blk-pci,id=disk0,addr=5";

pub(super) fn words(parts: impl IntoIterator<Item = [String; 2]>) -> Vec<String> {
    parts.into_iter().flatten().collect()
}

fn one(node: &Value) -> Vec<String> {
    words([["-object".into(), SECRET.into()], blockdev(node), device(&format!("{AT_5},drive=vda"))])
}

fn qcow2(file: &Path) -> Value {
    json!({"driver": "qcow2", "node-name": "vda", "file": file_node(file)})
}

pub(super) fn one_disk(place: &Place) -> Words {
    Ok(one(&raw("vda", &place.image("raw", "", "disk0.raw")?)))
}

fn one_qcow2(place: &Place) -> Words {
    Ok(one(&qcow2(&place.image("qcow2", "", "disk0.qcow2")?)))
}

fn plain_qcow2(place: &Place) -> Words {
    one_qcow2(place)
}

fn encrypted_qcow2(place: &Place) -> Words {
    let options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10";
    let mut node = qcow2(&place.image("qcow2", options, "disk0.qcow2")?);
    node["encrypt"] = json!({"format": "luks", "key-secret": "key"});
    Ok(one(&node))
}

fn filtered(mut below: Value) -> Vec<String> {
    below.as_object_mut().map(|node| node.remove("node-name"));
    let node = json!({"driver": "throttle", "node-name": "vda", "throttle-group": "calm", "file": below});
    [words([["-object".into(), "throttle-group,id=calm".into()]]), one(&node)].concat()
}

fn luks_below_filter(place: &Place) -> Words {
    let file = place.image("luks", "key-secret=key,iter-time=10", "disk0.luks")?;
    Ok(filtered(json!({"driver": "luks", "key-secret": "key", "file": file_node(&file)})))
}

fn plain_below_filter(place: &Place) -> Words {
    Ok(filtered(raw("vda", &place.image("raw", "", "disk0.raw")?)))
}

fn shared_file(place: &Place) -> Words {
    let file = place.shared.join("shared.raw");
    std::fs::File::options().create(true).append(true).open(&file)?.set_len(4 << 20)?;
    Ok(one(&raw("vda", &file)))
}

/// The same file by another name.
fn linked_file(place: &Place) -> Words {
    let link = place.file("link.raw");
    std::os::unix::fs::symlink(place.shared.join("shared.raw"), &link)?;
    Ok(one(&raw("vda", &link)))
}

fn two(first: &Value, second: &Value, addresses: [u8; 2]) -> Vec<String> {
    let plugged = |n: usize| {
        let node = ["vda", "vdb"][n];
        device(&format!("virtio-blk-pci,id=disk{n},addr={},drive={node}", addresses[n]))
    };
    words([blockdev(first), blockdev(second), plugged(0), plugged(1)])
}

fn two_disks_at(place: &Place, addresses: [u8; 2]) -> Words {
    let (a, b) = (place.image("raw", "", "disk0.raw")?, place.image("raw", "", "disk1.raw")?);
    Ok(two(&raw("vda", &a), &raw("vdb", &b), addresses))
}

fn two_disks(place: &Place) -> Words {
    two_disks_at(place, [5, 6])
}

fn two_disks_swapped(place: &Place) -> Words {
    two_disks_at(place, [6, 5])
}

fn two_nodes_one_file(place: &Place) -> Words {
    let file = place.image("raw", "", "disk0.raw")?;
    let unlocked = |name: &str| {
        let mut node = raw(name, &file);
        node["file"]["locking"] = json!("off");
        node
    };
    Ok(two(&unlocked("vda"), &unlocked("vdb"), [5, 6]))
}

fn one_node_two_devices(place: &Place) -> Words {
    let node = raw("vda", &place.image("raw", "", "disk0.raw")?);
    let plugged = |n: u8| device(&format!("virtio-blk-pci,id=disk{n},addr={},drive=vda,share-rw=on", 5 + n));
    Ok(words([blockdev(&node), plugged(0), plugged(1)]))
}

fn drive_words(place: &Place, more: &str) -> Words {
    let file = place.image("qcow2", "", "disk0.qcow2")?;
    let drive = format!("if=none,id=d0,format=qcow2,file={}{more}", file.display());
    Ok(words([["-drive".into(), drive], device(&format!("{AT_5},drive=d0"))]))
}

fn drive(place: &Place) -> Words {
    drive_words(place, "")
}

fn drive_with_snapshot(place: &Place) -> Words {
    drive_words(place, ",snapshot=on")
}

fn nameless_at(place: &Place, address: u8) -> Words {
    let node = raw("vda", &place.image("raw", "", "disk0.raw")?);
    Ok(words([blockdev(&node), device(&format!("virtio-blk-pci,addr={address},drive=vda"))]))
}

fn nameless(place: &Place) -> Words {
    nameless_at(place, 5)
}

fn nameless_elsewhere(place: &Place) -> Words {
    nameless_at(place, 6)
}

/// QEMU does not tell at which port it is.
fn usb_nameless(place: &Place) -> Words {
    let node = raw("vda", &place.image("raw", "", "disk0.raw")?);
    Ok(words([blockdev(&node), device("qemu-xhci,id=usb"), device("usb-storage,drive=vda")]))
}

fn nbd_socket(place: &Place) -> std::path::PathBuf {
    place.shared.join("nbd")
}

/// A network export that both hosts reach.
fn on_one_export(place: &Place) -> Words {
    let socket = nbd_socket(place);
    let server = format!("addr.type=unix,addr.path={}", socket.display());
    let export = "type=nbd,id=e,node-name=n,name=web1,writable=on";
    place.daemon(&socket, &["--nbd-server", &server, "--export", export])?;
    on_same_export(place)
}

fn on_same_export(place: &Place) -> Words {
    let server = json!({"type": "unix", "path": nbd_socket(place)});
    let node = json!({"driver": "nbd", "server": server, "export": "web1"});
    Ok(one(&json!({"driver": "raw", "node-name": "vda", "file": node})))
}

/// A disk that another process has, beside one of QEMU's.
fn vhost_user(place: &Place) -> Words {
    let socket = place.file("vhost");
    let export = format!(
        "type=vhost-user-blk,id=e,node-name=n,writable=on,addr.type=unix,addr.path={}",
        socket.display()
    );
    place.daemon(&socket, &["--export", &export])?;
    let chardev = format!("socket,id=v0,path={}", socket.display());
    let more = words([
        ["-object".into(), "memory-backend-memfd,id=mem,size=64M,share=on".into()],
        ["-machine".into(), "memory-backend=mem".into()],
        ["-chardev".into(), chardev],
        device("vhost-user-blk-pci,id=share0,chardev=v0"),
    ]);
    Ok([one_disk(place)?, more].concat())
}

fn folder(place: &Place) -> Words {
    let shared = format!("local,id=f0,security_model=none,path={}", place.dir.display());
    let fs = words([["-fsdev".into(), shared], device("virtio-9p-pci,id=share0,fsdev=f0,mount_tag=t")]);
    Ok([one_disk(place)?, fs].concat())
}

fn writable_by_others(place: &Place) -> Words {
    let node = raw("vda", &place.image("raw", "", "disk0.raw")?);
    Ok(words([blockdev(&node), device(&format!("{AT_5},drive=vda,share-rw=on"))]))
}

fn export(qmp: &mut Qmp, place: &Place, more: Value) -> Result<()> {
    let path = place.file("errand.nbd");
    qmp.execute("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": path}}}))?;
    let mut export = json!({"type": "nbd", "id": "errand", "node-name": "vda", "name": "vda"});
    for (name, value) in more.as_object().into_iter().flatten() {
        export[name] = value.clone();
    }
    qmp.execute("block-export-add", export).map(drop)
}

fn export_writable(qmp: &mut Qmp, place: &Place) -> Result<()> {
    export(qmp, place, json!({"writable": true}))
}

fn export_bitmap(qmp: &mut Qmp, place: &Place) -> Result<()> {
    let bitmap = json!({"node": "vda", "name": "nightly", "persistent": true, "disabled": true});
    qmp.execute("block-dirty-bitmap-add", bitmap)?;
    export(qmp, place, json!({"bitmaps": ["nightly"]}))
}
