//! How long to wait before trying again, in each case; and a little by chance.

use std::time::Duration;

use tidings_core::backoff::Backoff;

/// A plugin's trap, its blown limit, or its wish to retry without saying when.
pub const BUILD: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_mins(5));
/// A message that the broker could not route or refused.
pub const REFUSED: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
/// A connection that PostgreSQL does not give us at this moment, while somebody waits for it.
pub const CONNECT: Backoff = Backoff::new(Duration::from_millis(10), Duration::from_secs(2));

/// [`Backoff::delay`], ±20 %, so that what failed together does not come back together.
#[must_use]
pub fn jittered(backoff: &Backoff, failures: u32) -> Duration {
    backoff.delay(failures).mul_f64(0.8 + 0.4 * fastrand::f64())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_jitter_stays_within_a_fifth(failures in 0..40_u32) {
            let (delay, jittered) = (BUILD.delay(failures).as_secs_f64(), jittered(&BUILD, failures).as_secs_f64());
            prop_assert!((delay * 0.799..=delay * 1.201).contains(&jittered));
        }
    }
}
