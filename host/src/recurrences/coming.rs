//! The coming instants of stored recurrences, for people. No I/O.

use time::OffsetDateTime;

use crate::model::recurrence::Recurrence;
use crate::recurrences::instants::Instants;
use crate::recurrences::maker::{to_time, to_timestamp};
use crate::recurrences::rule::Rule;
use crate::recurrences::zone::Zone;

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
