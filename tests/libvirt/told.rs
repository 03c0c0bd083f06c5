//! What an agent tells of libvirt's migrations beside vmferry's own: list, list --json, status, metrics and watch
//! say the same, on both hosts.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::agents::code;
use crate::support::Agent;

fn printed(agent: &Agent, words: &[&str]) -> Result<Value> {
    let outcome = agent.vmferry(words)?;
    code(&outcome, 0)?;
    let value: Value = serde_json::from_str(&outcome.stdout)?;
    ensure!(value["schema"] == 1, "{value}");
    Ok(value)
}

/// That this host has these domains under way in that role, by everything that tells of them.
///
/// # Errors
/// One of them says something else.
pub(crate) fn under_way(agent: &Agent, role: &str, domains: &[&str]) -> Result<()> {
    let host = &agent.host().name;
    let listed = printed(agent, &["list", "--json"])?;
    let all = listed["libvirt"].as_array().context("list --json has none of libvirt's")?;
    let of_role: Vec<&Value> = all.iter().filter(|m| m["role"] == role).collect();
    let named = |m: &&&Value| domains.iter().any(|domain| m["domain"] == *domain);
    ensure!(of_role.iter().filter(named).count() == domains.len(), "{host}: {listed}");
    ensure!(listed["migrations"].is_array(), "{host}: {listed}");
    let text = agent.vmferry(&["list"])?.stdout;
    let status = printed(agent, &["status", "--json"])?;
    ensure!(status["libvirt_migrations_active"] == domains.len(), "{host}: {status}");
    let shown = agent.vmferry(&["status"])?.stdout;
    ensure!(shown.contains(&format!("libvirt's own      {} under way", domains.len())), "{host}: {shown}");
    let active = agent.metrics()?.find("vmferry_libvirt_migrations_active", &[("role", role)]);
    ensure!(active == Some(domains.len() as f64), "{host}: {active:?}");
    for domain in domains {
        ensure!(text.lines().any(|line| line.contains(domain) && line.contains(role)), "{host}: {text}");
        let one = printed(agent, &["status", domain, "--json"])?;
        ensure!(one["domain"] == *domain && one["role"] == role, "{host}: {one}");
    }
    Ok(())
}

/// That by everything that tells of them so many have moved, and none is under way.
///
/// # Errors
/// One of them says something else.
pub(crate) fn have_moved(agent: &Agent, role: &str, count: usize) -> Result<()> {
    let host = &agent.host().name;
    let listed = printed(agent, &["list", "--json"])?;
    let all = listed["libvirt"].as_array().context("list --json has none of libvirt's")?;
    let moved = |m: &&Value| m["role"] == role && m["ended"] == "moved";
    ensure!(all.iter().filter(moved).count() == count, "{host}: {listed}");
    let metrics = agent.metrics()?;
    let ended = metrics.find("vmferry_libvirt_migrations_total", &[("role", role), ("result", "moved")]);
    let active = metrics.find("vmferry_libvirt_migrations_active", &[("role", role)]);
    ensure!((ended, active) == (Some(count as f64), Some(0.0)), "{host}: {ended:?} {active:?}");
    Ok(())
}
