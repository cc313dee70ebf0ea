//! Finds out that the clock of PostgreSQL was set, by comparing it with the time that passed here.
//!
//! Must never do I/O or read a clock. What it finds is for people: nothing is decided by it. (What rows need after a step, the
//! low-water mark and the looks do by themselves.)

use std::time::Duration;

use time::OffsetDateTime;

/// A smaller difference is that of two clocks which run a little differently, or the time that a statement took.
const SMALLEST: time::Duration = time::Duration::SECOND;

/// A reading of the database's clock, between the moments at which it was asked for and answered, since the loop began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reading {
    pub(super) asked_at: Duration,
    pub(super) answered_at: Duration,
    pub(super) at: OffsetDateTime,
}

/// The last reading.
#[derive(Debug, Default)]
pub(super) struct ClockSteps(Option<Reading>);

impl ClockSteps {
    /// Takes a reading. Returns by how much the clock was set since the last one, at least; negative = back.
    pub(super) fn note(&mut self, reading: Reading) -> Option<time::Duration> {
        let last = self.0.replace(reading)?;
        let passed = reading.at - last.at;
        // The clock was read at some moment between the question and the answer.
        let least = time::Duration::try_from(reading.asked_at.saturating_sub(last.answered_at)).ok()?;
        let most = time::Duration::try_from(reading.answered_at.saturating_sub(last.asked_at)).ok()?;
        let (forward, back) = (passed - most, least - passed);
        if forward >= SMALLEST {
            Some(forward)
        } else if back >= SMALLEST {
            Some(-back)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn reading(asked_ms: u64, took_ms: u64, clock_ms: i64) -> Reading {
        let asked_at = Duration::from_millis(asked_ms);
        let at = OffsetDateTime::UNIX_EPOCH + time::Duration::milliseconds(clock_ms);
        Reading { asked_at, answered_at: asked_at + Duration::from_millis(took_ms), at }
    }

    #[test]
    fn a_clock_that_was_set_by_an_hour_is_found_whichever_way() {
        for step_ms in [3_600_000, -3_600_000] {
            let mut steps = ClockSteps::default();
            assert_eq!(steps.note(reading(0, 0, 10_000)), None);
            assert_eq!(steps.note(reading(5_000, 0, 15_000 + step_ms)), Some(time::Duration::milliseconds(step_ms)));
            assert_eq!(steps.note(reading(9_000, 0, 19_000 + step_ms)), None, "it is found once");
        }
    }

    proptest! {
        #[test]
        fn slow_statements_are_no_steps_and_every_large_step_is_found(
            first in (0..1_000_u64, 0..60_000_u64, 0..=100_u64),
            second in (0..600_000_u64, 0..60_000_u64, 0..=100_u64),
            step_ms in prop_oneof![Just(0_i64), -10_000_000..10_000_000_i64],
        ) {
            // The clock is read at a share of the time between question and answer.
            let read = |asked: u64, took: u64, share: u64| i64::try_from(asked + took * share / 100).expect("small");
            let second_asked = first.0 + first.1 + second.0;
            let mut steps = ClockSteps::default();
            steps.note(reading(first.0, first.1, read(first.0, first.1, first.2)));
            let at = read(second_asked, second.1, second.2) + step_ms;
            let found = steps.note(reading(second_asked, second.1, at));
            let slack_ms = i64::try_from(first.1 + second.1).expect("small") + 1_000;
            if step_ms == 0 {
                prop_assert_eq!(found, None);
            } else if step_ms.abs() > slack_ms {
                prop_assert_eq!(found.map(time::Duration::is_negative), Some(step_ms < 0));
            }
        }
    }
}
