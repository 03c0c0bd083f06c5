//! Managers that dial and listen on unix sockets themselves, with the paths and in the order in which they
//! do it: KubeVirt's launchers, as their proxy was read, and a pair of cloud-hypervisors.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};

use super::agents::{Agent, Ground};
use super::{accept, connect, exchange};
use crate::rig::pattern;

const UID: &str = "0b61c3a4-7c39-4f6e-9a9e-2f0f4f3a7a11";
/// What QEMU sends first on its main connection, and on each further one.
const MAIN: &[u8; 4] = b"QEVM";
const FURTHER: [u8; 4] = [0x11, 0x22, 0x33, 0x44];
/// KubeVirt's default of them.
const THREADS: usize = 8;

fn says(mut end: &UnixStream, text: &[u8]) {
    end.write_all(text).unwrap();
}

fn hears(mut end: &UnixStream, text: &[u8]) {
    let mut heard = vec![0; text.len()];
    end.read_exact(&mut heard).unwrap();
    assert_eq!(heard, text);
}

fn ends(end: &UnixStream) {
    end.shutdown(Shutdown::Write).unwrap();
}

fn is_at_end(mut end: &UnixStream) {
    assert_eq!(end.read(&mut [0]).unwrap(), 0);
}

fn add(alpha: &Agent, ground: &Ground, socket: &str, target: &str, more: &[&str]) -> String {
    let path = ground.path(socket);
    let words = ["forward", "add", path.to_str().unwrap(), "--to", "bravo", "--target", target];
    let (is_added, id) = alpha.run(&[&words[..], more].concat());
    assert!(is_added, "{id}");
    id.trim().to_owned()
}

/// One migration with two disks and eight RAM threads. The target's launcher listens before the source's
/// manager begins; the forwardings are added for this one and ended with it.
#[test]
fn kubevirts_sockets_are_carried_in_its_order() {
    let ground = Ground::new();
    for folder in ["migrationproxy", "launcher"] {
        std::fs::create_dir(ground.path(folder)).unwrap();
    }
    let target = |what: &str, file: &str| {
        format!("[target.'kubevirt-{what}-*']\nconnect = 'DIR/launcher/{file}'\nfrom = ['alpha']\n")
    };
    let targets =
        [target("rpc", "{}-virtqemud-sock"), target("ram", "{}-49152.sock"), target("disk", "{}-49153.sock")];
    let (_bravo, alpha) = (ground.bravo(&targets.concat()), ground.alpha(""));
    let [rpc, ram, disk] = ["virtqemud-sock", "49152.sock", "49153.sock"]
        .map(|file| ground.listen(&format!("launcher/{UID}-{file}")));
    let own = nix::unistd::geteuid().to_string();
    let near = |file: &str| format!("migrationproxy/{file}");
    let ram_file = near(&format!("{UID}-49152-source.sock"));
    let disk_file = near(&format!("{UID}-49153-source.sock"));
    let forwardings = [
        add(
            &alpha,
            &ground,
            &near("virtqemud-sock"),
            &format!("kubevirt-rpc-{UID}"),
            &["--owner", &own, "--urgent"],
        ),
        add(&alpha, &ground, &ram_file, &format!("kubevirt-ram-{UID}"), &["--owner", &own]),
        add(&alpha, &ground, &disk_file, &format!("kubevirt-disk-{UID}"), &["--owner", &own]),
    ];

    // libvirt's own connection: its client speaks first, and it is open to the very end.
    let (rpc_near, rpc_far) = (connect(&ground.path(&near("virtqemud-sock"))), accept(&rpc));
    says(&rpc_near, &[0, 0, 0, 0x1c, 0x20, 0, 0x80, 0x86]);
    hears(&rpc_far, &[0, 0, 0, 0x1c, 0x20, 0, 0x80, 0x86]);
    // Disks: the server speaks first.
    let disks = [0, 1].map(|n: u8| {
        let (near_end, far_end) = (connect(&ground.path(&disk_file)), accept(&disk));
        says(&far_end, b"NBDMAGICIHAVEOPT");
        hears(&near_end, b"NBDMAGICIHAVEOPT");
        says(&near_end, &[n; 512]);
        hears(&far_end, &[n; 512]);
        (near_end, far_end)
    });
    // RAM: all within moments, and the target takes the first one that it accepts for the main one.
    let ram_near: Vec<UnixStream> = (0..=THREADS).map(|_| connect(&ground.path(&ram_file))).collect();
    says(&ram_near[0], MAIN);
    ram_near[1..].iter().for_each(|end| says(end, &FURTHER));
    let ram_far: Vec<UnixStream> = ram_near.iter().map(|_| accept(&ram)).collect();
    hears(&ram_far[0], MAIN);
    ram_far[1..].iter().for_each(|end| hears(end, &FURTHER));
    // Disks end first, in both directions; then RAM, where the target ends before the source; RPC at last.
    for (near_end, far_end) in &disks {
        exchange(near_end, far_end, 300_000);
    }
    for (near_end, far_end) in ram_near.iter().zip(&ram_far) {
        says(far_end, b"done");
        ends(far_end);
        hears(near_end, b"done");
        is_at_end(near_end);
        says(near_end, b"last");
        ends(near_end);
        hears(far_end, b"last");
        is_at_end(far_end);
    }
    says(&rpc_far, b"finished");
    hears(&rpc_near, b"finished");
    ends(&rpc_near);
    is_at_end(&rpc_far);
    for id in &forwardings {
        let (is_ended, said) = alpha.run(&["forward", "end", id]);
        assert!(is_ended, "{said}");
    }
    let left = std::fs::read_dir(ground.path("migrationproxy")).unwrap().count();
    assert_eq!(left, 0, "the manager's folder is as it was");
}

/// Requests of `send-migration`, each answered before the next; RAM goes between two of them.
#[test]
fn a_pair_of_cloud_hypervisors_meets_at_its_sockets() {
    let ground = Ground::new();
    let target = "[target.'ch-*']\nconnect = 'DIR/{}.migration'\nfrom = ['alpha']\n";
    let forward = "[forward.ch-web1]\nlisten = 'DIR/near.migration'\nto = 'bravo'\n";
    let (_bravo, _alpha) = (ground.bravo(target), ground.alpha(forward));
    let receiver: UnixListener = ground.listen("web1.migration");
    let (sender, receiving) = (connect(&ground.path("near.migration")), accept(&receiver));
    // It takes one connection, and its socket is gone then.
    drop(receiver);
    std::fs::remove_file(ground.path("web1.migration")).unwrap();
    let ok = [0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for command in 1..=5_u8 {
        let request = [0, command, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        says(&sender, &request);
        hears(&receiving, &request);
        let ram = pattern(command.into(), 2_000_000);
        std::thread::scope(|scope| {
            scope.spawn(|| says(&sender, &ram));
            hears(&receiving, &ram);
        });
        says(&receiving, &ok);
        hears(&sender, &ok);
    }
    ends(&sender);
    is_at_end(&receiving);
    drop(receiving);
    is_at_end(&sender);
}
