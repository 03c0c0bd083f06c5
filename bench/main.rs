//! The benchmark's driver: interleaved rounds of all contenders on this machine, ratios to a
//! plain TLS copy, a table, and `bench/RESULTS.md`.
//!
//! A further contender is a program with the faces of `tls_copy.rs`:
//! `--contender 'vmferry=target/release/vmferry bench-relay'`.

mod contender;
mod load;
mod machine;
mod table;

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Parser;
use contender::{Contender, Pair, Place};
use table::Sample;
use vmferry::net::tls::Aead;
use vmferry::pki::{CaRequest, HostRequest, create_ca, issue_host};

const MIB: u64 = 1024 * 1024;

/// Compares relays: unix socket → (TLS) → unix socket, one machine, loopback.
#[derive(Parser)]
struct Cli {
    /// Rounds; every contender runs once in each, in turning order.
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// MiB per stream and round.
    #[arg(long, default_value_t = 512)]
    mib: u64,
    /// Local connections at the same time.
    #[arg(long, default_value_t = 1)]
    streams: u32,
    /// A further contender: NAME=PROGRAM ARG…; may be repeated.
    #[arg(long, value_name = "NAME=PROGRAM")]
    contender: Vec<String>,
    /// Only contenders whose name contains this word, and the reference.
    #[arg(long)]
    only: Option<String>,
    /// Where the result goes; `-` for nowhere.
    #[arg(long, default_value = "bench/RESULTS.md")]
    out: PathBuf,
}

/// Name of the contender that has ratio 1.
const REFERENCE: &str = "TLS copy, 64 KiB";

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let contenders = contenders(&cli)?;
    let names: Vec<String> = contenders.iter().map(|c| c.name.clone()).collect();
    let reference = names.iter().position(|n| n == REFERENCE);
    let reference = reference.context("the reference is missing")?;
    let place = tempfile::Builder::new().prefix("vmferry-bench").tempdir()?;
    let place = Place { dir: place.path().to_owned() };
    mint(&place.dir)?;
    let machine = machine::describe(&Aead::Auto.resolve().to_string());
    eprintln!("{machine}");

    let mut rounds = Vec::new();
    for round in 0..cli.rounds {
        rounds.push(one_round(round, &contenders, &place, &cli)?);
    }
    let table = table::render(&names, &rounds, reference);
    println!("{table}");
    if cli.out != Path::new("-") {
        let text = results(&cli, &machine, &table);
        std::fs::write(&cli.out, text).context("can't write the results")?;
    }
    Ok(())
}

fn contenders(cli: &Cli) -> anyhow::Result<Vec<Contender>> {
    let other = match Aead::Auto.resolve() {
        Aead::Ring => "aws-lc",
        _ => "ring",
    };
    let own = std::env::current_exe()?;
    let relay = own.with_file_name("bench-tls-copy");
    let mut all = vec![
        Contender::new(REFERENCE, &relay, &["--buffer", "65536"]),
        Contender::new("TLS copy, 256 KiB", &relay, &["--buffer", "262144"]),
        // The reference against itself: what it differs from 1 is noise.
        Contender::new("TLS copy, 64 KiB, again", &relay, &["--buffer", "65536"]),
        Contender::new(&format!("TLS copy, 64 KiB, {other}"), &relay, &["--aead", other]),
        Contender::new("clear copy, 64 KiB", &relay, &["--clear"]),
        Contender::new("clear copy, 256 KiB", &relay, &["--clear", "--buffer", "262144"]),
    ];
    for text in &cli.contender {
        all.push(Contender::parse(text)?);
    }
    if let Some(word) = &cli.only {
        all.retain(|c| c.name == REFERENCE || c.name.contains(word));
    }
    Ok(all)
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

fn one_round(
    round: usize,
    contenders: &[Contender],
    place: &Place,
    cli: &Cli,
) -> anyhow::Result<Vec<Sample>> {
    let mut samples = vec![None; contenders.len()];
    for turn in 0..contenders.len() {
        let index = (turn + round) % contenders.len();
        let contender = &contenders[index];
        let sample =
            measure(contender, place, cli).with_context(|| format!("round {round}, {}", contender.name))?;
        eprintln!("round {} of {}: {:<28} {:.1} s", round + 1, cli.rounds, contender.name, sample.seconds);
        samples[index] = Some(sample);
    }
    samples.into_iter().collect::<Option<_>>().context("a contender was left out")
}

fn measure(contender: &Contender, place: &Place, cli: &Cli) -> anyhow::Result<Sample> {
    let remote = place.remote();
    let sink = UnixListener::bind(&remote)?;
    sink.set_nonblocking(true)?;
    let pair = Pair::start(contender, place)?;
    let outcome = load::run(&place.local(), &sink, cli.streams, cli.mib * MIB);
    let cpu = pair.end();
    std::fs::remove_file(&remote)?;
    let (near, far) = cpu?;
    #[allow(clippy::cast_precision_loss)]
    let gib = (cli.mib * u64::from(cli.streams)) as f64 / 1024.0;
    Ok(Sample { gib, seconds: outcome?, near, far })
}

fn results(cli: &Cli, machine: &str, table: &str) -> String {
    format!(
        "# Results\n\n\
         Written by `bench/run.sh`. Repeat it before you believe it: figures of another machine \
         say little about yours.\n\n\
         Generator → unix socket → relay `near` → loopback TCP → relay `far` → unix socket → \
         sink, all on this machine. {} rounds, {} stream(s) of {} MiB each; contenders take \
         turns within a round. *CPU ratio*: processor seconds per byte of both relays, against \
         **{REFERENCE}** in the same round (below 1 is better), median [least–greatest]. \
         *Speed ratio*: bytes per second likewise (above 1 is better); generator, sink and both \
         relays share the cores, so it says less. *again* is the reference itself: its distance from 1 \
         is the noise of this run.\n\n\
         {machine}\n- load average after the last round: {}\n\n{table}",
        cli.rounds,
        cli.streams,
        cli.mib,
        machine::load(),
    )
}
