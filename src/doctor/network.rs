//! The one port and the interfaces. What lies between two hosts only `vmferry ping` can tell.

use std::fs;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};

use super::finding::Finding;
use crate::config::Config;

/// IPv6 carries no less.
const MTU_MIN: u64 = 1280;

/// Whether the port is free, or the agent's.
pub(super) fn ports(config: &Config, agent_answers: bool) -> Vec<Finding> {
    let mut addresses: Vec<(&str, SocketAddr)> = config.listen.iter().map(|a| ("listen", *a)).collect();
    addresses.extend(config.metrics.as_ref().map(|metrics| ("metrics.listen", metrics.listen)));
    if config.listen.is_empty() {
        let text = "`listen` is empty: peers cannot dial this host, it dials them";
        return vec![Finding::ok("port", text)];
    }
    addresses.into_iter().map(|(key, address)| port(key, address, agent_answers)).collect()
}

fn port(key: &str, address: SocketAddr, agent_answers: bool) -> Finding {
    let what = format!("port {address} ({key})");
    // Taken for a moment and given back: nobody is accepted.
    match (TcpListener::bind(address), agent_answers) {
        (Ok(_), false) => Finding::ok(what, "free"),
        (Ok(_), true) => {
            let remedy = "restart the agent: it runs with another configuration";
            Finding::warning(what, "free, although an agent answers", remedy)
        }
        (Err(e), true) if e.kind() == ErrorKind::AddrInUse => {
            Finding::ok(what, "in use, and an agent answers on this host")
        }
        (Err(e), false) if e.kind() == ErrorKind::AddrInUse => {
            let remedy = format!("`ss -tlnp sport = {}` shows whose it is", address.port());
            Finding::failed(what, "in use, and no agent answers", remedy)
        }
        (Err(e), _) if e.kind() == ErrorKind::PermissionDenied => {
            Finding::unknown(what, e.to_string(), "run it as root")
        }
        (Err(e), _) => Finding::failed(what, e.to_string(), format!("give `{key}` an address of this host")),
    }
}

/// The MTU of each interface that is up.
pub(super) fn interfaces() -> Vec<Finding> {
    let Ok(folder) = fs::read_dir("/sys/class/net") else {
        return vec![Finding::unknown("MTU", "/sys/class/net cannot be read", "`ip link` shows it")];
    };
    let mut names: Vec<String> =
        folder.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).filter(|n| n != "lo").collect();
    names.sort();
    let read = |name: &str, file: &str| fs::read_to_string(format!("/sys/class/net/{name}/{file}")).ok();
    let up = names.into_iter().filter(|name| read(name, "operstate").is_some_and(|s| s.trim() == "up"));
    let findings = up.map(|name| {
        let what = format!("MTU of {name}");
        match read(&name, "mtu").and_then(|mtu| mtu.trim().parse::<u64>().ok()) {
            Some(mtu) if mtu < MTU_MIN => {
                Finding::failed(what, mtu.to_string(), "less than 1280 is no network for IPv6")
            }
            Some(mtu) => Finding::ok(what, mtu.to_string()),
            None => Finding::unknown(what, "cannot be read", "`ip link` shows it"),
        }
    });
    findings.collect()
}
