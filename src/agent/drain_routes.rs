//! The local API of drains. Turns requests into calls on the agent.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::State;
use axum::extract::connect_info::ConnectInfo;
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Extension, Json};
use futures_util::stream;
use tokio::sync::watch;

use super::call::Call;
use super::draining::{self, Checked, DrainError, Shown};
use super::extract::{Agents, Callers, Line, Sent, answer_lines};
use super::foretell;
use super::gate::{About, Gate};
use super::refusal::Refusal;
use super::running::Agent;
use crate::api::{DrainPlan, DrainRequest, DrainStage, DrainStatus, Event, PeerCheck};
use crate::error_chain::chain;
use crate::migrate::problem::ProblemKind;

/// The routes.
pub(super) fn router(agent: Arc<Agent>) -> Gate {
    Gate::new(agent)
        .route(Call::ShowDrain, "/v1/drain", get(show))
        .route(Call::Drain, "/v1/drain", post(begin))
        .route(Call::PlanDrain, "/v1/drain/plan", post(plan))
        .route(Call::FollowDrain, "/v1/drain/events", get(events))
        .route(Call::CancelDrain, "/v1/drain/cancel", post(cancel))
}

impl From<DrainError> for Refusal {
    fn from(error: DrainError) -> Self {
        let status = match &error {
            DrainError::Stopping => StatusCode::SERVICE_UNAVAILABLE,
            DrainError::Peer(problem) if problem.kind == ProblemKind::PeerUnknown => StatusCode::NOT_FOUND,
            DrainError::AtOnce { .. } => StatusCode::BAD_REQUEST,
            DrainError::Record(_) => StatusCode::INTERNAL_SERVER_ERROR,
            DrainError::None => StatusCode::NOT_FOUND,
            DrainError::Peer(_) | DrainError::UnderWay(_) => StatusCode::CONFLICT,
        };
        Self::new(status, chain(&error), error.remedy())
    }
}

fn status(shown: Shown) -> DrainStatus {
    DrainStatus::new(shown.drain, shown.trouble)
}

fn no_drain() -> Refusal {
    let remedy = "begin one with `vmferry drain --to PEER`";
    Refusal::new(StatusCode::NOT_FOUND, "this host was never drained", remedy)
}

async fn show(State(agent): Agents) -> Result<Json<DrainStatus>, Refusal> {
    agent.draining.now().map(|shown| Json(status(shown))).ok_or_else(no_drain)
}

async fn begin(
    State(agent): Agents,
    ConnectInfo(caller): Callers,
    Sent(request): Sent<DrainRequest>,
) -> Result<(StatusCode, Extension<About>, Json<DrainStatus>), Refusal> {
    tracing::info!(uid = caller.uid, pid = caller.pid, to = ?request.to.names(), "drain asked for");
    let (shown, is_new) = draining::begin(&agent, request).await?;
    let code = if is_new { StatusCode::CREATED } else { StatusCode::OK };
    Ok((code, Extension(About(shown.drain.id)), Json(status(shown))))
}

async fn plan(State(agent): Agents, Sent(request): Sent<DrainRequest>) -> Result<Json<DrainPlan>, Refusal> {
    let (drain, found) = draining::dry_run(&agent, request).await?;
    let check = |checked: Checked| PeerCheck { peer: checked.peer, problems: checked.findings };
    // The way to a peer is tried once.
    let (mut rates, mut all) = (BTreeMap::new(), Vec::new());
    for (vm, checks) in found {
        let foretold = match checks.iter().find(|checked| checked.may_go()) {
            None => None,
            Some(Checked { peer, .. }) => {
                if !rates.contains_key(peer) {
                    rates.insert(peer.clone(), foretell::rate(&agent, peer).await);
                }
                let rate = rates[peer].clone();
                Some(foretell::foretell(&agent, (&vm, peer), &drain.request.options, rate).await)
            }
        };
        all.push((vm, checks.into_iter().map(check).collect(), foretold));
    }
    Ok(Json(DrainPlan::new(drain, all)))
}

async fn cancel(
    State(agent): Agents,
    ConnectInfo(caller): Callers,
) -> Result<(StatusCode, Extension<About>), Refusal> {
    tracing::info!(uid = caller.uid, pid = caller.pid, "end of the drain asked for");
    let drain = agent.draining.cancel()?;
    Ok((StatusCode::ACCEPTED, Extension(About(drain))))
}

/// One line of JSON for each change, until the drain's end.
async fn events(State(agent): Agents) -> Result<Response, Refusal> {
    let mut watch = agent.draining.watch();
    if watch.borrow().is_none() {
        return Err(no_drain());
    }
    watch.mark_changed();
    let lines = stream::unfold(Some(watch), next_line);
    Ok(answer_lines(lines))
}

type Following = watch::Receiver<Option<Shown>>;

async fn next_line(watch: Option<Following>) -> Option<(Line, Option<Following>)> {
    let mut watch = watch?;
    watch.changed().await.ok()?;
    let now = status(watch.borrow_and_update().clone()?);
    let goes_on = now.stage != DrainStage::Ended;
    Some((Event::line(now, !goes_on), goes_on.then_some(watch)))
}
