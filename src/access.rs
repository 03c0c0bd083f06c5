//! Who may do what on this host: the one question that comes before everything that is done for a peer on its
//! control streams, or for a user of this host on the local API. Knows the configuration, and nothing of how
//! things are done.
//!
//! Default is nothing: what no arm of [`authorize`] permits is denied.

use crate::config::{PeerConfig, glob_matches};

/// Who asks.
#[derive(Debug, Clone, Copy)]
pub enum Who<'a> {
    /// Another agent, by the part of the configuration for the identity that its certificate has proved; none if
    /// there is none.
    Peer(Option<&'a PeerConfig>),
    /// A user of this host.
    Local(Role),
}

/// What a user of this host may do. Each role includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Look at everything, change nothing.
    View,
    /// Migrate, cancel, limit, forward.
    Operate,
    /// Decide whose a VM is, against what the journals say.
    Admin,
}

impl Role {
    /// As the configuration calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Operate => "operate",
            Self::Admin => "admin",
        }
    }
}

/// What somebody wants to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action<'a> {
    /// Peer: ask after migrations of its own, and end them.
    AskAfterOwn,
    /// Peer: try how fast bytes go here, one at a time and not many.
    Probe,
    /// Peer: send any VM here at all. What a stranger may hold of this agent is less without it.
    SendVms,
    /// Peer: send this VM here, or ask whether it could.
    SendVm(&'a str),
    /// Peer: have its libvirt move any domain here at all.
    MoveDomains,
    /// Peer: have its libvirt move this domain here.
    MoveDomain(&'a str),
    /// Peer: reach this host's libvirt, to move such a domain.
    ReachLibvirt(&'a str),
    /// Peer: be sent this VM of this host, or this domain of its libvirt, for which a user of this host asks.
    GetVm(&'a str),
    /// User: read status, migrations, limits, forwardings, what is left to recover.
    View,
    /// User: begin, change and end them.
    Operate,
    /// User: what [`Role::Admin`] is for.
    Administer,
}

/// It is not permitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not permitted")]
pub struct Denied;

/// Whether `who` may.
/// Errors: [`Denied`]; what to say about it is the caller's, who knows what may be told to whom.
pub fn authorize(action: Action<'_>, who: Who<'_>) -> Result<(), Denied> {
    let may = match who {
        Who::Peer(None) => false,
        Who::Peer(Some(peer)) => peer_may(peer, action),
        Who::Local(role) => needed(action).is_some_and(|needed| role >= needed),
    };
    if may { Ok(()) } else { Err(Denied) }
}

fn peer_may(peer: &PeerConfig, action: Action<'_>) -> bool {
    let is_among = |patterns: &[String], name| patterns.iter().any(|pattern| glob_matches(pattern, name));
    match action {
        Action::AskAfterOwn | Action::Probe => true,
        Action::SendVms => !peer.receive.is_empty(),
        Action::SendVm(vm) => is_among(&peer.receive, vm),
        Action::GetVm(vm) => is_among(&peer.send, vm),
        Action::MoveDomains => !peer.libvirt.is_empty(),
        Action::MoveDomain(domain) => is_among(&peer.libvirt, domain),
        Action::ReachLibvirt(domain) => peer.libvirt_rpc && is_among(&peer.libvirt, domain),
        Action::View | Action::Operate | Action::Administer => false,
    }
}

/// The least role; none for what is only a peer's to ask.
fn needed(action: Action<'_>) -> Option<Role> {
    match action {
        Action::View => Some(Role::View),
        Action::Operate => Some(Role::Operate),
        Action::Administer => Some(Role::Admin),
        Action::AskAfterOwn
        | Action::Probe
        | Action::SendVms
        | Action::SendVm(_)
        | Action::GetVm(_)
        | Action::MoveDomains
        | Action::MoveDomain(_)
        | Action::ReachLibvirt(_) => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const ACTIONS: [Action<'_>; 15] = [
        Action::AskAfterOwn,
        Action::Probe,
        Action::SendVms,
        Action::SendVm("web1"),
        Action::SendVm("db1"),
        Action::MoveDomain("web1"),
        Action::MoveDomain("db1"),
        Action::ReachLibvirt("web1"),
        Action::ReachLibvirt("db1"),
        Action::View,
        Action::Operate,
        Action::Administer,
        Action::GetVm("web1"),
        Action::GetVm("db1"),
        Action::MoveDomains,
    ];

    fn peer(permissions: &str) -> PeerConfig {
        toml::from_str(&format!("identity = 'bravo'\n{permissions}")).unwrap()
    }

    /// Everybody and everything: `x` is permitted.
    #[test]
    fn the_table() {
        let (none, some) = (peer(""), peer("receive = ['web*']"));
        let (libvirt, rpc) = (peer("libvirt = ['web*']"), peer("libvirt = ['web*']\nlibvirt_rpc = true"));
        let (all, web) = (peer("send = ['*']"), peer("send = ['web*']"));
        let rpc_alone = peer("libvirt_rpc = true");
        for (who, row) in [
            (Who::Peer(None), "..............."),
            (Who::Peer(Some(&none)), "xx............."),
            (Who::Peer(Some(&some)), "xxxx..........."),
            (Who::Peer(Some(&libvirt)), "xx...x........x"),
            (Who::Peer(Some(&rpc)), "xx...x.x......x"),
            (Who::Peer(Some(&rpc_alone)), "xx............."),
            (Who::Peer(Some(&all)), "xx..........xx."),
            (Who::Peer(Some(&web)), "xx..........x.."),
            (Who::Local(Role::View), ".........x....."),
            (Who::Local(Role::Operate), ".........xx...."),
            (Who::Local(Role::Admin), ".........xxx..."),
        ] {
            let may: String =
                ACTIONS.iter().map(|a| if authorize(*a, who).is_ok() { 'x' } else { '.' }).collect();
            assert_eq!(may, row, "{who:?}");
        }
    }
}
