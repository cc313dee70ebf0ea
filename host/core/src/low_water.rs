//! The low-water mark: a time below which no slot waits, so that looks and claims begin there.
//!
//! What is delivered leaves its entry at the low end of the index, and there it stays until no transaction of the whole
//! server is so old that it might still see it. While one such is open, a dump or a forgotten session, each look from the
//! very beginning would step over everything that was delivered meanwhile.
//!
//! The mark is proved, not guessed. Each claim samples the clock and then, after that, takes a transaction number. Whatever
//! a look cannot see yet has a number that is not below the oldest one that is running; if that is higher than the number
//! of a sample, it was taken after the sample's clock was read. And a row's slot is read from the clock after its
//! transaction took its number ([`tidings.arrival()`](../../migrations/0002_schedules.sql)), so it is not below the
//! sample's time. What the look can see is not below the first slot that it found.
//!
//! A transaction that has written and stays open holds the mark back; after a minute it goes on without the proof. So does
//! what nobody can prove: rows that were written with the triggers off, a clock that was set back. And while there is no mark,
//! at the start and after a doubt, looks and claims begin a minute ago, or the first of them would step over all of it. A row
//! that is missed for such a reason is found by the next sweep, which looks below the mark, beside the loop; where there is no
//! mark one is due at once.

use std::collections::VecDeque;

use time::{Duration, OffsetDateTime};

use super::Moment;
use crate::queue::{Below, Look};

/// The longest time for which an open transaction holds the mark back.
const PATIENCE: Duration = Duration::MINUTE;
/// Samples are at least this far apart: there are many claims in a second.
const APART: Duration = Duration::milliseconds(50);
/// If a clock runs back by more than this, it was set.
const SET_BACK: Duration = Duration::SECOND;

/// The mark, and what the next one will stand on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct LowWater {
    /// Nothing waits below, once it has been swept; `None` = looks and claims begin as long ago as our patience.
    mark: Option<OffsetDateTime>,
    /// A sweep has looked below the mark, which has only been moved by proof and patience since.
    swept: bool,
    /// Oldest first, all of them newer than what the mark stands on; a minute's worth at most.
    samples: VecDeque<Sample>,
    /// What began before says nothing about the mark that there is now.
    given_up_at: Moment,
}

/// What a claim tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Sample {
    /// The database's time, read before the number was taken.
    pub(super) at: OffsetDateTime,
    /// The number of the claim's transaction.
    pub(super) xid: i64,
}

impl LowWater {
    /// The mark; `None` = looks and claims begin as long ago as our patience.
    pub(super) fn mark(&self) -> Option<OffsetDateTime> {
        self.mark
    }

    /// Whether somebody has looked below the mark since it was last given up.
    pub(super) fn is_swept(&self) -> bool {
        self.swept
    }

    /// The server may be another, or its clock.
    pub(super) fn give_up(&mut self, now: Moment) {
        *self = Self { given_up_at: now, ..Self::default() };
    }

    /// If the database's time is older than one that it told before, its clock was set back, and the mark is given up.
    fn check_clock(&mut self, now: Moment, at: OffsetDateTime) {
        let newest = self.samples.back().map(|sample| sample.at).max(self.mark);
        if newest.is_some_and(|newest| at < newest - SET_BACK) {
            self.give_up(now);
        }
    }

    /// After a claim.
    pub(super) fn claimed(&mut self, now: Moment, sample: Sample) {
        self.check_clock(now, sample.at);
        // Lanes claim side by side; one of them is enough.
        let is_new = |last: &Sample| sample.at >= last.at + APART && sample.xid > last.xid;
        if self.samples.back().is_none_or(is_new) {
            self.samples.push_back(sample);
        }
    }

    /// After a look.
    pub(super) fn looked(&mut self, now: Moment, look: &Look) {
        self.check_clock(now, look.at);
        self.move_up(look);
    }

    /// After a sweep that was asked for at a moment. Looks have gone on meanwhile, and may have moved the mark: what they saw is
    /// not below what it was.
    pub(super) fn swept(&mut self, asked_at: Moment, look: &Look) {
        if asked_at <= self.given_up_at {
            return;
        }
        self.move_up(look);
        self.swept = true;
        if let Some(Below { first, go_back: true, .. }) = look.below {
            self.mark = self.mark.min(Some(first));
        }
    }

    fn move_up(&mut self, look: &Look) {
        // The newest that counts, and nothing older, may be asked for again.
        let long_ago = look.at - PATIENCE;
        while self.samples.get(1).is_some_and(|next| next.xid < look.oldest_xid || next.at < long_ago) {
            self.samples.pop_front();
        }
        let proved = self.samples.front().filter(|sample| sample.xid < look.oldest_xid).map(|sample| sample.at);
        let below = proved.max(Some(long_ago));
        let found = look.first.into_iter().chain(below).min();
        // It has not seen what lies below the mark.
        self.mark = self.mark.max(found);
    }
}

#[cfg(test)]
mod tests;
