//! `vmferry limit`: what may be sent in a second, shown and changed.

use std::process::ExitCode;

use anyhow::bail;
use hyper::Method;
use indicatif::HumanBytes;
use uuid::Uuid;

use super::args::{Limit, LimitArgs};
use super::client::Client;
use super::{pick, show};
use crate::api::{Limits, MigrationLimit, PeerLimit, PeerLimitRequest, ShareRequest, migration_path};
use crate::rate::Rate;

pub(super) async fn run(client: &Client, args: LimitArgs) -> anyhow::Result<ExitCode> {
    let mut all: Limits = client.get("/v1/limits").await?;
    if let Some(peer) = &args.peer {
        all.migrations.clear();
        all.peers.retain(|p| p.peer == *peer);
        if let Some(Limit(limit_bytes_per_s)) = args.rate {
            let request = PeerLimitRequest { limit_bytes_per_s };
            let path = format!("/v1/peers/{peer}/limit");
            all.peers = vec![client.call(Method::POST, &path, &request).await?];
        } else if all.peers.is_empty() {
            bail!("this agent knows no peer {peer}; see `vmferry status` for those that it knows");
        }
    } else if let Some(wanted) = &args.migration {
        all.peers.clear();
        let id = match find(&all.migrations, wanted) {
            Some(id) => id,
            None => pick::migration(client, wanted).await?,
        };
        all.migrations.retain(|m| m.id == id);
        let weight = args.weight.map(TryInto::try_into).transpose()?;
        let limit = args.rate.map(|Limit(limit)| limit);
        if limit.is_some() || weight.is_some() {
            let request = ShareRequest { limit_bytes_per_s: limit, weight };
            let path = format!("{}/limit", migration_path(id));
            all.migrations = vec![client.call(Method::POST, &path, &request).await?];
        }
    } else if args.rate.is_some() {
        bail!("a limit for what? name a migration, the VM that is being moved, or --peer PEER");
    }
    if args.json {
        show::json(&all)?
    } else {
        show_limits(&all)
    }
    Ok(ExitCode::SUCCESS)
}

/// The migration of a VM while that is being moved away.
fn find(under_way: &[MigrationLimit], wanted: &str) -> Option<Uuid> {
    under_way.iter().find(|m| m.vm == wanted).map(|m| m.id)
}

fn show_limits(all: &Limits) {
    for PeerLimit { peer, limit_bytes_per_s } in &all.peers {
        println!("to {peer}: {}", limit_text(*limit_bytes_per_s));
    }
    for m in &all.migrations {
        println!(
            "{} ({} to {}): {}, weight {}, now {}/s",
            m.id,
            m.vm,
            m.peer,
            limit_text(m.limit_bytes_per_s),
            u16::from(m.weight),
            HumanBytes(m.rate_bytes_per_s)
        );
    }
    if all.peers.is_empty() && all.migrations.is_empty() {
        println!("no peers, and no migration under way");
    }
}

fn limit_text(limit: Option<Rate>) -> String {
    limit.map_or_else(|| "no limit".into(), |limit| limit.to_string())
}
