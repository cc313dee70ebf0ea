//! The errors of the interface. Each is answered as `{"error": "a sentence"}`, with a status for programs.

use axum::Json;
use axum::http::header::WWW_AUTHENTICATE;
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Response};

use crate::dead_letters::admin::AdminError;
use crate::dead_letters::replayer::PassError;
use crate::model::error_chain::error_chain;
use crate::store::StoreError;

/// An error as it is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ErrorResponse {
    pub(super) status: StatusCode,
    pub(super) sentence: String,
}

impl ErrorResponse {
    pub(super) fn new(status: StatusCode, sentence: impl Into<String>) -> Self {
        Self { status, sentence: sentence.into() }
    }

    /// The request is wrong.
    pub(super) fn bad_request(sentence: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, sentence)
    }
}

impl IntoResponse for ErrorResponse {
    fn into_response(self) -> Response {
        let body = Json(serde_json::json!({ "error": self.sentence }));
        if self.status == StatusCode::UNAUTHORIZED {
            return (self.status, [(WWW_AUTHENTICATE, "Bearer")], body).into_response();
        }
        (self.status, body).into_response()
    }
}

impl From<StoreError> for ErrorResponse {
    fn from(error: StoreError) -> Self {
        if let Some(rule) = error.broken_rule() {
            Self::bad_request(rule)
        } else if let Some(conflict) = error.conflict() {
            Self::new(StatusCode::CONFLICT, conflict)
        } else {
            Self::new(StatusCode::SERVICE_UNAVAILABLE, error_chain(&error))
        }
    }
}

impl From<AdminError> for ErrorResponse {
    fn from(error: AdminError) -> Self {
        match error {
            AdminError::Busy(_) => Self::new(StatusCode::CONFLICT, error.to_string()),
            AdminError::Pass(PassError::Store(error)) => error.into(),
            error => Self::new(StatusCode::SERVICE_UNAVAILABLE, error_chain(&error)),
        }
    }
}

impl From<tokio::task::JoinError> for ErrorResponse {
    fn from(_: tokio::task::JoinError) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "this is an error in the daemon; see its log")
    }
}

/// The answer for a path that does not exist.
pub(super) async fn not_found(uri: Uri) -> ErrorResponse {
    let path: String = uri.path().chars().take(200).collect();
    ErrorResponse::new(StatusCode::NOT_FOUND, format!("there is nothing at {path}; the page is at /"))
}

/// The answer for a path that does not allow the method.
pub(super) async fn method_not_allowed(method: axum::http::Method) -> ErrorResponse {
    let method: String = method.as_str().chars().take(20).collect();
    let sentence = format!("{method} is not allowed here: read with GET, and act with POST");
    ErrorResponse::new(StatusCode::METHOD_NOT_ALLOWED, sentence)
}
