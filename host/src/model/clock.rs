//! The database's time, by which no message is published after its deadline. The host's own wall clock must never be asked:
//! after the database's clock was read once, the monotonic clock carries the reading on, so that steps of either host's wall
//! clock change nothing.

use std::time::Duration;

use time::OffsetDateTime;
use tokio::time::Instant;

/// The database's clock: one reading of it, carried on by the monotonic clock.
#[derive(Clone, Copy, Debug)]
pub struct DatabaseClock {
    read: OffsetDateTime,
    asked_at: Instant,
}

impl DatabaseClock {
    /// The clock, by a statement that was sent at `asked_at` and returned `read`. Since `read` is younger than `asked_at`,
    /// this clock is never slow, and fast by at most a round trip: a deadline is never overlooked.
    #[must_use]
    pub fn new(read: OffsetDateTime, asked_at: Instant) -> Self {
        Self { read, asked_at }
    }

    /// The database's time now.
    #[must_use]
    pub fn now(&self) -> OffsetDateTime {
        self.at(Instant::now())
    }

    /// The database's time at `instant`, which may be before the reading.
    #[must_use]
    pub fn at(&self, instant: Instant) -> OffsetDateTime {
        let signed = |time: Duration| time::Duration::try_from(time).unwrap_or(time::Duration::ZERO);
        let since = signed(instant.saturating_duration_since(self.asked_at));
        let before = signed(self.asked_at.saturating_duration_since(instant));
        self.read + since - before
    }

    /// The database's time now, in whole milliseconds since the Unix epoch.
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
    i64::try_from(ms).expect("all times of OffsetDateTime fit into 64 bits of milliseconds")
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
    fn the_clock_continues_from_its_reading_and_also_tells_earlier_times() {
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
