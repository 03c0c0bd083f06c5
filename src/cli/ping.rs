//! `vmferry ping`: the way to a peer, as its agent's answer or the lack of one tells.

use std::process::ExitCode;

use clap::Args;
use hyper::Method;
use indicatif::HumanBytes;

use super::client::Client;
use super::exit_code::EXIT_FAILED;
use super::{complete, show};
use crate::api::{PROBE_BYTES_MAX, Ping, PingRequest, Probe, ProbeBytes, Reached};

#[derive(Debug, Args)]
pub(super) struct PingArgs {
    /// The peer, as [peer.NAME] in this host's configuration.
    #[arg(value_name = "PEER", add = complete::peers())]
    peer: String,
    /// Send so many bytes to measure how fast they go, beside whatever else is sent.
    #[arg(long, value_name = "BYTES", default_value_t = 8 * 1024 * 1024, value_parser = clap::value_parser!(u64).range(0..=PROBE_BYTES_MAX))]
    bytes: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(client: &Client, args: PingArgs) -> anyhow::Result<ExitCode> {
    let path = format!("/v1/peers/{}/ping", args.peer);
    let ping: Ping =
        client.call(Method::POST, &path, &PingRequest { bytes: ProbeBytes::new(args.bytes) }).await?;
    let is_well = ping.reached.as_ref().is_some_and(|reached| reached.probe.is_some());
    if args.json {
        show::json(&ping)?;
    } else {
        tell(&ping);
    }
    Ok(if is_well { ExitCode::SUCCESS } else { EXIT_FAILED.into() })
}

fn tell(ping: &Ping) {
    let name = &ping.peer;
    match &ping.reached {
        None => println!("{name} ({}) is not reached", ping.identity),
        Some(reached) => tell_reached(name, &ping.identity, reached),
    }
    if let Some(cause) = &ping.cause {
        println!("  {cause}");
    }
}

fn tell_reached(name: &str, identity: &str, reached: &Reached) {
    let how = if reached.dialed { "dialed by this host" } else { "it has dialed this host" };
    println!("{name} is reached at {}, {how}", reached.address);
    println!("  identity     {identity}, proved by certificate sha256:{}", reached.certificate);
    println!("  TLS 1.3      {}", reached.cipher);
    if let Some(connected) = reached.connected_in_ms {
        println!("  connected    in {connected:.1} ms");
    }
    if let Some(rtt) = reached.rtt_ms {
        println!("  round trip   {rtt:.2} ms, the smallest seen lately");
    }
    if let Some(bytes) = reached.segment_bytes {
        println!("  segments     of {bytes} bytes at most");
    }
    let Some(Probe { version, protocol_min, protocol_max, round_trip_ms, sent_bytes, bytes_per_s }) =
        &reached.probe
    else {
        return;
    };
    println!("  its agent    {version}, session protocol {protocol_min} to {protocol_max}");
    println!("  answered     in {round_trip_ms:.2} ms");
    if *sent_bytes > 0 {
        println!(
            "  throughput   {}/s, of {} beside whatever else was sent",
            HumanBytes(*bytes_per_s),
            HumanBytes(*sent_bytes)
        );
    }
}
