//! The requests of the page that are made only when needed: the list of dead letters, for which they must be fetched
//! from RabbitMQ, and the search for a row.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use serde::Serialize;
use time::OffsetDateTime;

use crate::broker::{DeadLetterQueue, ListedDeadLetter};
use crate::dead_letters::admin::{AdminError, DeadLetterListing};
use crate::http::error::ErrorResponse;
use crate::http::{AppState, overview};
use crate::model::display;
use crate::model::display::Explanation;
use crate::model::row_status::RowRef;

/// How long a list of dead letters is reused for further requests.
const CACHE_TIME: Duration = Duration::from_secs(2);
/// How many dead letters of each queue are shown.
const MAX_LETTERS: u32 = 100;
/// How far back a row is searched by its key, in minutes: the history has no index of keys.
const HISTORY_MINUTES: f64 = 240.0;

/// What `GET /api/letters` answers.
#[derive(Debug, Serialize)]
struct Letters {
    dead: LetterQueue,
    parked: LetterQueue,
}

/// The contents of one of the two queues.
#[derive(Debug, Serialize)]
struct LetterQueue {
    /// How many dead letters are in it.
    waiting: u32,
    /// The first of them.
    letters: Vec<Letter>,
}

/// A dead letter, without its body.
#[derive(Debug, Serialize)]
struct Letter {
    id: Option<String>,
    kind: Option<String>,
    /// The queue in which it died.
    queue: Option<String>,
    /// Why it died there, or why it was parked.
    reason: Option<String>,
    /// By RabbitMQ's clock, to the second.
    #[serde(with = "time::serde::rfc3339::option")]
    died_at: Option<OffsetDateTime>,
    /// How often it was replayed.
    replays: i64,
}

/// `GET /api/overview`.
pub(super) async fn overview(State(app): State<Arc<AppState>>) -> Result<Response, ErrorResponse> {
    // A task of its own, so that the overview is finished even if the request is dropped.
    let answer = tokio::spawn(async move { overview::overview(&app).await }).await?;
    Ok(json(&answer))
}

fn json(text: &str) -> Response {
    ([(CONTENT_TYPE, "application/json")], text.to_owned()).into_response()
}

/// `GET /api/letters`. Afterwards all dead letters are in their queues again.
pub(super) async fn letters(State(app): State<Arc<AppState>>) -> Result<Response, ErrorResponse> {
    let task = tokio::spawn(async move {
        // Requests that arrive meanwhile wait here, and get the same answer.
        let mut cache = app.letters_cache.lock().await;
        if let Some((_, letters)) = cache.as_ref().filter(|(made_at, _)| made_at.elapsed() < CACHE_TIME) {
            return Ok(Arc::clone(letters));
        }
        let letters = list_letters(&app).await?;
        let letters = serde_json::to_string(&letters).expect("an answer can always be written as JSON");
        let letters: Arc<str> = letters.into();
        *cache = Some((Instant::now(), Arc::clone(&letters)));
        Ok::<_, AdminError>(letters)
    });
    Ok(json(&task.await??))
}

async fn list_letters(app: &AppState) -> Result<Letters, AdminError> {
    let listing = DeadLetterListing::begin(&app.sources.store, &app.sources.broker).await?;
    let letters = async {
        Ok(Letters {
            dead: list_queue(&listing, DeadLetterQueue::Dead).await?,
            parked: list_queue(&listing, DeadLetterQueue::Parked).await?,
        })
    };
    let letters = letters.await;
    listing.end().await;
    letters
}

async fn list_queue(listing: &DeadLetterListing, queue: DeadLetterQueue) -> Result<LetterQueue, AdminError> {
    let mut letters = Vec::new();
    let waiting = listing.waiting(queue).await?;
    listing.at(queue, waiting.min(MAX_LETTERS), |letter| letters.push(show(letter, queue))).await?;
    Ok(LetterQueue { waiting, letters })
}

fn show(ListedDeadLetter { says, parked_reason }: ListedDeadLetter, queue: DeadLetterQueue) -> Letter {
    let died_at = says.died_at.and_then(|seconds| i64::try_from(seconds).ok());
    Letter {
        id: says.id,
        kind: says.kind,
        queue: says.queue,
        reason: if queue == DeadLetterQueue::Parked { parked_reason } else { says.reason },
        // RFC 3339 ends with the year 9999. The time may be anything, since any client may have written the header.
        died_at: died_at
            .and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok())
            .filter(|at| (1970..=9999).contains(&at.year())),
        replays: says.replays,
    }
}

/// `GET /api/rows?which=ID` or `KIND/KEY`.
pub(super) async fn explain(
    State(app): State<Arc<AppState>>,
    RawQuery(query): RawQuery,
) -> Result<Response, ErrorResponse> {
    let query = query.unwrap_or_default();
    let mut arguments = form_urlencoded::parse(query.as_bytes());
    let which = match (arguments.next(), arguments.next()) {
        (Some((name, which)), None) if name == "which" => which.into_owned(),
        _ => return Err(ErrorResponse::bad_request("say which row: /api/rows?which=ID, or which=KIND/KEY")),
    };
    let which: RowRef = which.trim().parse().map_err(ErrorResponse::bad_request)?;
    let found = tokio::spawn(async move {
        // One request at a time, so that requests do not take the connections that the loops need.
        let _turn = app.database_turn.lock().await;
        let found = app.sources.store.find(&which, Some(HISTORY_MINUTES)).await;
        (found, which)
    });
    let (found, which) = found.await?;
    if let Some(found) = found? {
        return Ok(Json(Explanation::of(found)).into_response());
    }
    let mut sentence = display::unknown_row(&which);
    if matches!(which, RowRef::Key { .. }) {
        sentence +=
            "; the page searches only the last four hours of the history, and `tidings explain` searches all of it";
    }
    Err(ErrorResponse::new(StatusCode::NOT_FOUND, sentence))
}
