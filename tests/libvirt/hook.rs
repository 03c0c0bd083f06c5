//! deploy/'s hook for libvirt: a host's libvirt takes no domain that no agent has prepared.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::agents::{Agents, code};
use crate::bed::{Domain, Hosts, QEMU_USER, virsh};
use crate::moves::spec;
use crate::plain::listen;
use crate::scene::COPY;
use crate::support::process::{SHORT, run};
use crate::support::vm::write_script;
use crate::support::{Way, with_lab};

#[test]
#[ignore = "of the matrix that takes long: make libvirt"]
fn the_hook_refuses_what_comes_past_the_agents() -> Result<()> {
    with_lab("the_hook_refuses_what_comes_past_the_agents", |lab| {
        let hosts = Hosts::start(lab, QEMU_USER)?;
        let domain = Domain::boot(lab, &hosts, &spec())?;
        let agents = Agents::start_open(lab, &hosts)?;
        let bravo = &hosts.net.bravo;
        let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/libvirt-hook");
        let text = fs::read_to_string(&example)?;
        // The bed's agent has its program and its socket in places of its own.
        let program = format!("/run/vmferry-bin --socket {}", bravo.dir.join("run/vmferry.sock").display());
        ensure!(text.contains("vmferry=vmferry\n"), "the hook names its program in another way");
        let hook = bravo.dir.join("hook");
        write_script(&hook, &text.replace("vmferry=vmferry\n", &format!("vmferry='{program}'\n")))?;
        let words = ["-D", "-m", "0755", &hook.display().to_string(), "/etc/libvirt/hooks/qemu"];
        run(bravo.command("install").args(words), SHORT)?;
        // libvirt looks for hooks when it starts.
        listen(bravo)?;

        let uri = format!("qemu+tcp://{}/system", bravo.v4);
        let ram = format!("--migrateuri=tcp://{}", bravo.v4);
        let past = virsh(&hosts.net.alpha, &["migrate", "--live", "--copy-storage-all", &ram, "web1", &uri])?;
        ensure!(past.code != 0, "{past:?}");
        let log = fs::read_to_string(bravo.dir.join("libvirtd.log"))?;
        let said = log.lines().find(|line| line.contains("no agent has prepared"));
        ensure!(said.context("the hook has said nothing")?.contains("web1"), "{said:?}");
        domain.proves_stay(Way::ToBravo)?;
        code(&agents.migrate(&COPY)?, 0)?;
        domain.proves_move(Way::ToBravo)?;
        agents.are_clean()
    })
}
