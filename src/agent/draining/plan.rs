//! Which VMs a drain has to move, and what would become of each.

use std::sync::Arc;

use futures_util::stream::{self, StreamExt};

use super::state::DrainError;
use crate::agent::running::Agent;
use crate::drain::{Drain, Guest, GuestState, Limits, Request, forecast};
use crate::migrate::problem::Problem;
use crate::migrate::vm_state::{Here, VmState};
use uuid::Uuid;

/// What `check` says of a VM and a peer.
#[derive(Debug, Clone)]
pub(crate) struct Checked {
    pub(crate) peer: String,
    pub(crate) findings: Vec<Problem>,
}

impl Checked {
    pub(crate) fn may_go(&self) -> bool {
        !self.findings.iter().any(Problem::is_refusal)
    }
}

/// A drain that nobody begins: what it would do, and what keeps VMs from it. For each VM the peers in the order in
/// which it would be tried there, up to the first that would take it.
pub(crate) async fn dry_run(
    agent: &Arc<Agent>,
    request: Request,
) -> Result<(Drain, Vec<(String, Vec<Checked>)>), DrainError> {
    let drain = planned(agent, request).await?;
    let looks = forecast(&drain).into_iter().map(|(vm, first)| {
        let (agent, request) = (Arc::clone(agent), drain.request.clone());
        async move {
            let mut checked: Vec<Checked> = Vec::new();
            let others = request.to.names().iter().filter(|name| **name != first).cloned();
            for peer in std::iter::once(first.clone()).chain(others) {
                let findings = crate::migrate::check(&agent.host, &vm, &peer, &request.options).await;
                checked.push(Checked { peer, findings });
                if checked.last().is_some_and(Checked::may_go) {
                    break;
                }
            }
            (vm, checked)
        }
    });
    let checked = stream::iter(looks).buffered(drain.limits.at_once).collect().await;
    Ok((drain, checked))
}

/// A drain as it would begin now.
pub(super) async fn planned(agent: &Arc<Agent>, request: Request) -> Result<Drain, DrainError> {
    let config = &agent.host.config;
    for name in request.to.names() {
        agent.host.find_peer(name).map_err(DrainError::Peer)?;
    }
    let most = config.drain.at_once;
    let asked = request.at_once.map_or(most, usize::from);
    if asked > most {
        return Err(DrainError::AtOnce { asked, most });
    }
    let limits = Limits { at_once: asked, per_peer: config.drain.at_once_per_peer };
    let guests = guests(agent, &request).await;
    let now = time::OffsetDateTime::now_utc().unix_timestamp();
    Ok(Drain::new(Uuid::new_v4(), request, limits, guests, now))
}

/// Those of the selection that are on this host, or are about to come.
async fn guests(agent: &Arc<Agent>, request: &Request) -> Vec<Guest> {
    let states = agent.vm_states.look_anew(&agent.host).await;
    let found = states.iter().filter(|state| request.selects(&state.vm)).filter_map(|s| guest(agent, s));
    let mut guests: Vec<Guest> = found.collect();
    let waiting: Vec<String> =
        guests.iter().filter(|g| g.state == GuestState::Waiting).map(|g| g.vm.clone()).collect();
    let sizes = agent.vm_states.disk_bytes(&agent.host, &waiting).await;
    for guest in &mut guests {
        guest.disk_bytes = sizes.get(&guest.vm).copied();
    }
    guests
}

fn guest(agent: &Agent, state: &VmState) -> Option<Guest> {
    let guest = |ran| Guest::new(&state.vm, None, ran);
    Some(match state.here {
        Here::Runs => guest(true),
        Here::Holds | Here::NotBegun => guest(false),
        Here::InMigration => match state.migration.and_then(|id| agent.registry.get(id)) {
            Some(entry) => {
                let progress = entry.progress.now();
                guest(!progress.paused).busy(progress.id)
            }
            // A check has it for a moment.
            None => guest(true),
        },
        Here::Unknown => guest(true),
        Here::Receives => {
            let cause = "it comes here by a migration that is not vmferry's".to_owned();
            Guest { state: GuestState::Stays { cause }, ..guest(true) }
        }
        Here::Waits | Here::Spent | Here::GivenAway | Here::NoQemu => return None,
    })
}
