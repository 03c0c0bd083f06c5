//! Which migration is meant: by its id, the beginning of its id, or its VM. Asks the agent for those
//! that it knows.

use anyhow::{Context, bail};
use uuid::Uuid;

use super::client::Client;
use crate::api::Migration;

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
    let mut ids: Vec<Uuid> = all.iter().map(|p| p.id).filter(|id| begins_with(id, wanted)).collect();
    ids.sort_unstable();
    ids.dedup();
    match ids[..] {
        [id] => Ok(id),
        [] => None.with_context(|| {
            format!("{wanted} is neither a migration nor a VM that was moved; `vmferry list` shows those that there are")
        }),
        _ => bail!("{} migrations begin with {wanted}; write more of the id", ids.len()),
    }
}

fn begins_with(id: &Uuid, wanted: &str) -> bool {
    !wanted.is_empty() && id.to_string().starts_with(&wanted.to_ascii_lowercase())
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
        assert!(found("abcd").unwrap_err().to_string().starts_with("2 migrations begin with"));
        for nothing in ["", "web", "9", "5678-"] {
            assert!(found(nothing).unwrap_err().to_string().contains("neither"), "{nothing}");
        }
    }
}
