//! What a person does from the page, as the commands do it: pause and resume a kind, put parked rows and letters back or
//! drop them, replay dead letters or drop them. Whatever was begun is seen through, whoever still waits for the answer.

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
use crate::dead_letters::admin::{DeadLetterAdmin, Done, NotDone, Selection};
use crate::http::AppState;
use crate::http::error::ErrorResponse;
use crate::model::dead_letter::PassCounts;
use crate::model::display::pause_sentence;
use crate::store::Until;

/// Of a request, in bytes.
pub(super) const LARGEST_BODY: usize = 64 * 1024;
/// Parked rows that are dealt with at once, if all are meant.
const ROWS: i64 = 10_000;
/// What stays is listed up to this.
const STAYS: usize = 100;

/// What was done, in words.
#[derive(Debug, Serialize)]
pub(super) struct Answer {
    says: String,
    /// What could not be done, and why.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    stay: Vec<NotDone>,
}

/// RowRef rows or letters.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RowRef {
    ids: Option<Vec<String>>,
    #[serde(default)]
    all: bool,
}

/// How a kind is paused.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pausing {
    for_seconds: Option<u32>,
    reason: Option<String>,
}

/// What is given where there is nothing to say.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

type Answered = Result<Json<Answer>, ErrorResponse>;
type Body = Result<Bytes, BytesRejection>;
type Name = Result<Path<String>, PathRejection>;
type Here = State<Arc<AppState>>;
type Peer = ConnectInfo<SocketAddr>;

/// What is done with rows.
#[derive(Clone, Copy)]
enum Rows {
    Retry,
    Drop,
}

/// What is done with letters.
#[derive(Clone, Copy)]
enum Letters {
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
pub(super) async fn pause(State(site): Here, from: Peer, kind: Name, headers: HeaderMap, body: Body) -> Answered {
    let (kind, Pausing { for_seconds, reason }) = (name(kind)?, read(&headers, body)?);
    let until = for_seconds.map_or(Until::Resumed, |seconds| Until::After(Duration::from_secs(seconds.into())));
    let reason = reason.filter(|reason| !reason.is_empty());
    let store = site.shown.store.clone();
    act(site, from, async move {
        let pause = store.pause(&kind, until, reason.as_deref()).await?;
        let served = store.count_daemons(&kind).await? > 0;
        let hint = if served { "" } else { "; no daemon serves it now: is that its name?" };
        Ok(Answer::new(format!("{}{hint}", pause_sentence(&pause))))
    })
    .await
}

/// `POST /api/kinds/{kind}/resume`
pub(super) async fn resume(State(site): Here, from: Peer, kind: Name, headers: HeaderMap, body: Body) -> Answered {
    let (kind, Nothing {}) = (name(kind)?, read(&headers, body)?);
    let store = site.shown.store.clone();
    act(site, from, async move {
        if store.resume(&kind).await? {
            Ok(Answer::new(format!("the kind {kind} goes on")))
        } else {
            Err(ErrorResponse::new(StatusCode::NOT_FOUND, format!("the kind {:?} is not paused", cut(&kind))))
        }
    })
    .await
}

/// `POST /api/parked/{id}/retry`
pub(super) async fn retry_row(State(site): Here, from: Peer, id: Name, headers: HeaderMap, body: Body) -> Answered {
    let (id, Nothing {}) = (name(id)?, read(&headers, body)?);
    rows(site, from, Rows::Retry, Selection::Ids(HashSet::from([id]))).await
}

/// `POST /api/parked/{id}/drop`
pub(super) async fn drop_row(State(site): Here, from: Peer, id: Name, headers: HeaderMap, body: Body) -> Answered {
    let (id, Nothing {}) = (name(id)?, read(&headers, body)?);
    rows(site, from, Rows::Drop, Selection::Ids(HashSet::from([id]))).await
}

/// `POST /api/parked/retry`
pub(super) async fn retry_rows(State(site): Here, from: Peer, headers: HeaderMap, body: Body) -> Answered {
    rows(site, from, Rows::Retry, wanted(&headers, body)?).await
}

/// `POST /api/parked/drop`
pub(super) async fn drop_rows(State(site): Here, from: Peer, headers: HeaderMap, body: Body) -> Answered {
    rows(site, from, Rows::Drop, wanted(&headers, body)?).await
}

/// `POST /api/dead/replay`
pub(super) async fn replay_dead(State(site): Here, from: Peer, headers: HeaderMap, body: Body) -> Answered {
    letters(site, from, Letters::ReplayDead, wanted(&headers, body)?).await
}

/// `POST /api/dead/drop`
pub(super) async fn drop_dead(State(site): Here, from: Peer, headers: HeaderMap, body: Body) -> Answered {
    letters(site, from, Letters::DropDead, wanted(&headers, body)?).await
}

/// `POST /api/parked-letters/retry`
pub(super) async fn retry_parked(State(site): Here, from: Peer, headers: HeaderMap, body: Body) -> Answered {
    letters(site, from, Letters::RetryParked, wanted(&headers, body)?).await
}

/// `POST /api/parked-letters/drop`
pub(super) async fn drop_parked(State(site): Here, from: Peer, headers: HeaderMap, body: Body) -> Answered {
    letters(site, from, Letters::DropParked, wanted(&headers, body)?).await
}

async fn rows(site: Arc<AppState>, from: Peer, deed: Rows, wanted: Selection) -> Answered {
    let given = match &wanted {
        Selection::All => None,
        Selection::Ids(ids) => Some(ids.iter().map(|id| uuid(id)).collect::<Result<Vec<_>, _>>()?),
    };
    let (store, of_here) = (site.shown.store.clone(), Arc::clone(&site));
    act(site, from, async move {
        // One after the other: they are not to take the connections of the loops.
        let _turn = of_here.turn.lock().await;
        let ids = match given {
            Some(ids) => ids,
            None => store.parked_ids(ROWS).await?,
        };
        let (what, done) = match deed {
            Rows::Retry => ("put back into the queue", admin::retry_rows(&store, &ids, drop).await?),
            Rows::Drop => ("dropped for good", admin::drop_rows(&store, &ids, drop).await?),
        };
        let mut answer = Answer::of("row", what, done, &wanted)?;
        if i64::try_from(ids.len()).is_ok_and(|count| count >= ROWS) {
            answer.says = format!("{}; {ROWS} are dealt with at once: do it again for more", answer.says);
        }
        Ok(answer)
    })
    .await
}

async fn letters(site: Arc<AppState>, from: Peer, deed: Letters, wanted: Selection) -> Answered {
    let of_here = Arc::clone(&site);
    act(site, from, async move {
        // Not while this daemon looks at them for the page: it would be told that somebody else is at them.
        let mut kept = of_here.letters.lock().await;
        *kept = None;
        let mut admin = DeadLetterAdmin::alone(&of_here.shown.store, &of_here.shown.broker).await?;
        let done = on_letters(&of_here, &mut admin, deed, &wanted).await;
        admin.end().await;
        done
    })
    .await
}

async fn on_letters(
    site: &AppState,
    admin: &mut DeadLetterAdmin,
    deed: Letters,
    wanted: &Selection,
) -> Result<Answer, ErrorResponse> {
    let shutdown = &site.shutdown;
    match deed {
        Letters::ReplayDead => {
            let (tally, missing) = admin.replay(site.shown.replay_max, wanted, shutdown).await?;
            met(wanted, missing)?;
            let PassCounts { replayed, expired, parked, left, .. } = tally;
            // By their ids, it is others that were left.
            let left = if *wanted == Selection::All { format!(", {left} left") } else { String::new() };
            Ok(Answer::new(format!("dead letters: {replayed} replayed, {expired} expired, {parked} parked{left}")))
        }
        Letters::DropDead => {
            let (dropped, missing) = admin.drop_dead(wanted, shutdown).await?;
            met(wanted, missing)?;
            Ok(Answer::new(format!("dead letters: {dropped} dropped for good")))
        }
        Letters::RetryParked => {
            let done = admin.retry_parked(wanted, drop, shutdown).await?;
            Answer::of("letter", "put back", done, wanted)
        }
        Letters::DropParked => {
            let done = admin.drop_parked(wanted, drop, shutdown).await?;
            Answer::of("letter", "dropped for good", done, wanted)
        }
    }
}

/// Does `work` to its end, whoever still waits for the answer, and writes down what was done.
async fn act(
    site: Arc<AppState>,
    ConnectInfo(from): Peer,
    work: impl Future<Output = Result<Answer, ErrorResponse>> + Send + 'static,
) -> Answered {
    let of_here = Arc::clone(&site);
    let done = site.at_work.spawn(async move {
        let done = work.await;
        match &done {
            Ok(answer) => info!(%from, "by hand: {}", answer.says),
            Err(refusal) => info!(%from, "by hand, and not done: {}", refusal.sentence),
        }
        // Whoever looks next sees it.
        *of_here.overview.lock().await = None;
        done
    });
    Ok(Json(done.await??))
}

impl Answer {
    fn new(says: String) -> Self {
        Self { says, stay: Vec::new() }
    }

    /// Of work on rows or letters, each a `thing`. If nothing was done with those that somebody named, that is an error.
    fn of(thing: &str, what: &str, Done { count, mut stay }: Done, wanted: &Selection) -> Result<Self, ErrorResponse> {
        if count == 0 && *wanted != Selection::All {
            return Err(match stay.first() {
                Some(NotDone { why, .. }) => ErrorResponse::new(StatusCode::CONFLICT, why),
                None => gone(thing),
            });
        }
        let stays = stay.len();
        stay.truncate(STAYS);
        let many = if count == 1 { "" } else { "s" };
        let stay_too = if stays == 0 { String::new() } else { format!(", and {stays} cannot be") };
        let says = format!("{count} {thing}{many} {what}{stay_too}");
        Ok(Self { says, stay })
    }
}

/// Whether some of the letters that somebody named were met.
fn met(wanted: &Selection, missing: usize) -> Result<(), ErrorResponse> {
    match wanted {
        Selection::Ids(ids) if ids.len() == missing => Err(gone("letter")),
        _ => Ok(()),
    }
}

fn gone(what: &str) -> ErrorResponse {
    let sentence = format!("there is no such {what} any more: somebody has dealt with it, or the daemon has");
    ErrorResponse::new(StatusCode::NOT_FOUND, sentence)
}

fn name(name: Name) -> Result<String, ErrorResponse> {
    name.map(|Path(name)| name).map_err(|_| ErrorResponse::bad("the path has a name that is not UTF-8"))
}

fn uuid(id: &str) -> Result<Uuid, ErrorResponse> {
    Uuid::try_parse(id).map_err(|_| ErrorResponse::bad(format!("{:?} is not the id of a row", cut(id))))
}

fn wanted(headers: &HeaderMap, body: Body) -> Result<Selection, ErrorResponse> {
    let RowRef { ids, all } = read(headers, body)?;
    match (ids, all) {
        (None, true) => Ok(Selection::All),
        (Some(ids), false) if !ids.is_empty() => Ok(Selection::Ids(ids.into_iter().collect())),
        _ => Err(ErrorResponse::bad(r#"say which: {"ids": ["…"]}, or {"all": true}"#)),
    }
}

/// What the body says; nothing at all is said by an empty one.
fn read<T: DeserializeOwned + Default>(headers: &HeaderMap, body: Body) -> Result<T, ErrorResponse> {
    let body = body.map_err(|_| {
        let sentence = format!("the body did not come whole, or is larger than {} KiB", LARGEST_BODY / 1024);
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
        ErrorResponse::bad(format!("the body is not the JSON that is expected here: {}", cut(&error.to_string())))
    })
}

/// As much of it as is repeated to whoever sent it.
fn cut(text: &str) -> String {
    text.chars().take(200).collect()
}
