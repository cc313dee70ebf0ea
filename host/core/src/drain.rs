//! How fast rows that are late are claimed, if the operator has set a rate. Rows that are on time pass them.
//!
//! A row is late when it has been due for longer than a second. Such rows gather while the daemons or their servers are away. A claim
//! of late rows moves the moment of the next one on, by the time that its rows take at the given rate. Until then only the rows of
//! the last second are claimed.

use std::time::Duration;

use super::Moment;
use crate::queue::Look;

/// A row that has been due for longer is late.
pub(super) const LATE: Duration = Duration::from_secs(1);
/// A claim takes at most as many late rows as the rate allows in this time, and makes up for so much of a delay.
const STEP: Duration = Duration::from_millis(100);

/// The rate, and when the next late row may be claimed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Drain {
    /// The time for one row; `None` = no rate is set.
    time_per_row: Option<Duration>,
    /// Late rows wait.
    is_late: bool,
    next: Moment,
}

impl Drain {
    /// `rate`: rows a second; `None` = late rows are not paced.
    pub(super) fn new(rate: Option<u32>) -> Self {
        Self { time_per_row: rate.map(|rate| Duration::from_secs(1) / rate.max(1)), is_late: false, next: Moment::ZERO }
    }

    /// Whether late rows wait and are paced.
    pub(super) fn is_active(&self) -> bool {
        self.is_late && self.time_per_row.is_some()
    }

    /// When late rows may be claimed again; `None` = none wait, or they are not paced.
    pub(super) fn next(&self) -> Option<Moment> {
        Some(self.next).filter(|_| self.is_active())
    }

    /// Whether late rows wait that may not be claimed yet.
    pub(super) fn is_pausing(&self, now: Moment) -> bool {
        self.next().is_some_and(|next| now < next)
    }

    /// The most rows of a claim of late rows.
    pub(super) fn limit(&self, most: i64) -> i64 {
        match self.time_per_row {
            Some(time) if self.is_late => {
                let allowed = STEP.as_nanos() / time.as_nanos().max(1);
                i64::try_from(allowed).map_or(most, |allowed| allowed.clamp(1, most))
            }
            _ => most,
        }
    }

    /// Notes what a look saw.
    pub(super) fn note_look(&mut self, look: &Look) {
        self.is_late = self.time_per_row.is_some() && look.first.is_some_and(|first| first < look.at - LATE);
    }

    /// Notes that so many late rows were claimed, and whether more rows are due. Late rows that others have locked are not waited for.
    pub(super) fn note_claim(&mut self, now: Moment, late_rows: u32, due: bool) {
        let Some(time) = self.time_per_row else { return };
        self.is_late = due && late_rows > 0;
        self.next = self.next.max(now.saturating_sub(STEP)) + time * late_rows;
    }
}
