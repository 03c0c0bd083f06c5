//! The gate before every route of the local API: may this caller ask for that, and the audit record. A route
//! that has no action cannot be served.

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

use super::authorize::{Action, Role};
use super::caller::Caller;
use super::refusal::Refusal;
use super::running::Agent;
use crate::audit::Event;

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

    /// Adds the route of an action.
    pub(super) fn route(self, action: Action, path: &str, handler: MethodRouter<Arc<Agent>>) -> Self {
        let passage = Passage { agent: Arc::clone(&self.agent), action };
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
    action: Action,
}

async fn pass(State(passage): State<Passage>, request: Request, next: Next) -> Response {
    let Passage { agent, action } = passage;
    let caller = request.extensions().get::<ConnectInfo<Caller>>().map(|ConnectInfo(caller)| caller.clone());
    let Some(caller) = caller else { return Refusal::internal("the caller is not known").into_response() };
    if let Err(refusal) = agent.authorize(action, &caller) {
        return refusal.into_response();
    }
    if action.role() == Role::View {
        return next.run(request).await;
    }
    let (head, body) = request.into_parts();
    let Ok(body) = to_bytes(body, BODY_BYTES_MAX).await else {
        return Refusal::internal("the request's body is gone").into_response();
    };
    let asked = Event::Asked {
        by: caller.by(),
        action: action.name(),
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
        Ok(value) if body.len() <= RECORDED_BYTES_MAX => value,
        _ => json!({ "bytes": body.len() }),
    }
}

impl Agent {
    /// Whether the caller may ask for that. A refusal is recorded, of each user and action the first.
    fn authorize(&self, action: Action, caller: &Caller) -> Result<(), Refusal> {
        if caller.role() >= Some(action.role()) {
            return Ok(());
        }
        let (source, needed) = (caller.source(), action.role().name());
        self.host
            .audit
            .refused(&source, &format!("api-{}", action.name()), || format!("it takes role {needed}"));
        self.metrics.count_api_refusal(action.name());
        let error = format!("`{}` takes the role `{needed}`, which you do not have", action.name());
        Err(Refusal::new(StatusCode::FORBIDDEN, error, "ask root, or see [api] in the agent's configuration"))
    }
}
