//! When something is to be done although nothing has happened.

use std::time::Duration;

use super::{Core, HEAD_START, Moment};
use crate::reason::Reason;

/// A transaction for a row that is due at a known moment is begun at most so long before it: nothing else is claimed meanwhile.
pub(super) const LONGEST_HEAD_START: Duration = Duration::from_secs(1);

impl Core {
    pub(super) fn until_sweep(&self, now: Moment) -> Duration {
        self.sweep_schedule.until(now, self.sweep, !self.mark.is_swept())
    }

    /// How long before a row's moment a transaction for it is begun. To begin takes a round trip, after which nothing is asked
    /// until the moment has come. One that was slow by chance, to connect anew for instance, does not count.
    pub(super) fn head_start(&self) -> Duration {
        HEAD_START + self.began[0].min(self.began[1]).min(LONGEST_HEAD_START)
    }

    /// The next moment at which something is to be done, and what for. Of those that have come, a row's is the first.
    pub(super) fn next_timer(&self, now: Moment) -> (Moment, Reason) {
        let due = self.next_at.map(|next_at| (next_at.saturating_sub(self.head_start()), Reason::Due));
        let sweep = (now.saturating_add(self.until_sweep(now)), Reason::Sweep);
        [due, Some(self.look_at), Some(sweep)]
            .into_iter()
            .flatten()
            .min_by_key(|(at, _)| (*at).max(now))
            .expect("there is always the next look")
    }
}
