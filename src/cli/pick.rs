//! Which migration is meant: by its id, the beginning of its id, or its VM. Asks the agent for those
//! that it knows.

use std::collections::BTreeMap;

use anyhow::{Context, bail};
use uuid::Uuid;

use super::client::Client;
use super::progress;
use crate::api::Migration;

/// So many of those that may be meant are shown.
const SHOWN_MAX: usize = 10;

/// The migration that `wanted` names.
pub(super) async fn migration(client: &Client, wanted: &str) -> anyhow::Result<Uuid> {
    if let Ok(id) = wanted.parse() {
        return Ok(id);
    }
    let all: Vec<Migration> = client.get("/v1/migrations").await?;
    among(&all, wanted)
}

/// Among those that the agent knows, oldest first. Of a VM it is the one that is not at its end, else the
/// last one.
pub(super) fn among(all: &[Migration], wanted: &str) -> anyhow::Result<Uuid> {
    let of_vm: Vec<&Migration> = all.iter().filter(|p| p.vm == wanted).collect();
    let open = of_vm.iter().rev().find(|p| !p.is_over());
    if let Some(found) = open.or(of_vm.last()) {
        return Ok(found.id);
    }
    let known = all.iter().map(|p| Known { id: p.id, told: progress::way(p) });
    by_beginning(known, wanted)?.with_context(|| {
        format!("{wanted} is neither a migration nor a VM that was moved; `vmferry list` shows those that there are")
    })
}

/// What an id may mean.
pub(super) struct Known {
    pub(super) id: Uuid,
    /// In words, beside the id.
    pub(super) told: String,
}

/// The one whose id begins so; none if there is none.
/// Errors: there are several, which are listed.
pub(super) fn by_beginning(known: impl Iterator<Item = Known>, wanted: &str) -> anyhow::Result<Option<Uuid>> {
    let begin = wanted.to_ascii_lowercase();
    let begins = |one: &Known| !begin.is_empty() && one.id.to_string().starts_with(&begin);
    only(known.filter(begins), wanted)
}

/// The only one of those that `wanted` means.
/// Errors: there are several, which are listed.
pub(super) fn only(meant: impl Iterator<Item = Known>, wanted: &str) -> anyhow::Result<Option<Uuid>> {
    let meant: BTreeMap<Uuid, String> = meant.map(|one| (one.id, one.told)).collect();
    if meant.len() <= 1 {
        return Ok(meant.into_keys().next());
    }
    let shown = meant.iter().take(SHOWN_MAX).map(|(id, told)| format!("\n  {id}  {told}"));
    let more = meant.len().saturating_sub(SHOWN_MAX);
    let more = if more > 0 { format!("\n  and {more} more") } else { String::new() };
    bail!(
        "{wanted} may be {} of these; write more of the id:{}{more}",
        meant.len(),
        shown.collect::<String>()
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::api::Role;
    use crate::migrate::progress::{Outcome, Progress};

    fn known(id: u128, vm: &str, over: bool) -> Migration {
        let mut progress = Progress::new(Uuid::from_u128(id << 96), vm, Role::Source, "bravo");
        progress.outcome = over.then(|| Outcome::Moved { leftovers: Vec::new() });
        Migration::new(progress, "alpha")
    }

    #[test]
    fn an_id_its_beginning_or_a_vm() {
        let all = [
            known(0xabcd_0001, "web1", true),
            known(0xabcd_0002, "web1", false),
            known(0x1234_0003, "web1", true),
            known(0x1234_0004, "db", true),
            known(0x5678_0005, "db", true),
        ];
        let found = |wanted: &str| among(&all, wanted).map(|id| id.as_u128() >> 96);
        assert_eq!(found("web1").unwrap(), 0xabcd_0002, "the one under way");
        assert_eq!(found("db").unwrap(), 0x5678_0005, "the last one");
        assert_eq!(found("ABCD0001").unwrap(), 0xabcd_0001);
        assert_eq!(found("5").unwrap(), 0x5678_0005);
        let several = found("abcd").unwrap_err().to_string();
        assert!(
            several.starts_with("abcd may be 2 of these; write more of the id:\n  abcd0001-"),
            "{several}"
        );
        assert!(several.ends_with("web1 to bravo"), "{several}");
        for nothing in ["", "web", "9", "5678-"] {
            assert!(found(nothing).unwrap_err().to_string().contains("neither"), "{nothing}");
        }
    }
}
