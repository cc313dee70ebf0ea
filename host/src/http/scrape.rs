//! The metrics in Prometheus' text format. What is not counted as it happens is read at each scrape, so that it costs
//! nothing without one. A scrape asks each server once and waits 3 s at most. If a server does not answer, its last
//! numbers stay, and it is shown as not connected.

use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use tokio::time::timeout;
use tracing::debug;

use crate::http::{SERVER_TIMEOUT, Sources};
use crate::plugins::{BreakerState, GenerationStatus, Registry};
use crate::store::StoreError;
use crate::telemetry::{
    Server, Serving, look_at_process, set_backlog, set_blocked, set_connected, set_intake_waiting, set_letters,
    set_limits, set_listening, set_recurrences, set_serving,
};

/// `GET /metrics`.
pub(super) async fn show_metrics(State(sources): State<Sources>) -> Response {
    let Sources { plugins, store, broker, metrics, health, .. } = sources;
    set_serving(&serving_plugins(&plugins));
    set_listening(health.listening.load(Ordering::Relaxed));
    look_at_process();
    let link = broker.link();
    set_connected(Server::Rabbitmq, link.connected);
    set_blocked(link.blocked);
    // Tasks of their own, so that a question that was asked is finished even if the request is dropped.
    let backlog =
        tokio::spawn(
            async move { Ok((store.backlog().await?, store.count_recurrences().await?, store.limits().await?)) },
        );
    let counts = tokio::spawn(async move { (broker.count_dead_letters().await, broker.count_intakes().await) });
    let (backlog, counts) = tokio::join!(timeout(SERVER_TIMEOUT, backlog), timeout(SERVER_TIMEOUT, counts));
    let backlog = match backlog {
        Ok(Ok(Ok(backlog))) => Some(backlog),
        Ok(Ok(Err::<_, StoreError>(error))) => {
            debug!(error = &error as &dyn std::error::Error, "could not read what waits in the database");
            None
        }
        _ => None,
    };
    set_connected(Server::Postgresql, backlog.is_some());
    if let Some((backlog, recurrences, limits)) = backlog {
        set_backlog(&backlog);
        set_limits(&limits);
        set_recurrences(recurrences);
    }
    if let Ok(Ok((letters, intakes))) = counts {
        match letters {
            Ok(Some((dead, parked))) => set_letters(dead, parked),
            Ok(None) => {}
            Err(error) => debug!(error = &error as &dyn std::error::Error, "could not count the dead letters"),
        }
        for (intake, counts) in intakes {
            if let Some(counts) = counts {
                set_intake_waiting(&intake.from, counts.messages);
            }
        }
    }
    ([(CONTENT_TYPE, "text/plain; version=0.0.4")], metrics.render()).into_response()
}

/// The plugins that serve, in the form of the metrics.
fn serving_plugins(plugins: &Registry) -> Vec<Serving> {
    let serving = |active: GenerationStatus| Serving {
        // The name without version and digest: a new version must not start a new series.
        plugin: active.plugin.split('@').next().unwrap_or_default().to_owned(),
        generation: active.generation,
        memory_bytes: active.peak_memory_bytes,
        cpu: Duration::from_millis(active.peak_cpu_ms),
        breakers: active.kinds.into_iter().map(|kind| (kind.kind, kind.breaker != BreakerState::Closed)).collect(),
    };
    plugins.status().into_iter().filter_map(|status| status.active).map(serving).collect()
}
