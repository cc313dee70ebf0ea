//! What the process tells of itself: the log, text on standard error with levels by `RUST_LOG`, and the metrics, for
//! Prometheus. Every metric has its name here and nowhere else, and is there from the start.

mod bounded;

use std::io::IsTerminal as _;
use std::time::Duration;

use anyhow::Context as _;
use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::EnvFilter;

use crate::dead_letter::Tally;
use bounded::Bounded;

/// Without `RUST_LOG`. The clients log the errors that they return as well, and we log those once.
const DEFAULT: &str = "info,lapin=off,sqlx=off";

const EXPIRED: &str = "tidings_expired_total";
const REPLAYS: &str = "tidings_replays_total";
const DEAD_LETTERS: &str = "tidings_dead_letters";
const PARKED_LETTERS: &str = "tidings_parked_letters";
const CANARY: &str = "tidings_canary_lateness_seconds";
const LOST_CANARIES: &str = "tidings_canaries_lost_total";
const OLDEST: &str = "tidings_dead_letters_oldest_age_seconds";

/// Upper bounds of the classes of lateness, in seconds.
const LATENESS: [f64; 12] = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0, 5.0, 15.0, 30.0];

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

/// Starts the log.
pub fn start() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .map_event_format(Bounded::new)
        .init();
}

/// Starts the metrics: before this, and in a process that never calls it, counting does nothing.
///
/// # Errors
///
/// When they were started before.
pub fn start_metrics() -> anyhow::Result<PrometheusHandle> {
    let buckets = PrometheusBuilder::new().set_buckets(&LATENESS).context("could not set the buckets")?;
    let handle = buckets.install_recorder().context("could not start the metrics")?;
    describe_histogram!(CANARY, "How late canaries came, from their due time to a consumer.");
    describe_counter!(LOST_CANARIES, "Canaries that did not come within 30 s, or could not be sent.");
    describe_counter!(EXPIRED, "Deadlines that had come, by where that was found: row, event or dead_letter.");
    describe_counter!(REPLAYS, "Dead letters that a pass dealt with, by outcome: replayed, expired, parked or left.");
    describe_gauge!(DEAD_LETTERS, "Dead letters that wait for the next pass.");
    describe_gauge!(PARKED_LETTERS, "Dead letters that were set aside for a person.");
    describe_gauge!(
        OLDEST,
        "How long the oldest dead letter that this daemon's last pass found had been due; 0 = there was none, or another daemon made the pass."
    );
    for place in Expired::ALL {
        count_expired(place, 0);
    }
    counter!(LOST_CANARIES).increment(0);
    count_replays(&Tally::default());
    set_letters(0, 0);
    set_oldest_dead_letter(Duration::ZERO);
    Ok(handle)
}

/// Notes how late a canary came.
pub fn record_canary(lateness: Duration) {
    histogram!(CANARY).record(lateness.as_secs_f64());
}

/// Counts a canary that did not come.
pub fn count_lost_canary() {
    counter!(LOST_CANARIES).increment(1);
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
    gauge!(OLDEST).set(age.as_secs_f64());
}
