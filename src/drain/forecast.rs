//! What a drain would do if everything went well: the machine itself, played to its end.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::guest::GuestState;
use super::machine::{Drain, End};

/// Where each VM would go, in the order in which they would begin, if each took as long as its disks are large.
pub fn forecast(drain: &Drain) -> Vec<(String, String)> {
    let mut played = drain.clone();
    let (mut now, mut begun, mut ends) = (0_u64, Vec::new(), BTreeMap::<(u64, usize), Uuid>::new());
    // Others' migrations are not waited for.
    for guest in &mut played.guests {
        if matches!(guest.state, GuestState::Busy { .. }) {
            guest.state = GuestState::Waiting;
        }
    }
    loop {
        while let Some(wanted) = played.wanted() {
            let (vm, peer) = (wanted.vm.to_owned(), wanted.peer.to_owned());
            let size = played.guests.iter().find(|guest| guest.vm == vm).and_then(|guest| guest.disk_bytes);
            let migration = Uuid::from_u128(begun.len() as u128);
            played.begin(&vm, &peer, migration);
            ends.insert((now.saturating_add(size.unwrap_or(0)), begun.len()), migration);
            begun.push((vm, peer));
        }
        let Some(((at, _), migration)) = ends.pop_first() else { return begun };
        now = at;
        played.ended(migration, End::Moved { left: false });
    }
}
