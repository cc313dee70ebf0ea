//! The daemon's HTTP interface: it shows what is, from the first moment, and on the page and through the API a person may
//! act by hand. It never decides, and no loop waits for it.

mod actions;
mod api;
mod authorization;
mod error;
mod overview;
mod page;
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
use crate::model::error_chain::error_chain;
use crate::model::health::Health;
use crate::model::http_token::HttpToken;
use crate::model::row_status::Pause;
use crate::plugins::{PluginStatus, Registry};
use crate::store::Store;
use error::ErrorResponse;

/// How long whoever asks waits for a server.
const PATIENCE: Duration = Duration::from_secs(3);
/// A row that has been due for longer is late.
pub(crate) const LATE: Duration = Duration::from_secs(30);

/// The interface, bound to its address.
#[derive(Debug)]
pub struct Http(TcpListener);

/// What is shown.
#[derive(Clone)]
#[expect(missing_debug_implementations, reason = "the plugins have none")]
pub struct Sources {
    /// What serves.
    pub plugins: Arc<Registry>,
    /// The rows.
    pub store: Store,
    /// The letters.
    pub broker: Arc<Broker>,
    /// What was counted.
    pub metrics: PrometheusHandle,
    /// How the loops are.
    pub health: Arc<Health>,
    /// Whether notifications are wanted.
    pub notify: bool,
    /// Who may act; `None` = nobody.
    pub token: Option<HttpToken>,
    /// How often a dead letter may be replayed; 0 = as often as it takes.
    pub replay_max: u32,
}

/// What is shown, and what the interface remembers for itself.
struct AppState {
    shown: Sources,
    /// Where it listens.
    addr: SocketAddr,
    began: Instant,
    /// The last overview, and when it was made.
    overview: Mutex<Option<(Instant, Arc<str>)>>,
    /// The last look at the letters.
    letters: Mutex<Option<(Instant, Arc<str>)>>,
    /// Whose turn it is to ask the database for something that takes longer.
    turn: Mutex<()>,
    /// What a person has begun.
    at_work: TaskTracker,
    shutdown: CancellationToken,
}

impl FromRef<Arc<AppState>> for Sources {
    fn from_ref(site: &Arc<AppState>) -> Self {
        site.shown.clone()
    }
}

/// What `GET /readyz` answers.
#[derive(Debug, Serialize)]
struct Ready {
    ready: bool,
    /// Why it is not.
    reasons: Vec<String>,
    /// What somebody should know, and is no reason.
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
    /// When it cannot be had.
    pub async fn bind(addr: SocketAddr) -> anyhow::Result<Self> {
        let bound = TcpListener::bind(addr).await;
        let bound = bound.with_context(|| {
            format!("could not listen at {addr} for HTTP; give another address with TIDINGS_HTTP_ADDR")
        })?;
        Ok(Self(bound))
    }

    /// Answers until `shutdown`.
    ///
    /// # Errors
    ///
    /// When the address is lost.
    pub async fn run(self, shown: Sources, shutdown: CancellationToken) -> anyhow::Result<()> {
        let addr = self.0.local_addr()?;
        info!("HTTP at http://{addr}");
        let site = Arc::new(AppState {
            shown,
            addr,
            began: Instant::now(),
            overview: Mutex::default(),
            letters: Mutex::default(),
            turn: Mutex::default(),
            at_work: TaskTracker::new(),
            shutdown: shutdown.clone(),
        });
        let service = routes(&site).into_make_service_with_connect_info::<SocketAddr>();
        // Requests in flight are not waited for: whoever asked can ask again.
        tokio::select! {
            biased;
            () = shutdown.cancelled() => {}
            ended = axum::serve(self.0, service) => ended?,
        }
        // What a person has begun ends after the letters that are on their way: broken off, it would leave copies.
        site.at_work.close();
        site.at_work.wait().await;
        Ok(())
    }
}

fn routes(site: &Arc<AppState>) -> Router {
    let acting = Router::new()
        .route("/api/token", post(actions::token))
        .route("/api/kinds/{kind}/pause", post(actions::pause))
        .route("/api/kinds/{kind}/resume", post(actions::resume))
        .route("/api/parked/retry", post(actions::retry_rows))
        .route("/api/parked/drop", post(actions::drop_rows))
        .route("/api/parked/{id}/retry", post(actions::retry_row))
        .route("/api/parked/{id}/drop", post(actions::drop_row))
        .route("/api/dead/replay", post(actions::replay_dead))
        .route("/api/dead/drop", post(actions::drop_dead))
        .route("/api/parked-letters/retry", post(actions::retry_parked))
        .route("/api/parked-letters/drop", post(actions::drop_parked))
        .route_layer(from_fn_with_state(Arc::clone(site), authorization::with_token));
    let api = Router::new()
        .route("/api/overview", get(api::overview))
        .route("/api/letters", get(api::letters))
        .route("/api/rows", get(api::explain))
        .route("/api/plugins", get(list_plugins))
        .merge(acting)
        .route_layer(from_fn_with_state(Arc::clone(site), authorization::own_page));
    Router::new()
        .route("/metrics", get(scrape::show_metrics))
        .route("/livez", get(is_alive))
        .route("/readyz", get(is_ready))
        .merge(page::files())
        .merge(api)
        .fallback(error::nowhere)
        .method_not_allowed_fallback(error::not_so)
        .layer(map_response(page::guarded))
        .layer(DefaultBodyLimit::max(actions::LARGEST_BODY))
        .with_state(Arc::clone(site))
}

async fn list_plugins(State(Sources { plugins, store, .. }): State<Sources>) -> Result<Json<Plugins>, ErrorResponse> {
    let held = store.held().await?.into_iter().map(|(kind, rows)| Held { kind, rows }).collect();
    let paused = store.pauses().await?;
    Ok(Json(Plugins { plugins: plugins.status(), held, paused }))
}

/// 200 as long as the loops make progress; 503 means that only a new start will help.
async fn is_alive(State(Sources { health, .. }): State<Sources>) -> Response {
    let reasons = health.hanging_loops();
    let status = if reasons.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(serde_json::json!({ "alive": reasons.is_empty(), "reasons": reasons }))).into_response()
}

/// 200 if rows that fall due now are delivered now; otherwise 503 and why not.
async fn is_ready(State(shown): State<Sources>) -> Response {
    let (reasons, _) = readiness(&shown).await;
    let ready = reasons.is_empty();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(Ready { ready, reasons, notes: shown.health.notes() })).into_response()
}

/// Why rows that fall due now are not delivered now, and whether the database answers.
async fn readiness(shown: &Sources) -> (Vec<String>, bool) {
    let mut reasons = shown.health.unready_reasons(shown.notify);
    if !shown.broker.is_open() {
        let why = shown.broker.failure().map_or_else(String::new, |why| format!(": {why}"));
        reasons.push(format!("RabbitMQ at {} is away, or blocks publishing{why}", shown.broker.place()));
    }
    reasons.extend(shown.broker.refusal());
    // A task of its own: a statement that was sent is seen through, whoever still waits for it.
    let (store, health) = (shown.store.clone(), Arc::clone(&shown.health));
    let asked = tokio::spawn(async move {
        if health.started.load(Ordering::Relaxed) {
            store.check_schema().await.map_err(anyhow::Error::from)?;
        } else {
            store.check().await.map_err(anyhow::Error::from)?;
        }
        store.overdue().await.map_err(anyhow::Error::from)
    });
    let asked =
        tokio::time::timeout(PATIENCE, asked).await.map(|asked| asked.unwrap_or_else(|panic| Err(panic.into())));
    let answers = matches!(asked, Ok(Ok(_)));
    match asked {
        Ok(Ok(overdue)) if overdue > LATE => {
            reasons.push(format!("late: a row that nothing holds back has been due for {} s", overdue.as_secs()));
        }
        Ok(Ok(_)) => {}
        Ok(Err(error)) => reasons.push(format!("PostgreSQL: {}", error_chain(&*error))),
        Err(_) => {
            let trouble = shown.store.trouble().map(|why| format!("; no connection could be opened: {why}"));
            reasons.push(format!(
                "PostgreSQL did not answer within {} s{}",
                PATIENCE.as_secs(),
                trouble.unwrap_or_default()
            ));
        }
    }
    reasons.extend(shown.store.shortage());
    (reasons, answers)
}
