//! The benchmark's driver: interleaved rounds of all contenders on this machine, ratios to a
//! plain copy, tables, and `bench/RESULTS.md`.
//!
//! A further contender is a program with the faces of `tls_copy.rs`:
//! `--contender 'mine=path/to/program --its-option'`; it is measured in every table.

mod contender;
mod delay_line;
mod field;
mod latency;
mod load;
mod machine;
mod measure;
mod records;
mod report;
mod resets;
mod results;
mod road;
mod rounds;
mod table;
mod usage;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::{Parser, ValueEnum};
use contender::Place;
use field::Field;
use latency::Asked;
use measure::{Ground, RESET_EVERY};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use report::Report;
use results::Half;
use road::Road;
use vmferry::net::tls::Aead;
use vmferry::pki::{CaRequest, HostRequest, create_ca, issue_host};

const RECORDS: &str = "More records than one key may seal";
/// Bulk bytes before requests count, on loopback; on a link what it carries in a second.
const WARM_UP_BYTES: u64 = 64 << 20;

/// Compares relays: unix socket → (TLS) → unix socket, one machine.
#[derive(Parser)]
struct Cli {
    /// What is measured; all but `records` unless chosen.
    #[arg(long, value_enum, value_delimiter = ',')]
    tables: Vec<Table>,
    /// Rounds; every contender runs once in each, in turning order.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// MiB per round and contender, over all connections together.
    #[arg(long, default_value_t = 512)]
    mib: u64,
    /// Numbers of streams in the table of that name.
    #[arg(long, value_delimiter = ',', default_value = "1,4,64,1000")]
    streams: Vec<u32>,
    /// Requests that are timed in each round, idle and again under load.
    #[arg(long, default_value_t = 1000)]
    requests: usize,
    /// Slow links, in Mbit/s.
    #[arg(long, value_delimiter = ',', default_value = "1000,200")]
    links: Vec<u32>,
    /// Round trips of the delay line, in ms.
    #[arg(long, value_delimiter = ',', default_value = "20,50,100")]
    round_trips: Vec<u64>,
    /// Seconds that are measured on the delay line.
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// Seconds in which connections are reset.
    #[arg(long, default_value_t = 15)]
    reset_seconds: u64,
    /// Also measures the table `records`.
    #[arg(long)]
    records: bool,
    /// GiB of the table `records`.
    #[arg(long, default_value_t = 260)]
    gib: u64,
    /// A further contender: NAME=PROGRAM ARG…; may be repeated.
    #[arg(long, value_name = "NAME=PROGRAM")]
    contender: Vec<String>,
    /// Of the built-in contenders only those whose name contains this word, and the reference.
    #[arg(long)]
    only: Option<String>,
    /// Folder with the programs of others (`tests/setup/relays.sh`).
    #[arg(long, default_value = ".lab/relays/bin")]
    relays: PathBuf,
    /// Where the result goes; by default `bench/RESULTS.md` if all tables are measured.
    #[arg(long)]
    out: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Table {
    /// One stream through vmferry and through everybody else.
    Relays,
    /// vmferry with one stream and with many.
    Streams,
    /// A small request beside bulk streams.
    Latency,
    /// The same over slow links.
    Links,
    /// One stream over long round trips.
    Delays,
    /// One stream whose connection is reset.
    Resets,
    /// More than 2^24 records on one connection: some minutes.
    Records,
}

impl Table {
    const SHORT: [Self; 6] =
        [Self::Relays, Self::Streams, Self::Latency, Self::Links, Self::Delays, Self::Resets];
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let congestion = match road::leave_the_machine() {
        Ok(()) => "cubic on every socket".to_owned(),
        Err(e) => format!("cubic on the sockets of vmferry and the copies, others as the system's ({e:#})"),
    };
    usage::adopt_orphans()?;
    allow_descriptors()?;
    let place = tempfile::Builder::new().prefix("vmferry-bench").tempdir()?;
    let place = Place { dir: place.path().to_owned() };
    mint(&place.dir)?;

    let machine = machine::describe(&Aead::Auto.resolve().to_string(), &congestion);
    eprintln!("{machine}");
    let mut report = Report::begin(&machine);
    let tables = cli.tables();
    let mut failed = false;
    for table in &tables {
        // One table less is no reason to lose the others.
        if let Err(e) = cli.measure(*table, &place, &mut report) {
            eprintln!("{table:?} failed: {e:#}");
            report.failed(&format!("{table:?}"), &format!("{e:#}"));
            failed = true;
        }
    }
    if !tables.contains(&Table::Records) {
        report.failed(RECORDS, "not part of this run: `bench/run.sh --tables records`, some minutes");
    }
    let text = report.end();
    println!("{text}");
    let is_whole = Table::SHORT.iter().all(|table| tables.contains(table));
    if let Some(out) = cli.out.or_else(|| is_whole.then(|| "bench/RESULTS.md".into())) {
        results::write(&out, Half::Relays, &text)?;
    }
    ensure!(!failed, "not everything could be measured");
    Ok(())
}

impl Cli {
    fn tables(&self) -> Vec<Table> {
        let mut tables = if self.tables.is_empty() { Table::SHORT.to_vec() } else { self.tables.clone() };
        if self.records && !tables.contains(&Table::Records) {
            tables.push(Table::Records);
        }
        tables
    }

    fn measure(&self, table: Table, place: &Place, report: &mut Report) -> anyhow::Result<()> {
        let relays = std::path::absolute(&self.relays)?;
        let field = Field {
            relays: relays.to_str().context("the path is not UTF-8")?,
            only: self.only.as_deref(),
            more: &self.contender,
        };
        let road = Road::loopback();
        let ground = Ground { place, road: &road, rounds: self.rounds };
        let rounds = format!("--rounds {}", self.rounds);
        match table {
            Table::Relays => {
                let found = ground.transfers(&field.relays()?, self.mib)?;
                let command = format!("--tables relays {rounds} --mib {}", self.mib);
                let table = table::throughput(&found);
                report.section("One stream", &report::relays(self.mib), &command, &table);
            }
            Table::Streams => {
                let found = ground.transfers(&field.streams(&self.streams)?, self.mib)?;
                let numbers = self.streams.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
                let command = format!("--tables streams {rounds} --mib {} --streams {numbers}", self.mib);
                let table = table::throughput(&found);
                report.section("Many streams", &report::streams(self.mib), &command, &table);
            }
            Table::Latency => {
                let asked = Asked { requests: self.requests, warm_up_bytes: WARM_UP_BYTES };
                let found = ground.latencies(&field.latency()?, asked)?;
                let command = format!("--tables latency {rounds} --requests {}", self.requests);
                let table = table::latency(&found);
                report.section("A small request", &report::latency(self.requests), &command, &table);
            }
            Table::Links => self.links(&field, place, report)?,
            Table::Delays => self.delays(&field, place, report)?,
            Table::Resets => {
                let span = Duration::from_secs(self.reset_seconds);
                let found = ground.steady(&field.resets()?, span)?;
                let command = format!("--tables resets {rounds} --reset-seconds {}", self.reset_seconds);
                let what = report::resets(RESET_EVERY.as_secs(), self.reset_seconds);
                report.section("Connections that are reset", &what, &command, &table::throughput(&found));
            }
            Table::Records => {
                let found = records::run(&ground, self.gib)?;
                let command = format!("--tables records --gib {}", self.gib);
                report.section(RECORDS, &found, &command, "");
            }
        }
        Ok(())
    }

    fn links(&self, field: &Field<'_>, place: &Place, report: &mut Report) -> anyhow::Result<()> {
        for mbit in &self.links {
            let queue = queue_bytes(*mbit);
            let road = Road::limited(*mbit, queue)?;
            let ground = Ground { place, road: &road, rounds: self.rounds };
            let asked = Asked { requests: self.requests, warm_up_bytes: u64::from(*mbit) * 125_000 };
            let found = ground.latencies(&field.latency()?, asked)?;
            let command = format!(
                "--tables links --links {mbit} --rounds {} --requests {}",
                self.rounds, self.requests
            );
            let title = format!("A small request on a link of {mbit} Mbit/s");
            let what = report::link(self.requests, *mbit, queue);
            report.section(&title, &what, &command, &table::latency(&found));
        }
        Ok(())
    }

    fn delays(&self, field: &Field<'_>, place: &Place, report: &mut Report) -> anyhow::Result<()> {
        for milliseconds in &self.round_trips {
            let ethtool = self.relays.join("ethtool");
            let ethtool = if ethtool.exists() { ethtool } else { "ethtool".into() };
            let ethtool = ethtool.to_str().context("the path is not UTF-8")?;
            let road = Road::delayed(Duration::from_millis(*milliseconds), ethtool)?;
            let ground = Ground { place, road: &road, rounds: self.rounds };
            let found = ground.steady(&field.delays()?, Duration::from_secs(self.seconds))?;
            let command = format!(
                "--tables delays --round-trips {milliseconds} --rounds {} --seconds {}",
                self.rounds, self.seconds
            );
            let title = format!("A round trip of {milliseconds} ms");
            let what = report::delay(*milliseconds, self.seconds);
            report.section(&title, &what, &command, &table::throughput(&found));
        }
        Ok(())
    }
}

/// About 4 ms of a fast link, 12 ms of a slow one: what a switch has.
fn queue_bytes(mbit: u32) -> u32 {
    if mbit >= 1000 { 512 * 1024 * (mbit / 1000) } else { 1500 * mbit }
}

/// A thousand streams are some thousand descriptors, here and in the relays that inherit this.
fn allow_descriptors() -> anyhow::Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, most, most)?)
}

/// A CA and a host for each end, as an operator would make them.
fn mint(dir: &Path) -> anyhow::Result<()> {
    let ca = dir.join("ca");
    let request = CaRequest { name: None, days: 1, domains: Vec::new() };
    create_ca(&ca, &request)?;
    for end in ["near", "far"] {
        let request = HostRequest { name: end.parse()?, names: Vec::new(), days: 1, force: false };
        let made = issue_host(&ca, &request)?;
        std::fs::rename(made.dir, dir.join(end))?;
    }
    Ok(())
}
