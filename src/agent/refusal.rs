//! An answer of the local API that is not 2xx: what is wrong, and what to do about it.

use axum::Json;
use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use uuid::Uuid;

use crate::api::{ErrorBody, PROBLEM_JSON};
use crate::error_chain::chain;
use crate::migrate::journal::JournalError;

/// An answer that is not 2xx.
pub(super) struct Refusal(Box<ErrorBody>);

impl Refusal {
    pub(super) fn new(status: StatusCode, error: impl Into<String>, remedy: impl Into<String>) -> Self {
        let title = status.canonical_reason().unwrap_or_default().to_owned();
        let (kind, error, remedy) = ("about:blank".to_owned(), error.into(), remedy.into());
        let (status, detail, field) = (status.as_u16(), error.clone(), None);
        Self(Box::new(ErrorBody { kind, title, status, detail, error, remedy, field }))
    }

    /// The same, of one field of the request.
    pub(super) fn in_field(mut self, field: Option<String>) -> Self {
        self.0.field = field;
        self
    }

    pub(super) fn unknown(id: Uuid) -> Self {
        let error = format!("this agent knows no migration {id}");
        Self::new(StatusCode::NOT_FOUND, error, "see `vmferry list` for those that it knows")
    }

    /// What is asked does not fit what there is.
    pub(super) fn conflict(error: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, error, remedy)
    }

    pub(super) fn leaving() -> Self {
        let status = StatusCode::SERVICE_UNAVAILABLE;
        Self::new(status, "the agent is shutting down", "try again when it is back")
    }

    pub(super) fn internal(error: &str) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, error, "look at the agent's log")
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, [(header::CONTENT_TYPE, PROBLEM_JSON)], Json(self.0)).into_response()
    }
}

impl From<JsonRejection> for Refusal {
    fn from(rejection: JsonRejection) -> Self {
        let remedy = "see GET /v1/openapi.json for what may be asked";
        match wrong_field(&rejection) {
            Some((field, what)) => {
                let error = format!("`{field}`: {what}");
                Self::new(StatusCode::BAD_REQUEST, error, remedy).in_field(Some(field))
            }
            None if matches!(rejection, JsonRejection::JsonDataError(_)) => {
                Self::new(StatusCode::BAD_REQUEST, rejection.body_text(), remedy)
            }
            None => Self::new(rejection.status(), rejection.body_text(), remedy),
        }
    }
}

/// The field that JSON of another shape, or a value outside its range, is in, and what is wrong with it.
fn wrong_field(rejection: &JsonRejection) -> Option<(String, String)> {
    let JsonRejection::JsonDataError(error) = rejection else { return None };
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(found) = error.downcast_ref::<serde_path_to_error::Error<serde_json::Error>>() {
            let field = found.path().to_string();
            return (field != ".").then(|| (field, found.inner().to_string()));
        }
        cause = error.source();
    }
    None
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
