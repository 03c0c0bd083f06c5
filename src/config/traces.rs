//! `[traces]`: where it is told what migrations have been through.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use serde::Deserialize;

/// Where a collector takes traces, by OpenTelemetry's convention.
const PATH: &str = "/v1/traces";

/// An OpenTelemetry collector.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TracesConfig {
    pub url: CollectorUrl,
}

/// A collector on this host, which takes OTLP over HTTP: `http://127.0.0.1:4318`. What goes to it is not encrypted,
/// so it goes nowhere else.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct CollectorUrl {
    pub address: SocketAddr,
    /// With its `/` at the beginning.
    pub path: String,
}

/// Not a collector on this host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CollectorUrlError {
    #[error("\"{0}\" is no address of a collector; write it as in http://127.0.0.1:4318")]
    Form(String),
    #[error(
        "{0} is no loopback address; run a collector on this host, for what others can read must not leave in clear"
    )]
    NotLoopback(SocketAddr),
}

impl FromStr for CollectorUrl {
    type Err = CollectorUrlError;

    fn from_str(text: &str) -> Result<Self, CollectorUrlError> {
        let no = || CollectorUrlError::Form(text.to_owned());
        let rest = text.strip_prefix("http://").ok_or_else(no)?;
        let (address, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let address: SocketAddr = address.parse().map_err(|_| no())?;
        if !path.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/-_.~".contains(&byte)) {
            return Err(no());
        }
        if !address.ip().is_loopback() {
            return Err(CollectorUrlError::NotLoopback(address));
        }
        let path = if path.trim_matches('/').is_empty() { PATH.to_owned() } else { path.to_owned() };
        Ok(Self { address, path })
    }
}

impl TryFrom<String> for CollectorUrl {
    type Error = CollectorUrlError;

    fn try_from(text: String) -> Result<Self, CollectorUrlError> {
        text.parse()
    }
}

impl fmt::Display for CollectorUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}{}", self.address, self.path)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_collector_is_one_of_this_host() {
        for (text, whole) in [
            ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
            ("http://[::1]:4318/", "http://[::1]:4318/v1/traces"),
            ("http://127.0.0.1:4318/otlp/v1/traces", "http://127.0.0.1:4318/otlp/v1/traces"),
        ] {
            assert_eq!(text.parse::<CollectorUrl>().unwrap().to_string(), whole);
        }
        for text in
            ["", "127.0.0.1:4318", "https://127.0.0.1:4318", "http://127.0.0.1", "http://127.0.0.1:1/a b"]
        {
            assert_eq!(text.parse::<CollectorUrl>(), Err(CollectorUrlError::Form(text.to_owned())));
        }
        let far = "http://192.0.2.1:4318".parse::<CollectorUrl>().unwrap_err();
        assert!(far.to_string().contains("no loopback address"), "{far}");
    }
}
