//! Connections that were refused, for the log: of each cause and address the first is told, the rest is counted
//! and summed up. The metrics count all of them.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::audit::Audit;
use crate::error_chain::chain;
use crate::net::connect_error::ConnectError;

/// After so long the first is told again.
const SUM_UP_EVERY: Duration = Duration::from_secs(300);
/// Addresses that are told apart for each cause; connections from further ones are counted only.
const ADDRESSES_MAX: usize = 16;

/// Of one cause.
#[derive(Debug, Default)]
struct Refused {
    /// Those of which one was told.
    addresses: Vec<IpAddr>,
    untold: u64,
}

/// Those since it was last summed up.
#[derive(Debug, Default)]
pub(super) struct Refusals(Mutex<BTreeMap<&'static str, Refused>>);

impl Refusals {
    /// Takes note of a connection from `address` that came to nothing.
    pub(super) fn note(&self, address: SocketAddr, error: &ConnectError) {
        if self.is_first(error.label(), address.ip()) {
            tracing::warn!(%address, cause = chain(error), "a connection was refused");
        }
    }

    fn is_first(&self, label: &'static str, address: IpAddr) -> bool {
        let mut all = self.locked();
        let refused = all.entry(label).or_default();
        let address = address.to_canonical();
        let is_first = !refused.addresses.contains(&address) && refused.addresses.len() < ADDRESSES_MAX;
        if is_first {
            refused.addresses.push(address);
        } else {
            refused.untold += 1;
        }
        is_first
    }

    /// What was not told, by its cause; begins anew.
    fn take(&self) -> Vec<(&'static str, u64)> {
        let all = std::mem::take(&mut *self.locked());
        all.into_iter().map(|(label, refused)| (label, refused.untold)).filter(|(_, n)| *n > 0).collect()
    }

    /// Sums up from time to time, in the audit record as well, without end.
    pub(super) async fn sum_up(&self, audit: &Audit) {
        loop {
            tokio::time::sleep(SUM_UP_EVERY).await;
            audit.sum_up();
            for (reason, refused) in self.take() {
                let within_s = SUM_UP_EVERY.as_secs();
                tracing::warn!(
                    reason,
                    refused,
                    within_s,
                    "further connections were refused, and not told one by one"
                );
            }
        }
    }

    fn locked(&self) -> MutexGuard<'_, BTreeMap<&'static str, Refused>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_each_cause_and_address_is_told_and_the_rest_is_counted() {
        let refusals = Refusals::default();
        let told = |label, n: u32| refusals.is_first(label, IpAddr::from((0x0a00_0000 + n).to_be_bytes()));
        assert!(told("timeout", 1) && told("garbage", 1) && told("timeout", 2));
        assert!(!told("timeout", 1) && !told("timeout", 2));
        assert!(
            !refusals.is_first("timeout", "::ffff:10.0.0.1".parse().unwrap()),
            "IPv4 over an IPv6 listener"
        );
        let everywhere = (0..1000).filter(|n| told("timeout", 100 + n)).count();
        assert_eq!(everywhere, ADDRESSES_MAX - 2);
        assert_eq!(refusals.take(), [("timeout", 3 + 1000 - everywhere as u64)]);
        assert!(refusals.take().is_empty());
        assert!(told("timeout", 1), "and the first is told again");
    }
}
