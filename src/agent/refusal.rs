//! An answer of the local API that is not 2xx: what is wrong, and what to do about it.

use axum::Json;
use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use uuid::Uuid;

use crate::api::ErrorBody;
use crate::error_chain::chain;
use crate::migrate::journal::JournalError;

/// An answer that is not 2xx.
pub(super) struct Refusal(StatusCode, ErrorBody);

impl Refusal {
    pub(super) fn new(status: StatusCode, error: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self(status, ErrorBody { error: error.into(), remedy: remedy.into() })
    }

    pub(super) fn unknown(id: Uuid) -> Self {
        let error = format!("this agent knows no migration {id}");
        Self::new(StatusCode::NOT_FOUND, error, "see `vmferry list` for those that it knows")
    }

    pub(super) fn internal(error: &str) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, error, "look at the agent's log")
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, Json(self.1)).into_response()
    }
}

impl From<JsonRejection> for Refusal {
    fn from(rejection: JsonRejection) -> Self {
        Self::new(rejection.status(), rejection.body_text(), "send JSON as the documentation shows it")
    }
}

impl From<PathRejection> for Refusal {
    fn from(rejection: PathRejection) -> Self {
        Self::new(rejection.status(), rejection.body_text(), "see `vmferry list` for the ids of migrations")
    }
}

impl From<QueryRejection> for Refusal {
    fn from(rejection: QueryRejection) -> Self {
        Self::new(rejection.status(), rejection.body_text(), "see GET /v1/openapi.json for what may be asked")
    }
}

impl From<JournalError> for Refusal {
    fn from(error: JournalError) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, chain(&error), "look at the agent's state folder")
    }
}
