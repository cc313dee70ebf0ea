//! The moments at which the core acts although nothing has happened.

use std::time::Duration;

use super::{Core, Moment};
use crate::reason::Reason;

impl Core {
    pub(super) fn time_until_sweep(&self, now: Moment) -> Duration {
        self.sweep_schedule.time_until_next(now, self.sweep_interval, !self.low_water.is_swept())
    }

    /// The next moment to act without an event, and the reason. If several have passed, the row's due time comes first.
    pub(super) fn next_timer(&self, now: Moment) -> (Moment, Reason) {
        let due = self.next_due_at.map(|next_due_at| (next_due_at, Reason::Due));
        let turn = self.turns.next().map(|at| (at, Reason::Turn));
        let drain = self.drain.next().map(|at| (at, Reason::Drain));
        let sweep = (now.saturating_add(self.time_until_sweep(now)), Reason::Sweep);
        [due, turn, drain, Some(self.next_look), Some(sweep)]
            .into_iter()
            .flatten()
            .min_by_key(|(at, _)| (*at).max(now))
            .expect("there is always the next look")
    }
}
