//! The metrics in Prometheus' text format. What is not counted as it happens is asked for when somebody scrapes: nobody
//! pays for it otherwise. A server that does not answer in time keeps its last numbers, and is shown as not connected.

use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use tokio::time::timeout;
use tracing::debug;

use crate::http::{PATIENCE, Sources};
use crate::plugins::{BreakerState, GenerationStatus, Registry};
use crate::telemetry::{
    Server, Serving, look_at_process, set_backlog, set_blocked, set_connected, set_letters, set_listening, set_serving,
};

/// `GET /metrics`.
pub(super) async fn show_metrics(State(shown): State<Sources>) -> Response {
    let Sources { plugins, store, broker, metrics, health, .. } = shown;
    set_serving(&serving(&plugins));
    set_listening(health.listening.load(Ordering::Relaxed));
    look_at_process();
    let link = broker.link().await;
    set_connected(Server::Rabbitmq, link.connected);
    set_blocked(link.blocked);
    // Tasks of their own: what was asked is seen through, whoever still waits for it.
    let asked = tokio::spawn(async move { store.backlog().await });
    let counted = tokio::spawn(async move { broker.count_letters().await });
    let (asked, counted) = tokio::join!(timeout(PATIENCE, asked), timeout(PATIENCE, counted));
    let backlog = match asked {
        Ok(Ok(Ok(backlog))) => Some(backlog),
        Ok(Ok(Err(error))) => {
            debug!(error = &error as &dyn std::error::Error, "could not look at what waits");
            None
        }
        _ => None,
    };
    set_connected(Server::Postgresql, backlog.is_some());
    if let Some(backlog) = backlog {
        set_backlog(&backlog);
    }
    match counted {
        Ok(Ok(Ok(Some((dead, parked))))) => set_letters(dead, parked),
        Ok(Ok(Err(error))) => debug!(error = &error as &dyn std::error::Error, "could not count the dead letters"),
        _ => {}
    }
    ([(CONTENT_TYPE, "text/plain; version=0.0.4")], metrics.render()).into_response()
}

/// What serves, as the metrics tell it.
fn serving(plugins: &Registry) -> Vec<Serving> {
    let serving = |active: GenerationStatus| Serving {
        // Without version and digest: a new version must not be a new series.
        plugin: active.plugin.split('@').next().unwrap_or_default().to_owned(),
        generation: active.generation,
        memory_bytes: active.peak_memory_bytes,
        cpu: Duration::from_millis(active.peak_cpu_ms),
        breakers: active.kinds.into_iter().map(|kind| (kind.kind, kind.breaker != BreakerState::Closed)).collect(),
    };
    plugins.status().into_iter().filter_map(|status| status.active).map(serving).collect()
}
