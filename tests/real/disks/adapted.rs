//! A QEMU at the destination that was made of the source's own command line: it takes the guest.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::moves::{VM, migrate};
use crate::support::vm::write_script;
use crate::support::{DiskFormat, Pair, Version, VmSpec, Way, proof, with_lab};

pub(crate) fn takes_the_guest(name: &str, version: Version) -> Result<()> {
    with_lab(name, |lab| {
        // An alias, which is another machine with every QEMU.
        let spec = VmSpec {
            disks: vec![DiskFormat::Raw, DiskFormat::Qcow2],
            machine: "pc".into(),
            rate: 100,
            blocks: 512,
            extra: ["-device", "virtio-rng-pci,id=rng0"].map(str::to_owned).to_vec(),
            ..VmSpec::new(VM, version)
        };
        let (pair, guest) = Pair::with_guest(lab, &spec, &spec)?;
        let (here, there) = (guest.alpha.dir().display(), guest.bravo.dir().display());
        let program = lab.paths.qemu(version, "qemu-system-x86_64").display().to_string();
        let moved = format!("{here}={there}");
        let words = ["qemu-command", VM, "--program", &program, "--path", &moved];

        // What was plugged in since the start is said.
        guest
            .alpha
            .qmp()?
            .execute("device_add", json!({"driver": "virtio-balloon-pci", "id": "late0", "addr": "0x9"}))?;
        let said = pair.alpha.vmferry(&[&words[..], &["--json"]].concat())?;
        let told: Value = serde_json::from_str(&said.stdout)?;
        ensure!(told["undecided"].to_string().contains("late0 (virtio-balloon-pci)"), "{told}");
        ensure!(told["undecided"].as_array().is_some_and(|all| all.len() == 1), "{told}");
        let pinned = told["changed"].to_string();
        ensure!(pinned.contains("machine pc is pc-i440fx-"), "{told}");

        let script = pair.alpha.vmferry(&words)?;
        ensure!(script.code == 0, "{script:?}");
        let script =
            script.stdout.trim_end().to_owned() + " \\\n  -device virtio-balloon-pci,id=late0,addr=0x9";
        let script =
            script.replace("exec ", &format!("cd {there}\necho waits >>starts\necho $$ >qemu.pid\nexec "));
        write_script(&guest.bravo.start_script(), &(script + " >>qemu.log 2>&1\n"))?;
        migrate(&pair, VM, Way::ToBravo, &["--verify"])?;
        pair.proves_move(&guest, Way::ToBravo)?;
        ensure!(guest.bravo.starts() == 1, "it was started otherwise");
        if version != Version::V72 {
            proof::guest_continued(&guest.alpha, &guest.bravo)?;
            guest.bravo.quit()?;
            proof::disks_whole(&guest.bravo)?;
        }
        Ok(())
    })
}

#[test]
#[ignore = "make disks"]
fn a_qemu_of_the_sources_own_words_takes_the_guest_with_qemu_10() -> Result<()> {
    takes_the_guest("a_qemu_of_the_sources_own_words_takes_the_guest_with_qemu_10", Version::V10)
}

#[test]
#[ignore = "make disks"]
fn a_qemu_of_the_sources_own_words_takes_the_guest_with_qemu_7_2() -> Result<()> {
    takes_the_guest("a_qemu_of_the_sources_own_words_takes_the_guest_with_qemu_7_2", Version::V72)
}
