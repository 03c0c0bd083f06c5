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

/// Where it is written down what may be asked.
const DESCRIBED: &str = "see GET /v1/openapi.json for what may be asked";

/// What is in a body and in which field of it.
type WrongField = serde_path_to_error::Error<serde_json::Error>;

impl From<JsonRejection> for Refusal {
    fn from(rejection: JsonRejection) -> Self {
        match (&rejection, wrong_field(&rejection)) {
            (_, Some(found)) => found.into(),
            (JsonRejection::JsonDataError(_), None) => {
                Self::new(StatusCode::BAD_REQUEST, rejection.body_text(), DESCRIBED)
            }
            _ => Self::new(rejection.status(), rejection.body_text(), DESCRIBED),
        }
    }
}

/// JSON of another shape, or a value outside its range.
impl From<&WrongField> for Refusal {
    fn from(found: &WrongField) -> Self {
        let (field, what) = (found.path().to_string(), found.inner());
        if field == "." {
            return Self::new(StatusCode::BAD_REQUEST, format!("the request: {what}"), DESCRIBED);
        }
        let error = format!("`{field}`: {what}");
        Self::new(StatusCode::BAD_REQUEST, error, DESCRIBED).in_field(Some(field))
    }
}

fn wrong_field(rejection: &JsonRejection) -> Option<&WrongField> {
    let JsonRejection::JsonDataError(error) = rejection else { return None };
    let first: &(dyn std::error::Error + 'static) = error;
    std::iter::successors(Some(first), |cause| cause.source()).find_map(|cause| cause.downcast_ref())
}

impl From<PathRejection> for Refusal {
    fn from(rejection: PathRejection) -> Self {
        Self::new(rejection.status(), rejection.body_text(), "see `vmferry list` for the ids of migrations")
    }
}

impl From<QueryRejection> for Refusal {
    fn from(rejection: QueryRejection) -> Self {
        Self::new(rejection.status(), rejection.body_text(), DESCRIBED)
    }
}

impl From<JournalError> for Refusal {
    fn from(error: JournalError) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, chain(&error), "look at the agent's state folder")
    }
}
