//! How long to wait before trying again. Pure but for the jitter.

use std::time::Duration;

/// A delay that doubles with every failure up to a cap.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    first: Duration,
    cap: Duration,
}

/// A plugin's trap, its blown limit, or its wish to retry without saying when.
pub const BUILD: Backoff = Backoff { first: Duration::from_secs(1), cap: Duration::from_mins(5) };
/// A message that the broker could not route or refused.
pub const REFUSED: Backoff = Backoff { first: Duration::from_secs(1), cap: Duration::from_secs(30) };
/// A server that is away: soon, and then at most every few seconds, as someone is waiting for it to come back.
pub const RECONNECT: Backoff = Backoff { first: Duration::from_millis(100), cap: Duration::from_secs(5) };
/// PostgreSQL refuses to finish what was sent: the first time at once, since one row alone may be the reason.
pub const FINISH: Backoff = Backoff { first: Duration::from_millis(100), cap: Duration::from_secs(30) };
/// A connection that PostgreSQL does not give us at this moment, while somebody waits for it.
pub const CONNECT: Backoff = Backoff { first: Duration::from_millis(10), cap: Duration::from_secs(2) };
/// A due row that somebody else has locked.
pub const LOCKED: Backoff = Backoff { first: Duration::from_millis(100), cap: Duration::from_secs(1) };

impl Backoff {
    /// The delay after `failures` failures in a row before this one: the first delay for 0, doubled for each.
    #[must_use]
    pub fn delay(&self, failures: u32) -> Duration {
        self.first.saturating_mul(1_u32.checked_shl(failures).unwrap_or(u32::MAX)).min(self.cap)
    }

    /// [`Backoff::delay`], ±20 %, so that what failed together does not come back together.
    #[must_use]
    pub fn jittered(&self, failures: u32) -> Duration {
        self.delay(failures).mul_f64(0.8 + 0.4 * fastrand::f64())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_delay_doubles_from_the_first_to_the_cap() {
        let delays: Vec<u64> = (0..7).map(|failures| REFUSED.delay(failures).as_secs()).collect();
        assert_eq!(delays, [1, 2, 4, 8, 16, 30, 30]);
    }

    proptest! {
        #[test]
        fn the_delay_never_falls_never_passes_the_cap_and_never_overflows(failures in any::<u32>()) {
            for backoff in [BUILD, REFUSED, RECONNECT, FINISH, CONNECT, LOCKED] {
                prop_assert!(backoff.delay(failures) <= backoff.delay(failures.saturating_add(1)));
                prop_assert!((backoff.first..=backoff.cap).contains(&backoff.delay(failures)));
            }
        }

        #[test]
        fn the_jitter_stays_within_a_fifth(failures in 0..40_u32) {
            let (delay, jittered) = (BUILD.delay(failures).as_secs_f64(), BUILD.jittered(failures).as_secs_f64());
            prop_assert!((delay * 0.799..=delay * 1.201).contains(&jittered));
        }
    }
}
