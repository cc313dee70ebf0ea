//! What is asked for one by one: the letters, since to look at them is to fetch them, and where a row is, and why.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use serde::Serialize;
use time::OffsetDateTime;

use crate::broker::{DeadLetterQueue, Looked};
use crate::dead_letters::admin::{AdminError, DeadLetterListing};
use crate::http::error::ErrorResponse;
use crate::http::{AppState, overview};
use crate::model::display;
use crate::model::display::Explanation;
use crate::model::row_status::RowRef;

/// For so long a look at the letters is new enough for whoever asks next.
const FRESH: Duration = Duration::from_secs(2);
/// Letters of each pile that are shown.
const LETTERS: u32 = 100;
/// How far back a row is looked for by its key, in minutes: there is no index of the keys of the history.
const HISTORY: f64 = 240.0;

/// What `GET /api/letters` answers.
#[derive(Debug, Serialize)]
struct Letters {
    dead: Heap,
    parked: Heap,
}

/// What lies in one of the two queues.
#[derive(Debug, Serialize)]
struct Heap {
    /// How many.
    waiting: u32,
    /// The first of them.
    letters: Vec<Sources>,
}

/// A letter, without its body.
#[derive(Debug, Serialize)]
struct Sources {
    id: Option<String>,
    kind: Option<String>,
    /// Where it died.
    queue: Option<String>,
    /// Why it died there, or why it was parked.
    reason: Option<String>,
    /// By the broker's clock, to the second.
    #[serde(with = "time::serde::rfc3339::option")]
    died_at: Option<OffsetDateTime>,
    /// How often it was replayed.
    replays: i64,
}

/// `GET /api/overview`.
pub(super) async fn overview(State(site): State<Arc<AppState>>) -> Result<Response, ErrorResponse> {
    // A task of its own: it is made to its end, whoever still waits for it.
    let answer = tokio::spawn(async move { overview::overview(&site).await }).await?;
    Ok(json(&answer))
}

fn json(text: &str) -> Response {
    ([(CONTENT_TYPE, "application/json")], text.to_owned()).into_response()
}

/// `GET /api/letters`. All of them are where they were afterwards.
pub(super) async fn letters(State(site): State<Arc<AppState>>) -> Result<Response, ErrorResponse> {
    let looked = tokio::spawn(async move {
        // Whoever comes meanwhile waits, and has the same.
        let mut kept = site.letters.lock().await;
        if let Some((_, letters)) = kept.as_ref().filter(|(made, _)| made.elapsed() < FRESH) {
            return Ok(Arc::clone(letters));
        }
        let letters = look(&site).await?;
        let letters = serde_json::to_string(&letters).expect("an answer can always be written as JSON");
        let letters: Arc<str> = letters.into();
        *kept = Some((Instant::now(), Arc::clone(&letters)));
        Ok::<_, AdminError>(letters)
    });
    Ok(json(&looked.await??))
}

async fn look(site: &AppState) -> Result<Letters, AdminError> {
    let look = DeadLetterListing::begin(&site.shown.store, &site.shown.broker).await?;
    let looked = async {
        Ok(Letters {
            dead: heap(&look, DeadLetterQueue::Dead).await?,
            parked: heap(&look, DeadLetterQueue::Parked).await?,
        })
    };
    let looked = looked.await;
    look.end().await;
    looked
}

async fn heap(look: &DeadLetterListing, pile: DeadLetterQueue) -> Result<Heap, AdminError> {
    let mut letters = Vec::new();
    let waiting = look.waiting(pile).await?;
    look.at(pile, waiting.min(LETTERS), |letter| letters.push(shown(letter, pile))).await?;
    Ok(Heap { waiting, letters })
}

fn shown(Looked { says, parked_reason }: Looked, pile: DeadLetterQueue) -> Sources {
    let died_at = says.died_at.and_then(|seconds| i64::try_from(seconds).ok());
    Sources {
        id: says.id,
        kind: says.kind,
        queue: says.queue,
        reason: if pile == DeadLetterQueue::Parked { parked_reason } else { says.reason },
        // RFC 3339 ends with the year 9999, and anybody may have written the time.
        died_at: died_at
            .and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok())
            .filter(|at| (1970..=9999).contains(&at.year())),
        replays: says.replays,
    }
}

/// `GET /api/rows?which=ID` or `KIND/KEY`.
pub(super) async fn explain(
    State(site): State<Arc<AppState>>,
    RawQuery(query): RawQuery,
) -> Result<Response, ErrorResponse> {
    let query = query.unwrap_or_default();
    let mut arguments = form_urlencoded::parse(query.as_bytes());
    let which = match (arguments.next(), arguments.next()) {
        (Some((name, which)), None) if name == "which" => which.into_owned(),
        _ => return Err(ErrorResponse::bad("say which row: /api/rows?which=ID, or which=KIND/KEY")),
    };
    let which: RowRef = which.trim().parse().map_err(ErrorResponse::bad)?;
    let found = tokio::spawn(async move {
        // One question at a time: they are not to take the connections of the loops.
        let _turn = site.turn.lock().await;
        let found = site.shown.store.find(&which, Some(HISTORY)).await;
        (found, which)
    });
    let (found, which) = found.await?;
    if let Some(found) = found? {
        return Ok(Json(Explanation::of(found)).into_response());
    }
    let mut sentence = display::unknown_row(&which);
    if matches!(which, RowRef::Key { .. }) {
        sentence +=
            "; among what is finished, the page looks only at the last four hours, and tidings explain at all of it";
    }
    Err(ErrorResponse::new(StatusCode::NOT_FOUND, sentence))
}
