//! The actions on recurrences: pause, resume and stop one.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};

use crate::http::AppState;
use crate::http::actions::{
    ActionResult, Answer, App, Body, EmptyBody, PathPart, Peer, path_part, read_body, run_action, shorten,
};
use crate::http::error::ErrorResponse;

/// `POST /api/recurrences/{name}/pause`
pub(in crate::http) async fn pause(
    State(app): App,
    from: Peer,
    name: PathPart,
    headers: HeaderMap,
    body: Body,
) -> ActionResult {
    let (name, EmptyBody {}) = (path_part(name)?, read_body(&headers, body)?);
    set_paused(app, from, name, true).await
}

/// `POST /api/recurrences/{name}/resume`
pub(in crate::http) async fn resume(
    State(app): App,
    from: Peer,
    name: PathPart,
    headers: HeaderMap,
    body: Body,
) -> ActionResult {
    let (name, EmptyBody {}) = (path_part(name)?, read_body(&headers, body)?);
    set_paused(app, from, name, false).await
}

/// `POST /api/recurrences/{name}/stop`
pub(in crate::http) async fn stop(
    State(app): App,
    from: Peer,
    name: PathPart,
    headers: HeaderMap,
    body: Body,
) -> ActionResult {
    let (name, EmptyBody {}) = (path_part(name)?, read_body(&headers, body)?);
    let store = app.sources.store.clone();
    run_action(app, from, async move {
        if store.stop_repeating(&name).await? {
            Ok(Answer::new(format!("the recurrence {name:?} is stopped; its occurrences that waited are removed")))
        } else {
            Err(unknown(&name))
        }
    })
    .await
}

async fn set_paused(app: Arc<AppState>, from: Peer, name: String, paused: bool) -> ActionResult {
    let store = app.sources.store.clone();
    run_action(app, from, async move {
        let Some(changed) = store.pause_recurrence(&name, paused).await? else { return Err(unknown(&name)) };
        let says = match (paused, changed) {
            (true, true) => "is paused: it makes no occurrences until somebody resumes it",
            (true, false) => "was paused already",
            (false, true) => "goes on",
            (false, false) => "was not paused",
        };
        Ok(Answer::new(format!("the recurrence {name:?} {says}")))
    })
    .await
}

fn unknown(name: &str) -> ErrorResponse {
    ErrorResponse::new(StatusCode::NOT_FOUND, format!("there is no recurrence named {:?}", shorten(name)))
}
