//! What a route takes of a request, and what it gives line by line. Whatever is not as it must be is answered with a
//! refusal in the API's own form.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::connect_info::ConnectInfo;
use axum::extract::{FromRequest, FromRequestParts, Path, Request, State};
use axum::http::header;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use futures_util::Stream;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::caller::Caller;
use super::refusal::Refusal;
use super::running::Agent;
use crate::json::{Document, Strict};

pub(super) type Agents = State<Arc<Agent>>;
pub(super) type Callers = ConnectInfo<Caller>;
/// One line of JSON.
pub(super) type Line = Result<Vec<u8>, serde_json::Error>;

/// The id in a request's path.
pub(super) struct Id(pub(super) Uuid);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let Path(id) = Path::from_request_parts(parts, state).await?;
        Ok(Self(id))
    }
}

/// What a request's body asks for.
pub(super) struct Sent<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Sent<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refusal> {
        let Json(Document(sent)) = Json::from_request(request, state).await?;
        serde_path_to_error::deserialize(Strict(sent)).map(Self).map_err(|wrong| Refusal::from(&wrong))
    }
}

/// Lines of JSON, as they come.
pub(super) fn answer_lines(lines: impl Stream<Item = Line> + Send + 'static) -> Response {
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}
