//! `vmferry doctor`: looks at everything on a host that a migration will need. Looks and changes nothing. What
//! cannot be looked at is not known, and is said to be so.

mod files;
mod finding;
mod host;
mod network;
mod witness;

use std::path::Path;

pub use self::finding::{Finding, RunningAgent, State};
use crate::config::Config;
use crate::error_chain::chain;

/// Looks at the host whose configuration is at `path`.
pub async fn examine(path: &Path, agent: Option<&RunningAgent>) -> Vec<Finding> {
    let mut found = Vec::new();
    match Config::load(path) {
        Ok(config) => {
            found.push(Finding::ok("configuration", path.display().to_string()));
            found.extend(files::certificates(&config, path));
            found.extend(files::keys(&config));
            found.extend(files::folders(&config));
            found.extend(files::monitors(&config));
            found.extend(files::sockets(&config, agent.is_some()));
            found.extend(network::ports(&config, agent.is_some()));
            found.extend(witness::witness(&config).await);
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
