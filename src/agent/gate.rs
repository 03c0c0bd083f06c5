//! The gate before every route of the local API: may this caller ask for that, and the audit record. A route
//! that has no call cannot be served.

use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::connect_info::ConnectInfo;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::MethodRouter;
use serde_json::{Value, json};
use uuid::Uuid;

use super::call::Call;
use super::caller::Caller;
use super::http::HasBusiness;
use super::refusal::Refusal;
use super::running::Agent;
use crate::access::{Action, Who, authorize};
use crate::audit::Event;
use crate::json::Document;

/// Largest request that is recorded as it is; of a longer one the size is.
const RECORDED_BYTES_MAX: usize = 4 * 1024;
/// Largest body that comes so far.
pub(super) const BODY_BYTES_MAX: usize = 64 * 1024;

/// The routes of an API, each behind its gate.
pub(super) struct Gate {
    agent: Arc<Agent>,
    router: Router<Arc<Agent>>,
}

impl Gate {
    pub(super) fn new(agent: Arc<Agent>) -> Self {
        Self { agent, router: Router::new() }
    }

    /// Adds the route of a call.
    pub(super) fn route(self, call: Call, path: &str, handler: MethodRouter<Arc<Agent>>) -> Self {
        let passage = Passage { agent: Arc::clone(&self.agent), call };
        let handler = handler.route_layer(middleware::from_fn_with_state(passage, pass));
        Self { router: self.router.route(path, handler), ..self }
    }

    /// All of them.
    pub(super) fn open(self) -> Router {
        self.router.with_state(self.agent)
    }
}

/// The migration that an answer is about, for the record.
#[derive(Debug, Clone, Copy)]
pub(super) struct About(pub(super) Uuid);

#[derive(Clone)]
struct Passage {
    agent: Arc<Agent>,
    call: Call,
}

async fn pass(State(passage): State<Passage>, request: Request, next: Next) -> Response {
    let Passage { agent, call } = passage;
    let caller = request.extensions().get::<ConnectInfo<Caller>>().map(|ConnectInfo(caller)| caller.clone());
    let Some(caller) = caller else { return Refusal::internal("the caller is not known").into_response() };
    if let Err(refusal) = agent.permits(call, &caller).await {
        return refusal.into_response();
    }
    if let Some(has_business) = request.extensions().get::<HasBusiness>() {
        has_business.note();
    }
    if call.action() == Action::View {
        return next.run(request).await;
    }
    let (head, body) = request.into_parts();
    let Ok(body) = to_bytes(body, BODY_BYTES_MAX).await else {
        return Refusal::internal("the request's body is gone").into_response();
    };
    let asked = Event::Asked {
        by: caller.by(),
        action: call.name(),
        path: head.uri.path_and_query().map_or_else(String::new, ToString::to_string),
        request: recorded(&body),
    };
    let asked = agent.host.audit.record_durably(asked).await;
    let response = next.run(Request::from_parts(head, Body::from(body))).await;
    let migration = response.extensions().get::<About>().map(|About(id)| *id);
    agent.host.audit.record(Event::Answered { asked, status: response.status().as_u16(), migration });
    response
}

/// A request as the record has it.
fn recorded(body: &Bytes) -> Value {
    match serde_json::from_slice(body) {
        _ if body.is_empty() => Value::Null,
        Ok(Document(value)) if body.len() <= RECORDED_BYTES_MAX => value,
        _ => json!({ "bytes": body.len() }),
    }
}

impl Agent {
    /// Whether the caller may ask for that. A refusal is recorded, of each user and call the first.
    async fn permits(&self, call: Call, caller: &Caller) -> Result<(), Refusal> {
        let role = caller.role(&self.host.config.api).await;
        if role.is_some_and(|role| authorize(call.action(), Who::Local(role)).is_ok()) {
            return Ok(());
        }
        let (source, what) = (caller.source(), call.name());
        let has = role.map_or("no role", |role| role.name());
        self.host.audit.refused(&source, &format!("api-{what}"), || format!("it has {has} here"));
        self.metrics.count_api_refusal(what);
        let error = format!("you may not ask for `{what}`: you have {has} here");
        let remedy = "ask an administrator of this host; roles are in [api] of the agent's configuration";
        Err(Refusal::new(StatusCode::FORBIDDEN, error, remedy))
    }
}
