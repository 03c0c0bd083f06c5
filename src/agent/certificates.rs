//! Certificates: read at the start, and new ones without a restart (SIGHUP, `systemctl reload vmferry`): read and checked as at
//! the start, then used for every new connection. Sessions go on, unless their peer would not be
//! accepted any more.

use anyhow::{bail, ensure};
use sd_notify::NotifyState;

use super::running::Agent;
use crate::config::TlsConfig;
use crate::mux::{Code, Role};
use crate::net::session::Session;
use crate::net::tls::{Aead, PeerRole, Tls, TlsError, TlsPaths};

/// The certificates that the configuration names.
/// Errors: they cannot be read, or do not fit together.
pub(super) fn load(tls: &TlsConfig) -> Result<Tls, TlsError> {
    let TlsConfig { ca, cert, key, crl } = tls.clone();
    Tls::load(&TlsPaths { ca, cert, key, crl }, Aead::Auto)
}

/// Reloads; whatever is wrong with the new files, the agent goes on with the old ones.
pub(super) fn reload(agent: &Agent) {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => drop(sd_notify::notify(&[NotifyState::Reloading, now])),
        Err(error) => tracing::debug!(%error, "no clock for systemd"),
    }
    match load_again(agent) {
        Ok(tls) => {
            agent.metrics.certificate_expires(tls.not_after.unix_timestamp());
            tracing::info!(not_after = %tls.not_after, "certificates reloaded");
            agent.host.pool.endpoint().set_tls(tls);
            end_untrusted(agent);
        }
        Err(e) => tracing::error!(
            cause = format!("{e:#}"),
            "certificates not reloaded; the old ones stay in use until this is mended and `systemctl reload vmferry` repeated"
        ),
    }
    let _ = sd_notify::notify(&[NotifyState::Ready]);
}

fn load_again(agent: &Agent) -> anyhow::Result<Tls> {
    let tls = load(&agent.host.config.tls)?;
    let ours = &agent.host.identity;
    // Journals and peers' grants are bound to it.
    ensure!(
        tls.identity == *ours,
        "the new certificate is {}'s, this agent is {ours}: restart it",
        tls.identity
    );
    if agent.stopping.is_cancelled() {
        bail!("the agent is shutting down");
    }
    Ok(tls)
}

/// Ends sessions with peers whose certificates the new CA file or revocation list rules out.
fn end_untrusted(agent: &Agent) {
    let tls = agent.host.pool.endpoint().tls();
    for session in agent.host.pool.all() {
        let info = session.info();
        if let Err(failure) =
            tls.reverify(&session.link().connection.chain, role_of_peer(&session), &info.peer)
        {
            tracing::warn!(peer = %info.peer, cause = %failure, "a session's peer is not trusted any more");
            session.close(Code::Auth, "your certificate is not accepted any more");
        }
    }
}

fn role_of_peer(session: &Session) -> PeerRole {
    match session.info().role {
        Role::Dialer => PeerRole::Server,
        Role::Acceptor => PeerRole::Client,
    }
}
