//! How long to wait before the next attempt, in each case, with jitter.

use std::time::Duration;

use tidings_core::backoff::Backoff;

/// After a plugin trapped, exceeded a limit, or asked for a retry without a time.
pub const BUILD: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_mins(5));
/// After RabbitMQ refused a message or could not route it.
pub const REFUSED: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
/// After PostgreSQL refused a connection for now, while a statement waits for it.
pub const CONNECT: Backoff = Backoff::new(Duration::from_millis(10), Duration::from_millis(500));

/// [`Backoff::delay`], ±20 %, so that attempts that failed at the same time are not repeated at the same time.
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
        fn the_jitter_stays_within_20_percent(failures in 0..40_u32) {
            let (delay, jittered) = (BUILD.delay(failures).as_secs_f64(), jittered(&BUILD, failures).as_secs_f64());
            prop_assert!((delay * 0.799..=delay * 1.201).contains(&jittered));
        }
    }
}
