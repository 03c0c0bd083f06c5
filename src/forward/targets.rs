//! What peers may be connected to on this host: the targets of the configuration, and those that this agent
//! grants for a time. A peer names a target and never a path; what it may name is decided here.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::connections::Connections;
use super::limits::{FORWARDINGS_MAX, GRANT_MAX};
use super::tally::{DYNAMIC, Labels, Side, Totals};
use crate::config::{LocalSocket, TargetConfig, TargetName, TargetPattern};
use crate::mux::Code;
use crate::net::identity::Identity;

/// A target for one peer and for a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// What the peer calls it.
    pub name: TargetName,
    /// What it is connected to.
    pub connect: LocalSocket,
    /// The peer that may use it.
    pub peer: Identity,
    /// Connections are only made while this file is there, too.
    pub beside: Option<PathBuf>,
    /// For how long it may begin connections; those that it has begun go on until the grant is revoked.
    pub within: Duration,
}

/// Why a grant was not made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrantError {
    /// There is one of that name.
    #[error("target {0} has been granted already")]
    Taken(TargetName),
    /// There are too many.
    #[error("more than {FORWARDINGS_MAX} targets cannot be granted")]
    TooMany,
}

#[derive(Debug)]
pub(super) struct Granted {
    pub(super) connect: LocalSocket,
    pub(super) peer: Identity,
    pub(super) beside: Option<PathBuf>,
    pub(super) until: Instant,
    pub(super) connections: Connections,
}

#[derive(Debug)]
pub(super) struct Configured {
    /// Its name in the configuration, in which a `*` may be.
    pub(super) name: String,
    pub(super) config: TargetConfig,
    pub(super) connections: Connections,
}

/// A target that a peer may use.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) connect: LocalSocket,
    pub(super) is_granted: bool,
    /// Must be there, too.
    pub(super) beside: Option<PathBuf>,
    pub(super) connections: Connections,
}

/// All targets.
#[derive(Debug)]
pub(super) struct Targets {
    /// Those that say most of a name first.
    configured: Vec<Configured>,
    granted: Mutex<BTreeMap<TargetName, Granted>>,
}

impl Targets {
    pub(super) fn new(configured: &BTreeMap<String, TargetConfig>, labels: &Labels) -> Self {
        let configured = configured.iter().map(|(name, config)| Configured {
            connections: Connections::new(labels.of(Side::Target, name)),
            name: name.clone(),
            config: config.clone(),
        });
        let mut configured: Vec<_> = configured.collect();
        let said = |name: &str| TargetPattern::parse(name).map(|pattern| pattern.said());
        configured.sort_by_key(|target| std::cmp::Reverse(said(&target.name)));
        Self { configured, granted: Mutex::default() }
    }

    /// The target of that name, for a peer by its name in the configuration and its identity.
    pub(super) fn find(
        &self,
        name: &TargetName,
        peer: Option<&str>,
        identity: &Identity,
    ) -> Result<Found, Code> {
        if let Some(granted) = self.locked().get(name).filter(|granted| Instant::now() < granted.until) {
            let found = || Found {
                connect: granted.connect.clone(),
                is_granted: true,
                beside: granted.beside.clone(),
                connections: granted.connections.clone(),
            };
            return (granted.peer == *identity).then(found).ok_or(Code::Denied);
        }
        let matching = self.configured.iter().find_map(|target| {
            let part = TargetPattern::parse(&target.name)?.part_of(name)?;
            Some((target, part))
        });
        let (target, part) = matching.ok_or(Code::NoTarget)?;
        if !peer.is_some_and(|peer| target.config.from.iter().any(|permitted| permitted == peer)) {
            return Err(Code::Denied);
        }
        // With this part of a name the path is too long for the kernel: there is no such socket.
        let connect = target.config.socket(part).map_err(|_| Code::TargetAbsent)?;
        Ok(Found { connect, is_granted: false, beside: None, connections: target.connections.clone() })
    }

    /// Grants a target.
    pub(super) fn grant(&self, grant: Grant, labels: &Labels) -> Result<(), GrantError> {
        let now = Instant::now();
        let mut granted = self.locked();
        granted.retain(|_, granted| now < granted.until || granted.connections.open() > 0);
        if granted.contains_key(&grant.name) {
            return Err(GrantError::Taken(grant.name));
        }
        if granted.len() >= FORWARDINGS_MAX {
            return Err(GrantError::TooMany);
        }
        let Grant { name, connect, peer, beside, within } = grant;
        let connections = Connections::new(labels.of(Side::Target, DYNAMIC));
        let until = now + within.min(GRANT_MAX);
        granted.insert(name, Granted { connect, peer, beside, until, connections });
        Ok(())
    }

    /// Prolongs a grant, from now on; false if there is none.
    pub(super) fn prolong(&self, name: &TargetName, within: Duration) -> bool {
        let mut granted = self.locked();
        let found = granted.get_mut(name);
        let is_there = found.is_some();
        if let Some(granted) = found {
            granted.until = Instant::now() + within.min(GRANT_MAX);
        }
        is_there
    }

    /// Ends a grant and cuts its connections; what they had moved.
    pub(super) fn revoke(&self, name: &TargetName) -> Option<Totals> {
        let granted = self.locked().remove(name)?;
        granted.connections.end();
        Some(granted.connections.totals())
    }

    /// Puts a grant of an earlier process back.
    pub(super) fn restore(&self, name: TargetName, granted: Granted) {
        self.locked().insert(name, granted);
    }

    /// Those of the configuration.
    pub(super) fn configured(&self) -> &[Configured] {
        &self.configured
    }

    /// Those that were granted.
    pub(super) fn granted(&self) -> MutexGuard<'_, BTreeMap<TargetName, Granted>> {
        self.locked()
    }

    fn locked(&self) -> MutexGuard<'_, BTreeMap<TargetName, Granted>> {
        self.granted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn targets(all: &[(&str, &str)]) -> Targets {
        let config = |connect: &str| TargetConfig { connect: connect.into(), from: vec!["alpha".into()] };
        let all = all.iter().map(|(name, connect)| ((*name).to_owned(), config(connect)));
        Targets::new(&all.collect(), &Labels::default())
    }

    fn find(targets: &Targets, name: &str, peer: &str) -> Result<String, Code> {
        let found = targets.find(&name.parse().unwrap(), Some(peer), &peer.parse().unwrap());
        found.map(|found| found.connect.to_string())
    }

    #[test]
    fn the_target_that_says_most_of_a_name_counts() {
        let targets =
            targets(&[("*", "/any/{}"), ("vnc-*", "/vnc/{}"), ("vnc-web*", "/web/{}"), ("vnc-web1", "/one")]);
        for (name, socket) in [
            ("vnc-web1", "/one"),
            ("vnc-web2", "/web/2"),
            ("vnc-db", "/vnc/db"),
            ("db", "/any/db"),
            ("vnc-web", "/vnc/web"),
        ] {
            assert_eq!(find(&targets, name, "alpha").as_deref(), Ok(socket), "{name}");
        }
        assert_eq!(find(&targets, "vnc-web1", "bravo"), Err(Code::Denied));
        let long = "x".repeat(120);
        assert_eq!(find(&targets, &long, "alpha"), Err(Code::TargetAbsent), "too long for a socket's path");
    }

    #[test]
    fn a_grant_is_for_one_peer_and_for_a_time() {
        let (targets, labels) = (targets(&[("vnc-*", "/vnc/{}")]), Labels::default());
        let grant = |within| Grant {
            name: "vnc-ram".parse().unwrap(),
            connect: "/granted".parse().unwrap(),
            peer: "bravo".parse().unwrap(),
            beside: None,
            within,
        };
        assert_eq!(find(&targets, "vnc-ram", "bravo"), Err(Code::Denied));
        targets.grant(grant(Duration::from_secs(60)), &labels).unwrap();
        assert_eq!(find(&targets, "vnc-ram", "bravo").as_deref(), Ok("/granted"));
        assert_eq!(find(&targets, "vnc-ram", "alpha"), Err(Code::Denied));
        let again = targets.grant(grant(Duration::ZERO), &labels);
        assert_eq!(again, Err(GrantError::Taken("vnc-ram".parse().unwrap())));
        assert!(targets.revoke(&"vnc-ram".parse().unwrap()).is_some());
        assert_eq!(find(&targets, "vnc-ram", "bravo"), Err(Code::Denied));
        // One whose time is over is none, and another can take its name.
        targets.grant(grant(Duration::ZERO), &labels).unwrap();
        assert_eq!(find(&targets, "vnc-ram", "alpha").as_deref(), Ok("/vnc/ram"));
        targets.grant(grant(Duration::from_secs(60)), &labels).unwrap();
        assert!(targets.prolong(&"vnc-ram".parse().unwrap(), Duration::ZERO));
        assert_eq!(find(&targets, "vnc-ram", "bravo"), Err(Code::Denied));
    }
}
