//! The daemon's HTTP interface: health checks, metrics, an API and a page. It answers from the start of the process on,
//! before the servers do. With a token, a person can act through the API and the page.
//!
//! Must never decide anything, show a payload or the token, or be waited for by a loop.
//!
//! To change it, know: `scrape` reads the metrics that are not counted as they happen; `overview` is what the page
//! shows and is made at most once a second for all browsers; `recurrences` and
//! `intakes` are its parts about them; `authorization` decides who may read and who may act;
//! `actions` does the same as the commands do. A statement or action that was begun is finished even if the client
//! closes the connection.

mod actions;
mod api;
mod authorization;
mod error;
mod intakes;
mod overview;
mod page;
mod recurrences;
mod scrape;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use axum::extract::{DefaultBodyLimit, FromRef, State};
use axum::http::StatusCode;
use axum::middleware::{from_fn_with_state, map_response};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use metrics_exporter_prometheus::PrometheusHandle;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::info;

use crate::broker::Broker;
use crate::intake::status::IntakeStatuses;
use crate::model::error_chain::error_chain;
use crate::model::health::Health;
use crate::model::row_status::Pause;
use crate::model::secrets::HttpToken;
use crate::plugins::{PluginStatus, Registry};
use crate::store::Store;
use error::ErrorResponse;

/// How long a request waits for PostgreSQL or RabbitMQ.
const SERVER_TIMEOUT: Duration = Duration::from_secs(3);
/// A row that has been due for longer is late.
pub(crate) const LATE: Duration = Duration::from_secs(30);

/// The HTTP interface, bound to its address.
#[derive(Debug)]
pub struct Http(TcpListener);

/// The parts of the daemon that the interface shows, and the settings that it needs.
#[derive(Clone)]
#[expect(missing_debug_implementations, reason = "the plugins have none")]
pub struct Sources {
    /// The plugins that serve.
    pub plugins: Arc<Registry>,
    /// The rows.
    pub store: Store,
    /// The dead letters.
    pub broker: Arc<Broker>,
    /// The metrics.
    pub metrics: PrometheusHandle,
    /// The state of the loops.
    pub health: Arc<Health>,
    /// Whether the daemon listens for notifications.
    pub notify: bool,
    /// The token that allows acting; `None` = the interface is read-only.
    pub token: Option<HttpToken>,
    /// How often a dead letter may be replayed; 0 = no limit.
    pub replay_max: u32,
    /// What the intakes do.
    pub intakes: Arc<IntakeStatuses>,
}

/// The state that the handlers share.
struct AppState {
    sources: Sources,
    /// The address at which the interface listens.
    addr: SocketAddr,
    started_at: Instant,
    /// The last overview as JSON, and when it was made.
    overview_cache: Mutex<Option<(Instant, Arc<str>)>>,
    /// The last list of dead letters as JSON, and when it was made.
    letters_cache: Mutex<Option<(Instant, Arc<str>)>>,
    /// Held during a longer statement, so that requests use one connection of the pool at a time.
    database_turn: Mutex<()>,
    /// The actions that were begun and have not ended.
    running_actions: TaskTracker,
    shutdown: CancellationToken,
}

impl FromRef<Arc<AppState>> for Sources {
    fn from_ref(app: &Arc<AppState>) -> Self {
        app.sources.clone()
    }
}

/// What `GET /readyz` answers.
#[derive(Debug, Serialize)]
struct Ready {
    ready: bool,
    /// Why the daemon is not ready.
    reasons: Vec<String>,
    /// What the operator should know, although it does not keep the daemon from being ready.
    notes: Vec<String>,
}

/// What `GET /api/plugins` answers.
#[derive(Debug, Serialize)]
struct Plugins {
    plugins: Vec<PluginStatus>,
    held: Vec<Held>,
    paused: Vec<Pause>,
}

/// Rows that wait for a plugin of their kind.
#[derive(Debug, Serialize)]
struct Held {
    kind: String,
    rows: i64,
}

impl Http {
    /// Binds the address.
    ///
    /// # Errors
    ///
    /// When the address cannot be bound.
    pub async fn bind(addr: SocketAddr) -> anyhow::Result<Self> {
        let bound = TcpListener::bind(addr).await;
        let bound = bound.with_context(|| {
            format!("could not listen at {addr} for HTTP; give another address with TIDINGS_HTTP_ADDR")
        })?;
        Ok(Self(bound))
    }

    /// Answers requests until `shutdown` is cancelled.
    ///
    /// # Errors
    ///
    /// When the listening socket fails.
    pub async fn run(self, sources: Sources, shutdown: CancellationToken) -> anyhow::Result<()> {
        let addr = self.0.local_addr()?;
        info!("HTTP at http://{addr}");
        let app = Arc::new(AppState {
            sources,
            addr,
            started_at: Instant::now(),
            overview_cache: Mutex::default(),
            letters_cache: Mutex::default(),
            database_turn: Mutex::default(),
            running_actions: TaskTracker::new(),
            shutdown: shutdown.clone(),
        });
        let service = routes(&app).into_make_service_with_connect_info::<SocketAddr>();
        // Requests in flight are not waited for: a client can ask again.
        tokio::select! {
            biased;
            () = shutdown.cancelled() => {}
            ended = axum::serve(self.0, service) => ended?,
        }
        // An action ends after the dead letters in flight; stopped earlier, it would leave copies of them.
        app.running_actions.close();
        app.running_actions.wait().await;
        Ok(())
    }
}

fn routes(app: &Arc<AppState>) -> Router {
    let acting = Router::new()
        .route("/api/token", post(actions::token))
        .route("/api/kinds/{kind}/pause", post(actions::pause))
        .route("/api/kinds/{kind}/resume", post(actions::resume))
        .route("/api/recurrences/{name}/pause", post(actions::recurrences::pause))
        .route("/api/recurrences/{name}/resume", post(actions::recurrences::resume))
        .route("/api/recurrences/{name}/stop", post(actions::recurrences::stop))
        .route("/api/parked/retry", post(actions::retry_rows))
        .route("/api/parked/drop", post(actions::drop_rows))
        .route("/api/parked/{id}/retry", post(actions::retry_row))
        .route("/api/parked/{id}/drop", post(actions::drop_row))
        .route("/api/dead/replay", post(actions::replay_dead))
        .route("/api/dead/drop", post(actions::drop_dead))
        .route("/api/parked-letters/retry", post(actions::retry_parked))
        .route("/api/parked-letters/drop", post(actions::drop_parked))
        .route_layer(from_fn_with_state(Arc::clone(app), authorization::require_token));
    let api = Router::new()
        .route("/api/overview", get(api::overview))
        .route("/api/letters", get(api::letters))
        .route("/api/rows", get(api::explain))
        .route("/api/plugins", get(list_plugins))
        .merge(acting)
        .route_layer(from_fn_with_state(Arc::clone(app), authorization::require_same_origin));
    Router::new()
        .route("/metrics", get(scrape::show_metrics))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .merge(page::routes())
        .merge(api)
        .fallback(error::not_found)
        .method_not_allowed_fallback(error::method_not_allowed)
        .layer(map_response(page::add_headers))
        .layer(DefaultBodyLimit::max(actions::MAX_BODY_BYTES))
        .with_state(Arc::clone(app))
}

async fn list_plugins(State(Sources { plugins, store, .. }): State<Sources>) -> Result<Json<Plugins>, ErrorResponse> {
    let held = store.held().await?.into_iter().map(|(kind, rows)| Held { kind, rows }).collect();
    let paused = store.pauses().await?;
    Ok(Json(Plugins { plugins: plugins.status(), held, paused }))
}

/// `GET /livez`: 200 as long as the loops make progress; 503 means that only a restart will help.
async fn livez(State(Sources { health, .. }): State<Sources>) -> Response {
    let reasons = health.hanging_loops();
    let status = if reasons.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(serde_json::json!({ "alive": reasons.is_empty(), "reasons": reasons }))).into_response()
}

/// `GET /readyz`: 200 if rows that fall due now are delivered now; otherwise 503 with the reasons.
async fn readyz(State(sources): State<Sources>) -> Response {
    let (reasons, _) = readiness(&sources).await;
    let ready = reasons.is_empty();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(Ready { ready, reasons, notes: sources.health.notes() })).into_response()
}

/// Returns why rows that fall due now are not delivered now, and whether the database answers.
async fn readiness(sources: &Sources) -> (Vec<String>, bool) {
    let mut reasons = sources.health.unready_reasons(sources.notify);
    if !sources.broker.is_open() {
        let reason = sources.broker.failure().map_or_else(String::new, |reason| format!(": {reason}"));
        reasons.push(format!("RabbitMQ at {} is away, or blocks publishing{reason}", sources.broker.place()));
    }
    reasons.extend(sources.broker.refusal());
    // A task of its own, so that a statement that was sent is finished even if the request is dropped.
    let (store, health) = (sources.store.clone(), Arc::clone(&sources.health));
    let asked = tokio::spawn(async move {
        if health.started.load(Ordering::Relaxed) {
            store.check_schema().await.map_err(anyhow::Error::from)?;
        } else {
            store.check().await.map_err(anyhow::Error::from)?;
        }
        store.overdue().await.map_err(anyhow::Error::from)
    });
    let asked =
        tokio::time::timeout(SERVER_TIMEOUT, asked).await.map(|asked| asked.unwrap_or_else(|panic| Err(panic.into())));
    let answers = matches!(asked, Ok(Ok(_)));
    match asked {
        Ok(Ok(overdue)) if overdue > LATE => {
            reasons.push(format!("late: a row that nothing holds back has been due for {} s", overdue.as_secs()));
        }
        Ok(Ok(_)) => {}
        Ok(Err(error)) => reasons.push(format!("PostgreSQL: {}", error_chain(&*error))),
        Err(_) => {
            let cause = sources.store.trouble().map(|cause| format!("; no connection could be opened: {cause}"));
            reasons.push(format!(
                "PostgreSQL did not answer within {} s{}",
                SERVER_TIMEOUT.as_secs(),
                cause.unwrap_or_default()
            ));
        }
    }
    reasons.extend(sources.store.shortage());
    (reasons, answers)
}
