//! Time, as the database tells it. The host's own wall clock is never asked: a reading of the database clock is
//! carried on by the monotonic clock, so that steps of either host's clock change nothing.

use std::time::Duration;

use time::OffsetDateTime;
use tokio::time::Instant;

/// The database clock as it was read once, and what it says since.
#[derive(Clone, Copy, Debug)]
pub struct DatabaseClock {
    read: OffsetDateTime,
    asked_at: Instant,
}

impl DatabaseClock {
    /// A clock that said `read` in answer to a question sent at `asked_at`. Since the answer is younger than the
    /// question, this clock is never slow, and fast by at most a round trip: a deadline is never overlooked.
    #[must_use]
    pub fn new(read: OffsetDateTime, asked_at: Instant) -> Self {
        Self { read, asked_at }
    }

    /// Now.
    #[must_use]
    pub fn now(&self) -> OffsetDateTime {
        self.at(Instant::now())
    }

    /// What the clock said at `instant`, which may be before the reading.
    #[must_use]
    pub fn at(&self, instant: Instant) -> OffsetDateTime {
        let signed = |time: Duration| time::Duration::try_from(time).unwrap_or(time::Duration::ZERO);
        let since = signed(instant.saturating_duration_since(self.asked_at));
        let before = signed(self.asked_at.saturating_duration_since(instant));
        self.read + since - before
    }

    /// Now, in whole milliseconds since the Unix epoch.
    #[must_use]
    pub fn now_ms(&self) -> i64 {
        unix_ms(self.now())
    }

    /// How long ago the clock was read.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.asked_at.elapsed()
    }
}

/// Whole milliseconds since the Unix epoch, rounded down.
#[must_use]
pub fn unix_ms(time: OffsetDateTime) -> i64 {
    let ms = time.unix_timestamp_nanos().div_euclid(1_000_000);
    i64::try_from(ms).expect("the years that OffsetDateTime knows fit into 64 bits of milliseconds")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn milliseconds_are_rounded_down_on_both_sides_of_the_epoch() {
        let epoch = OffsetDateTime::UNIX_EPOCH;
        assert_eq!(unix_ms(epoch + Duration::from_micros(1_999)), 1);
        assert_eq!(unix_ms(epoch - Duration::from_micros(1)), -1);
    }

    #[test]
    fn the_clock_goes_on_from_its_reading() {
        let asked_at = Instant::now();
        let clock = DatabaseClock::new(OffsetDateTime::UNIX_EPOCH, asked_at);
        assert_eq!(
            clock.at(asked_at + Duration::from_millis(1_500)),
            OffsetDateTime::UNIX_EPOCH + Duration::from_millis(1_500)
        );
        assert_eq!(clock.at(asked_at), OffsetDateTime::UNIX_EPOCH);
        let later = DatabaseClock::new(OffsetDateTime::UNIX_EPOCH, asked_at + Duration::from_secs(3));
        assert_eq!(later.at(asked_at), OffsetDateTime::UNIX_EPOCH - Duration::from_secs(3));
    }
}
