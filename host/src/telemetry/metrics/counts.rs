//! One function for each thing that is counted.

use std::sync::{LazyLock, OnceLock};
use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use metrics_process::Collector;
use tidings_core::reason::{Reason, Reasons};

use crate::model::dead_letter::PassCounts;
use crate::store::Backlog;
use crate::telemetry::metrics::names::{
    BLOCKED, CANARY, CLAIMED_ROWS, CLAIMS, CONFIRM, CONNECTED, DEAD_LETTERS, DROPPED_LINES, DROPPED_SPANS, EXPIRED,
    HELD, LISTENING, LOST_CANARIES, NEXT_DUE, OLDEST_DUE, OLDEST_LETTER, PARKED, PARKED_LETTERS, PENDING, RELOADS,
    REPLAYS, WAKES,
};

/// The handles of what is counted often, once the metrics were started.
static OFTEN: OnceLock<Often> = OnceLock::new();

struct Often {
    wakes: [Counter; Reason::ALL.len()],
    claims: Counter,
    claimed_rows: Counter,
    confirm: Histogram,
    next_due: Gauge,
}

/// Makes the handles, once the recorder is there.
pub(super) fn begin() {
    let often = Often {
        wakes: Reason::ALL.map(|reason| counter!(WAKES, "reason" => reason.label())),
        claims: counter!(CLAIMS),
        claimed_rows: counter!(CLAIMED_ROWS),
        confirm: histogram!(CONFIRM),
        next_due: gauge!(NEXT_DUE),
    };
    OFTEN.set(often).ok().expect("the recorder was not installed twice");
}

/// What the operating system says of the process.
pub(super) static PROCESS: LazyLock<Collector> = LazyLock::new(|| Collector::new("tidings_"));

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
    pub(super) const ALL: [Self; 3] = [Self::Row, Self::Event, Self::DeadLetter];

    pub(super) fn label(self) -> &'static str {
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

/// A server that we need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// Where the rows are.
    Postgresql,
    /// Where the messages go.
    Rabbitmq,
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
pub(super) fn number(number: u64) -> f64 {
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
pub fn count_replays(tally: &PassCounts) {
    let PassCounts { expired, replayed, parked, left, oldest_ms: _ } = *tally;
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
