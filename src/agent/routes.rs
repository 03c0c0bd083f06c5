//! The local API: HTTP+JSON on a unix socket, each changing call with its caller in the log. Turns requests into calls on the agent and knows nothing else.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::connect_info::ConnectInfo;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use futures_util::stream;
use tokio::sync::watch;
use tokio::time::timeout;
use uuid::Uuid;

use super::call::Call;
use super::extract::{Agents, Callers, Id, Line, Sent, answer_lines};
use super::foretell;
use super::gate::{About, BODY_BYTES_MAX, Gate};
use super::limits::{self, NoShare};
use super::once;
use super::ping;
use super::qemu_command;
use super::refusal::Refusal;
use super::registry::NoCancel;
use super::running::{Agent, Asked};
use crate::api::{
    CheckReport, CheckRequest, Course, Event, ForceRequest, Forward, ForwardRequest, Forwards, Limits,
    MigrateRequest, Migration, MigrationLimit, MigrationPlan, Names, OPENAPI, PeerLimit, PeerLimitRequest,
    Ping, PingRequest, QemuCommand, QemuCommandRequest, RecoverQuery, Recovery, ShareRequest, Status, Target,
    unknown_remedy,
};
use crate::error_chain::chain;
use crate::forward::AddError;
use crate::migrate::known_vms;
use crate::migrate::problem::Problem;
use crate::migrate::progress::Progress;
use crate::migrate::recover::{self as recovery, Asked as RecoverAsked, NotForced};

/// How long it may take.
const BODY_DEADLINE: Duration = Duration::from_secs(10);

/// A request's body is small and there soon.
async fn whole_body(request: Request, next: Next) -> Response {
    let (head, body) = request.into_parts();
    match timeout(BODY_DEADLINE, to_bytes(body, BODY_BYTES_MAX)).await {
        Ok(Ok(body)) => next.run(Request::from_parts(head, Body::from(body))).await,
        Ok(Err(_)) => {
            let remedy = format!("send at most {BODY_BYTES_MAX} bytes");
            Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "the request is too long", remedy).into_response()
        }
        Err(_) => {
            let remedy = format!("send it within {} s", BODY_DEADLINE.as_secs());
            Refusal::new(StatusCode::REQUEST_TIMEOUT, "the request's body did not come", remedy)
                .into_response()
        }
    }
}

pub(super) fn router(agent: Arc<Agent>) -> Gate {
    let description = || async { ([(header::CONTENT_TYPE, "application/json")], OPENAPI) };
    Gate::new(agent)
        .route(Call::Status, "/v1/status", get(status))
        .route(Call::Names, "/v1/names", get(names))
        .route(Call::Description, "/v1/openapi.json", get(description))
        .route(Call::Check, "/v1/check", post(check))
        .route(Call::ListMigrations, "/v1/migrations", get(list))
        .route(Call::Migrate, "/v1/migrations", post(migrate))
        .route(Call::PlanMigration, "/v1/migrations/plan", post(plan))
        .route(Call::ShowMigration, "/v1/migrations/{id}", get(one))
        .route(Call::ShowTimeline, "/v1/migrations/{id}/timeline", get(timeline))
        .route(Call::FollowMigration, "/v1/migrations/{id}/events", get(events))
        .route(Call::Cancel, "/v1/migrations/{id}/cancel", post(cancel))
        .route(Call::LimitMigration, "/v1/migrations/{id}/limit", post(share))
        .route(Call::ListLimits, "/v1/limits", get(all_limits))
        .route(Call::LimitPeer, "/v1/peers/{name}/limit", post(limit_peer))
        .route(Call::Ping, "/v1/peers/{name}/ping", post(ping))
        .route(Call::QemuCommand, "/v1/vms/{vm}/qemu-command", post(qemu_command))
        .route(Call::ListForwards, "/v1/forwards", get(forwards))
        .route(Call::AddForward, "/v1/forwards", post(add_forward))
        .route(Call::EndForward, "/v1/forwards/{id}/end", post(end_forward))
        .route(Call::LimitForward, "/v1/forwards/{id}/limit", post(limit_forward))
        .route(Call::LookAtRecovery, "/v1/recover", get(look))
        .route(Call::Recover, "/v1/recover", post(recover))
        .route(Call::Force, "/v1/recover/{id}", post(force))
}

/// What is served: these routes and others, for bodies within their limits.
pub(super) fn served<const N: usize>(gates: [Gate; N]) -> Router {
    let all = gates.into_iter().fold(Router::new(), |all, gate| all.merge(gate.open()));
    all.fallback(|| async {
        Refusal::new(
            StatusCode::NOT_FOUND,
            "no such path",
            "see GET /v1/openapi.json for those that there are",
        )
    })
    .method_not_allowed_fallback(|| async {
        Refusal::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "that cannot be done with this path",
            "see GET /v1/openapi.json for what can",
        )
    })
    .layer(middleware::from_fn(whole_body))
}

async fn status(State(agent): Agents) -> Json<Status> {
    Json(agent.status().await)
}

async fn names(State(agent): Agents) -> Json<Names> {
    let config = &agent.host.config;
    Json(Names { vms: known_vms::names(config), peers: config.peers.keys().cloned().collect() })
}

async fn check(
    State(agent): Agents,
    Sent(request): Sent<CheckRequest>,
) -> Result<Json<CheckReport>, Refusal> {
    let (vm, to) = (request.vm.clone(), request.to.clone());
    let problems = crate::migrate::check(&agent.host, &vm, &to, &request.into()).await;
    Ok(Json(CheckReport { problems }))
}

async fn list(State(agent): Agents) -> Json<Vec<Migration>> {
    Json(agent.registry.all().into_iter().map(|p| agent.shown(p)).collect())
}

async fn migrate(
    State(agent): Agents,
    ConnectInfo(caller): Callers,
    headers: HeaderMap,
    Sent(request): Sent<MigrateRequest>,
) -> Result<(StatusCode, Extension<About>, Json<Migration>), Refusal> {
    let id = once::migration(&headers, caller.uid)?;
    tracing::info!(uid = caller.uid, pid = caller.pid, vm = request.vm, to = request.to, "migrate asked for");
    match agent.migrate_once(id, request) {
        Asked::Begun(progress) => {
            Ok((StatusCode::CREATED, Extension(About(progress.id)), Json(agent.shown(progress))))
        }
        Asked::Before(progress) => {
            Ok((StatusCode::OK, Extension(About(progress.id)), Json(agent.shown(progress))))
        }
        Asked::OtherwiseBefore(progress) => Err(once::another(&progress)),
        Asked::Leaving => Err(Refusal::leaving()),
    }
}

/// What a migration would do.
async fn plan(
    State(agent): Agents,
    Sent(MigrateRequest { vm, to, options }): Sent<MigrateRequest>,
) -> Result<Json<MigrationPlan>, Refusal> {
    let problems = crate::migrate::check(&agent.host, &vm, &to, &options).await;
    let foretold = match problems.iter().any(Problem::is_refusal) {
        true => None,
        false => {
            let rate = foretell::rate(&agent, &to).await;
            Some(foretell::foretell(&agent, (&vm, &to), &options, rate).await)
        }
    };
    Ok(Json(MigrationPlan { problems, foretold }))
}

async fn timeline(State(agent): Agents, Id(id): Id) -> Result<Json<Course>, Refusal> {
    let entry = agent.registry.get(id).ok_or_else(|| Refusal::unknown(id))?;
    Ok(Json(Course::new(agent.shown(entry.progress.now()), entry.progress.timeline())))
}

async fn one(State(agent): Agents, Id(id): Id) -> Result<Json<Migration>, Refusal> {
    let entry = agent.registry.get(id).ok_or_else(|| Refusal::unknown(id))?;
    Ok(Json(agent.shown(entry.progress.now())))
}

/// One line of JSON for each change, until the migration's end.
async fn events(State(agent): Agents, Id(id): Id) -> Result<Response, Refusal> {
    let entry = agent.registry.get(id).ok_or_else(|| Refusal::unknown(id))?;
    let mut watch = entry.progress.watch();
    watch.mark_changed();
    let lines = stream::unfold(Some((agent, watch)), next_line);
    Ok(answer_lines(lines))
}

type Following = (Arc<Agent>, watch::Receiver<Progress>);

async fn next_line(following: Option<Following>) -> Option<(Line, Option<Following>)> {
    let (agent, mut watch) = following?;
    watch.changed().await.ok()?;
    let migration = agent.shown(watch.borrow_and_update().clone());
    let is_over = migration.is_over();
    Some((Event::line(migration, is_over), (!is_over).then_some((agent, watch))))
}

async fn cancel(
    State(agent): Agents,
    ConnectInfo(caller): Callers,
    Id(id): Id,
) -> Result<StatusCode, Refusal> {
    tracing::info!(uid = caller.uid, pid = caller.pid, migration = %id, "cancel asked for");
    agent.registry.cancel(id).map(|()| StatusCode::ACCEPTED).map_err(|no| match no {
        NoCancel::Unknown => Refusal::unknown(id),
        NoCancel::NotSource => {
            Refusal::conflict("this host is the migration's destination", "cancel it at the source")
        }
        NoCancel::TooLate => Refusal::conflict(
            "the guest is already the destination's, or the migration has ended",
            "move it back with a migration the other way",
        ),
    })
}

async fn all_limits(State(agent): Agents) -> Json<Limits> {
    Json(limits::all(&agent.host, &agent.registry))
}

async fn limit_peer(
    State(agent): Agents,
    ConnectInfo(caller): Callers,
    Path(name): Path<String>,
    Sent(request): Sent<PeerLimitRequest>,
) -> Result<Json<PeerLimit>, Refusal> {
    let limit = request.limit_bytes_per_s.map(u64::from);
    tracing::info!(uid = caller.uid, pid = caller.pid, peer = name, limit, "limit asked for");
    let limited = agent.peer_limits.limit(&agent.host, &name, request.limit_bytes_per_s);
    limited.map(Json).map_err(|p| Refusal::new(StatusCode::NOT_FOUND, p.text, p.remedy))
}

async fn ping(
    State(agent): Agents,
    Path(name): Path<String>,
    Sent(request): Sent<PingRequest>,
) -> Result<Json<Ping>, Refusal> {
    let Some(config) = agent.host.config.peers.get(&name) else {
        return Err(Refusal::new(
            StatusCode::NOT_FOUND,
            format!("this agent knows no peer {name}"),
            "see `vmferry status` for the peers that it knows",
        ));
    };
    Ok(Json(ping::ping(&agent.host, &name, config, &request).await))
}

async fn qemu_command(
    State(agent): Agents,
    Path(vm): Path<String>,
    Sent(request): Sent<QemuCommandRequest>,
) -> Result<Json<QemuCommand>, Refusal> {
    Ok(Json(qemu_command::qemu_command(&agent.host, vm, request).await?))
}

async fn share(
    State(agent): Agents,
    ConnectInfo(caller): Callers,
    Id(id): Id,
    Sent(request): Sent<ShareRequest>,
) -> Result<Json<MigrationLimit>, Refusal> {
    tracing::info!(uid = caller.uid, pid = caller.pid, migration = %id, ?request, "limit asked for");
    limits::share(&agent.registry, id, request).map(Json).map_err(|no| match no {
        NoShare::Unknown => Refusal::unknown(id),
        NoShare::NotSource => {
            Refusal::conflict("this host is the migration's destination", "limit it at the source")
        }
        NoShare::Ended => {
            Refusal::conflict("the migration has ended", "see `vmferry limit` for those that are under way")
        }
    })
}

async fn forwards(State(agent): Agents) -> Json<Forwards> {
    let forwards = agent.forwards.list().await.into_iter().map(Forward::from).collect();
    let targets = agent.forwards.targets().await.into_iter().map(Target::from).collect();
    Json(Forwards { forwards, targets })
}

async fn add_forward(
    State(agent): Agents,
    ConnectInfo(caller): Callers,
    Sent(request): Sent<ForwardRequest>,
) -> Result<(StatusCode, Json<Forward>), Refusal> {
    tracing::info!(uid = caller.uid, pid = caller.pid, listen = %request.listen, to = request.to, target = %request.target, "forward asked for");
    let id = agent.forwards.add(request.into())?;
    match agent.forwards.status(id).await {
        Some(begun) => Ok((StatusCode::CREATED, Json(begun.into()))),
        None => Err(AddError::Stopping.into()),
    }
}

async fn end_forward(
    State(agent): Agents,
    ConnectInfo(caller): Callers,
    Id(id): Id,
) -> Result<Json<Forward>, Refusal> {
    tracing::info!(uid = caller.uid, pid = caller.pid, forwarding = %id, "end of a forwarding asked for");
    let ended = agent.forwards.end(id).await.ok_or_else(|| no_forwarding(id))?;
    Ok(Json(ended.into()))
}

async fn limit_forward(
    State(agent): Agents,
    ConnectInfo(caller): Callers,
    Id(id): Id,
    Sent(request): Sent<ShareRequest>,
) -> Result<Json<Forward>, Refusal> {
    tracing::info!(uid = caller.uid, pid = caller.pid, forwarding = %id, ?request, "limit asked for");
    let changed = agent.forwards.change_share(id, request.into()).await;
    changed.map(|changed| Json(changed.into())).ok_or_else(|| no_forwarding(id))
}

fn no_forwarding(id: Uuid) -> Refusal {
    let error = format!("this agent knows no forwarding {id}");
    Refusal::new(StatusCode::NOT_FOUND, error, "see `vmferry forward list` for those that there are")
}

impl From<AddError> for Refusal {
    fn from(error: AddError) -> Self {
        let (status, remedy) = match &error {
            AddError::UnknownPeer(_) => {
                (StatusCode::NOT_FOUND, "see `vmferry status` for the peers that it knows")
            }
            AddError::Stopping => (StatusCode::SERVICE_UNAVAILABLE, "try again when it is back"),
            AddError::TooMany => (StatusCode::CONFLICT, "end one with `vmferry forward end`"),
            AddError::Taken(_) => (StatusCode::CONFLICT, "see `vmferry forward list` for which it is"),
            AddError::NoOwner | AddError::Name(_) => {
                (StatusCode::BAD_REQUEST, "see docs/forward.md for what a forwarding may be")
            }
            AddError::Listen(_) => (
                StatusCode::CONFLICT,
                "choose a folder that the agent may write to, and a socket of nobody else",
            ),
        };
        Self::new(status, chain(&error), remedy)
    }
}

type Wanted = Result<Query<RecoverQuery>, QueryRejection>;

async fn look(State(agent): Agents, wanted: Wanted) -> Result<Json<Recovery>, Refusal> {
    recovery_of(&agent, wanted?.0, false).await
}

async fn recover(
    State(agent): Agents,
    ConnectInfo(caller): Callers,
    wanted: Wanted,
) -> Result<Json<Recovery>, Refusal> {
    tracing::info!(uid = caller.uid, pid = caller.pid, "recover asked for");
    if let Err(e) = agent.host.journals.end_late() {
        tracing::warn!(error = chain(&e), "a journal still cannot be ended");
    }
    recovery_of(&agent, wanted?.0, true).await
}

async fn recovery_of(agent: &Agent, wanted: RecoverQuery, clean: bool) -> Result<Json<Recovery>, Refusal> {
    let asked = RecoverAsked { migration: wanted.id, clean, without_peers: wanted.peers == Some(false) };
    let cases = recovery::cases(&agent.host, asked).await?;
    match wanted.id {
        Some(id) if cases.is_empty() => Err(Refusal::new(
            StatusCode::NOT_FOUND,
            format!("this host has no journal of migration {id}"),
            "see `vmferry list` for the ids of migrations, and `vmferry recover` on the other host",
        )),
        _ => Ok(Json(Recovery { cases })),
    }
}

async fn force(
    State(agent): Agents,
    ConnectInfo(caller): Callers,
    Id(id): Id,
    Sent(request): Sent<ForceRequest>,
) -> Result<StatusCode, Refusal> {
    tracing::warn!(uid = caller.uid, pid = caller.pid, migration = %id, force = ?request.force, "a forced decision");
    let forced = recovery::force(&agent.host, id, request.force, caller.uid, request.until).await;
    forced.map(|()| StatusCode::ACCEPTED).map_err(|e| {
        let (status, remedy) = match e {
            NotForced::NothingOpen(_) => {
                (StatusCode::CONFLICT, "see `vmferry recover` for what is undecided on this host".to_owned())
            }
            NotForced::Refused(_) => {
                (StatusCode::CONFLICT, "`vmferry recover` says what each side knows by now".to_owned())
            }
            NotForced::Unknown(_) => (StatusCode::GATEWAY_TIMEOUT, unknown_remedy(id)),
        };
        Refusal::new(status, chain(&e), remedy)
    })
}
