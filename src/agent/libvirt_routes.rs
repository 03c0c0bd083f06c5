//! The local API of migrations that libvirt makes itself. Turns requests into calls on the agent.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::extract::connect_info::ConnectInfo;
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::{get, post};
use futures_util::stream;

use super::call::Call;
use super::extract::{Agents, Callers, Id, Line, Sent, answer_lines};
use super::gate::Gate;
use super::refusal::Refusal;
use super::running::Agent;
use crate::api::{Event, LibvirtLook, LibvirtMigration, LibvirtRequest, LibvirtStage, Told};
use crate::error_chain::chain;
use crate::libvirt::{Follower, LibvirtError};

/// A state is told again after this long without a change, so that a follower that is gone is noticed.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// The routes.
pub(super) fn router(agent: Arc<Agent>) -> Gate {
    Gate::new(agent)
        .route(Call::ListLibvirt, "/v1/libvirt", get(list))
        .route(Call::MigrateLibvirt, "/v1/libvirt", post(prepare))
        .route(Call::CheckLibvirt, "/v1/libvirt/check", post(check))
        .route(Call::FollowLibvirt, "/v1/libvirt/{id}/events", get(events))
        .route(Call::EndLibvirt, "/v1/libvirt/{id}/end", post(end))
}

impl From<LibvirtError> for Refusal {
    fn from(error: LibvirtError) -> Self {
        let status = match error {
            LibvirtError::Unknown(_) | LibvirtError::NoPeer(_) => StatusCode::NOT_FOUND,
            _ => StatusCode::CONFLICT,
        };
        Self::new(status, chain(&error), error.remedy())
    }
}

async fn list(State(agent): Agents) -> Json<Vec<LibvirtMigration>> {
    Json(agent.libvirt.all())
}

async fn prepare(
    State(agent): Agents,
    ConnectInfo(caller): Callers,
    Sent(request): Sent<LibvirtRequest>,
) -> Result<(StatusCode, Json<LibvirtMigration>), Refusal> {
    let (uid, pid) = (caller.uid, caller.pid);
    tracing::info!(uid, pid, domain = request.domain, to = request.to, "a migration of libvirt's asked for");
    if agent.stopping.is_cancelled() || agent.host.freeze.is_on() {
        return Err(Refusal::leaving());
    }
    Ok((StatusCode::CREATED, Json(agent.libvirt.prepare(&request).await?)))
}

async fn check(
    State(agent): Agents,
    Sent(request): Sent<LibvirtRequest>,
) -> Result<Json<LibvirtLook>, Refusal> {
    let (rpc, lacks) = agent.libvirt.look(&request).await?;
    Ok(Json(LibvirtLook { rpc, lacks }))
}

async fn end(
    State(agent): Agents,
    ConnectInfo(caller): Callers,
    Id(id): Id,
    Sent(told): Sent<Told>,
) -> Result<Json<LibvirtMigration>, Refusal> {
    let (uid, pid) = (caller.uid, caller.pid);
    tracing::info!(uid, pid, migration = %id, ?told, "the end of a migration of libvirt's");
    Ok(Json(agent.libvirt.end(id, told).await?))
}

/// A line of JSON for each change and each second, until the end. Who reads them keeps it.
async fn events(State(agent): Agents, Id(id): Id) -> Result<Response, Refusal> {
    let mut follower = agent.libvirt.follow(id)?;
    follower.states.mark_changed();
    let lines = stream::unfold(Some(follower), next_line);
    Ok(answer_lines(lines))
}

async fn next_line(follower: Option<Follower>) -> Option<(Line, Option<Follower>)> {
    let mut follower = follower?;
    // Without a change the same is told again.
    let _ = tokio::time::timeout(TELL_EVERY, follower.states.changed()).await;
    let state = follower.states.borrow_and_update().clone();
    let goes_on = state.stage != LibvirtStage::Ended;
    Some((Event::line(state, !goes_on), goes_on.then_some(follower)))
}
