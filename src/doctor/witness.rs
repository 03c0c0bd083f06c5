//! The witness: its files, and whether each endpoint answers and is of the same etcd. Whether the other host has the
//! same one only `vmferry check` can tell.

use super::finding::Finding;
use crate::config::Config;
use crate::error_chain::chain;
use crate::witness::Etcd;

const FILES: &str =
    "see [witness]: the agent's user must be able to read them, and own the key (docs/witness.md)";
const ENDPOINT: &str = "see `endpoints` of [witness], the etcd there, and the way to it (docs/witness.md)";

pub(super) async fn witness(config: &Config) -> Vec<Finding> {
    let Some(table) = &config.witness else { return Vec::new() };
    let etcd = Etcd::new(table);
    if let Err(e) = etcd.check_files() {
        return vec![Finding::failed("witness", chain(&e), FILES)];
    }
    let seen = etcd.each().await;
    let usual = etcd.usual();
    let findings = seen.into_iter().map(|seen| {
        let what = format!("witness {}", seen.endpoint);
        match (seen.cluster, &usual) {
            (Ok(cluster), Some(usual)) if cluster != *usual => {
                let text = format!("is of another etcd, cluster {cluster}; others are of {usual}");
                Finding::failed(what, text, "`endpoints` of [witness] are the members of one etcd")
            }
            (Ok(cluster), _) => Finding::ok(what, format!("answers, cluster {cluster}")),
            (Err(why), Some(_)) => Finding::warning(what, why, ENDPOINT),
            (Err(why), None) => Finding::failed(what, why, ENDPOINT),
        }
    });
    findings.collect()
}
