//! The actions of the API and the page: pause and resume a kind, put back or drop parked rows and parked dead letters,
//! replay or drop dead letters; those on recurrences are in `actions/recurrences.rs`. They do what the commands do. An
//! action that was begun is finished even if the client closes the connection.

pub(super) mod recurrences;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, PathRejection};
use axum::extract::{ConnectInfo, Path, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, StatusCode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tracing::info;
use uuid::Uuid;

use crate::dead_letters::admin;
use crate::dead_letters::admin::{AdminResult, DeadLetterAdmin, NotDone, Selection};
use crate::http::AppState;
use crate::http::error::ErrorResponse;
use crate::model::dead_letter::PassCounts;
use crate::model::display::pause_sentence;
use crate::store::Until;

/// The largest body of a request, in bytes.
pub(super) const MAX_BODY_BYTES: usize = 64 * 1024;
/// How many parked rows one request for all of them works on at most.
const MAX_ROWS: i64 = 10_000;
/// How many rows or dead letters an answer lists that could not be worked on.
const MAX_LISTED: usize = 100;

/// What was done.
#[derive(Debug, Serialize)]
pub(super) struct Answer {
    /// As a sentence.
    says: String,
    /// The rows or dead letters with which it could not be done, and why.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    stay: Vec<NotDone>,
}

/// The body of a request about rows or dead letters.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct SelectionBody {
    ids: Option<Vec<String>>,
    #[serde(default)]
    all: bool,
}

/// The body of a request to pause a kind.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct PauseBody {
    for_seconds: Option<u32>,
    reason: Option<String>,
}

/// The body of a request that needs none.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct EmptyBody {}

type ActionResult = Result<Json<Answer>, ErrorResponse>;
type Body = Result<Bytes, BytesRejection>;
type PathPart = Result<Path<String>, PathRejection>;
type App = State<Arc<AppState>>;
type Peer = ConnectInfo<SocketAddr>;

/// What is done with parked rows.
#[derive(Clone, Copy)]
enum RowAction {
    Retry,
    Drop,
}

/// What is done with dead letters.
#[derive(Clone, Copy)]
enum LetterAction {
    ReplayDead,
    DropDead,
    RetryParked,
    DropParked,
}

/// `POST /api/token`: whether the token is right, and nothing else.
pub(super) async fn token() -> Json<Answer> {
    Json(Answer::new("the token is right".into()))
}

/// `POST /api/kinds/{kind}/pause`
pub(super) async fn pause(State(app): App, from: Peer, kind: PathPart, headers: HeaderMap, body: Body) -> ActionResult {
    let (kind, PauseBody { for_seconds, reason }) = (path_part(kind)?, read_body(&headers, body)?);
    let until = for_seconds.map_or(Until::Resumed, |seconds| Until::After(Duration::from_secs(seconds.into())));
    let reason = reason.filter(|reason| !reason.is_empty());
    let store = app.sources.store.clone();
    run_action(app, from, async move {
        let pause = store.pause(&kind, until, reason.as_deref()).await?;
        let is_served = store.count_daemons(&kind).await? > 0;
        let hint = if is_served { "" } else { "; no daemon serves it now: is that its name?" };
        Ok(Answer::new(format!("{}{hint}", pause_sentence(&pause))))
    })
    .await
}

/// `POST /api/kinds/{kind}/resume`
pub(super) async fn resume(
    State(app): App,
    from: Peer,
    kind: PathPart,
    headers: HeaderMap,
    body: Body,
) -> ActionResult {
    let (kind, EmptyBody {}) = (path_part(kind)?, read_body(&headers, body)?);
    let store = app.sources.store.clone();
    run_action(app, from, async move {
        if store.resume(&kind).await? {
            Ok(Answer::new(format!("the kind {kind} goes on")))
        } else {
            Err(ErrorResponse::new(StatusCode::NOT_FOUND, format!("the kind {:?} is not paused", shorten(&kind))))
        }
    })
    .await
}

/// `POST /api/parked/{id}/retry`
pub(super) async fn retry_row(
    State(app): App,
    from: Peer,
    id: PathPart,
    headers: HeaderMap,
    body: Body,
) -> ActionResult {
    let (id, EmptyBody {}) = (path_part(id)?, read_body(&headers, body)?);
    act_on_rows(app, from, RowAction::Retry, Selection::Ids(HashSet::from([id]))).await
}

/// `POST /api/parked/{id}/drop`
pub(super) async fn drop_row(
    State(app): App,
    from: Peer,
    id: PathPart,
    headers: HeaderMap,
    body: Body,
) -> ActionResult {
    let (id, EmptyBody {}) = (path_part(id)?, read_body(&headers, body)?);
    act_on_rows(app, from, RowAction::Drop, Selection::Ids(HashSet::from([id]))).await
}

/// `POST /api/parked/retry`
pub(super) async fn retry_rows(State(app): App, from: Peer, headers: HeaderMap, body: Body) -> ActionResult {
    act_on_rows(app, from, RowAction::Retry, read_selection(&headers, body)?).await
}

/// `POST /api/parked/drop`
pub(super) async fn drop_rows(State(app): App, from: Peer, headers: HeaderMap, body: Body) -> ActionResult {
    act_on_rows(app, from, RowAction::Drop, read_selection(&headers, body)?).await
}

/// `POST /api/dead/replay`
pub(super) async fn replay_dead(State(app): App, from: Peer, headers: HeaderMap, body: Body) -> ActionResult {
    act_on_letters(app, from, LetterAction::ReplayDead, read_selection(&headers, body)?).await
}

/// `POST /api/dead/drop`
pub(super) async fn drop_dead(State(app): App, from: Peer, headers: HeaderMap, body: Body) -> ActionResult {
    act_on_letters(app, from, LetterAction::DropDead, read_selection(&headers, body)?).await
}

/// `POST /api/parked-letters/retry`
pub(super) async fn retry_parked(State(app): App, from: Peer, headers: HeaderMap, body: Body) -> ActionResult {
    act_on_letters(app, from, LetterAction::RetryParked, read_selection(&headers, body)?).await
}

/// `POST /api/parked-letters/drop`
pub(super) async fn drop_parked(State(app): App, from: Peer, headers: HeaderMap, body: Body) -> ActionResult {
    act_on_letters(app, from, LetterAction::DropParked, read_selection(&headers, body)?).await
}

async fn act_on_rows(app: Arc<AppState>, from: Peer, action: RowAction, selection: Selection) -> ActionResult {
    let given = match &selection {
        Selection::All => None,
        Selection::Ids(ids) => Some(ids.iter().map(|id| parse_row_id(id)).collect::<Result<Vec<_>, _>>()?),
    };
    let (store, task_app) = (app.sources.store.clone(), Arc::clone(&app));
    run_action(app, from, async move {
        // One request at a time, so that requests do not take the connections that the loops need.
        let _turn = task_app.database_turn.lock().await;
        let ids = match given {
            Some(ids) => ids,
            None => store.parked_ids(MAX_ROWS).await?,
        };
        let (done, result) = match action {
            RowAction::Retry => ("put back into the queue", admin::retry_rows(&store, &ids, drop).await?),
            RowAction::Drop => ("dropped for good", admin::drop_rows(&store, &ids, drop).await?),
        };
        let mut answer = Answer::of("row", done, result, &selection)?;
        if i64::try_from(ids.len()).is_ok_and(|count| count >= MAX_ROWS) {
            answer.says = format!("{}; at most {MAX_ROWS} at a time: repeat it for the rest", answer.says);
        }
        Ok(answer)
    })
    .await
}

async fn act_on_letters(app: Arc<AppState>, from: Peer, action: LetterAction, selection: Selection) -> ActionResult {
    let task_app = Arc::clone(&app);
    run_action(app, from, async move {
        // Waits while this daemon lists the dead letters for the page: the list holds the lock in PostgreSQL that this
        // needs.
        let mut cache = task_app.letters_cache.lock().await;
        *cache = None;
        let mut admin = DeadLetterAdmin::alone(&task_app.sources.store, &task_app.sources.broker).await?;
        let result = run_letter_action(&task_app, &mut admin, action, &selection).await;
        admin.end().await;
        result
    })
    .await
}

async fn run_letter_action(
    app: &AppState,
    admin: &mut DeadLetterAdmin,
    action: LetterAction,
    selection: &Selection,
) -> Result<Answer, ErrorResponse> {
    let shutdown = &app.shutdown;
    match action {
        LetterAction::ReplayDead => {
            let (counts, missing) = admin.replay(app.sources.replay_max, selection, shutdown).await?;
            check_found(selection, missing)?;
            let PassCounts { replayed, expired, parked, left, .. } = counts;
            // With ids, `left` counts the dead letters that were not selected.
            let left = if *selection == Selection::All { format!(", {left} left") } else { String::new() };
            Ok(Answer::new(format!("dead letters: {replayed} replayed, {expired} expired, {parked} parked{left}")))
        }
        LetterAction::DropDead => {
            let (dropped, missing) = admin.drop_dead(selection, shutdown).await?;
            check_found(selection, missing)?;
            Ok(Answer::new(format!("dead letters: {dropped} dropped for good")))
        }
        LetterAction::RetryParked => {
            let done = admin.retry_parked(selection, drop, shutdown).await?;
            Answer::of("letter", "put back", done, selection)
        }
        LetterAction::DropParked => {
            let done = admin.drop_parked(selection, drop, shutdown).await?;
            Answer::of("letter", "dropped for good", done, selection)
        }
    }
}

/// Runs `work` to its end, even if the client closes the connection, and logs what was done.
async fn run_action(
    app: Arc<AppState>,
    ConnectInfo(from): Peer,
    work: impl Future<Output = Result<Answer, ErrorResponse>> + Send + 'static,
) -> ActionResult {
    let task_app = Arc::clone(&app);
    let task = app.running_actions.spawn(async move {
        let result = work.await;
        match &result {
            Ok(answer) => info!(%from, "by hand: {}", answer.says),
            Err(error) => info!(%from, "by hand, but not done: {}", error.sentence),
        }
        // The next overview shows the change.
        *task_app.overview_cache.lock().await = None;
        result
    });
    Ok(Json(task.await??))
}

impl Answer {
    fn new(says: String) -> Self {
        Self { says, stay: Vec::new() }
    }

    /// The answer after work on rows or dead letters, each a `thing`; `done` is what was done with them.
    ///
    /// # Errors
    ///
    /// When nothing was done with the ids that the request named.
    fn of(
        thing: &str,
        done: &str,
        AdminResult { count, mut stay }: AdminResult,
        selection: &Selection,
    ) -> Result<Self, ErrorResponse> {
        if count == 0 && *selection != Selection::All {
            return Err(match stay.first() {
                Some(NotDone { why, .. }) => ErrorResponse::new(StatusCode::CONFLICT, why),
                None => not_found(thing),
            });
        }
        let stays = stay.len();
        stay.truncate(MAX_LISTED);
        let plural = if count == 1 { "" } else { "s" };
        let unchanged = if stays == 0 { String::new() } else { format!(", and {stays} cannot be") };
        let says = format!("{count} {thing}{plural} {done}{unchanged}");
        Ok(Self { says, stay })
    }
}

/// Returns an error if none of the dead letters that the request named was found.
fn check_found(selection: &Selection, missing: usize) -> Result<(), ErrorResponse> {
    match selection {
        Selection::Ids(ids) if ids.len() == missing => Err(not_found("letter")),
        _ => Ok(()),
    }
}

fn not_found(thing: &str) -> ErrorResponse {
    let sentence = format!("there is no such {thing} any more: another person or the daemon has dealt with it");
    ErrorResponse::new(StatusCode::NOT_FOUND, sentence)
}

fn path_part(part: PathPart) -> Result<String, ErrorResponse> {
    part.map(|Path(part)| part).map_err(|_| ErrorResponse::bad_request("the path has a name that is not UTF-8"))
}

fn parse_row_id(id: &str) -> Result<Uuid, ErrorResponse> {
    Uuid::try_parse(id).map_err(|_| ErrorResponse::bad_request(format!("{:?} is not the id of a row", shorten(id))))
}

fn read_selection(headers: &HeaderMap, body: Body) -> Result<Selection, ErrorResponse> {
    let SelectionBody { ids, all } = read_body(headers, body)?;
    match (ids, all) {
        (None, true) => Ok(Selection::All),
        (Some(ids), false) if !ids.is_empty() => Ok(Selection::Ids(ids.into_iter().collect())),
        _ => Err(ErrorResponse::bad_request(r#"say which: {"ids": ["…"]}, or {"all": true}"#)),
    }
}

/// Reads the body of a request; an empty body gives the default.
fn read_body<T: DeserializeOwned + Default>(headers: &HeaderMap, body: Body) -> Result<T, ErrorResponse> {
    let body = body.map_err(|_| {
        let sentence = format!("the body is incomplete, or larger than {} KiB", MAX_BODY_BYTES / 1024);
        ErrorResponse::new(StatusCode::PAYLOAD_TOO_LARGE, sentence)
    })?;
    if body.is_empty() {
        return Ok(T::default());
    }
    let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if content_type.split(';').next().unwrap_or_default().trim() != "application/json" {
        return Err(ErrorResponse::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "the body must be JSON: send Content-Type: application/json",
        ));
    }
    serde_json::from_slice(&body).map_err(|error| {
        ErrorResponse::bad_request(format!(
            "the body is not the JSON that is expected here: {}",
            shorten(&error.to_string())
        ))
    })
}

/// Shortens a text from a request before an error quotes it.
fn shorten(text: &str) -> String {
    text.chars().take(200).collect()
}
