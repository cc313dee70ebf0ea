//! What is counted by kind and by plugin. The label `kind` has only the kinds that a loaded plugin serves. Rows of all
//! other kinds are counted as `(unserved)`, which is not a valid name of a kind, so that writing a row never makes a
//! new series.
//!
//! Handles are made once, when a plugin is loaded. A batch is summed up by kind first, and counted when it is
//! committed.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use metrics::{Counter, Histogram, counter, gauge, histogram};

use crate::model::clock::DatabaseClock;
use crate::model::event::BuildError;
use crate::model::schedule::Schedule;
use crate::store::{LimitStatus, Outcome, Settlement};
use crate::telemetry::metrics::counts::{Expired, count_expired, to_f64};
use crate::telemetry::metrics::last_hour;
use crate::telemetry::metrics::names::{
    BREAKER, CALL_SECONDS, CALLS, DELIVERIES, LATENESS, LIMITED, LIMITED_OLDEST, LIMITED_WAIT,
};

/// The label of every kind that no loaded plugin serves.
const UNSERVED: &str = "(unserved)";

/// The outcomes of an attempt at a row, as values of the label.
const OUTCOMES: [&str; 8] = ["delivered", "expired", "skipped", "parked", "retried", "waits", "refused", "held"];
/// The index of `held`, which is the outcome of no settlement.
const HELD: usize = 7;

/// The results of a call of a plugin, as values of the label.
const RESULTS: [&str; 5] = ["built", "skipped", "invalid", "retry", "failed"];

/// The handles of the kinds that are served now.
static METERS: ArcSwapOption<Meters> = ArcSwapOption::const_empty();

/// The handles of all kinds.
struct Meters {
    served: HashMap<String, Meter>,
    unserved: Meter,
}

/// The handles of one kind.
struct Meter {
    lateness: Histogram,
    limited_wait: Histogram,
    outcomes: [Counter; OUTCOMES.len()],
}

impl Meter {
    /// Makes the handles, which makes the series exist at zero.
    fn of(kind: &str) -> Self {
        Self {
            lateness: histogram!(LATENESS, "kind" => kind.to_owned()),
            limited_wait: histogram!(LIMITED_WAIT, "kind" => kind.to_owned()),
            outcomes: OUTCOMES.map(|outcome| counter!(DELIVERIES, "kind" => kind.to_owned(), "outcome" => outcome)),
        }
    }
}

/// The index of an outcome in [`OUTCOMES`].
fn outcome_index(outcome: &Outcome) -> usize {
    match outcome {
        Outcome::Delivered { .. } => 0,
        Outcome::Expired(_) => 1,
        Outcome::Skipped(_) => 2,
        Outcome::Parked(_) => 3,
        Outcome::Retry { .. } => 4,
        Outcome::Waits { .. } => 5,
        Outcome::Refused { .. } => 6,
    }
}

/// The value of the label for an outcome.
pub(in crate::telemetry) fn outcome_label(outcome: &Outcome) -> &'static str {
    OUTCOMES[outcome_index(outcome)]
}

/// Sets the kinds that are served from now on.
pub fn serve(kinds: &[String]) {
    let served = kinds.iter().map(|kind| (kind.clone(), Meter::of(kind))).collect();
    let before = METERS.swap(Some(Arc::new(Meters { served, unserved: Meter::of(UNSERVED) })));
    for kind in kinds {
        // Makes the series exist; the next scrape sets its value.
        gauge!(BREAKER, "kind" => kind.clone()).increment(0);
        gauge!(LIMITED, "kind" => kind.clone()).increment(0);
        gauge!(LIMITED_OLDEST, "kind" => kind.clone()).increment(0);
    }
    for gone in before.iter().flat_map(|before| before.served.keys()).filter(|kind| !kinds.contains(kind)) {
        gauge!(BREAKER, "kind" => gone.clone()).set(0);
        gauge!(LIMITED, "kind" => gone.clone()).set(0);
        gauge!(LIMITED_OLDEST, "kind" => gone.clone()).set(0);
    }
}

/// Sets how many rows of each kind that is served wait for their turn.
pub fn set_limits(limits: &[LimitStatus]) {
    let Some(meters) = &*METERS.load() else { return };
    for kind in meters.served.keys() {
        let status = limits.iter().find(|status| status.limit.kind == *kind);
        let (rows, oldest) = status.map_or((0, 0.0), |status| (status.waiting, status.oldest_seconds));
        gauge!(LIMITED, "kind" => kind.clone()).set(to_f64(rows.unsigned_abs()));
        gauge!(LIMITED_OLDEST, "kind" => kind.clone()).set(oldest);
    }
}

/// Counts rows of `kind` that were held because no daemon serves the kind or it is paused.
pub fn count_held(kind: &str, rows: u64) {
    if let Some(meters) = &*METERS.load() {
        let meter = meters.served.get(kind).unwrap_or(&meters.unserved);
        let mut outcomes = [0; OUTCOMES.len()];
        outcomes[HELD] = rows;
        last_hour::count(outcomes, &[]);
        meter.outcomes[HELD].increment(rows);
    }
}

/// The outcomes of the rows of one batch, summed up by kind.
#[derive(Debug, Default)]
pub struct Batch {
    by_kind: HashMap<String, Sums>,
    expired_rows: u64,
    expired_events: u64,
}

/// The outcomes of the rows of one kind.
#[derive(Debug, Default)]
struct Sums {
    outcomes: [u64; OUTCOMES.len()],
    /// The lateness of each delivered row, in seconds.
    lateness: Vec<f64>,
    /// The same for rows that waited for their turn.
    limited_wait: Vec<f64>,
}

impl Batch {
    /// Sums up `settlements`. `clock` is the clock of their claim.
    #[must_use]
    pub fn of(settlements: &[Settlement], clock: DatabaseClock) -> Self {
        let mut batch = Self::default();
        for Settlement { row: Schedule { kind, due_at, line, .. }, plugin, outcome } in settlements {
            if !batch.by_kind.contains_key(kind) {
                batch.by_kind.insert(kind.clone(), Sums::default());
            }
            let sums = batch.by_kind.get_mut(kind).expect("it was just put there");
            match outcome {
                Outcome::Delivered { confirmed, .. } => {
                    let times = if line.is_some() { &mut sums.limited_wait } else { &mut sums.lateness };
                    times.push((clock.at(confirmed.at()) - *due_at).as_seconds_f64().max(0.0));
                }
                // Without a plugin the row expired before its plugin was called.
                Outcome::Expired(_) if plugin.is_none() => batch.expired_rows += 1,
                Outcome::Expired(_) => batch.expired_events += 1,
                _ => {}
            }
            sums.outcomes[outcome_index(outcome)] += 1;
        }
        batch
    }

    /// Adds the sums to the metrics, after the batch is committed.
    pub fn count(self) {
        let meters = METERS.load();
        let Some(meters) = &*meters else { return };
        for (kind, sums) in self.by_kind {
            last_hour::count(sums.outcomes, &sums.lateness);
            let meter = meters.served.get(&kind).unwrap_or(&meters.unserved);
            sums.lateness.into_iter().for_each(|seconds| meter.lateness.record(seconds));
            sums.limited_wait.into_iter().for_each(|seconds| meter.limited_wait.record(seconds));
            for (counter, rows) in meter.outcomes.iter().zip(sums.outcomes).filter(|(_, rows)| *rows > 0) {
                counter.increment(rows);
            }
        }
        count_expired(Expired::Row, self.expired_rows);
        count_expired(Expired::Event, self.expired_events);
    }
}

/// The result of a call of a plugin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallResult {
    /// An event.
    Built,
    /// The plugin says that there is nothing to send.
    Skipped,
    /// The plugin cannot use the row.
    Invalid,
    /// The plugin asks to be called again.
    Retry,
    /// A trap, a blown limit, or a broken contract.
    Failed,
}

impl<T> From<&Result<T, BuildError>> for CallResult {
    fn from(outcome: &Result<T, BuildError>) -> Self {
        match outcome {
            Ok(_) => Self::Built,
            Err(BuildError::Skip(_)) => Self::Skipped,
            Err(BuildError::Invalid(_)) => Self::Invalid,
            Err(BuildError::Retry(..)) => Self::Retry,
            Err(BuildError::Failed(_) | BuildError::TooLarge(_) | BuildError::Unavailable(..)) => Self::Failed,
        }
    }
}

/// The handles of one plugin's calls for one kind.
#[expect(missing_debug_implementations, reason = "the handles have none")]
pub struct Calls {
    results: [Counter; RESULTS.len()],
    seconds: Histogram,
}

impl Calls {
    /// Makes the handles of a plugin, by its name, for one of its kinds. New series start at zero.
    #[must_use]
    pub fn of(plugin: &str, kind: &str) -> Self {
        let result =
            |result| counter!(CALLS, "plugin" => plugin.to_owned(), "kind" => kind.to_owned(), "result" => result);
        Self { results: RESULTS.map(result), seconds: histogram!(CALL_SECONDS, "plugin" => plugin.to_owned()) }
    }

    /// Counts a call that took this wall-clock time.
    pub fn count(&self, result: CallResult, took: Duration) {
        self.results[result as usize].increment(1);
        self.seconds.record(took.as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use time::OffsetDateTime;
    use tokio::time::Instant;
    use uuid::Uuid;

    use super::*;

    #[test]
    fn a_batch_is_summed_up_by_kind_and_outcome() {
        let clock = DatabaseClock::new(OffsetDateTime::UNIX_EPOCH, Instant::now());
        let row = |kind: &str, plugin: Option<&str>, outcome| Settlement {
            row: Schedule {
                id: Uuid::nil(),
                kind: kind.into(),
                key: None,
                subject: None,
                due_at: OffsetDateTime::UNIX_EPOCH,
                expires_at: None,
                payload: "{}".into(),
                headers: Vec::new(),
                attempts: 0,
                failures: 0,
                refusals: 0,
                untried_since: None,
                recurrence: None,
                nominal_at: None,
                line: None,
                priority: 4,
            },
            plugin: plugin.map(str::to_owned),
            outcome,
        };
        let refused = || Outcome::Refused { error: String::new(), after: Duration::ZERO };
        let batch = Batch::of(
            &[
                row("a", Some("p"), Outcome::Skipped(String::new())),
                row("b", None, Outcome::Expired(String::new())),
                row("a", Some("p"), refused()),
                row("a", Some("p"), refused()),
                row("b", Some("p"), Outcome::Expired(String::new())),
            ],
            clock,
        );
        let of = |kind: &str, outcome: &str| {
            let at = OUTCOMES.iter().position(|other| *other == outcome).expect("there is one");
            batch.by_kind[kind].outcomes[at]
        };
        assert_eq!((of("a", "skipped"), of("a", "refused"), of("a", "expired")), (1, 2, 0));
        assert_eq!((of("b", "expired"), batch.expired_rows, batch.expired_events), (2, 1, 1));
    }
}
