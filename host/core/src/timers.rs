//! The moments at which the core acts although nothing has happened.

use std::time::Duration;

use super::{Core, HEAD_START, Moment};
use crate::reason::Reason;

/// A transaction for a row that is due at a known moment begins at most about this long before it: nothing else is claimed
/// meanwhile.
pub(super) const LONGEST_HEAD_START: Duration = Duration::from_secs(1);

impl Core {
    pub(super) fn time_until_sweep(&self, now: Moment) -> Duration {
        self.sweep_schedule.time_until_next(now, self.sweep_interval, !self.low_water.is_swept())
    }

    /// How long before a row's due time the transaction for it begins. To begin takes a round trip, after which the claim
    /// waits for the due time. Of the last two durations the shorter counts: the other may include connecting, for instance.
    pub(super) fn head_start(&self) -> Duration {
        HEAD_START + self.begin_durations[0].min(self.begin_durations[1]).min(LONGEST_HEAD_START)
    }

    /// The next moment to act without an event, and the reason. If several have passed, the row's due time comes first.
    pub(super) fn next_timer(&self, now: Moment) -> (Moment, Reason) {
        let due = self.next_due_at.map(|next_due_at| (next_due_at.saturating_sub(self.head_start()), Reason::Due));
        let sweep = (now.saturating_add(self.time_until_sweep(now)), Reason::Sweep);
        [due, Some(self.next_look), Some(sweep)]
            .into_iter()
            .flatten()
            .min_by_key(|(at, _)| (*at).max(now))
            .expect("there is always the next look")
    }
}
