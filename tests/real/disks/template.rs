//! A guest whose name the destination's configuration has no table for: its QEMU is started by what holds for a
//! pattern of names, with the disks that the agent has made or found.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::machine::{Arch, Place, blockdev, device, file_node, raw};
use super::tells;
use crate::support::process::{LONG, run};
use crate::support::vm::write_script;
use crate::support::{Agent, AgentSpec, Credentials, Lab, Version, VmEntry, with_lab};

const FIXED: &str = "-S -machine pc-q35-7.2 -accel tcg -cpu qemu64 -m 64 -nodefaults -no-user-config -display none \
                     -incoming defer";
const MONITORS: [&str; 2] = ["agent", "test"];
const DISK_ARGUMENTS: &str = r#"disk_arguments = [
  "-blockdev", "driver={format},node-name={disk},discard=unmap,file.driver=file,file.filename={path},file.discard=unmap",
  "-device", "virtio-blk-pci,id={disk},drive={disk},addr={address}",
]
"#;

/// QEMU itself, all of whose words are in the configuration.
fn by_words(target: &Place) -> String {
    let mut words = vec![target.paths.qemu(target.version, "qemu-system-x86_64").display().to_string()];
    words.extend(FIXED.split_whitespace().map(str::to_owned));
    for monitor in MONITORS {
        let path = format!("{}/{{vm}}/{monitor}.qmp", target.host.dir.display());
        words.extend(["-qmp".to_owned(), format!("unix:{path},server=on,wait=off")]);
    }
    format!("start = {{ command = {words:?} }}\n{DISK_ARGUMENTS}")
}

/// A script that has all from its environment.
fn by_environment(target: &Place) -> String {
    let program = target.paths.qemu(target.version, "qemu-system-x86_64");
    let script = target.host.dir.join("start-any");
    let text = format!(
        "#!/bin/sh -eu\n[ $VMFERRY_DISKS = 2 ]\n\
         set -- -qmp unix:$VMFERRY_QMP,server=on,wait=off -qmp unix:${{VMFERRY_QMP%agent.qmp}}test.qmp,server=on,wait=off\n\
         for n in 0 1; do\n  eval name=\\$VMFERRY_DISK${{n}}_NAME path=\\$VMFERRY_DISK${{n}}_PATH format=\\$VMFERRY_DISK${{n}}_FORMAT address=\\$VMFERRY_DISK${{n}}_ADDRESS\n\
         set -- \"$@\" -blockdev driver=$format,node-name=$name,discard=unmap,file.driver=file,file.filename=$path,file.discard=unmap \
         -device virtio-blk-pci,id=$name,drive=$name,addr=$address\ndone\nexec '{}' {FIXED} \"$@\"\n",
        program.display()
    );
    let _ = write_script(&script, &text);
    format!("start = {{ command = [\"{}\"] }}\n", script.display())
}

/// Agents of which bravo's knows no VM by its name.
fn agents(lab: &Lab, version: Version, start: fn(&Place) -> String) -> Result<(Agent, Agent, [Place; 2])> {
    let net = lab.two_hosts()?;
    let credentials = Credentials::create(&lab.paths, lab.dir())?;
    let place = |host: &crate::support::Host| -> Result<Place> {
        let dir = host.dir.join("web7");
        fs::create_dir(&dir)?;
        let shared = lab.dir().to_owned();
        Ok(Place { paths: lab.paths.clone(), host: host.clone(), version, arch: Arch::X86, dir, shared })
    };
    let (source, target) = (place(&net.alpha)?, place(&net.bravo)?);
    let mut on_alpha = AgentSpec::default().peer(&net.bravo);
    for name in ["web7", "db1"] {
        let qmp = source.file("agent.qmp");
        on_alpha = on_alpha.vm(VmEntry { name: name.into(), qmp, start: None, before_start: None });
    }
    let (dir, qemu_img) = (net.bravo.dir.display(), lab.paths.qemu_img());
    let mut on_bravo = AgentSpec::default().peer(&net.alpha);
    on_bravo.end_lines = format!(
        "[create]\npath = \"{dir}/{{vm}}/{{disk}}.{{format}}\"\nformat = \"source\"\nqemu_img = \"{}\"\n\
         [vm.\"web*\"]\nqmp = \"{dir}/{{vm}}/agent.qmp\"\n{}",
        qemu_img.get_program().display(),
        start(&target)
    );
    let alpha = Agent::start(&lab.paths, &net.alpha, &on_alpha, &credentials.issue("alpha")?)?;
    let bravo = Agent::start(&lab.paths, &net.bravo, &on_bravo, &credentials.issue("bravo")?)?;
    Ok((alpha, bravo, [source, target]))
}

fn names(folder: &std::path::Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    entries.collect()
}

fn vms_known(agent: &Agent) -> Result<Value> {
    Ok(agent.api("/v1/status")?["vms"].clone())
}

fn a_guest_comes_by_a_pattern(name: &str, version: Version, start: fn(&Place) -> String) -> Result<()> {
    with_lab(name, |lab| {
        let (alpha, bravo, [source, target]) = agents(lab, version, start)?;
        let ours = [source.image("raw", "", "0.raw")?, source.image("qcow2", "", "1.qcow2")?];
        let mut qcow2 = raw("n1", &ours[1]);
        (qcow2["driver"], qcow2["file"]) = ("qcow2".into(), file_node(&ours[1]));
        let words = [
            blockdev(&raw("n0", &ours[0])),
            blockdev(&qcow2),
            device("virtio-blk-pci,id=vda,drive=n0,addr=7"),
            device("virtio-blk-pci,id=vdb,drive=n1,addr=5.0"),
        ];
        source.io(&format!("driver=raw,file.filename={}", ours[0].display()), "write -P 7 64k 1M")?;
        source.io(&format!("driver=qcow2,file.filename={}", ours[1].display()), "write -P 9 1M 128k")?;
        let at_source = source.start(&words.concat(), false)?;

        let stranger = alpha.vmferry(&["check", "db1", "--to", "bravo", "--json"])?;
        let report: Value = serde_json::from_str(&stranger.stdout)?;
        let problems = report["problems"].as_array().cloned().unwrap_or_default();
        tells(&problems, "vm-unknown", "problem", &["bravo", "knows no VM db1"])?;

        let checked = alpha.vmferry(&["check", "web7", "--to", "bravo"])?;
        ensure!(checked.code == 0, "{checked:?}");
        ensure!(names(&target.dir)?.is_empty(), "check leaves {:?}", names(&target.dir)?);
        ensure!(vms_known(&bravo)? == serde_json::json!([]), "{}", vms_known(&bravo)?);

        let moved = alpha.vmferry(&["migrate", "web7", "--to", "bravo", "--json", "--verify"])?;
        let last: Value = serde_json::from_str(moved.stdout.lines().last().context("no line")?)?;
        ensure!(moved.code == 0 && last["outcome"]["result"] == "moved", "{last}");
        ensure!(vms_known(&bravo)? == serde_json::json!(["web7"]), "{}", vms_known(&bravo)?);
        let stays = bravo.vmferry(&["status", "web7", "--json"])?;
        ensure!(stays.stdout.contains("web7"), "{stays:?}");
        at_source.quit()?;
        target.quit_started()?;
        for (ours, theirs) in ours.iter().zip(["vda.raw", "vdb.qcow2"]) {
            let compare = ["compare", "-q"];
            run(lab.paths.qemu_img().args(compare).arg(ours).arg(target.file(theirs)), LONG)?;
        }
        Ok(())
    })
}

/// By words alone, with one QEMU on both hosts.
pub(crate) fn on(version: Version, name: &str) -> Result<()> {
    a_guest_comes_by_a_pattern(name, version, by_words)
}

#[test]
#[ignore = "make disks"]
fn a_guest_comes_by_a_pattern_with_qemu_10() -> Result<()> {
    a_guest_comes_by_a_pattern("a_guest_comes_by_a_pattern_with_qemu_10", Version::V10, by_words)
}

#[test]
#[ignore = "make disks"]
fn a_guest_comes_by_a_pattern_with_qemu_7_2() -> Result<()> {
    a_guest_comes_by_a_pattern("a_guest_comes_by_a_pattern_with_qemu_7_2", Version::V72, by_environment)
}
