//! What the page shows, in one answer: all that changes by itself. It is made once for everybody who looks within a second,
//! so that a hundred open pages cost no more than one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use time::OffsetDateTime;
use tokio::time::timeout;
use tracing::debug;

use crate::http::{AppState, PATIENCE, readiness};
use crate::model::row_status::Pause;
use crate::plugins::PluginStatus;
use crate::store::{Backlog, ENOUGH, ParkedRow, Store, StoreError, UpcomingRow};
use crate::telemetry::{LastHour, last_hour};

/// For so long an answer is new enough for whoever asks next.
const FRESH: Duration = Duration::from_secs(1);
/// Rows of the queue that are shown.
const NEXT: i64 = 10;
/// Parked rows that are shown.
const PARKED: i64 = 50;

/// What `GET /api/overview` answers.
#[derive(Debug, Serialize)]
pub(super) struct Overview {
    version: &'static str,
    /// The address that this daemon listens at.
    daemon: String,
    /// The exchange that it publishes to.
    exchange: String,
    uptime_seconds: u64,
    /// Whether there is a token, with which one may act.
    actions: bool,
    ready: bool,
    /// Why it is not ready.
    reasons: Vec<String>,
    /// `None` = PostgreSQL does not answer.
    database: Option<Waiting>,
    /// `None` = RabbitMQ does not answer.
    letters: Option<Letters>,
    plugins: Vec<PluginStatus>,
    hour: LastHour,
}

/// What the database says: the same at every daemon.
#[derive(Debug, Serialize)]
struct Waiting {
    /// By the database clock.
    #[serde(with = "time::serde::rfc3339")]
    now: OffsetDateTime,
    /// For how long the first row has been due that nothing holds back; 0 = none is due.
    late_seconds: f64,
    /// How many rows wait: counted up to 1000, more as PostgreSQL's statistics estimate it.
    pending: u64,
    next: Vec<UpcomingRow>,
    held: Vec<Held>,
    paused: Vec<Pause>,
    parked: Parked,
}

/// Rows of one kind that are held.
#[derive(Debug, Serialize)]
struct Held {
    kind: String,
    rows: i64,
    /// There are more than that.
    or_more: bool,
}

/// Rows that were set aside.
#[derive(Debug, Serialize)]
struct Parked {
    rows: u64,
    /// There are more than that.
    or_more: bool,
    /// Those of them that were scheduled last.
    newest: Vec<ParkedRow>,
}

/// How many letters wait.
#[derive(Debug, Serialize)]
struct Letters {
    dead: u32,
    parked: u32,
}

/// What the page shows, as JSON.
pub(super) async fn overview(site: &AppState) -> Arc<str> {
    // Whoever comes meanwhile waits, and has the same.
    let mut kept = site.overview.lock().await;
    if let Some((_, answer)) = kept.as_ref().filter(|(made, _)| made.elapsed() < FRESH) {
        return Arc::clone(answer);
    }
    let answer = serde_json::to_string(&look(site).await).expect("an answer can always be written as JSON");
    let answer: Arc<str> = answer.into();
    *kept = Some((Instant::now(), Arc::clone(&answer)));
    answer
}

async fn look(site: &AppState) -> Overview {
    let shown = &site.shown;
    let (store, broker) = (shown.store.clone(), Arc::clone(&shown.broker));
    // Tasks of their own: what was asked is seen through, however long it takes.
    let counted = tokio::spawn(async move { broker.count_letters().await });
    let (reasons, answers) = readiness(shown).await;
    let mut database = None;
    if answers {
        match timeout(PATIENCE, tokio::spawn(async move { waiting(&store).await })).await {
            Ok(Ok(Ok(waiting))) => database = Some(waiting),
            Ok(Ok(Err(error))) => {
                debug!(error = &error as &dyn std::error::Error, "could not look at what waits");
            }
            _ => {}
        }
    }
    let letters = match timeout(PATIENCE, counted).await {
        Ok(Ok(Ok(letters))) => letters.map(|(dead, parked)| Letters { dead, parked }),
        _ => None,
    };
    Overview {
        version: env!("CARGO_PKG_VERSION"),
        daemon: site.addr.to_string(),
        exchange: shown.broker.exchange().to_owned(),
        uptime_seconds: site.began.elapsed().as_secs(),
        actions: shown.token.is_some(),
        ready: reasons.is_empty(),
        reasons,
        database,
        letters,
        plugins: shown.plugins.status(),
        hour: last_hour(),
    }
}

async fn waiting(store: &Store) -> Result<Waiting, StoreError> {
    let (now, next) = store.next_rows(NEXT).await?;
    let Backlog { pending, parked, overdue, .. } = store.backlog().await?;
    let held = store.some_held().await?.into_iter();
    let held = held.map(|(kind, rows)| Held { kind, rows: rows.min(ENOUGH), or_more: rows > ENOUGH }).collect();
    let enough = ENOUGH.unsigned_abs();
    let newest = if parked == 0 { Vec::new() } else { store.newest_parked(PARKED).await? };
    let parked = Parked { rows: parked.min(enough), or_more: parked > enough, newest };
    let paused = store.pauses().await?;
    Ok(Waiting { now, late_seconds: overdue.as_secs_f64(), pending, next, held, paused, parked })
}
