//! The local API of replicas. Turns requests into calls on the agent.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::extract::connect_info::ConnectInfo;
use axum::http::StatusCode;
use axum::routing::{get, post};

use super::call::Call;
use super::extract::{Agents, Callers, Sent};
use super::gate::Gate;
use super::refusal::Refusal;
use super::running::Agent;
use crate::api::{EndReplicaRequest, Replica, ReplicaEnd};
use crate::migrate::problem::ProblemKind;
use crate::migrate::replicas;

/// The routes.
pub(super) fn router(agent: Arc<Agent>) -> Gate {
    let gate = Gate::new(agent).route(Call::ListReplicas, "/v1/replicas", get(list));
    gate.route(Call::EndReplica, "/v1/replicas/end", post(end))
}

async fn list(State(agent): Agents) -> Json<Vec<Replica>> {
    Json(replicas::list(&agent.host))
}

async fn end(
    State(agent): Agents,
    ConnectInfo(caller): Callers,
    Sent(EndReplicaRequest { vm, to, images }): Sent<EndReplicaRequest>,
) -> Result<Json<ReplicaEnd>, Refusal> {
    tracing::info!(uid = caller.uid, pid = caller.pid, vm, to, images, "end of a replica asked for");
    match replicas::end(&agent.host, &vm, &to, images).await {
        Ok(left) => Ok(Json(ReplicaEnd { left })),
        Err(problem) => {
            let status = match problem.kind {
                ProblemKind::PeerUnknown | ProblemKind::VmUnknown => StatusCode::NOT_FOUND,
                _ => StatusCode::CONFLICT,
            };
            Err(Refusal::new(status, problem.text, problem.remedy))
        }
    }
}
