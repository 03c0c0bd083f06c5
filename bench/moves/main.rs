//! `bench/run.sh --moves`: real QEMUs in two network namespaces on this machine, moved by vmferry,
//! by QEMU's own TLS and in clear, in interleaved rounds. Writes its half of `bench/RESULTS.md`.

mod budget;
mod by_hand;
mod copies;
mod cpu;
mod downtime;
mod guest;
#[path = "../machine.rs"]
mod machine;
mod memory;
#[path = "../../tests/faults/migration.rs"]
#[allow(dead_code, unreachable_pub)]
mod migration;
mod monitor;
mod report;
#[path = "../results.rs"]
mod results;
#[path = "../rounds.rs"]
#[allow(dead_code)]
mod rounds;
mod stage;
#[path = "../../tests/support/mod.rs"]
mod support;
mod verify;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};
use report::Report;
use results::Half;
use stage::{Sizes, Stage};
use support::Lab;
use vmferry::net::tls::Aead;

/// Compares migrations of real QEMUs: vmferry, QEMU's own TLS, clear TCP.
#[derive(Parser)]
struct Cli {
    /// What is measured; all unless chosen.
    #[arg(long, value_enum, value_delimiter = ',')]
    tables: Vec<Table>,
    /// Rounds; every contender runs once in each, in turning order.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Rounds of the table `downtime`.
    #[arg(long, default_value_t = 10)]
    moves: usize,
    /// The longest pause that QEMU plans in that table, in ms; the shorter, the less RAM is left for
    /// the pause, and the less that differs between two moves.
    #[arg(long, default_value_t = 20)]
    downtime_limit: u64,
    /// MiB of the disk that is copied.
    #[arg(long, default_value_t = 4096)]
    disk_mib: u64,
    /// MiB of the RAM that is copied.
    #[arg(long, default_value_t = 2048)]
    ram_mib: u64,
    /// Where the result goes; by default `bench/RESULTS.md` if all tables are measured.
    #[arg(long)]
    out: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Table {
    /// The mirror of a disk.
    Disk,
    /// The copy of the RAM.
    Ram,
    /// A whole migration with its disks compared.
    Verify,
    /// How long a guest stands still.
    Downtime,
    /// A limit, and what two migrations have of one.
    Budget,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let all = [Table::Disk, Table::Ram, Table::Verify, Table::Downtime, Table::Budget];
    let tables = if cli.tables.is_empty() { all.to_vec() } else { cli.tables.clone() };
    let machine = machine::describe(&Aead::Auto.resolve().to_string(), "cubic on both hosts");
    eprintln!("{machine}");
    let mut lab = Lab::open("bench-moves")?;
    let mut report = Report::begin(&machine);
    let failed = measure(&lab, &cli, &tables, &mut report)?;
    if failed == 0 {
        lab.pass();
    }
    let text = report.end();
    println!("{text}");
    let is_whole = all.iter().all(|table| tables.contains(table));
    if let Some(out) = cli.out.or_else(|| is_whole.then(|| "bench/RESULTS.md".into())) {
        results::write(&out, Half::Moves, &text)?;
    }
    ensure!(failed == 0, "not everything could be measured");
    Ok(())
}

/// How many tables could not be measured; one less is no reason to lose the others.
fn measure(lab: &Lab, cli: &Cli, tables: &[Table], report: &mut Report) -> Result<usize> {
    let sizes = Sizes { disk_mib: cli.disk_mib, ram_mib: cli.ram_mib };
    let stage = Stage::set_up(lab, sizes)?;
    let mut failed = 0;
    for table in tables {
        let done = match table {
            Table::Disk => copies::disk(&stage, cli.rounds, cli.disk_mib),
            Table::Ram => copies::ram(&stage, cli.rounds, cli.ram_mib),
            Table::Verify => verify::table(&stage, cli.rounds, cli.disk_mib),
            Table::Downtime => downtime::table(&stage, cli.moves, cli.downtime_limit),
            Table::Budget => budget::table(&stage, cli.rounds),
        };
        match done {
            Ok(section) => report.section(&section),
            Err(e) => {
                eprintln!("{table:?} failed: {e:#}");
                report.failed(&format!("{table:?}"), &format!("{e:#}"));
                failed += 1;
            }
        }
    }
    Ok(failed)
}
