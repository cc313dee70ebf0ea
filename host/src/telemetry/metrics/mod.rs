//! The metrics: their names and help texts, and one function for each thing that is counted.
//!
//! Must never label by what users can make up without end: the label `kind` has only kinds that a loaded plugin serves,
//! so writing rows of other kinds makes no new series.
//!
//! To change it, know: every metric exists from the start, at zero; those with the label `kind` or `plugin` from the
//! moment a plugin is loaded. Outcomes of rows are summed up by kind for each batch, and counted once the batch is
//! committed.

pub(super) mod counts;
pub(super) mod kinds;
pub(super) mod last_hour;
mod names;
pub(super) mod serving;

use std::time::Duration;

use anyhow::Context as _;
use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio_util::sync::CancellationToken;

use crate::model::dead_letter::PassCounts;
use crate::model::recurrence::RecurrenceCounts;
use crate::store::Backlog;
use counts::{
    Expired, PROCESS, Reload, Server, count_dropped_spans, count_expired, count_occurrences, count_replays,
    note_next_due, set_backlog, set_blocked, set_connected, set_letters, set_listening, set_oldest_dead_letter,
    set_recurrences,
};
use names::{
    BUILD_INFO, CANARY, CLOCK_STEPS, COUNTERS, DROPPED_LINES, GAUGES, HISTOGRAMS, LOST_CANARIES, MAKING_LAG, RELOADS,
};

/// How often recorded values are moved into the histograms. Until then they are in a list that grows.
const UPKEEP: Duration = Duration::from_secs(5);

/// Starts the metrics. Without this call, counting does nothing.
///
/// # Errors
///
/// When the metrics were started before.
pub fn start_metrics() -> anyhow::Result<PrometheusHandle> {
    let mut builder = PrometheusBuilder::new();
    for (name, _, buckets) in HISTOGRAMS {
        let matcher = Matcher::Full(name.to_owned());
        builder = builder.set_buckets_for_metric(matcher, buckets).context("could not set the buckets")?;
    }
    let handle = builder.install_recorder().context("could not start the metrics")?;
    for (name, help, _) in HISTOGRAMS {
        describe_histogram!(name, help);
    }
    for (name, help) in COUNTERS {
        describe_counter!(name, help);
    }
    for (name, help) in GAUGES {
        describe_gauge!(name, help);
    }
    PROCESS.describe();

    counts::init();
    kinds::serve(&[]);
    last_hour::start();
    note_next_due(None);
    for place in Expired::ALL {
        count_expired(place, 0);
    }
    for result in Reload::ALL {
        counter!(RELOADS, "result" => result.label()).increment(0);
    }
    count_replays(&PassCounts::default());
    counter!(LOST_CANARIES).increment(0);
    counter!(CLOCK_STEPS).increment(0);
    count_dropped_spans(0);
    count_occurrences(0);
    counter!(DROPPED_LINES).increment(0);
    // Makes the histograms visible before the first canary and the first recurrence.
    drop(histogram!(CANARY));
    drop(histogram!(MAKING_LAG));
    set_backlog(&Backlog::default());
    set_connected(Server::Postgresql, false);
    set_connected(Server::Rabbitmq, false);
    set_blocked(false);
    set_listening(false);
    set_letters(0, 0);
    set_oldest_dead_letter(Duration::ZERO);
    set_recurrences(RecurrenceCounts::default());
    gauge!(BUILD_INFO, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    Ok(handle)
}

/// Moves recorded values into the histograms until `shutdown` is cancelled, so that they do not pile up without a
/// scrape.
pub async fn upkeep(metrics: PrometheusHandle, shutdown: CancellationToken) {
    while shutdown.run_until_cancelled(tokio::time::sleep(UPKEEP)).await.is_some() {
        metrics.run_upkeep();
    }
}
