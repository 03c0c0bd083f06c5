//! Certificates: read at the start, and new ones without a restart (SIGHUP, `systemctl reload vmferry`): read and checked as at
//! the start, then used for every new connection. Sessions go on, unless their peer would not be
//! accepted any more.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use sd_notify::NotifyState;
use time::OffsetDateTime;

use super::running::Agent;
use crate::config::{Config, TlsConfig};
use crate::metrics::Metrics;
use crate::net::tls::{Aead, Tls, TlsError, TlsPaths};
use crate::net::trust;

/// Between two looks at whether the peers of live sessions would still be let in.
const JUDGE_EVERY: Duration = Duration::from_secs(60);

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
    let TlsConfig { ca, cert, key, crl, trust_domain } = tls.clone();
    Tls::load_named(&TlsPaths { ca, cert, key, crl }, trust_domain.into(), Aead::Auto)
}

/// Reloads; whatever is wrong with the new files, the agent goes on with the old ones.
pub(super) fn reload(agent: &Agent) {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => drop(sd_notify::notify(&[NotifyState::Reloading, now])),
        Err(error) => tracing::debug!(%error, "no clock for systemd"),
    }
    match load_again(agent) {
        Ok(tls) => {
            tracing::info!(not_after = %tls.not_after, "certificates reloaded");
            note_endings(&agent.metrics, &tls);
            agent.host.pool.endpoint().set_tls(tls);
            judge_all(agent);
        }
        Err(e) => tracing::error!(
            cause = format!("{e:#}"),
            "certificates not reloaded; the old ones stay in use until this is mended and `systemctl reload vmferry` repeated"
        ),
    }
    let _ = sd_notify::notify(&[NotifyState::Ready]);
}

fn load_again(agent: &Agent) -> anyhow::Result<Tls> {
    let config = Config::load(&agent.config_path)?;
    let tls = load(&config.tls)?;
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
