//! The nominal instants of a recurrence: when its rule says, in its time zone. No I/O, and no clock.
//!
//! What happens when clocks change (`host/docs/recurrences.md` has the table):
//!
//! - A rule with fixed times of the day comes once for each of them. If clocks are set forward past a time, its instant is
//!   the first after the gap. If clocks show a time twice, its instant is the first of the two.
//! - A rule with an asterisk or a step in its hour, minute or second comes at every instant at which the clocks show a
//!   matching time. So it keeps its distance in real time through a change.
//! - `every` does not look at the clocks.

use jiff::civil::DateTime;
use jiff::{SignedDuration, Timestamp};

use crate::recurrences::rule::{CronRule, Rule, RuleError};
use crate::recurrences::zone::Zone;

const SECOND: SignedDuration = SignedDuration::from_secs(1);
/// Windows in which the last instant before another is looked for, in seconds.
const WINDOWS: [i64; 7] = [1, 60, 3_600, 86_400, 32 * 86_400, 367 * 86_400, 9 * 366 * 86_400];

/// The instants of one recurrence.
#[derive(Clone, Debug)]
pub struct Instants {
    rule: Rule,
    zone: Zone,
    /// `every` counts from here.
    anchor: Timestamp,
    /// No instant is before this.
    starts_at: Option<Timestamp>,
}

impl Instants {
    /// The instants of a rule in a zone.
    #[must_use]
    pub fn new(rule: Rule, zone: Zone, anchor: Timestamp, starts_at: Option<Timestamp>) -> Self {
        Self { rule, zone, anchor, starts_at }
    }

    /// Its rule.
    #[must_use]
    pub fn rule(&self) -> &Rule {
        &self.rule
    }

    /// Its time zone.
    #[must_use]
    pub fn zone(&self) -> &Zone {
        &self.zone
    }

    /// The first instant after another; `None` = there is none before the year 9999.
    ///
    /// # Errors
    ///
    /// [`RuleError::Never`] when no date fits the rule.
    pub fn after(&self, at: Timestamp) -> Result<Option<Timestamp>, RuleError> {
        // The instant before the start, so that the start itself may be one.
        let just_before_start = self.starts_at.map(|starts_at| starts_at - SignedDuration::from_nanos(1));
        let at = at.max(just_before_start.unwrap_or(at));
        match &self.rule {
            Rule::Every(time) => {
                let time = SignedDuration::try_from(*time).expect("ten years at most");
                let passed = at.duration_since(self.anchor).as_nanos().div_euclid(time.as_nanos());
                let nanos = self.anchor.as_nanosecond().checked_add((passed + 1) * time.as_nanos());
                Ok(nanos.and_then(|nanos| Timestamp::from_nanosecond(nanos).ok()))
            }
            Rule::Cron(rule) if rule.is_fixed() => self.fixed_after(rule, at),
            Rule::Cron(rule) => self.repeated_after(rule, at),
        }
    }

    /// The last instant at or before another, if it is not before `from`, which is an instant.
    ///
    /// # Errors
    ///
    /// As [`Instants::after`].
    pub fn last(&self, from: Timestamp, until: Timestamp) -> Result<Timestamp, RuleError> {
        let mut last = from;
        for seconds in WINDOWS {
            let begin = until.checked_sub(SignedDuration::from_secs(seconds)).unwrap_or(from).max(from);
            if begin == from {
                break;
            }
            if let Some(found) = self.after(begin)?.filter(|found| *found <= until) {
                last = found;
                break;
            }
        }
        while let Some(next) = self.after(last)?.filter(|next| *next <= until) {
            last = next;
        }
        Ok(last)
    }

    fn fixed_after(&self, rule: &CronRule, at: Timestamp) -> Result<Option<Timestamp>, RuleError> {
        // Later times have later instants, or the same. Times that clocks showed before this instant have earlier ones.
        let mut wall = whole_second(self.zone.wall(at)).checked_add(SECOND).ok();
        while let Some(from) = wall {
            let Some(found) = rule.next(from)? else { return Ok(None) };
            let Some(instant) = self.zone.first_instant(found) else { return Ok(None) };
            if instant > at {
                return Ok(Some(instant));
            }
            // Clocks show it for the second time.
            wall = found.checked_add(SECOND).ok();
        }
        Ok(None)
    }

    fn repeated_after(&self, rule: &CronRule, at: Timestamp) -> Result<Option<Timestamp>, RuleError> {
        let mut changes = self.zone.changes_after(at);
        let (mut begin, mut wall) = (at, self.zone.wall(at));
        let mut from = whole_second(wall).checked_add(SECOND).ok();
        // From one change of the clocks to the next.
        while let Some(search) = from {
            let Some(found) = rule.next(search)? else {
                // Clocks may be set back to a time that matches.
                let Some(change) = changes.next().filter(|change| change.to < change.from) else { return Ok(None) };
                (begin, wall, from) = (change.at, change.to, Some(round_up(change.to)));
                continue;
            };
            let instant = begin.checked_add(found.duration_since(wall)).ok();
            match (instant, changes.next()) {
                (Some(instant), Some(change)) if change.at <= instant => {
                    (begin, wall, from) = (change.at, change.to, Some(round_up(change.to)));
                }
                (instant, _) => return Ok(instant),
            }
        }
        Ok(None)
    }
}

/// The second that a time is in.
fn whole_second(wall: DateTime) -> DateTime {
    wall.with().subsec_nanosecond(0).build().expect("a time without a fraction is a time")
}

/// The first whole second that is not before a time.
fn round_up(wall: DateTime) -> DateTime {
    let second = whole_second(wall);
    if second == wall { wall } else { second.checked_add(SECOND).unwrap_or(DateTime::MAX) }
}

#[cfg(test)]
mod tests;
