//! How long to wait before the next attempt after a failure.

use std::time::Duration;

/// A delay that doubles with every failure up to a cap.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    first: Duration,
    cap: Duration,
}

/// For a server that is away: soon at first, and never more than a few seconds apart, since rows wait for its return.
pub const RECONNECT: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
/// For a database that is away. A failover ends when one of its servers takes writes, which no connection announces, and every
/// row that is due by then is late until the next attempt.
pub const DATABASE: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
/// For rows that PostgreSQL refuses to finish: almost at once the first time, since a single row may be the cause.
pub(crate) const FINISH: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(30));
/// For due rows that other sessions have locked.
pub(crate) const LOCKED: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));

impl Backoff {
    /// A backoff with this delay after the first failure, and this longest delay.
    #[must_use]
    pub const fn new(first: Duration, cap: Duration) -> Self {
        Self { first, cap }
    }

    /// The delay after `failures` failures in a row before this one: the first delay for 0, doubled for each.
    #[must_use]
    pub fn delay(&self, failures: u32) -> Duration {
        self.first.saturating_mul(1_u32.checked_shl(failures).unwrap_or(u32::MAX)).min(self.cap)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_delay_doubles_from_the_first_up_to_the_cap() {
        let delays: Vec<u64> = (0..10).map(|failures| FINISH.delay(failures).as_secs()).collect();
        assert_eq!(delays, [0, 0, 0, 0, 1, 3, 6, 12, 25, 30]);
    }

    proptest! {
        #[test]
        fn the_delay_never_decreases_exceeds_the_cap_or_overflows(failures in any::<u32>()) {
            for backoff in [RECONNECT, DATABASE, FINISH, LOCKED] {
                prop_assert!(backoff.delay(failures) <= backoff.delay(failures.saturating_add(1)));
                prop_assert!((backoff.first..=backoff.cap).contains(&backoff.delay(failures)));
            }
        }
    }
}
