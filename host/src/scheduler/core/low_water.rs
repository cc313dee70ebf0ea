//! The low-water mark: a time below which no slot waits, so that looks and claims begin there.
//!
//! What is delivered leaves its entry at the low end of the index, and there it stays until no transaction of the whole
//! server is so old that it might still see it. While one such is open, a dump or a forgotten session, each look from the
//! very beginning would step over everything that was delivered meanwhile.
//!
//! The mark is proved, not guessed. Each claim samples the clock and then, after that, takes a transaction number. Whatever
//! a look cannot see yet has a number that is not below the oldest one that is running; if that is higher than the number
//! of a sample, it was taken after the sample's clock was read. And a row's slot is read from the clock after its
//! transaction took its number ([`tidings.arrival()`](../../../../migrations/0002_schedules.sql)), so it is not below the
//! sample's time. What the look can see is not below the first slot that it found.
//!
//! A transaction that has written and stays open holds the mark back; after a minute it goes on without the proof. So does
//! what nobody can prove: rows that were written with the triggers off, a clock that was set back. And while there is no mark,
//! at the start and after a doubt, looks and claims begin a minute ago, or the first of them would step over all of it. A row
//! that is missed for such a reason is found by the next sweep, which looks below the mark, beside the loop; where there is no
//! mark one is due at once.

use std::collections::VecDeque;

use time::{Duration, OffsetDateTime};

use crate::queue::Look;

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
    /// How often the mark was given up.
    given_up: u64,
}

/// What was known when a look or a claim began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Known {
    /// The newest time that the database had told. If it tells an older one later, its clock was set back.
    newest: Option<OffsetDateTime>,
    /// What began before the mark was given up says nothing about what is known since.
    given_up: u64,
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

    /// For what begins now.
    pub(super) fn known(&self) -> Known {
        let newest = self.samples.back().map(|sample| sample.at).max(self.mark);
        Known { newest, given_up: self.given_up }
    }

    /// Whether what began with `known`, and was told the database's time `at`, counts. If the clock was set back, the mark is
    /// given up.
    fn counts(&mut self, known: Known, at: OffsetDateTime) -> bool {
        if known.given_up == self.given_up && known.newest.is_some_and(|newest| at < newest - SET_BACK) {
            self.give_up();
        }
        known.given_up == self.given_up
    }

    /// The server may be another, or its clock.
    pub(super) fn give_up(&mut self) {
        *self = Self { given_up: self.given_up + 1, ..Self::default() };
    }

    /// After a claim that began with `known`.
    pub(super) fn sample(&mut self, sample: Sample, known: Known) {
        // Lanes claim side by side; one of them is enough.
        let is_new = |last: &Sample| sample.at >= last.at + APART && sample.xid > last.xid;
        if self.counts(known, sample.at) && self.samples.back().is_none_or(is_new) {
            self.samples.push_back(sample);
        }
    }

    /// After a look that began with `known`.
    pub(super) fn seen(&mut self, seen: &Look, known: Known) {
        // If a sweep has ended since it began, the mark may have gone back to what this look has not seen.
        if !self.counts(known, seen.at) || self.mark.is_some_and(|mark| mark < seen.from) {
            return;
        }
        // The newest that counts, and nothing older, may be asked for again.
        while self.samples.get(1).is_some_and(|next| next.xid < seen.oldest_xid) {
            self.samples.pop_front();
        }
        let long_ago = seen.at - PATIENCE;
        while self.samples.get(1).is_some_and(|next| next.at < long_ago) {
            self.samples.pop_front();
        }
        let proved = self.samples.front().filter(|sample| sample.xid < seen.oldest_xid).map(|sample| sample.at);
        let below = proved.map_or(long_ago, |at| at.max(long_ago));
        let found = seen.first.map_or(below, |first| first.min(below));
        // It has not seen what lies below the mark.
        self.mark = self.mark.max(Some(found));
    }

    /// After a sweep that began with `known`. `back_to` = this waits below what the mark was then. Looks have gone on meanwhile,
    /// and may have moved the mark: what they saw is not below what it was.
    pub(super) fn swept(&mut self, back_to: Option<OffsetDateTime>, known: Known) {
        if known.given_up != self.given_up {
            return;
        }
        self.swept = true;
        self.mark = match (self.mark, back_to) {
            (Some(mark), Some(back_to)) => Some(mark.min(back_to)),
            (mark, back_to) => back_to.or(mark),
        };
    }
}

#[cfg(test)]
mod tests;
