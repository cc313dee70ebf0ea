//! The metrics: their names, what they tell, and one function for each thing that is counted. All of them are there from
//! the start, at zero; those with the label `kind` or `plugin` since a plugin was loaded.

mod serving;

use std::sync::{LazyLock, OnceLock};
use std::time::Duration;

use anyhow::Context as _;
use metrics::{
    Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use metrics_process::Collector;
use tidings_core::reason::{Reason, Reasons};
use tokio_util::sync::CancellationToken;

use super::{hour, kinds};
use crate::dead_letter::Tally;
use crate::store::Backlog;

pub use serving::{Serving, set_serving};

pub(super) const LATENESS: &str = "tidings_lateness_seconds";
pub(super) const DELIVERIES: &str = "tidings_deliveries_total";
pub(super) const CALLS: &str = "tidings_plugin_calls_total";
pub(super) const CALL_SECONDS: &str = "tidings_plugin_call_seconds";
pub(super) const BREAKER: &str = "tidings_breaker_open";
const WAKES: &str = "tidings_wakes_total";
const CLAIMS: &str = "tidings_claims_total";
const CLAIMED_ROWS: &str = "tidings_claimed_rows_total";
const CONFIRM: &str = "tidings_confirm_seconds";
const NEXT_DUE: &str = "tidings_next_due_seconds";
const PENDING: &str = "tidings_pending";
const OLDEST_DUE: &str = "tidings_oldest_due_age_seconds";
const HELD: &str = "tidings_held";
const PARKED: &str = "tidings_parked";
const GENERATION: &str = "tidings_plugin_generation";
const PLUGIN_MEMORY: &str = "tidings_plugin_memory_bytes";
const PLUGIN_CPU: &str = "tidings_plugin_cpu_seconds";
const RELOADS: &str = "tidings_reloads_total";
const CONNECTED: &str = "tidings_connected";
const BLOCKED: &str = "tidings_broker_blocked";
const LISTENING: &str = "tidings_listening";
const BUILD_INFO: &str = "tidings_build_info";
const EXPIRED: &str = "tidings_expired_total";
const REPLAYS: &str = "tidings_replays_total";
const DEAD_LETTERS: &str = "tidings_dead_letters";
const PARKED_LETTERS: &str = "tidings_parked_letters";
const OLDEST_LETTER: &str = "tidings_dead_letters_oldest_age_seconds";
const CANARY: &str = "tidings_canary_lateness_seconds";
const LOST_CANARIES: &str = "tidings_canaries_lost_total";
const DROPPED_SPANS: &str = "tidings_spans_dropped_total";
const DROPPED_LINES: &str = "tidings_log_lines_dropped_total";

const HISTOGRAMS: [(&str, &str, &[f64]); 4] = [
    (LATENESS, "From the due time to the confirm, by the database clock, of delivered rows.", &LATENESS_CLASSES),
    (CANARY, "How late canaries came, from their due time to a consumer.", &LATENESS_CLASSES),
    (CONFIRM, "From the first publish of a batch to its last confirm.", &WORK_CLASSES),
    (
        CALL_SECONDS,
        "One call of a plugin, by the clock on the wall, with its start if it was not running.",
        &WORK_CLASSES,
    ),
];

/// Upper bounds of the classes of lateness, in seconds.
const LATENESS_CLASSES: [f64; 15] =
    [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0, 5.0, 15.0, 30.0, 120.0, 600.0, 3600.0];
/// Upper bounds of the classes of what takes microseconds to seconds, in seconds.
const WORK_CLASSES: [f64; 12] = [0.000_1, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 10.0];

const COUNTERS: [(&str, &str); 11] = [
    (DELIVERIES, "What attempts at rows came to, by kind and outcome."),
    (WAKES, "Looks at the queue, by what woke the dispatcher."),
    (CLAIMS, "Claims that locked rows."),
    (CLAIMED_ROWS, "Rows that claims locked."),
    (CALLS, "Calls of plugins, by plugin, kind and result."),
    (RELOADS, "Changes of what serves, by result: loaded, refused, removed or rolled_back."),
    (EXPIRED, "Deadlines that had come, by where that was found: row, event or dead_letter."),
    (REPLAYS, "Dead letters that a pass dealt with, by outcome: replayed, expired, parked or left."),
    (LOST_CANARIES, "Canaries that did not come within 30 s, or could not be sent."),
    (DROPPED_SPANS, "Spans that the collector did not take, or that were too many to wait for it."),
    (DROPPED_LINES, "Lines of the log that could not be written to standard error."),
];

const GAUGES: [(&str, &str); 16] = [
    (PENDING, "Rows that wait: counted up to 1000, more as PostgreSQL's statistics estimate it."),
    (NEXT_DUE, "Until the next row is due that is not yet, at the last look; +Inf = there is none."),
    (OLDEST_DUE, "How long the oldest row has been due that nothing holds back; 0 = there is none."),
    (HELD, "Rows that wait for a plugin of their kind or for the end of a pause; 1001 = more than a thousand."),
    (PARKED, "Rows that were set aside for a person; 1001 = more than a thousand."),
    (GENERATION, "Which loaded version of a plugin serves, counted over all plugins; 0 = none any more."),
    (PLUGIN_MEMORY, "The most memory that the generation has used."),
    (PLUGIN_CPU, "The most CPU time that one call of the generation has used, in steps of 10 ms."),
    (BREAKER, "1 = the kind's breaker is open: its rows wait until one succeeds."),
    (CONNECTED, "Whether the server answers: postgresql or rabbitmq."),
    (BLOCKED, "Whether RabbitMQ blocks publishing, for want of memory or disk."),
    (LISTENING, "Whether the connection for notifications is there."),
    (BUILD_INFO, "The version."),
    (DEAD_LETTERS, "Dead letters that wait for the next pass."),
    (PARKED_LETTERS, "Dead letters that were set aside for a person."),
    (
        OLDEST_LETTER,
        "How long the oldest dead letter that this daemon's last pass found had been due; 0 = there was none, or another daemon made the pass.",
    ),
];

/// How often what was recorded is taken into the histograms: until then it is a list that grows.
const UPKEEP: Duration = Duration::from_secs(5);

/// The handles of what is counted often, once the metrics were started.
static OFTEN: OnceLock<Often> = OnceLock::new();

struct Often {
    wakes: [Counter; Reason::ALL.len()],
    claims: Counter,
    claimed_rows: Counter,
    confirm: Histogram,
    next_due: Gauge,
}

/// What the operating system says of the process.
static PROCESS: LazyLock<Collector> = LazyLock::new(|| Collector::new("tidings_"));

/// Where it was found that a deadline had come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expired {
    /// In the row, before its plugin was asked.
    Row,
    /// When its event was about to be published.
    Event,
    /// In the dead letter.
    DeadLetter,
}

impl Expired {
    const ALL: [Self; 3] = [Self::Row, Self::Event, Self::DeadLetter];

    fn label(self) -> &'static str {
        match self {
            Self::Row => "row",
            Self::Event => "event",
            Self::DeadLetter => "dead_letter",
        }
    }
}

/// How what serves has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reload {
    /// A version serves that did not.
    Loaded,
    /// A file cannot serve; what served goes on.
    Refused,
    /// A file is gone, and its kinds with it.
    Removed,
    /// A version failed from the start; the one before it serves again.
    RolledBack,
}

impl Reload {
    const ALL: [Self; 4] = [Self::Loaded, Self::Refused, Self::Removed, Self::RolledBack];

    fn label(self) -> &'static str {
        match self {
            Self::Loaded => "loaded",
            Self::Refused => "refused",
            Self::Removed => "removed",
            Self::RolledBack => "rolled_back",
        }
    }
}

/// A server that we need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// Where the rows are.
    Postgresql,
    /// Where the messages go.
    Rabbitmq,
}

/// Starts the metrics: before this, and in a process that never calls it, counting does nothing.
///
/// # Errors
///
/// When they were started before.
pub fn start_metrics() -> anyhow::Result<PrometheusHandle> {
    let mut builder = PrometheusBuilder::new();
    for (name, _, classes) in HISTOGRAMS {
        let matcher = Matcher::Full(name.to_owned());
        builder = builder.set_buckets_for_metric(matcher, classes).context("could not set the buckets")?;
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

    let often = Often {
        wakes: Reason::ALL.map(|reason| counter!(WAKES, "reason" => reason.label())),
        claims: counter!(CLAIMS),
        claimed_rows: counter!(CLAIMED_ROWS),
        confirm: histogram!(CONFIRM),
        next_due: gauge!(NEXT_DUE),
    };
    OFTEN.set(often).ok().expect("the recorder was not installed twice");
    kinds::serve(&[]);
    hour::begin();
    note_next_due(None);
    for place in Expired::ALL {
        count_expired(place, 0);
    }
    for result in Reload::ALL {
        counter!(RELOADS, "result" => result.label()).increment(0);
    }
    count_replays(&Tally::default());
    counter!(LOST_CANARIES).increment(0);
    count_dropped_spans(0);
    counter!(DROPPED_LINES).increment(0);
    // So that it can be seen before the first came.
    drop(histogram!(CANARY));
    set_backlog(&Backlog::default());
    set_connected(Server::Postgresql, false);
    set_connected(Server::Rabbitmq, false);
    set_blocked(false);
    set_listening(false);
    set_letters(0, 0);
    set_oldest_dead_letter(Duration::ZERO);
    gauge!(BUILD_INFO, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    Ok(handle)
}

/// Keeps what is recorded small until `shutdown`, whether anybody scrapes or not.
pub async fn upkeep(metrics: PrometheusHandle, shutdown: CancellationToken) {
    while shutdown.run_until_cancelled(tokio::time::sleep(UPKEEP)).await.is_some() {
        metrics.run_upkeep();
    }
}

/// Counts one look, by all that it was woken for.
pub fn count_wakes(reasons: Reasons) {
    if let Some(often) = OFTEN.get() {
        reasons.iter().for_each(|reason| often.wakes[reason as usize].increment(1));
    }
}

/// Counts a claim and its rows.
pub fn count_claim(rows: usize) {
    if let Some(often) = OFTEN.get() {
        often.claims.increment(1);
        often.claimed_rows.increment(rows as u64);
    }
}

/// Notes how long the confirms of a batch took.
pub fn record_confirms(took: Duration) {
    if let Some(often) = OFTEN.get() {
        often.confirm.record(took.as_secs_f64());
    }
}

/// Notes what a look found: the time until the next row is due, if there is one.
pub fn note_next_due(next_in: Option<Duration>) {
    if let Some(often) = OFTEN.get() {
        often.next_due.set(next_in.map_or(f64::INFINITY, |next_in| next_in.as_secs_f64()));
    }
}

/// Counts rows of `kind` that were held, since nobody serves it or it is paused.
pub fn count_held(kind: &str, rows: u64) {
    kinds::count_held(kind, rows);
}

/// Counts a change of what serves.
pub fn count_reload(result: Reload) {
    counter!(RELOADS, "result" => result.label()).increment(1);
}

/// Notes what waits in the database.
pub fn set_backlog(backlog: &Backlog) {
    let Backlog { pending, held, parked, overdue } = *backlog;
    gauge!(PENDING).set(number(pending));
    gauge!(HELD).set(number(held));
    gauge!(PARKED).set(number(parked));
    gauge!(OLDEST_DUE).set(overdue.as_secs_f64());
}

/// Notes whether a server answers.
pub fn set_connected(server: Server, connected: bool) {
    let server = match server {
        Server::Postgresql => "postgresql",
        Server::Rabbitmq => "rabbitmq",
    };
    gauge!(CONNECTED, "server" => server).set(u8::from(connected));
}

/// Notes whether RabbitMQ blocks publishing.
pub fn set_blocked(blocked: bool) {
    gauge!(BLOCKED).set(u8::from(blocked));
}

/// Notes whether the connection for notifications is there.
pub fn set_listening(listening: bool) {
    gauge!(LISTENING).set(u8::from(listening));
}

/// Asks the operating system about the process.
pub fn look_at_process() {
    PROCESS.collect();
}

#[expect(clippy::cast_precision_loss, reason = "it is exact up to 2^53")]
fn number(number: u64) -> f64 {
    number as f64
}

/// Notes how late a canary came.
pub fn record_canary(lateness: Duration) {
    histogram!(CANARY).record(lateness.as_secs_f64());
}

/// Counts a canary that did not come.
pub fn count_lost_canary() {
    counter!(LOST_CANARIES).increment(1);
}

/// Counts spans that were lost.
pub fn count_dropped_spans(count: u64) {
    counter!(DROPPED_SPANS).increment(count);
}

/// Counts a line of the log that was lost.
pub fn count_dropped_line() {
    counter!(DROPPED_LINES).increment(1);
}

/// Counts deadlines that had come.
pub fn count_expired(place: Expired, count: u64) {
    counter!(EXPIRED, "where" => place.label()).increment(count);
}

/// Counts dead letters that were dealt with.
pub fn count_replays(tally: &Tally) {
    let Tally { expired, replayed, parked, left, oldest_ms: _ } = *tally;
    for (outcome, count) in [("expired", expired), ("replayed", replayed), ("parked", parked), ("left", left)] {
        counter!(REPLAYS, "outcome" => outcome).increment(count);
    }
}

/// Notes how many letters wait and are parked.
pub fn set_letters(dead: u32, parked: u32) {
    gauge!(DEAD_LETTERS).set(dead);
    gauge!(PARKED_LETTERS).set(parked);
}

/// Notes how long the oldest dead letter has been on its way.
pub fn set_oldest_dead_letter(age: Duration) {
    gauge!(OLDEST_LETTER).set(age.as_secs_f64());
}
