//! One function for each thing that is counted or measured without the label `kind`.

use std::sync::{LazyLock, OnceLock};
use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use metrics_process::Collector;
use tidings_core::reason::{Reason, Reasons};

use crate::model::dead_letter::PassCounts;
use crate::model::intake::Taken;
use crate::model::recurrence::RecurrenceCounts;
use crate::store::Backlog;
use crate::telemetry::metrics::names::{
    BLOCKED, CANARY, CLAIMED_ROWS, CLAIMS, CLOCK_STEPS, CONFIRM, CONNECTED, DEAD_LETTERS, DROPPED_LINES, DROPPED_SPANS,
    EXPIRED, HELD, INTAKE, INTAKE_WAITING, LISTENING, LOST_CANARIES, MAKING_LAG, NEXT_DUE, OCCURRENCES, OLDEST_DUE,
    OLDEST_LETTER, PARKED, PARKED_LETTERS, PENDING, RECURRENCE_PROBLEMS, RECURRENCES, RELOADS, REPLAYS, WAKES,
};

/// The handles of the metrics that change often; set when the metrics are started.
static HANDLES: OnceLock<Handles> = OnceLock::new();

struct Handles {
    wakes: [Counter; Reason::ALL.len()],
    claims: Counter,
    claimed_rows: Counter,
    confirm: Histogram,
    next_due: Gauge,
}

/// Makes the handles. The recorder must have been installed before.
pub(super) fn init() {
    let handles = Handles {
        wakes: Reason::ALL.map(|reason| counter!(WAKES, "reason" => reason.label())),
        claims: counter!(CLAIMS),
        claimed_rows: counter!(CLAIMED_ROWS),
        confirm: histogram!(CONFIRM),
        next_due: gauge!(NEXT_DUE),
    };
    HANDLES.set(handles).ok().expect("the recorder was not installed twice");
}

/// The metrics of the process that come from the operating system.
pub(super) static PROCESS: LazyLock<Collector> = LazyLock::new(|| Collector::new("tidings_"));

/// Where it was found that a deadline had passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expired {
    /// In the row, before its plugin was called.
    Row,
    /// In its event, before it was published.
    Event,
    /// In a dead letter.
    DeadLetter,
}

impl Expired {
    pub(super) const ALL: [Self; 3] = [Self::Row, Self::Event, Self::DeadLetter];

    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Row => "row",
            Self::Event => "event",
            Self::DeadLetter => "dead_letter",
        }
    }
}

/// A change of the plugins that serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reload {
    /// A new version serves.
    Loaded,
    /// A file was refused; the version before it goes on serving.
    Refused,
    /// A file was removed, and its kinds are no longer served.
    Removed,
    /// A version failed from the start; the version before it serves again.
    RolledBack,
}

impl Reload {
    pub(super) const ALL: [Self; 4] = [Self::Loaded, Self::Refused, Self::Removed, Self::RolledBack];

    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Loaded => "loaded",
            Self::Refused => "refused",
            Self::Removed => "removed",
            Self::RolledBack => "rolled_back",
        }
    }
}

/// A server that the daemon needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// Where the rows are.
    Postgresql,
    /// Where the messages go.
    Rabbitmq,
}

/// Counts one look at the queue, once for each of its reasons.
pub fn count_wakes(reasons: Reasons) {
    if let Some(handles) = HANDLES.get() {
        reasons.iter().for_each(|reason| handles.wakes[reason as usize].increment(1));
    }
}

/// Counts occurrences that were put into the queue.
pub fn count_occurrences(occurrences: u64) {
    counter!(OCCURRENCES).increment(occurrences);
}

/// Makes the counters of an intake, at zero.
pub fn serve_intake(intake: &str) {
    for outcome in ["scheduled", "kept", "changed", "refused"] {
        counter!(INTAKE, "intake" => intake.to_owned(), "outcome" => outcome).increment(0);
    }
    set_intake_waiting(intake, 0);
}

/// Counts messages that an intake took, by what became of them.
pub fn count_intake(intake: &str, taken: &[Taken]) {
    let count = |outcome: &'static str, is: fn(&Taken) -> bool| {
        let count = taken.iter().filter(|taken| is(taken)).count();
        if count > 0 {
            counter!(INTAKE, "intake" => intake.to_owned(), "outcome" => outcome).increment(count as u64);
        }
    };
    count("scheduled", |taken| matches!(taken, Taken::Scheduled));
    count("kept", |taken| matches!(taken, Taken::Kept));
    count("changed", |taken| matches!(taken, Taken::Changed(_)));
}

/// Counts a message that an intake refused.
pub fn count_refused_by_intake(intake: &str) {
    counter!(INTAKE, "intake" => intake.to_owned(), "outcome" => "refused").increment(1);
}

/// Sets how many messages wait in the queue of an intake.
pub fn set_intake_waiting(intake: &str, messages: u32) {
    gauge!(INTAKE_WAITING, "intake" => intake.to_owned()).set(messages);
}

/// Records for how long a daemon should have looked at a recurrence.
pub fn record_making_lag(lag: Duration) {
    histogram!(MAKING_LAG).record(lag.as_secs_f64());
}

/// Sets how many recurrences there are.
pub fn set_recurrences(counts: RecurrenceCounts) {
    gauge!(RECURRENCES).set(to_f64(counts.all));
    gauge!(RECURRENCE_PROBLEMS).set(to_f64(counts.problems));
}

/// Counts that the clock of PostgreSQL was set.
pub fn count_clock_step() {
    counter!(CLOCK_STEPS).increment(1);
}

/// Counts a claim and its rows.
pub fn count_claim(rows: usize) {
    if let Some(handles) = HANDLES.get() {
        handles.claims.increment(1);
        handles.claimed_rows.increment(rows as u64);
    }
}

/// Records how long the confirms of a batch took.
pub fn record_confirms(took: Duration) {
    if let Some(handles) = HANDLES.get() {
        handles.confirm.record(took.as_secs_f64());
    }
}

/// Sets the time until the next row is due, as a look found it; `None` = there is no such row.
pub fn note_next_due(next_in: Option<Duration>) {
    if let Some(handles) = HANDLES.get() {
        handles.next_due.set(next_in.map_or(f64::INFINITY, |next_in| next_in.as_secs_f64()));
    }
}

/// Counts a change of the plugins that serve.
pub fn count_reload(result: Reload) {
    counter!(RELOADS, "result" => result.label()).increment(1);
}

/// Sets the gauges of the rows that wait in the database.
pub fn set_backlog(backlog: &Backlog) {
    let Backlog { pending, held, parked, overdue } = *backlog;
    gauge!(PENDING).set(to_f64(pending));
    gauge!(HELD).set(to_f64(held));
    gauge!(PARKED).set(to_f64(parked));
    gauge!(OLDEST_DUE).set(overdue.as_secs_f64());
}

/// Sets whether a server answers.
pub fn set_connected(server: Server, connected: bool) {
    let server = match server {
        Server::Postgresql => "postgresql",
        Server::Rabbitmq => "rabbitmq",
    };
    gauge!(CONNECTED, "server" => server).set(u8::from(connected));
}

/// Sets whether RabbitMQ blocks publishing.
pub fn set_blocked(blocked: bool) {
    gauge!(BLOCKED).set(u8::from(blocked));
}

/// Sets whether the connection for notifications is there.
pub fn set_listening(listening: bool) {
    gauge!(LISTENING).set(u8::from(listening));
}

/// Reads the metrics of the process from the operating system.
pub fn look_at_process() {
    PROCESS.collect();
}

#[expect(clippy::cast_precision_loss, reason = "it is exact up to 2^53")]
pub(super) fn to_f64(number: u64) -> f64 {
    number as f64
}

/// Records how late a canary came.
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

/// Counts deadlines that had passed.
pub fn count_expired(place: Expired, count: u64) {
    counter!(EXPIRED, "where" => place.label()).increment(count);
}

/// Counts the dead letters of a pass by outcome.
pub fn count_replays(counts: &PassCounts) {
    let PassCounts { expired, replayed, parked, left, oldest_ms: _ } = *counts;
    for (outcome, count) in [("expired", expired), ("replayed", replayed), ("parked", parked), ("left", left)] {
        counter!(REPLAYS, "outcome" => outcome).increment(count);
    }
}

/// Sets how many dead letters wait for the next pass, and how many are parked.
pub fn set_letters(dead: u32, parked: u32) {
    gauge!(DEAD_LETTERS).set(dead);
    gauge!(PARKED_LETTERS).set(parked);
}

/// Sets how long the oldest dead letter of a pass had been due.
pub fn set_oldest_dead_letter(age: Duration) {
    gauge!(OLDEST_LETTER).set(age.as_secs_f64());
}
