//! The daemon's HTTP interface. It shows; it never decides, and nothing waits for it.

mod scrape;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context as _;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use axum::{Json, Router};
use metrics_exporter_prometheus::PrometheusHandle;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::broker::Broker;
use crate::health::Health;
use crate::plugins::{PluginStatus, Registry};
use crate::store::{Store, StoreError};
use crate::whereabouts::Pause;

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
pub struct Shown {
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
}

/// What `GET /readyz` answers.
#[derive(Debug, Serialize)]
struct Ready {
    ready: bool,
    reasons: Vec<String>,
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
    pub async fn run(self, shown: Shown, shutdown: CancellationToken) -> anyhow::Result<()> {
        info!("HTTP at http://{}", self.0.local_addr()?);
        let router = Router::new()
            .route("/api/plugins", get(list_plugins))
            .route("/metrics", get(scrape::show_metrics))
            .route("/livez", get(is_alive))
            .route("/readyz", get(is_ready))
            .with_state(shown);
        // Requests in flight are not waited for: whoever asked can ask again.
        tokio::select! {
            biased;
            () = shutdown.cancelled() => Ok(()),
            ended = axum::serve(self.0, router) => Ok(ended?),
        }
    }
}

async fn list_plugins(State(Shown { plugins, store, .. }): State<Shown>) -> Response {
    match async { Ok::<_, StoreError>((store.held().await?, store.pauses().await?)) }.await {
        Ok((held, paused)) => {
            let held = held.into_iter().map(|(kind, rows)| Held { kind, rows }).collect();
            Json(Plugins { plugins: plugins.status(), held, paused }).into_response()
        }
        Err(error) => {
            let error = format!("{:#}", anyhow::Error::from(error));
            (StatusCode::SERVICE_UNAVAILABLE, Json(serde_json::json!({ "error": error }))).into_response()
        }
    }
}

/// 200 as long as the loops make progress; 503 means that only a new start will help.
async fn is_alive(State(Shown { health, .. }): State<Shown>) -> Response {
    let reasons = health.hanging();
    let status = if reasons.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(serde_json::json!({ "alive": reasons.is_empty(), "reasons": reasons }))).into_response()
}

/// 200 if rows that fall due now are delivered now; otherwise 503 and why not.
async fn is_ready(State(shown): State<Shown>) -> Response {
    let mut reasons = shown.health.lacking(shown.notify);
    if !shown.broker.is_open() {
        reasons.push(format!("RabbitMQ at {} is away, or blocks publishing", shown.broker.place()));
    }
    // A task of its own: a statement that was sent is seen through, whoever still waits for it.
    let asked = tokio::spawn(async move {
        if shown.health.started.load(Ordering::Relaxed) {
            shown.store.check_schema().await.map_err(anyhow::Error::from)?;
        } else {
            shown.store.check().await.map_err(anyhow::Error::from)?;
        }
        shown.store.overdue().await.map_err(anyhow::Error::from)
    });
    let asked =
        tokio::time::timeout(PATIENCE, asked).await.map(|asked| asked.unwrap_or_else(|panic| Err(panic.into())));
    match asked {
        Ok(Ok(overdue)) if overdue > LATE => {
            reasons.push(format!("late: a row that nothing holds back has been due for {} s", overdue.as_secs()));
        }
        Ok(Ok(_)) => {}
        Ok(Err(error)) => reasons.push(format!("PostgreSQL: {error:#}")),
        Err(_) => reasons.push(format!("PostgreSQL did not answer within {} s", PATIENCE.as_secs())),
    }
    let ready = reasons.is_empty();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(Ready { ready, reasons })).into_response()
}
