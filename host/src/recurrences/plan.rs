//! Decides which occurrences of one recurrence are made now, and what follows. No I/O, and no clock.
//!
//! An instant was missed if its occurrence is due before now and was not made. Occurrences are made 20 to 30 s before they are
//! due, so that happens only when no daemon ran, or the recurrence was paused.

use jiff::{SignedDuration, Timestamp};

use crate::model::recurrence::{CatchUp, Then};
use crate::recurrences::instants::Instants;
use crate::recurrences::rule::RuleError;

/// Occurrences are made this long before they are due, at most.
pub(super) const AHEAD: SignedDuration = SignedDuration::from_secs(30);
const NANOSECOND: SignedDuration = SignedDuration::from_nanos(1);

/// What is known of a recurrence.
#[derive(Clone, Debug)]
pub(super) struct State {
    /// The next instant whose occurrence is not made yet; `None` = it must be computed.
    pub(super) next_at: Option<Timestamp>,
    /// Instants up to here are made, or will not be.
    pub(super) passed_at: Timestamp,
    /// No instant is after this.
    pub(super) ends_at: Option<Timestamp>,
    /// How many occurrences may still be made.
    pub(super) left: Option<u64>,
    pub(super) catch_up: CatchUp,
    /// Instants that were missed for longer than this are not made.
    pub(super) within: Option<SignedDuration>,
    /// How much later than its instant an occurrence is due.
    pub(super) offset: SignedDuration,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// The instants whose occurrences are made now, earliest first.
    pub(super) instants: Vec<Timestamp>,
    pub(super) next_at: Option<Timestamp>,
    pub(super) passed_at: Timestamp,
    pub(super) then: Then,
}

impl State {
    /// Plans at this moment, by the database's clock; at most `room` occurrences are made.
    ///
    /// # Errors
    ///
    /// [`RuleError::Never`] when no date fits the rule, and [`RuleError::Past`] when all of them are past.
    pub(super) fn plan(&self, instants: &Instants, now: Timestamp, room: usize) -> Result<Plan, RuleError> {
        let before = |time: SignedDuration| now.checked_sub(time).unwrap_or(Timestamp::MIN);
        // Instants up to here were missed, and those up to there for too long.
        let missed_until = before(self.offset + NANOSECOND);
        let given_up_until = self.within.map(|within| before(self.offset + within + NANOSECOND));
        let left = self.left.map_or(usize::MAX, |left| usize::try_from(left).unwrap_or(usize::MAX));

        let mut plan = Plan { instants: Vec::new(), next_at: None, passed_at: self.passed_at, then: Then::Continue };
        let mut next = self.next_at;
        if next.is_none() {
            next = instants.after(self.passed_at)?;
            if next.is_none() {
                return Err(RuleError::Past(instants.rule().written()));
            }
        }
        loop {
            let in_time = |at: &Timestamp| self.ends_at.is_none_or(|ends_at| *at <= ends_at);
            let Some(at) = next.filter(in_time).filter(|_| plan.instants.len() < left) else {
                plan.then = Then::Ended;
                return Ok(plan);
            };
            let at = if at > missed_until {
                if at.checked_add(self.offset).is_ok_and(|due| due > now + AHEAD) {
                    plan.next_at = Some(at);
                    return Ok(plan);
                }
                at
            } else {
                if let Some(given_up_until) = given_up_until.filter(|until| at <= *until) {
                    next = plan.pass(given_up_until, instants)?;
                    continue;
                }
                match self.catch_up {
                    CatchUp::None => {
                        next = plan.pass(missed_until, instants)?;
                        continue;
                    }
                    CatchUp::Latest => instants.last(at, self.ends_at.unwrap_or(missed_until).min(missed_until))?,
                    CatchUp::All => at,
                }
            };
            if plan.instants.len() == room {
                (plan.next_at, plan.then) = (Some(at), Then::Backlog);
                return Ok(plan);
            }
            plan.instants.push(at);
            next = plan.pass(at, instants)?;
        }
    }
}

impl Plan {
    /// Leaves all instants up to this one behind. Returns the next.
    fn pass(&mut self, until: Timestamp, instants: &Instants) -> Result<Option<Timestamp>, RuleError> {
        self.passed_at = until.max(self.passed_at);
        instants.after(until)
    }
}

#[cfg(test)]
mod tests;
