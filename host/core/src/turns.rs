//! When to claim rows of limited kinds, which wait in lines for their turn.
//!
//! One claim of turns at a time is delivered: until it is settled, nobody knows what its lines allow next, and then it is asked again
//! at once. Other daemons claim of the same lines, so a look may tell of a turn that a claim does not get.

use std::time::Duration;

use super::Moment;
use crate::backoff::LOCKED;

/// What the core knows of the lines.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Turns {
    /// When a line has its turn; `None` = no row waits for one, or a claim of turns is being delivered.
    next: Option<Moment>,
    /// A claim of turns is being delivered.
    is_busy: bool,
    /// How many claims in a row got nothing although a line seemed to have its turn.
    empty_claims: u32,
}

impl Turns {
    /// When to claim.
    pub(super) fn next(&self) -> Option<Moment> {
        self.next
    }

    /// Notes what a look saw that was asked for at this moment.
    pub(super) fn note_look(&mut self, asked_at: Moment, turn_in: Option<Duration>) {
        if self.is_busy {
            return;
        }
        let seen = turn_in.map(|turn_in| asked_at.saturating_add(turn_in));
        // A line whose rows others deliver seems to have its turn.
        let is_waiting = self.empty_claims > 0 && turn_in == Some(Duration::ZERO);
        self.next = if is_waiting { self.next.max(seen) } else { seen };
    }

    /// Notes that a claim got rows, which are being delivered.
    pub(super) fn begin(&mut self) {
        *self = Self { is_busy: true, ..Self::default() };
    }

    /// Notes that a claim got nothing, and when the next line has its turn.
    pub(super) fn note_empty_claim(&mut self, asked_at: Moment, now: Moment, next_in: Option<Duration>) {
        if next_in == Some(Duration::ZERO) {
            self.next = Some(now + LOCKED.delay(self.empty_claims));
            self.empty_claims = self.empty_claims.saturating_add(1);
        } else {
            self.next = next_in.map(|next_in| asked_at.saturating_add(next_in));
            self.empty_claims = 0;
        }
    }

    /// Notes that the delivery has ended: its lines may have their next turn.
    pub(super) fn end(&mut self, now: Moment) {
        *self = Self { next: Some(now), ..Self::default() };
    }
}
