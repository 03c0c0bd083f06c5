//! The configuration: its operator is trusted, and mistaken.

use std::path::Path;

use vmferry::config::{Config, ConfigError};

/// It is taken whole or refused with a word on what is wrong.
pub(crate) fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match Config::parse(text, Path::new("/etc/vmferry/vmferry.toml")) {
        Ok(config) => sound(&config),
        Err(ConfigError::Value { key, problem, .. }) => assert!(!key.is_empty() && !problem.is_empty()),
        Err(ConfigError::Parse { problem, .. }) => assert!(!problem.is_empty()),
        Err(error @ ConfigError::Read { .. }) => panic!("nothing is read: {error}"),
    }
}

fn sound(config: &Config) {
    let paths = [&config.state_dir, &config.runtime_dir, &config.tls.ca, &config.tls.cert, &config.tls.key];
    for path in paths.into_iter().chain(config.vms.values().map(|vm| &vm.qmp)) {
        assert!(path.is_absolute(), "{}", path.display());
    }
    assert!(config.api_socket().as_os_str().len() <= 107);
    for peer in config.peers.values() {
        let found = config.peer_by_identity(&peer.identity).map(|(name, _)| &config.peers[name]);
        assert!(found.is_some_and(|found| std::ptr::eq(found, peer)), "an identity is one peer's");
    }
}
