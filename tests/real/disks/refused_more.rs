//! More guests that must not be moved as they are, for what does not show in the disks themselves: who else writes
//! to them, what the guest need not flush, what is the host's own, what is kept in the firmware's flash and in persistent memory, where the RAM
//! lies.

use anyhow::Result;
use serde_json::{Value, json};

use super::machine::{DISK_BYTES, Place, blockdev, device, raw};
use super::refused::{Case, Words, case, one_disk, words};
use crate::support::volume::Volume;

/// Of a storage daemon on the destination's host.
const NBD_PORT: &str = "9911";

pub(super) const ALL: &[Case] = &[
    case("shareable", shareable, one_disk, "disk-shareable", &["disk0", "other VMs", "share-rw=on"]),
    case("write-cache", scsi_through, scsi_cached, "disk-cache", &["disk0", "at the destination it has one"]),
    case("write-cache-drive", scsi_drive_through, scsi_cached, "disk-cache", &["disk0", "no write cache"]),
    case("write-cache-ide", ide_through, ide_through, "disk-cache", &["disk0", "an IDE disk's"]),
    case(
        "usb-host",
        usb_host,
        usb_host,
        "device-data",
        &["stick (usb-host)", "as if it were at the destination"],
    ),
    case("flash-fixed", flash, flash_read_only, "disk-read-only", &["system.flash1", "UEFI variables"]),
    case("flash-dropped", flash, flash_with_snapshot, "disk-temporary", &["system.flash1", "temporary"]),
    case("one-ram", ram_in_shared_file, ram_in_shared_file, "memory", &["mem", "one and the same file"]),
    case("memory-lost", kept_memory, lost_memory, "memory", &["nv0", "would be gone"]),
    case("memory-private", kept_memory, private_memory, "memory", &["nv0", "would be gone"]),
    case("mounted", one_disk, mounted, "disk-in-use", &["disk0", "mounted there at"]),
    case("nbd-bared", by_tls, in_clear, "disk-format", &["disk0", "encrypted connection", "in clear, to"]),
    case("processors", second_socket, third_socket, "cpu-count", &["socket-id 1", "socket-id 2"]),
];

fn shareable(place: &Place) -> Words {
    let node = raw("vda", &place.image("raw", "", "disk0.raw")?);
    Ok(words([blockdev(&node), device("virtio-blk-pci,id=disk0,addr=5,drive=vda,share-rw=on")]))
}

/// What is plugged in or not at the host.
fn usb_host(place: &Place) -> Words {
    let usb = words([
        device("qemu-xhci,id=usb,addr=6"),
        device("usb-host,id=stick,bus=usb.0,port=1,vendorid=0x1234,productid=0x5678"),
    ]);
    Ok([one_disk(place)?, usb].concat())
}

/// One that needs no guest to have read anything.
fn scsi(node: [String; 2], drive: &str, more: &str) -> Vec<String> {
    let disk = device(&format!("scsi-hd,id=disk0,bus=s.0,scsi-id=1,lun=0,drive={drive}{more}"));
    words([node, device("virtio-scsi-pci,id=s,addr=5"), disk])
}

fn scsi_through(place: &Place) -> Words {
    let node = blockdev(&raw("vda", &place.image("raw", "", "disk0.raw")?));
    Ok(scsi(node, "vda", ",write-cache=off"))
}

fn scsi_cached(place: &Place) -> Words {
    Ok(scsi(blockdev(&raw("vda", &place.image("raw", "", "disk0.raw")?)), "vda", ""))
}

fn scsi_drive_through(place: &Place) -> Words {
    let file = place.image("raw", "", "disk0.raw")?;
    let drive = format!("if=none,id=d0,format=raw,cache=writethrough,file={}", file.display());
    Ok(scsi(["-drive".into(), drive], "d0", ""))
}

/// Whatever the destination's has, QEMU turns it on.
fn ide_through(place: &Place) -> Words {
    let node = raw("vda", &place.image("raw", "", "disk0.raw")?);
    Ok(words([blockdev(&node), device("ide-hd,id=disk0,bus=ide.0,drive=vda,write-cache=off")]))
}

fn with_flash(place: &Place, more: &str) -> Words {
    let unit = |unit: u8, bytes: usize, more: &str| -> Result<[String; 2]> {
        let file = place.file(&format!("flash{unit}.fd"));
        std::fs::write(&file, vec![0xf4; bytes])?;
        Ok(["-drive".into(), format!("if=pflash,unit={unit},format=raw,file={}{more}", file.display())])
    };
    Ok([one_disk(place)?, words([unit(0, 256 << 10, ",readonly=on")?, unit(1, 128 << 10, more)?])].concat())
}

fn flash(place: &Place) -> Words {
    with_flash(place, "")
}

fn flash_read_only(place: &Place) -> Words {
    with_flash(place, ",readonly=on")
}

fn flash_with_snapshot(place: &Place) -> Words {
    with_flash(place, ",snapshot=on")
}

fn ram_in_shared_file(place: &Place) -> Words {
    let file = place.shared.join("ram");
    let backend = format!("memory-backend-file,id=mem,size=64M,share=on,mem-path={}", file.display());
    let ram = words([["-object".into(), backend], ["-machine".into(), "memory-backend=mem".into()]]);
    Ok([one_disk(place)?, ram].concat())
}

fn persistent_memory(place: &Place, backend: &str) -> Words {
    let file = place.file("nv0");
    std::fs::File::create(&file)?.set_len(16 << 20)?;
    let backend = backend.replace("FILE", &file.display().to_string());
    let memory = words([
        ["-machine".into(), "nvdimm=on".into()],
        ["-m".into(), "64M,slots=2,maxmem=256M".into()],
        ["-object".into(), format!("{backend},id=nv,size=16M")],
        device("nvdimm,id=nv0,memdev=nv"),
    ]);
    Ok([one_disk(place)?, memory].concat())
}

fn kept_memory(place: &Place) -> Words {
    persistent_memory(place, "memory-backend-file,share=on,mem-path=FILE")
}

fn private_memory(place: &Place) -> Words {
    persistent_memory(place, "memory-backend-file,share=off,mem-path=FILE")
}

fn lost_memory(place: &Place) -> Words {
    persistent_memory(place, "memory-backend-ram")
}

fn processors(place: &Place, second: u8) -> Words {
    let more = words([
        ["-smp".into(), "1,maxcpus=4,sockets=4,cores=1,threads=1".into()],
        device(&format!("qemu64-x86_64-cpu,socket-id={second},core-id=0,thread-id=0")),
    ]);
    Ok([one_disk(place)?, more].concat())
}

fn second_socket(place: &Place) -> Words {
    processors(place, 1)
}

fn third_socket(place: &Place) -> Words {
    processors(place, 2)
}

/// A disk at a storage daemon's.
fn remote(node: &Value) -> Vec<String> {
    let node = json!({"driver": "raw", "node-name": "vda", "file": node});
    words([blockdev(&node), device("virtio-blk-pci,id=disk0,addr=5,drive=vda")])
}

/// By TLS with a key that both have.
fn by_tls(place: &Place) -> Words {
    let (socket, keys) = (place.file("nbd"), place.file("keys"));
    std::fs::create_dir(&keys)?;
    std::fs::write(keys.join("keys.psk"), format!("qemu:{}\n", "0f".repeat(32)))?;
    let credentials = |end: &str| format!("tls-creds-psk,id=t0,dir={},endpoint={end}", keys.display());
    let server = format!("addr.type=unix,addr.path={},tls-creds=t0", socket.display());
    let export = "type=nbd,id=e,node-name=n,name=web1,writable=on";
    place.daemon(
        &socket,
        &["--object", &credentials("server"), "--nbd-server", &server, "--export", export],
    )?;
    let server = json!({"type": "unix", "path": socket});
    let node = json!({"driver": "nbd", "server": server, "export": "web1", "tls-creds": "t0"});
    Ok([words([["-object".into(), credentials("client")]]), remote(&node)].concat())
}

/// Over the network as it is.
fn in_clear(place: &Place) -> Words {
    let (ready, host) = (place.file("daemon.pid"), &place.host.v4);
    let server = format!("addr.type=inet,addr.host={host},addr.port={NBD_PORT}");
    let export = "type=nbd,id=e,node-name=n,name=web1,writable=on";
    let pidfile = ready.display().to_string();
    place.daemon(&ready, &["--nbd-server", &server, "--export", export, "--pidfile", &pidfile])?;
    let server = json!({"type": "inet", "host": host, "port": NBD_PORT});
    Ok(remote(&json!({"driver": "nbd", "server": server, "export": "web1"})))
}

/// An image that the host has a file system in.
fn mounted(place: &Place) -> Words {
    let folder = place.file("mounted");
    // The lab's janitor unmounts it.
    std::mem::forget(Volume::mount(&folder, DISK_BYTES >> 20)?);
    let node = raw("vda", &folder.with_extension("volume"));
    Ok(words([blockdev(&node), device("virtio-blk-pci,id=disk0,addr=5,drive=vda")]))
}
