//! The low-water mark: looks and claims begin there, since no row waits below it.
//!
//! Why it exists: a delivered row leaves its entry at the low end of the index until no transaction of the whole server is so
//! old that it might still see the row. While one such transaction is open (a dump, a forgotten session), each look from the
//! beginning of the index would step over everything that was delivered meanwhile.
//!
//! How it is proved: each claim reads the database's clock and then takes a transaction number; the pair is a [`Sample`]. A
//! row that a look cannot see yet belongs to a transaction whose number is not below the lowest running number. If the lowest
//! running number is higher than the sample's, that transaction took its number after the sample's clock was read. A row's
//! slot is read from the clock after its transaction took its number
//! ([`tidings.arrival()`](../../../migrations/0002_schedules.sql)), so it is not below the sample's time. Rows that the look
//! can see are not below the first slot that it found.
//!
//! Where the proof ends: a transaction that has written and stays open holds the mark back for a minute; then the mark moves
//! on without proof. Rows written with the triggers off and clocks that were set back cannot be proved either. And without a
//! mark, at the start and after a doubt, looks and claims begin a minute ago, or the first of them would step over all old
//! entries. A row that is missed for such a reason is found by the next sweep, which looks below the mark, beside the loop.
//! Without a mark a sweep is due at once.

use std::collections::VecDeque;

use time::{Duration, OffsetDateTime};

use super::Moment;
use crate::queue::{Below, Look};

/// An open transaction holds the mark back for at most this long. Without a mark, looks and claims begin this long ago.
const MAX_AGE: Duration = Duration::MINUTE;
/// Samples are at least this far apart: there are many claims in a second.
const SAMPLE_DISTANCE: Duration = Duration::milliseconds(50);
/// A clock that runs back by more than this was set.
const SET_BACK: Duration = Duration::SECOND;

/// The mark, and the samples that will prove the next one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct LowWater {
    /// Once a sweep has looked below it, no row waits below; `None` = looks and claims begin a minute ago.
    mark: Option<OffsetDateTime>,
    /// A sweep has looked below the mark, which has only been moved by proof or after a minute since.
    swept: bool,
    /// Oldest first, all newer than the sample that proved the mark; a minute's worth at most.
    samples: VecDeque<Sample>,
    /// A sweep that began before this moment says nothing about the present mark.
    given_up_at: Moment,
}

/// What a claim tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Sample {
    /// The database's time, read before the claim's transaction took its number.
    pub(super) at: OffsetDateTime,
    /// The number of the claim's transaction.
    pub(super) xid: i64,
}

impl LowWater {
    /// The mark; `None` = looks and claims begin a minute ago.
    pub(super) fn mark(&self) -> Option<OffsetDateTime> {
        self.mark
    }

    /// Whether a sweep has looked below the mark since the mark was last given up.
    pub(super) fn is_swept(&self) -> bool {
        self.swept
    }

    /// Gives up the mark: the server may be another one, or its clock was set.
    pub(super) fn give_up(&mut self, now: Moment) {
        *self = Self { given_up_at: now, ..Self::default() };
    }

    /// Gives up the mark if the database's clock was set back, that is, shows a time well before one that it showed earlier.
    fn check_clock(&mut self, now: Moment, at: OffsetDateTime) {
        let newest = self.samples.back().map(|sample| sample.at).max(self.mark);
        if newest.is_some_and(|newest| at < newest - SET_BACK) {
            self.give_up(now);
        }
    }

    /// Keeps the sample of a claim.
    pub(super) fn note_claim(&mut self, now: Moment, sample: Sample) {
        self.check_clock(now, sample.at);
        // Lanes claim at the same time; the sample of one is enough.
        let is_new = |last: &Sample| sample.at >= last.at + SAMPLE_DISTANCE && sample.xid > last.xid;
        if self.samples.back().is_none_or(is_new) {
            self.samples.push_back(sample);
        }
    }

    /// Moves the mark up as far as a look proves.
    pub(super) fn note_look(&mut self, now: Moment, look: &Look) {
        self.check_clock(now, look.at);
        self.move_up(look);
    }

    /// Notes a sweep that was asked for at `asked_at`. Looks may have moved the mark meanwhile; the rows that they saw are
    /// not below the mark that the sweep began with.
    pub(super) fn note_sweep(&mut self, asked_at: Moment, look: &Look) {
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
        // The newest sample that proves something stays, since the next look may need it; older samples go.
        let oldest_mark = look.at - MAX_AGE;
        while self.samples.get(1).is_some_and(|next| next.xid < look.oldest_xid || next.at < oldest_mark) {
            self.samples.pop_front();
        }
        let proved = self.samples.front().filter(|sample| sample.xid < look.oldest_xid).map(|sample| sample.at);
        let below = proved.max(Some(oldest_mark));
        let found = look.first.into_iter().chain(below).min();
        // The look has not seen what lies below the present mark, so the mark never moves down here.
        self.mark = self.mark.max(found);
    }
}

#[cfg(test)]
mod tests;
