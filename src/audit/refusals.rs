//! What was refused, for the record: of each reason and source the first is recorded, the rest is counted. Pure.

use std::collections::BTreeMap;

/// Sources that are told apart for each reason.
const SOURCES_MAX: usize = 16;

/// Of one reason.
#[derive(Debug, Default)]
struct Refused {
    sources: Vec<String>,
    further: u64,
}

/// Those since they were last summed up. Reasons are words of this program: there are few.
#[derive(Debug, Default)]
pub(super) struct Refusals(BTreeMap<String, Refused>);

impl Refusals {
    /// Whether it is to be recorded for itself.
    pub(super) fn is_first(&mut self, source: &str, reason: &str) -> bool {
        let refused = self.0.entry(reason.to_owned()).or_default();
        let is_first = refused.sources.len() < SOURCES_MAX && !refused.sources.iter().any(|s| s == source);
        if is_first {
            refused.sources.push(source.to_owned());
        } else {
            refused.further += 1;
        }
        is_first
    }

    /// How many were not, by their reason; begins anew.
    pub(super) fn take(&mut self) -> Vec<(String, u64)> {
        let all = std::mem::take(&mut self.0);
        all.into_iter().map(|(reason, refused)| (reason, refused.further)).filter(|(_, n)| *n > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_a_few_lines_and_a_number() {
        let mut refusals = Refusals::default();
        let recorded = (0..10_000).filter(|n| refusals.is_first(&format!("10.0.0.{}", n % 200), "timeout"));
        assert_eq!(recorded.count(), SOURCES_MAX);
        assert!(refusals.is_first("10.0.0.1", "garbage"));
        assert_eq!(refusals.take(), [("timeout".to_owned(), 10_000 - SOURCES_MAX as u64)]);
        assert!(refusals.is_first("10.0.0.1", "timeout"), "and the first is recorded again");
    }
}
