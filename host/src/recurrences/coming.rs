//! The coming instants of stored recurrences, for people. No I/O.

use serde::Serialize;
use time::OffsetDateTime;

use crate::model::recurrence::Recurrence;
use crate::recurrences::instants::Instants;
use crate::recurrences::maker::{to_time, to_timestamp};
use crate::recurrences::rule::Rule;
use crate::recurrences::zone::Zone;

/// A coming occurrence that is not a row yet.
#[derive(Clone, Debug, Serialize)]
pub struct Occurrence {
    /// When it will be due.
    #[serde(with = "time::serde::rfc3339")]
    pub due_at: OffsetDateTime,
    /// Its kind.
    pub kind: String,
    /// The name of its recurrence.
    pub recurrence: String,
    /// Its subject, if it will have one.
    pub subject: Option<String>,
}

/// Whether it is known when the next occurrence of a recurrence is due.
#[must_use]
pub fn goes_on(recurrence: &Recurrence) -> bool {
    recurrence.next_at.is_some() && recurrence.problem.is_none() && !recurrence.paused && !recurrence.ended
}

/// When the next occurrence that is not made yet is due; `None` = after the year 9999, or it is not known.
#[must_use]
pub fn next_due_at(recurrence: &Recurrence) -> Option<OffsetDateTime> {
    recurrence.next_at.and_then(|next_at| due_at(recurrence, next_at))
}

fn due_at(recurrence: &Recurrence, instant: OffsetDateTime) -> Option<OffsetDateTime> {
    instant.checked_add(time::Duration::seconds_f64(recurrence.offset_seconds))
}

/// The coming occurrences of recurrences, earliest first, at most `limit`. The recurrences that go on must be in the order of
/// their next occurrences. What is past was missed: how a recurrence catches up decides what is made of it. Computes for
/// milliseconds, and longer for rules that come rarely.
#[must_use]
pub fn occurrences(recurrences: &[Recurrence], now: OffsetDateTime, limit: usize) -> Vec<Occurrence> {
    let mut coming: Vec<Occurrence> = Vec::new();
    for recurrence in recurrences.iter().filter(|recurrence| goes_on(recurrence)) {
        // No recurrence after this one has an earlier occurrence.
        let last = coming.last().filter(|_| coming.len() == limit);
        if last.is_some_and(|last| next_due_at(recurrence).is_none_or(|due_at| due_at >= last.due_at)) {
            break;
        }
        let due = instants(recurrence, limit).into_iter().filter_map(|instant| due_at(recurrence, instant));
        coming.extend(due.filter(|due_at| *due_at > now).map(|due_at| Occurrence {
            due_at,
            kind: recurrence.kind.clone(),
            recurrence: recurrence.name.clone(),
            subject: recurrence.subject.clone(),
        }));
        coming.sort_by_key(|occurrence| occurrence.due_at);
        coming.truncate(limit);
    }
    coming
}

/// The next instants whose occurrences are not made yet, at most so many. A paused recurrence has none, and neither has one
/// with a problem.
#[must_use]
pub fn instants(recurrence: &Recurrence, count: usize) -> Vec<OffsetDateTime> {
    let (Some(next_at), false, false) = (recurrence.next_at, recurrence.paused, recurrence.ended) else {
        return Vec::new();
    };
    let (Ok(rule), Ok(zone)) = (Rule::parse(&recurrence.rule), Zone::named(&recurrence.time_zone)) else {
        return vec![next_at];
    };
    let (anchor, starts_at) = (to_timestamp(recurrence.anchor), recurrence.starts_at.map(to_timestamp));
    let instants = Instants::new(rule, zone, anchor, starts_at);
    let left = recurrence.max_count.map_or(usize::MAX, |max| usize::try_from(max - recurrence.count).unwrap_or(0));
    std::iter::successors(Some(to_timestamp(next_at)), |last| instants.after(*last).ok().flatten())
        .map(to_time)
        .take_while(|at| recurrence.ends_at.is_none_or(|ends_at| *at <= ends_at))
        .take(count.min(left))
        .collect()
}
