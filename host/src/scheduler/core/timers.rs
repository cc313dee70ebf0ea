//! When something is to be done although nothing has happened.

use std::time::Duration;

use super::{Core, Moment, Queue};
use crate::wake::Reason;

/// A transaction for a row that is due at a known moment is begun at least so long before it ...
pub(super) const HEAD_START: Duration = Duration::from_micros(500);
/// ... and at most so long: nothing else is claimed meanwhile.
pub(super) const LONGEST_HEAD_START: Duration = Duration::from_secs(1);
/// While rows are claimed again and again, looks are at least this far apart.
pub(super) const LOOKS_APART: Duration = Duration::from_millis(50);

impl Core {
    pub(super) fn is_look_old(&self, now: Moment) -> bool {
        self.looked_at.is_none_or(|looked_at| now >= looked_at + LOOKS_APART)
    }

    pub(super) fn until_sweep(&self, now: Moment) -> Duration {
        self.pace.until(now, self.sweep, !self.mark.is_swept())
    }

    /// How long before a row's moment a transaction for it is begun. To begin takes a round trip, after which nothing is asked
    /// until the moment has come. One that was slow by chance, to connect anew for instance, does not count.
    pub(super) fn head_start(&self) -> Duration {
        HEAD_START + self.began[0].min(self.began[1]).min(LONGEST_HEAD_START)
    }

    /// When to look again, if nothing happens before.
    pub(super) fn look_at(&self) -> Moment {
        self.looked_at.map_or(Moment::ZERO, |looked_at| looked_at + self.sweep)
    }

    /// When something is to be done although nothing has happened, and what for.
    pub(super) fn timers(&self, now: Moment) -> impl Iterator<Item = (Moment, Reason)> {
        let again = if let Queue::Stuck { until } = self.queue { Some(until) } else { None };
        let due = self.next_at.map(|next_at| next_at.saturating_sub(self.head_start()));
        let polling = self.polling.every().map(|every| self.asked_at + every);
        let sweep = self.look_at().min(now.saturating_add(self.until_sweep(now)));
        [(again, Reason::Again), (due, Reason::Due), (polling, Reason::Polling), (Some(sweep), Reason::Sweep)]
            .into_iter()
            .filter_map(|(at, why)| Some((at?, why)))
    }

    /// What was to be done at a moment that has come.
    pub(super) fn time_passes(&mut self, now: Moment) {
        let (Queue::Stuck { .. } | Queue::Waiting) = self.queue else { return };
        let is_over = |why| self.timers(now).any(|(at, other)| other == why && at <= now);
        // A sweep that is quick is a look as well, and hardly later.
        let looks = self.look_at() <= now && !(self.until_sweep(now).is_zero() && self.pace.is_quick());
        if is_over(Reason::Due) {
            self.queue = Queue::Expected(self.next_at.take().expect("its moment has come"));
        } else if is_over(Reason::Again) || is_over(Reason::Polling) || looks {
            self.queue = Queue::Unknown { claimed: false };
        }
    }
}
