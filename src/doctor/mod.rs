//! `vmferry doctor`: looks at everything on a host that a migration will need. Looks and changes nothing. What
//! cannot be looked at is not known, and is said to be so.

mod files;
mod host;
mod network;

use std::path::Path;

use serde::Serialize;

use crate::config::Config;
use crate::error_chain::chain;

/// What was found of one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    Ok,
    Warning,
    Failed,
    /// It could not be looked at.
    Unknown,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub what: String,
    pub state: State,
    pub text: String,
    /// What to do about it; none where all is well.
    pub remedy: Option<String>,
}

impl Finding {
    pub fn ok(what: impl Into<String>, text: impl Into<String>) -> Self {
        Self { what: what.into(), state: State::Ok, text: text.into(), remedy: None }
    }

    pub fn warning(what: impl Into<String>, text: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { state: State::Warning, remedy: Some(remedy.into()), ..Self::ok(what, text) }
    }

    pub fn failed(what: impl Into<String>, text: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { state: State::Failed, remedy: Some(remedy.into()), ..Self::ok(what, text) }
    }

    pub fn unknown(what: impl Into<String>, text: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { state: State::Unknown, remedy: Some(remedy.into()), ..Self::ok(what, text) }
    }
}

/// The agent that answers on this host, as far as it is of interest here.
#[derive(Debug, Clone)]
pub struct RunningAgent {
    pub pid: Option<i32>,
}

/// Looks at the host whose configuration is at `path`.
pub fn examine(path: &Path, agent: Option<&RunningAgent>) -> Vec<Finding> {
    let mut found = Vec::new();
    match Config::load(path) {
        Ok(config) => {
            found.push(Finding::ok("configuration", path.display().to_string()));
            found.extend(files::certificates(&config, path));
            found.extend(files::key(&config));
            found.extend(files::folders(&config));
            found.extend(files::monitors(&config));
            found.extend(files::sockets(&config, agent.is_some()));
            found.extend(network::ports(&config, agent.is_some()));
        }
        Err(error) => found.push(unreadable(&chain(&error))),
    }
    found.extend(host::kernel());
    found.push(host::clock());
    found.push(host::descriptors(agent));
    found.push(host::descriptor_store());
    found.extend(network::interfaces());
    found
}

fn unreadable(cause: &str) -> Finding {
    let what = "configuration";
    // Only the service manager gives those.
    if cause.contains("was given no credentials") {
        let remedy = "look at what `systemctl status vmferry` says; files of certificates are not looked at";
        return Finding::unknown(what, cause, remedy);
    }
    Finding::failed(what, cause, "mend it; deploy/vmferry.toml shows every key")
}
