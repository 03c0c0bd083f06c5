//! `[witness]`: the etcd that is asked when one of two hosts is lost.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;

/// Most endpoints of one etcd.
const ENDPOINTS_MAX: usize = 9;
/// Longest time for one endpoint: whatever is asked about a migration is answered within this time, by all of them.
const ANSWER_S_MAX: u64 = 10;
const PORT: u16 = 2379;

/// An existing etcd.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WitnessConfig {
    /// Where its members take clients; they are asked one after the other.
    pub endpoints: Vec<Endpoint>,
    /// PEM file with the authority of its certificates; needed for `https://`.
    pub ca: Option<PathBuf>,
    /// PEM file with the certificate that it is shown, where it wants one.
    pub cert: Option<PathBuf>,
    /// PEM file with its private key, mode 0600.
    pub key: Option<PathBuf>,
    /// What the names of its keys begin with.
    #[serde(default = "default_prefix")]
    pub prefix: String,
    /// An endpoint must answer within this time, or within its share of what is left for all of them.
    #[serde(default = "default_answer_s")]
    pub answer_s: u64,
    /// A destination that has not said for so long what became of the guest loses it, if it has not taken it.
    #[serde(default = "default_after_s")]
    pub after_s: u64,
}

fn default_prefix() -> String {
    "/vmferry/".into()
}
fn default_answer_s() -> u64 {
    2
}
fn default_after_s() -> u64 {
    30
}

impl WitnessConfig {
    pub fn answer(&self) -> Duration {
        Duration::from_secs(self.answer_s)
    }

    pub fn after(&self) -> Duration {
        Duration::from_secs(self.after_s)
    }

    pub(super) fn check(&self) -> Result<(), (String, String)> {
        let problem = |key: &str, problem: String| Err((format!("witness.{key}"), problem));
        if self.endpoints.is_empty() || self.endpoints.len() > ENDPOINTS_MAX {
            return problem("endpoints", format!("1 to {ENDPOINTS_MAX} of them"));
        }
        if self.endpoints.iter().any(|endpoint| endpoint.tls) && self.ca.is_none() {
            return problem("ca", "an endpoint with https:// needs it: no other authority is trusted".into());
        }
        if self.cert.is_some() != self.key.is_some() {
            return problem("cert", "`cert` and `key` go together".into());
        }
        if self.prefix.is_empty() || self.prefix.len() > 200 {
            return problem("prefix", "1 to 200 bytes".into());
        }
        for (key, value, most) in
            [("answer_s", self.answer_s, ANSWER_S_MAX), ("after_s", self.after_s, 86_400)]
        {
            if !(1..=most).contains(&value) {
                return problem(key, format!("1 to {most}"));
            }
        }
        Ok(())
    }

    /// The files that it names, each with its key.
    pub(super) fn files(&mut self) -> impl Iterator<Item = (&'static str, &mut PathBuf)> {
        let files = [("ca", &mut self.ca), ("cert", &mut self.cert), ("key", &mut self.key)];
        files.into_iter().filter_map(|(key, file)| Some((key, file.as_mut()?)))
    }
}

/// `https://HOST:PORT`, or `http://` on this host.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Endpoint {
    pub(crate) tls: bool,
    /// A name, or an address without brackets.
    pub(crate) host: String,
    pub(crate) port: u16,
}

/// Not an endpoint of an etcd.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    #[error("\"{0}\" is no endpoint; write it as in https://etcd1.example:2379")]
    Form(String),
    #[error("{0} goes over the network in clear; write https://, or http:// with a loopback address")]
    InClear(String),
}

impl Endpoint {
    /// `HOST:PORT`, an IPv6 address in brackets.
    pub(crate) fn authority(&self) -> String {
        match self.host.contains(':') {
            true => format!("[{}]:{}", self.host, self.port),
            false => format!("{}:{}", self.host, self.port),
        }
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let form = || EndpointError::Form(text.to_owned());
        let (tls, rest) = match (text.strip_prefix("https://"), text.strip_prefix("http://")) {
            (Some(rest), _) => (true, rest),
            (_, Some(rest)) => (false, rest),
            _ => return Err(form()),
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (host, port) = match rest.strip_prefix('[') {
            Some(rest) => rest.split_once(']').ok_or_else(form)?,
            None => rest.split_at(rest.find(':').unwrap_or(rest.len())),
        };
        let port = match port.strip_prefix(':') {
            Some(port) => port.parse().map_err(|_| form())?,
            None if port.is_empty() => PORT,
            None => return Err(form()),
        };
        let is_name = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
        let address = host.parse::<IpAddr>();
        if host.is_empty() || address.is_err() && !host.chars().all(is_name) {
            return Err(form());
        }
        if !tls && !address.is_ok_and(|address| address.is_loopback()) {
            return Err(EndpointError::InClear(text.to_owned()));
        }
        Ok(Self { tls, host: host.to_owned(), port })
    }
}

impl TryFrom<String> for Endpoint {
    type Error = EndpointError;

    fn try_from(text: String) -> Result<Self, EndpointError> {
        text.parse()
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        write!(f, "{scheme}://{}", self.authority())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn each_mistake_names_its_key() {
        const GOOD: &str = "endpoints = [\"https://a\"]\nca = \"ca\"\ncert = \"c\"\nkey = \"k\"\n";
        let checked = |text: &str| toml::from_str::<WitnessConfig>(text).unwrap().check();
        assert_eq!(checked(GOOD), Ok(()));
        assert_eq!(checked("endpoints = [\"http://127.0.0.1\"]\n"), Ok(()));
        for (text, key) in [
            (GOOD.replace("\"https://a\"", ""), "witness.endpoints"),
            (GOOD.replace("ca = \"ca\"\n", ""), "witness.ca"),
            (GOOD.replace("key = \"k\"\n", ""), "witness.cert"),
            (GOOD.replace("cert = \"c\"\n", ""), "witness.cert"),
            (format!("{GOOD}prefix = \"\"\n"), "witness.prefix"),
            (format!("{GOOD}answer_s = 0\n"), "witness.answer_s"),
            (format!("{GOOD}answer_s = 11\n"), "witness.answer_s"),
            (format!("{GOOD}after_s = 90000\n"), "witness.after_s"),
        ] {
            assert_eq!(checked(&text).unwrap_err().0, key, "{text}");
        }
        for text in ["endpoints = [\"10.0.0.1:2379\"]", "endpoints = [\"http://10.0.0.1\"]", "wrong = 1"] {
            assert!(toml::from_str::<WitnessConfig>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_endpoint_is_encrypted_or_of_this_host() {
        for (text, whole) in [
            ("https://etcd1.example", "https://etcd1.example:2379"),
            ("https://10.0.0.1:2380/", "https://10.0.0.1:2380"),
            ("https://[fd00::1]:2379", "https://[fd00::1]:2379"),
            ("http://127.0.0.1:2379", "http://127.0.0.1:2379"),
            ("http://[::1]", "http://[::1]:2379"),
        ] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), whole, "{text}");
        }
        for text in ["etcd1:2379", "https://", "https://a b", "https://a:x", "https://a/b", "ftp://a"] {
            assert_eq!(text.parse::<Endpoint>(), Err(EndpointError::Form(text.into())), "{text}");
        }
        for text in ["http://10.0.0.1:2379", "http://localhost:2379"] {
            assert_eq!(text.parse::<Endpoint>(), Err(EndpointError::InClear(text.into())), "{text}");
        }
    }
}
