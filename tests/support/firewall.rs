//! The nftables rules of a host: the wall that lets one port through, and the faults of the link.
//! All of them look at what arrives. Stateless, so that a rule means the same at any time.

use std::fs;

use anyhow::{Context, Result};

use super::capture::DISCARD_PORT;
use super::net::{Host, LINK};
use super::process::{SHORT, run};

/// Lets in TCP to `open` (when given) and the answers to connections that this host opened to
/// `port` on the other; drops and counts everything else that comes over the link. Neighbour
/// discovery must pass, or IPv6 has no link; what the kernel itself says about multicast and the
/// last packet of a capture are nobody's attempt, so they are not counted.
pub(super) fn wall(host: &Host, open: Option<u16>, port: u16) -> Result<()> {
    let door = open.map(|port| format!("tcp dport {port} accept")).unwrap_or_default();
    load(
        host,
        &format!(
            "table inet wall\ndelete table inet wall\ntable inet wall {{
               counter refused {{}}
               chain arriving {{
                 type filter hook input priority 0; policy accept;
                 iifname != \"{LINK}\" accept
                 icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, nd-router-advert }} accept
                 icmpv6 type {{ mld-listener-query, mld-listener-report, mld-listener-done, mld2-listener-report }} accept
                 udp dport {DISCARD_PORT} drop
                 {door}
                 tcp sport {port} tcp flags & (syn | ack) != syn accept
                 counter name refused drop
               }}
             }}"
        ),
    )
}

pub(super) fn refused(host: &Host) -> Result<u64> {
    let text = run(host.command("nft").args(["list", "counter", "inet", "wall", "refused"]), SHORT)?;
    let mut words = text.split_whitespace();
    words.find(|word| *word == "packets");
    words.next().and_then(|n| n.parse().ok()).with_context(|| format!("no counter in {text:?}"))
}

pub(super) fn black_hole(host: &Host) -> Result<()> {
    fault(host, &format!("iifname \"{LINK}\" drop"))
}

pub(super) fn resets(host: &Host, port: u16) -> Result<()> {
    fault(host, &format!("iifname \"{LINK}\" tcp dport {port} reject with tcp reset"))
}

pub(super) fn clear_black_hole(host: &Host) -> Result<()> {
    load(host, "table inet fault\ndelete table inet fault")
}

fn fault(host: &Host, rule: &str) -> Result<()> {
    load(
        host,
        &format!(
            "table inet fault\ndelete table inet fault\ntable inet fault {{
               chain arriving {{ type filter hook input priority -50; policy accept; {rule}; }}
             }}"
        ),
    )
}

fn load(host: &Host, rules: &str) -> Result<()> {
    let file = host.dir.join("rules.nft");
    fs::write(&file, rules)?;
    run(host.command("nft").arg("-f").arg(&file), SHORT)
        .with_context(|| format!("rules on {}:\n{rules}", host.name))
        .map(drop)
}
