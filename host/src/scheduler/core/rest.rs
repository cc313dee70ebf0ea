//! Servers that did not see something through are left alone for a while.

use super::{Core, Moment};
use crate::backoff::{FINISH, RECONNECT};

/// A server did not see something through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Rest {
    /// How often in a row, at least once.
    pub(super) failures: u32,
    /// Nothing is tried before this moment.
    pub(super) until: Moment,
}

impl Core {
    /// The database did not do it.
    pub(super) fn failed(&mut self, now: Moment) {
        self.pace.doubt();
        self.rest(now);
    }

    /// Tries nothing for a while, longer each time until a batch succeeds. What fails together fails for the same reason.
    pub(super) fn rest(&mut self, now: Moment) {
        if self.rest.is_some_and(|rest| now < rest.until) {
            return;
        }
        let failures = self.rest.map_or(0, |rest| rest.failures);
        let backoff = if self.refused.is_some() { FINISH } else { RECONNECT };
        self.rest = Some(Rest { failures: failures.saturating_add(1), until: now + backoff.delay(failures) });
    }
}
