//! `bench/run.sh --libvirt`: a domain of a real libvirt moved between two hosts, by libvirt's own ways, by
//! relays that people use, and by vmferry, in interleaved rounds. Writes `bench/LIBVIRT.md`.

#[path = "../../tests/libvirt/agents.rs"]
mod agents;
#[path = "../../tests/libvirt/bed.rs"]
mod bed;
mod cpu;
#[path = "../machine.rs"]
mod machine;
mod relay;
#[path = "../rounds.rs"]
#[allow(dead_code)]
mod rounds;
mod stage;
#[path = "../../tests/support/mod.rs"]
mod support;
mod way;

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Parser;
use rounds::Rounds;
use stage::{Sample, Stage};
use support::Lab;
use vmferry::net::tls::Aead;
use way::Way;

/// Compares migrations by libvirt: its own TLS, its tunnel, relays, vmferry.
#[derive(Parser)]
struct Cli {
    /// Rounds; every contender runs once in each, in turning order.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// MiB of RAM that are not empty.
    #[arg(long, default_value_t = 256)]
    ram_mib: u32,
    /// MiB of the disk.
    #[arg(long, default_value_t = 256)]
    disk_mib: u32,
    /// Where the relays are, from tests/setup/relays.sh.
    #[arg(long)]
    relays: PathBuf,
    /// Where the result goes.
    #[arg(long, default_value = "bench/LIBVIRT.md")]
    out: PathBuf,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let machine = machine::describe(&Aead::Auto.resolve().to_string(), "the machine's own");
    let usage = cpu::Group::enter()?;
    let mut text = head(&machine);
    for (title, disk_mib) in [("RAM only", 0), ("RAM and a disk", cli.disk_mib)] {
        let mut lab = Lab::open("bench-libvirt")?;
        let mut stage = Stage::set_up(&lab, &usage, &cli.relays, cli.ram_mib, disk_mib)?;
        // What tunnels RAM in libvirt's own connection copies no disk.
        let ways: Vec<Way> =
            Way::ALL.into_iter().filter(|way| disk_mib == 0 || *way != Way::Tunnelled).collect();
        let names = ways.iter().map(|way| way.name().to_owned()).collect();
        let rounds = Rounds::take(names, cli.rounds, |index| stage.move_by(ways[index]))?;
        lab.pass();
        section(&mut text, title, &cli, disk_mib, &rounds);
    }
    println!("{text}");
    std::fs::write(&cli.out, &text)?;
    let ours = text.lines().filter(|line| line.starts_with("| vmferry |"));
    ensure!(ours.count() == 2, "vmferry did not run in both tables");
    Ok(())
}

fn head(machine: &str) -> String {
    format!(
        "# A domain of libvirt's, moved in different ways\n\n\
         Written by `bench/run.sh --libvirt` (`make bench-libvirt`).\n\n{machine}\n\n\
         Two hosts are namespaces of this machine with file systems of their own, libvirt 11.3 and QEMU 10.0 on \
         both; everything shares the same cores. `virsh migrate --live --p2p` in all cases; the relays carry the same \
         unix sockets as vmferry (RPC, RAM, disks), and each connection takes a TCP connection of its own but with \
         ssh. All that is encrypted is so mutually authenticated. *CPU* is the processor time of all processes of \
         both hosts, QEMU's guest included, by the kernel's control group; *time* is that of the whole command. \
         Ratios are taken within a round, below 1 is better; shown is the median and [least–greatest].\n"
    )
}

fn section(text: &mut String, title: &str, cli: &Cli, disk_mib: u32, rounds: &Rounds<Sample>) {
    let mut table =
        "| way | CPU to libvirt's TLS | time to libvirt's TLS | CPU s | time s | TCP connections |\n\
                     | --- | --- | --- | --- | --- | --- |\n"
            .to_owned();
    rounds.rows(&mut table, |index| {
        format!(
            "{} | {} | {} | {} | {}",
            rounds.ratio(index, |s| s.cpu_s),
            rounds.ratio(index, |s| s.wall_s),
            rounds.spread(index, |s| s.cpu_s).shown(2),
            rounds.spread(index, |s| s.wall_s).shown(1),
            rounds.spread(index, |s| s.connections).shown(0),
        )
    });
    let disk = match disk_mib {
        0 => "The domain has no disk.".to_owned(),
        mib => format!("The disk has {mib} MiB, three quarters of them random."),
    };
    // Writing to a String can't fail.
    let _ = write!(
        text,
        "\n## {title}\n\n{} MiB of the RAM are not empty. {disk}\n\n\
         Again: `bench/run.sh --libvirt --rounds {} --ram-mib {} --disk-mib {}`. Load average afterwards: {}.\n\n{table}",
        cli.ram_mib,
        cli.rounds,
        cli.ram_mib,
        cli.disk_mib,
        machine::load(),
    );
}
