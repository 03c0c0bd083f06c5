//! The benchmark's driver: interleaved rounds of all contenders on this machine, ratios to a
//! plain TLS copy, tables, and `bench/RESULTS.md`.
//!
//! A further contender is a program with the faces of `tls_copy.rs`:
//! `--contender 'mine=path/to/program --its-option'`.

mod contender;
mod latency;
mod load;
mod machine;
mod table;

use std::fmt::Write;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Parser;
use contender::{Contender, Cpu, Pair, Place};
use latency::{BULK_STREAMS, Latency};
use table::{Rounds, Sample};
use vmferry::net::tls::Aead;
use vmferry::pki::{CaRequest, HostRequest, create_ca, issue_host};

const MIB: u64 = 1024 * 1024;

/// Compares relays: unix socket → (TLS) → unix socket, one machine, loopback.
#[derive(Parser)]
struct Cli {
    /// Rounds of the throughput measurements; every contender runs once in each, in turning
    /// order. 0 leaves them out.
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Local connections at the same time; one table for each number.
    #[arg(long, value_delimiter = ',', default_value = "1,4,64")]
    streams: Vec<u32>,
    /// MiB per round and contender, over all connections together.
    #[arg(long, default_value_t = 512)]
    mib: u64,
    /// Rounds of the latency measurement; 0 leaves it out.
    #[arg(long, default_value_t = 15)]
    latency_rounds: usize,
    /// Requests that are timed in each of its rounds, idle and again under load.
    #[arg(long, default_value_t = 1000)]
    requests: usize,
    /// A further contender: NAME=PROGRAM ARG…; may be repeated.
    #[arg(long, value_name = "NAME=PROGRAM")]
    contender: Vec<String>,
    /// Of the built-in contenders only those whose name contains this word, and the reference.
    #[arg(long)]
    only: Option<String>,
    /// Where the result goes; `-` for nowhere.
    #[arg(long, default_value = "bench/RESULTS.md")]
    out: PathBuf,
}

/// Name of the contender that has ratio 1.
const REFERENCE: &str = "TLS copy, one connection";

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let place = tempfile::Builder::new().prefix("vmferry-bench").tempdir()?;
    let place = Place { dir: place.path().to_owned() };
    mint(&place.dir)?;
    let mut report = Report::begin();
    for streams in cli.streams.iter().filter(|_| cli.rounds > 0) {
        let rounds = throughput(&cli, &place, *streams)?;
        report.throughput(&cli, *streams, &rounds);
    }
    if cli.latency_rounds > 0 {
        let rounds = latencies(&cli, &place)?;
        report.latency(&cli, &rounds);
    }
    let text = report.end();
    println!("{text}");
    if cli.out != Path::new("-") {
        std::fs::write(&cli.out, text).context("can't write the results")?;
    }
    Ok(())
}

fn throughput(cli: &Cli, place: &Place, streams: u32) -> anyhow::Result<Rounds<Sample>> {
    let mut contenders = vec![copy(REFERENCE, &[])?.with_one_connection()];
    if streams == 1 {
        contenders.extend([
            // The reference against itself: what it differs from 1 is noise.
            copy("TLS copy, again", &[])?,
            copy("TLS copy, 256 KiB buffers", &["--buffer", "262144"])?,
            other_aead()?,
        ]);
    } else {
        contenders.push(copy("TLS copy, a connection each", &[])?);
    }
    contenders.push(copy("clear TCP copy", &[])?.with(&["--clear"]));
    contenders.push(Contender::new("vmferry, one connection", &beside("bench-vmferry")?, &[]));
    chosen(cli, &mut contenders)?;
    interleaved(&contenders, cli.rounds, &format!("{streams} streams"), |contender| {
        transfer(contender, place, if contender.one_connection { 1 } else { streams }, cli.mib)
    })
}

fn latencies(cli: &Cli, place: &Place) -> anyhow::Result<Rounds<Latency>> {
    let vmferry = beside("bench-vmferry")?;
    let mut contenders = vec![
        copy("TLS copy, a connection of its own", &[])?,
        copy("the same, again", &[])?,
        copy("clear TCP copy, a connection of its own", &[])?.with(&["--clear"]),
        Contender::new("vmferry, ordinary stream", &vmferry, &[]),
        Contender::new("vmferry, urgent stream", &vmferry, &[]).with_near(&["--urgent-first"]),
    ];
    chosen(cli, &mut contenders)?;
    interleaved(&contenders, cli.latency_rounds, "latency", |contender| {
        let requests = cli.requests;
        let run = |local: &Path, sink: &UnixListener| latency::run(local, sink, requests);
        relayed(contender, place, run).map(|(latency, ..)| latency)
    })
}

/// The bare copy that everything is compared to, with further arguments.
fn copy(name: &str, args: &[&str]) -> anyhow::Result<Contender> {
    Ok(Contender::new(name, &beside("bench-tls-copy")?, args))
}

fn other_aead() -> anyhow::Result<Contender> {
    let other = match Aead::Auto.resolve() {
        Aead::Ring => "aws-lc",
        _ => "ring",
    };
    copy(&format!("TLS copy, {other}"), &["--aead", other])
}

fn beside(program: &str) -> anyhow::Result<PathBuf> {
    Ok(std::env::current_exe()?.with_file_name(program))
}

/// The first is the reference and stays; those of the command line stay, too.
fn chosen(cli: &Cli, contenders: &mut Vec<Contender>) -> anyhow::Result<()> {
    if let Some(word) = &cli.only {
        let mut first = true;
        contenders.retain(|c| std::mem::take(&mut first) || c.name.contains(word));
    }
    for text in &cli.contender {
        contenders.push(Contender::parse(text)?);
    }
    Ok(())
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

fn interleaved<T: Clone>(
    contenders: &[Contender],
    count: usize,
    what: &str,
    measure: impl Fn(&Contender) -> anyhow::Result<T>,
) -> anyhow::Result<Rounds<T>> {
    let mut rounds = Vec::new();
    for round in 0..count {
        let mut samples = vec![None; contenders.len()];
        for turn in 0..contenders.len() {
            let index = (turn + round) % contenders.len();
            let name = &contenders[index].name;
            eprintln!("{what}: round {} of {count}: {name}", round + 1);
            let sample = measure(&contenders[index]).with_context(|| format!("round {round}, {name}"))?;
            samples[index] = Some(sample);
        }
        rounds.push(samples.into_iter().collect::<Option<_>>().context("a contender was left out")?);
    }
    let names = contenders.iter().map(|c| c.name.clone()).collect();
    Ok(Rounds { names, rounds, reference: 0 })
}

fn transfer(contender: &Contender, place: &Place, streams: u32, mib: u64) -> anyhow::Result<Sample> {
    let chunk = load::CHUNK as u64;
    let each = (mib * MIB / u64::from(streams)).next_multiple_of(chunk);
    let run = |local: &Path, sink: &UnixListener| load::run(local, sink, streams, each);
    let (seconds, near, far) = relayed(contender, place, run)?;
    #[allow(clippy::cast_precision_loss)]
    let gib = (each * u64::from(streams)) as f64 / (1u64 << 30) as f64;
    Ok(Sample { gib, seconds, near, far })
}

/// Runs something through a fresh pair of relays; also what the pair has used.
fn relayed<T>(
    contender: &Contender,
    place: &Place,
    run: impl FnOnce(&Path, &UnixListener) -> anyhow::Result<T>,
) -> anyhow::Result<(T, Cpu, Cpu)> {
    let remote = place.remote();
    let sink = UnixListener::bind(&remote)?;
    sink.set_nonblocking(true)?;
    let pair = Pair::start(contender, place)?;
    let outcome = run(&place.local(), &sink);
    let cpu = pair.end();
    std::fs::remove_file(&remote)?;
    let (near, far) = cpu?;
    Ok((outcome?, near, far))
}

/// The text of RESULTS.md as it grows. Writing to a String can't fail.
struct Report {
    text: String,
}

impl Report {
    fn begin() -> Self {
        let machine = machine::describe(&Aead::Auto.resolve().to_string());
        eprintln!("{machine}");
        let text = format!(
            "# Results\n\n\
             Written by `bench/run.sh` (`make bench`). Repeat it before you believe it: figures of \
             another machine say little about yours, and two cores that others use too say less \
             about time than about processor seconds.\n\n{machine}\n\n\
             Generators → unix sockets → relay `near` → loopback TCP → relay `far` → unix sockets \
             → sinks, all on this machine. Contenders take turns within a round. Ratios are taken \
             within a round, to the contender in **bold**; shown is the median over the rounds and \
             [least–greatest]. *again* is the reference itself: its distance from 1 is the noise.\n"
        );
        Self { text }
    }

    fn throughput(&mut self, cli: &Cli, streams: u32, rounds: &Rounds<Sample>) {
        let _ = write!(
            self.text,
            "\n## Throughput and processor time, {streams} stream{}\n\n\
             {} MiB per round, {} rounds: `bench/run.sh --streams {streams} --rounds {} --mib {} \
             --latency-rounds 0`. *CPU ratio*: processor seconds per byte of both relays, user and \
             system (below 1 is better). *Speed ratio*: bytes per second (above 1 is better); \
             generators, sinks and both relays share the cores. Load average afterwards: {}.\n\n{}",
            if streams == 1 { "" } else { "s" },
            cli.mib,
            cli.rounds,
            cli.rounds,
            cli.mib,
            machine::load(),
            table::throughput(rounds),
        );
    }

    fn latency(&mut self, cli: &Cli, rounds: &Rounds<Latency>) {
        let _ = write!(
            self.text,
            "\n## Latency of a 1 KiB request and its 1 KiB reply\n\n\
             Alone, and while {BULK_STREAMS} bulk streams send as fast as they can; {} requests each, \
             {} rounds: `bench/run.sh --rounds 0 --latency-rounds {} --requests {}`. vmferry carries \
             all five in one connection, the copies each in its own (ratios below 1 are better). \
             On loopback the processor is the queue, not the wire. Load average afterwards: {}.\n\n{}",
            cli.requests,
            cli.latency_rounds,
            cli.latency_rounds,
            cli.requests,
            machine::load(),
            table::latency(rounds),
        );
    }

    fn end(self) -> String {
        self.text
    }
}
