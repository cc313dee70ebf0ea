//! Everything on the page that changes by itself, in one answer. The answer is made once a second at most and shared by
//! all clients, so that a hundred open pages cost no more than one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use time::OffsetDateTime;
use tokio::time::timeout;
use tracing::{debug, error};

use crate::http::intakes;
use crate::http::intakes::IntakeOverview;
use crate::http::recurrences::{Found, NextRow, Recurrences, merge};
use crate::http::{AppState, SERVER_TIMEOUT, readiness};
use crate::model::row_status::Pause;
use crate::plugins::PluginStatus;
use crate::store::{Backlog, COUNT_LIMIT, LimitStatus, ParkedRow, Store, StoreError};
use crate::telemetry::{LastHour, last_hour};

/// How long an answer is reused for further requests.
const CACHE_TIME: Duration = Duration::from_secs(1);
/// How many rows of the queue and coming occurrences are shown together.
const NEXT_ROWS: usize = 10;
/// How many parked rows are shown.
const PARKED_ROWS: i64 = 50;

/// What `GET /api/overview` answers.
#[derive(Debug, Serialize)]
pub(super) struct Overview {
    version: &'static str,
    /// The address at which this daemon listens.
    daemon: String,
    /// The exchange to which it publishes.
    exchange: String,
    uptime_seconds: u64,
    /// Whether the daemon has a token, so that actions are possible.
    actions: bool,
    ready: bool,
    /// Why the daemon is not ready.
    reasons: Vec<String>,
    /// `None` = PostgreSQL does not answer.
    database: Option<DatabaseOverview>,
    /// `None` = RabbitMQ does not answer.
    letters: Option<Letters>,
    plugins: Vec<PluginStatus>,
    intakes: Vec<IntakeOverview>,
    hour: LastHour,
}

/// The part that comes from the database, and is the same at every daemon.
#[derive(Debug, Serialize)]
struct DatabaseOverview {
    /// By the database clock.
    #[serde(with = "time::serde::rfc3339")]
    now: OffsetDateTime,
    /// How long the oldest row has been due that nothing holds back; 0 = none is due.
    late_seconds: f64,
    /// How many rows wait: counted up to 1000, above that estimated from PostgreSQL's statistics.
    pending: u64,
    /// What is due next, earliest first: rows, and occurrences of recurrences that are not rows yet.
    next: Vec<NextRow>,
    held: Vec<Held>,
    paused: Vec<Pause>,
    limits: Vec<LimitStatus>,
    parked: Parked,
    /// `None` = this daemon could not compute their instants; its log says why.
    recurrences: Option<Recurrences>,
}

/// Rows of one kind that are held.
#[derive(Debug, Serialize)]
struct Held {
    kind: String,
    rows: i64,
    /// Whether there are more than `rows`.
    or_more: bool,
}

/// Parked rows.
#[derive(Debug, Serialize)]
struct Parked {
    rows: u64,
    /// Whether there are more than `rows`.
    or_more: bool,
    /// The ones that were scheduled last.
    newest: Vec<ParkedRow>,
}

/// How many dead letters wait, and how many are parked.
#[derive(Debug, Serialize)]
struct Letters {
    dead: u32,
    parked: u32,
}

/// Returns the overview as JSON.
pub(super) async fn overview(app: &AppState) -> Arc<str> {
    // Requests that arrive meanwhile wait here, and get the same answer.
    let mut cache = app.overview_cache.lock().await;
    if let Some((_, answer)) = cache.as_ref().filter(|(made_at, _)| made_at.elapsed() < CACHE_TIME) {
        return Arc::clone(answer);
    }
    let answer = serde_json::to_string(&make(app).await).expect("an answer can always be written as JSON");
    let answer: Arc<str> = answer.into();
    *cache = Some((Instant::now(), Arc::clone(&answer)));
    answer
}

async fn make(app: &AppState) -> Overview {
    let sources = &app.sources;
    let (store, broker) = (sources.store.clone(), Arc::clone(&sources.broker));
    // Tasks of their own, so that a question that was asked is finished even after the timeout.
    let letter_counts = tokio::spawn({
        let broker = Arc::clone(&broker);
        async move { broker.count_dead_letters().await }
    });
    let intake_counts = tokio::spawn(async move { broker.count_intakes().await });
    let (reasons, database_answers) = readiness(sources).await;
    let mut database = None;
    if database_answers {
        match timeout(SERVER_TIMEOUT, tokio::spawn(async move { read_database(&store).await })).await {
            Ok(Ok(Ok(overview))) => database = Some(overview),
            Ok(Ok(Err(error))) => {
                debug!(error = &error as &dyn std::error::Error, "could not read what waits in the database");
            }
            _ => {}
        }
    }
    let letters = match timeout(SERVER_TIMEOUT, letter_counts).await {
        Ok(Ok(Ok(letters))) => letters.map(|(dead, parked)| Letters { dead, parked }),
        _ => None,
    };
    let intake_counts = match timeout(SERVER_TIMEOUT, intake_counts).await {
        Ok(Ok(counts)) => counts,
        _ => Vec::new(),
    };
    Overview {
        version: env!("CARGO_PKG_VERSION"),
        daemon: app.addr.to_string(),
        exchange: sources.broker.exchange().to_owned(),
        uptime_seconds: app.started_at.elapsed().as_secs(),
        actions: sources.token.is_some(),
        ready: reasons.is_empty(),
        reasons,
        database,
        letters,
        plugins: sources.plugins.status(),
        intakes: intakes::show(sources, &intake_counts),
        hour: last_hour(),
    }
}

async fn read_database(store: &Store) -> Result<DatabaseOverview, StoreError> {
    // Before the rows, so that an occurrence that becomes a row meanwhile is not missing.
    let found = Found::read(store, NEXT_ROWS).await?;
    let (now, rows) = store.next_rows(i64::try_from(NEXT_ROWS).unwrap_or(i64::MAX)).await?;
    // On a thread of its own, since no row would be delivered while a rule that comes rarely is computed.
    let (recurrences, occurrences) = match tokio::task::spawn_blocking(move || found.show(now, NEXT_ROWS)).await {
        Ok((recurrences, occurrences)) => (Some(recurrences), occurrences),
        Err(panic) => {
            error!(%panic, "computing the coming occurrences of recurrences panicked");
            (None, Vec::new())
        }
    };
    let next = merge(rows, occurrences, NEXT_ROWS);
    let Backlog { pending, parked, overdue, .. } = store.backlog().await?;
    let held = store.held_by_kind().await?.into_iter();
    let held =
        held.map(|(kind, rows)| Held { kind, rows: rows.min(COUNT_LIMIT), or_more: rows > COUNT_LIMIT }).collect();
    let enough = COUNT_LIMIT.unsigned_abs();
    let newest = if parked == 0 { Vec::new() } else { store.newest_parked(PARKED_ROWS).await? };
    let parked = Parked { rows: parked.min(enough), or_more: parked > enough, newest };
    let (paused, limits) = (store.pauses().await?, store.limits().await?);
    let late_seconds = overdue.as_secs_f64();
    Ok(DatabaseOverview { now, late_seconds, pending, next, held, paused, limits, parked, recurrences })
}
