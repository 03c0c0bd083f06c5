//! Certificates: read at the start, and new ones without a restart (SIGHUP, `systemctl reload vmferry`, and when their
//! files have changed): read and checked as at the start, then used for every new connection. Sessions go on, unless
//! their peer would not be accepted any more.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use sd_notify::NotifyState;
use time::OffsetDateTime;

use super::certificate_files::{Stamp, Watch};
use super::running::Agent;
use crate::config::{Config, TlsConfig};
use crate::metrics::{Metrics, ReloadCause as Cause};
use crate::net::tls::{Aead, Tls, TlsError, TlsPaths};
use crate::net::trust;

/// Between two looks at whether the peers of live sessions would still be let in.
const JUDGE_EVERY: Duration = Duration::from_secs(60);

/// Between two looks at the files.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Between two warnings of what ends soon.
const WARN_EVERY: Duration = Duration::from_secs(24 * 3600);

/// Says to the metrics when everything ends, and to the log what ends soon.
pub(super) fn note_endings(metrics: &Metrics, tls: &Tls) {
    metrics.expiry.set(&tls.endings);
    let now = OffsetDateTime::now_utc();
    for ending in tls.endings.iter().filter(|ending| ending.is_soon(now)) {
        let (what, remedy) = ending.kind.words();
        let days_left = (ending.not_after - now).whole_days();
        tracing::warn!(not_after = %ending.not_after, days_left, remedy, "{what} ends soon");
    }
}

/// The certificates that the configuration names.
/// Errors: they cannot be read, or do not fit together.
pub(super) fn load(tls: &TlsConfig) -> Result<Tls, TlsError> {
    let TlsConfig { ca, cert, key, crl, key_exchange, trust_domain } = tls.clone();
    Tls::load_as(&TlsPaths { ca, cert, key, crl }, trust_domain.into(), (Aead::Auto, key_exchange))
}

/// Reloads, as somebody asks for; whatever is wrong with the new files, the agent goes on with the old ones.
pub(super) fn reload(agent: &Agent) {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => drop(sd_notify::notify(&[NotifyState::Reloading, now])),
        Err(error) => tracing::debug!(%error, "no clock for systemd"),
    }
    match load_again(agent) {
        Ok((config, before, tls)) => {
            agent.certificates.set(config, before);
            take(agent, tls, Cause::Signal);
        }
        Err(e) => {
            agent.metrics.expiry.count_reload(Cause::Signal, false);
            tracing::error!(
                cause = format!("{e:#}"),
                "certificates not reloaded; the old ones stay in use until this is mended and `systemctl reload vmferry` repeated"
            );
        }
    }
    let _ = sd_notify::notify(&[NotifyState::Ready]);
}

fn load_again(agent: &Agent) -> anyhow::Result<(TlsConfig, Stamp, Tls)> {
    let config = Config::load(&agent.config_path)?.tls;
    let before = Stamp::of(&config);
    let tls = load_ours(agent, &config)?;
    Ok((config, before, tls))
}

/// The files, if they are this agent's.
fn load_ours(agent: &Agent, config: &TlsConfig) -> anyhow::Result<Tls> {
    let tls = load(config)?;
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

fn take(agent: &Agent, tls: Tls, cause: Cause) {
    tracing::info!(not_after = %tls.not_after, because = cause.words(), "certificates reloaded");
    agent.metrics.expiry.count_reload(cause, true);
    note_endings(&agent.metrics, &tls);
    agent.host.pool.endpoint().set_tls(tls);
    judge_all(agent);
}

/// Takes files that have changed, without end: those that the last start or reload has named. A set that does not
/// fit together, or is not whole yet, is not taken, and said once.
pub(super) async fn keep_watching(agent: Arc<Agent>) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        look(&agent);
    }
}

fn look(agent: &Agent) {
    let mut in_use = agent.certificates.locked();
    let Some((config, watch)) = in_use.as_mut() else { return };
    let before = Stamp::of(config);
    if !watch.look(&before) {
        return;
    }
    let loaded = load_ours(agent, config);
    // What changes while it is read is read again.
    if Stamp::of(config) != before {
        return;
    }
    match loaded {
        Ok(tls) => {
            *watch = Watch::new(before);
            take(agent, tls, Cause::Files);
        }
        Err(e) => {
            watch.refuse(before);
            agent.metrics.expiry.count_reload(Cause::Files, false);
            tracing::error!(
                cause = format!("{e:#}"),
                "certificate files have changed and are not taken; the old ones stay in use until these are mended"
            );
        }
    }
}

/// Judges all sessions anew from time to time: certificates and revocation lists expire.
pub(super) async fn keep_judging(agent: Arc<Agent>) {
    let mut warned = Instant::now();
    loop {
        tokio::time::sleep(JUDGE_EVERY).await;
        judge_all(&agent);
        if warned.elapsed() >= WARN_EVERY {
            warned = Instant::now();
            note_endings(&agent.metrics, &agent.host.pool.endpoint().tls());
        }
    }
}

fn judge_all(agent: &Agent) {
    let pool = &agent.host.pool;
    for session in pool.all() {
        // Whoever is not trusted any more is told, and the log.
        let _ = trust::judge(pool.endpoint(), &session);
    }
}
