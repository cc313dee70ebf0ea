//! What becomes of a row whose message was not sent: its deadline had passed, it was missed, or a server refused it. No I/O.

use std::time::Duration;

use time::OffsetDateTime;

use crate::model::backoff::{REFUSED, jittered};
use crate::model::schedule::Schedule;
use crate::scheduler::look_notes::CatchUps;
use crate::store::{Outcome, Settlement};

/// A settlement; `plugin` is the label of the plugin that was called, if any.
pub(super) fn settlement_of(row: Schedule, plugin: Option<&str>, outcome: Outcome) -> Settlement {
    Settlement { row, plugin: plugin.map(str::to_owned), outcome }
}

/// The settlement of a row whose deadline passed before its plugin was called.
pub(super) fn expired_row(row: Schedule, now_ms: i64) -> Settlement {
    let late_ms = row.expires_ms().map_or(0, |deadline| now_ms - deadline);
    let why = if row.line.is_some() { ", because it waited for its turn (tidings.limit)" } else { "" };
    let detail = format!("its deadline had passed {late_ms} ms before it could be built{why}");
    settlement_of(row, None, Outcome::Expired(detail))
}

/// For how long a row has been due without an attempt.
pub(super) fn missed_for(row: &Schedule, now: OffsetDateTime) -> Duration {
    row.untried_since.and_then(|since| Duration::try_from(now - since).ok()).unwrap_or_default()
}

/// The settlement of a row that was missed, and whose kind is not caught up with for so long.
pub(super) fn missed_row(row: Schedule, now: OffsetDateTime, catch_ups: &CatchUps) -> Settlement {
    let within = catch_ups.get(&row.kind).copied().unwrap_or_default();
    let late = missed_for(&row, now);
    let detail = format!(
        "it was missed: it had been due for {} s when it was claimed, and tidings.catch_up lets rows of its kind be {} s late",
        late.as_secs(),
        within.as_secs(),
    );
    settlement_of(row, None, Outcome::Expired(detail))
}

/// The outcome of a row whose message the broker refused, or that PostgreSQL refuses to finish: the row waits.
pub(super) fn refused_for(schedule: &Schedule, error: String) -> Outcome {
    Outcome::Refused { error, after: jittered(&REFUSED, schedule.refusals) }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn each_refusal_makes_the_row_wait_longer() {
        let after = |refusals| {
            let schedule = Schedule {
                id: Uuid::nil(),
                kind: "k".into(),
                key: None,
                subject: None,
                due_at: OffsetDateTime::UNIX_EPOCH,
                expires_at: None,
                payload: "{}".into(),
                headers: Vec::new(),
                attempts: 0,
                failures: 0,
                refusals,
                untried_since: None,
                recurrence: None,
                nominal_at: None,
                line: None,
                priority: 4,
            };
            match refused_for(&schedule, "no queue".into()) {
                Outcome::Refused { after, .. } => after,
                other => panic!("{other:?}"),
            }
        };
        assert!(after(0) < after(2) && after(2) < after(5));
        assert!(after(9) <= Duration::from_secs(36));
    }
}
