//! Sentences for people, which commands and the page share: times, pauses, and the status of a row. No I/O.

use serde::Serialize;
use time::format_description::well_known::Rfc3339;
use time::{OffsetDateTime, UtcOffset};

use crate::model::limit::{Place, clock_time};
use crate::model::recurrence::Recurrence;
use crate::model::row_status::{FoundRow, Pause, RowRef, RowStatus};

/// A row that was found, with its status as data and as a sentence.
#[derive(Debug, Serialize)]
pub struct Explanation {
    /// The row, for programs.
    #[serde(flatten)]
    pub found: FoundRow,
    /// The same, for people.
    pub explanation: String,
}

impl Explanation {
    /// Adds the sentence.
    #[must_use]
    pub fn of(found: FoundRow) -> Self {
        let explanation = row_status(&found);
        Self { found, explanation }
    }
}

/// An instant in RFC 3339, in UTC, to the millisecond.
#[must_use]
pub fn show(instant: OffsetDateTime) -> String {
    let instant = instant.to_offset(UtcOffset::UTC);
    let instant = instant.replace_millisecond(instant.millisecond()).unwrap_or(instant);
    instant.format(&Rfc3339).unwrap_or_else(|_| instant.to_string())
}

/// One line without control characters, which could change a terminal: texts of dead letters and plugins come from others.
#[must_use]
pub fn printable(text: &str) -> String {
    text.chars().map(|char| if char.is_control() { ' ' } else { char }).collect()
}

/// Says that a kind is paused: by whom, since when, until when, and why.
#[must_use]
pub fn pause_sentence(Pause { kind, since, until, reason, by }: &Pause) -> String {
    let until = until.map_or_else(|| "until somebody resumes it".to_owned(), |until| format!("until {}", show(until)));
    let reason = reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
    let since = show(*since);
    printable(&format!("the kind {kind} is paused by {by} since {since}, {until}{reason}"))
}

/// Says why a recurrence makes no occurrence; `None` = it does.
#[must_use]
pub fn standstill(recurrence: &Recurrence) -> Option<String> {
    match &recurrence.problem {
        Some(problem) => Some(format!("problem: {}", printable(problem))),
        None if recurrence.paused => Some("paused".to_owned()),
        None if recurrence.ended => Some("ended".to_owned()),
        None => None,
    }
}

/// Says why an occurrence of a recurrence was not found.
#[must_use]
pub fn missing_occurrence(recurrence: &Recurrence, instant: OffsetDateTime) -> String {
    let (name, at) = (printable(&recurrence.name), show(instant));
    match (recurrence.next_at, standstill(recurrence)) {
        (_, Some(standstill)) => {
            format!("no occurrence of {name} at {at} was made and kept, and none is made now: {standstill}")
        }
        (Some(next_at), None) if next_at <= instant => format!(
            "no occurrence of {name} at {at} is made yet: the next one that is not made is that of {}, and one is put into the queue 20 to 30 s before it is due",
            show(next_at)
        ),
        (None, None) => format!("a daemon has yet to compute the next instant of {name}"),
        (Some(_), None) => format!(
            "nothing is known of {name} at {at}: that is no instant of its rule, or it was missed, cancelled, or finished before the history begins"
        ),
    }
}

/// Says that nothing is known of a row, and why that may be.
#[must_use]
pub fn unknown_row(which: &RowRef) -> String {
    match which {
        RowRef::Id(id) => format!(
            "nothing is known of {id}: it was cancelled, or replaced or rescheduled under a new id, or never scheduled here, or finished before the history begins; if it was delivered, its message may lie among the dead letters: tidings dead list"
        ),
        RowRef::Key { kind, key } => format!(
            "nothing is known of the kind {} with the key {}: it was cancelled, or never scheduled here, or finished before the history begins",
            printable(kind),
            printable(key)
        ),
    }
}

/// The status of a row, and its reason, in one line.
#[must_use]
pub fn row_status(found: &FoundRow) -> String {
    let FoundRow { kind, attempts, .. } = found;
    let by = |plugin: &Option<String>| plugin.as_ref().map(|plugin| format!(" by {plugin}")).unwrap_or_default();
    let because = |reason: &Option<String>| reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
    let sentence = match &found.row_status {
        RowStatus::Waiting { until, pause } => {
            let pause = pause.as_ref().map(|pause| format!("; {}", pause_sentence(pause))).unwrap_or_default();
            format!("waits until it is due, at {}{pause}", show(*until))
        }
        RowStatus::Due { past_deadline: true, daemons, .. } => {
            format!(
                "its deadline has come: the next daemon that looks finishes it as expired; {}",
                serving(kind, *daemons)
            )
        }
        RowStatus::Due { late_seconds, daemons, .. } => {
            format!("due for {late_seconds:.1} s, and not taken yet; {}", serving(kind, *daemons))
        }
        RowStatus::Locked { late_seconds, by } => format!("due for {late_seconds:.1} s, and locked by {by}"),
        RowStatus::BackingOff { until, last_error } => format!(
            "backs off after {attempts} attempts, and is tried again at {}{}",
            show(*until),
            because(last_error)
        ),
        RowStatus::Held { daemons: 0 } => {
            format!("held: no daemon serves the kind {kind}; put its plugin into the plugin directory of one")
        }
        RowStatus::Held { .. } => {
            format!("held, since no daemon served the kind {kind}; now one does, and is about to release it")
        }
        RowStatus::WaitsForTurn { place: Place { limit, before, before_or_more, in_seconds } } => format!(
            "due, and waits for its turn: {limit}; {} others go before it, so about {}{} from now",
            if *before_or_more { format!("more than {before}") } else { before.to_string() },
            if *before_or_more { "more than " } else { "" },
            clock_time(*in_seconds)
        ),
        RowStatus::Paused { pause } => format!("due, and held: {}", pause_sentence(pause)),
        RowStatus::Parked { parked_at, reason, plugin } => format!(
            "parked at {} after {attempts} attempts{}: {reason}; put it back with `tidings parked retry {}`",
            show(*parked_at),
            by(plugin),
            found.id
        ),
        RowStatus::Delivered { finished_at, late_seconds, plugin } => format!(
            "delivered at {}, {late_seconds:.3} s after it was due{}; if no consumer has it, its message may lie among the dead letters: tidings dead list",
            show(*finished_at),
            plugin.as_ref().map(|plugin| format!(", built by {plugin}")).unwrap_or_default()
        ),
        RowStatus::Expired { finished_at, reason } => {
            format!("expired, and never sent; finished at {}{}", show(*finished_at), because(reason))
        }
        RowStatus::Skipped { finished_at, reason, plugin } => {
            format!("skipped at {}{}, and nothing was sent{}", show(*finished_at), by(plugin), because(reason))
        }
    };
    printable(&sentence)
}

fn serving(kind: &str, daemons: i64) -> String {
    match daemons {
        0 => format!("no daemon serves the kind {kind} now"),
        1 => format!("one daemon serves the kind {kind}"),
        daemons => format!("{daemons} daemons serve the kind {kind}"),
    }
}
