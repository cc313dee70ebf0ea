//! How long to wait before trying again.

use std::time::Duration;

/// A delay that doubles with every failure up to a cap.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    first: Duration,
    cap: Duration,
}

/// A server that is away: soon, and then at most every few seconds, as someone is waiting for it to come back.
pub const RECONNECT: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
/// PostgreSQL refuses to finish what was sent: the first time at once, since one row alone may be the reason.
pub(crate) const FINISH: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(30));
/// A due row that somebody else has locked.
pub(crate) const LOCKED: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));

impl Backoff {
    /// The delay after the first failure, and the longest.
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
    fn the_delay_doubles_from_the_first_to_the_cap() {
        let delays: Vec<u64> = (0..10).map(|failures| FINISH.delay(failures).as_secs()).collect();
        assert_eq!(delays, [0, 0, 0, 0, 1, 3, 6, 12, 25, 30]);
    }

    proptest! {
        #[test]
        fn the_delay_never_falls_never_passes_the_cap_and_never_overflows(failures in any::<u32>()) {
            for backoff in [RECONNECT, FINISH, LOCKED] {
                prop_assert!(backoff.delay(failures) <= backoff.delay(failures.saturating_add(1)));
                prop_assert!((backoff.first..=backoff.cap).contains(&backoff.delay(failures)));
            }
        }
    }
}
