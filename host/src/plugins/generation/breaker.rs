//! The circuit breaker of one kind in one generation. It does no I/O and reads no clock: the caller passes the time.
//!
//! A plugin that fails for every row must not spend the attempts of all the rows that wait for it. When five different
//! rows have failed, without an answer in between, the breaker opens: rows wait without being built. When the waiting
//! time is over, one row is tried, and its answer closes the breaker. One bad row alone never opens it.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;
use uuid::Uuid;

use crate::model::backoff::{BUILD, jittered};

/// How many different rows must fail, without an answer in between, before the breaker opens.
const ROWS_TO_OPEN: usize = 5;
/// If the breaker opens for the first time within so many calls, the generation has failed from its start.
const FIRST_CALLS: u64 = 100;
/// How long rows wait while another row is being tried.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// Whether a row may be built now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::plugins) enum Admission {
    /// The row may be built.
    Build,
    /// The row must wait for this time, and then ask again.
    Wait(Duration),
}

/// What a failed call changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::plugins) enum FailureEffect {
    /// The failure was counted.
    Counted,
    /// The failure opened the breaker.
    Opened,
    /// The failure opened the breaker for the first time, within the first calls of the generation.
    OpenedFromTheStart,
}

/// The state of a breaker, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BreakerState {
    /// Rows are built.
    Closed,
    /// Rows wait.
    Open,
    /// One row is being tried, and the others wait.
    Probing,
}

/// The breaker of one kind, and the calls of the kind that it counts.
#[derive(Debug, Default)]
pub(in crate::plugins) struct Breaker {
    phase: Phase,
    /// Calls that the plugin answered, with an event or with a build-error.
    pub(in crate::plugins) answered_calls: u64,
    /// Calls that ended in a trap, exceeded a limit or broke the contract.
    pub(in crate::plugins) failed_calls: u64,
    /// The error of the last call that failed, and when it failed.
    pub(in crate::plugins) last_error: Option<(Instant, String)>,
    /// The different rows that have failed since the last answer.
    failing_rows: BTreeSet<Uuid>,
    /// How many times the breaker has opened since the last answer.
    consecutive_openings: u32,
}

#[derive(Debug, Default)]
enum Phase {
    #[default]
    Closed,
    /// Rows wait until this time.
    Open(Instant),
    /// One row is being tried. If it has no result by this time, another row is tried.
    Probing(Instant),
}

impl Breaker {
    /// Whether to build a row now. The caller reports the result of each `Build` with `record_answer` or
    /// `record_failure`, or reports nothing if the call was cancelled.
    pub(in crate::plugins) fn admit(&mut self, now: Instant) -> Admission {
        match self.phase {
            Phase::Closed => Admission::Build,
            Phase::Open(until) | Phase::Probing(until) if now < until => Admission::Wait(until - now),
            Phase::Open(_) | Phase::Probing(_) => {
                self.phase = Phase::Probing(now + PROBE_TIMEOUT);
                Admission::Build
            }
        }
    }

    /// Records that the plugin answered, which closes the breaker.
    pub(in crate::plugins) fn record_answer(&mut self) {
        self.answered_calls += 1;
        self.phase = Phase::Closed;
        self.failing_rows.clear();
        self.consecutive_openings = 0;
    }

    /// Records that the plugin failed for `row`. If the row has failed before (`is_first_failure` is false), its
    /// failure says nothing new about the plugin: the breaker opens again for as long as before, not for longer.
    pub(in crate::plugins) fn record_failure(
        &mut self,
        row: Uuid,
        is_first_failure: bool,
        now: Instant,
    ) -> FailureEffect {
        self.failed_calls += 1;
        self.failing_rows.insert(row);
        match self.phase {
            Phase::Closed if self.failing_rows.len() < ROWS_TO_OPEN => FailureEffect::Counted,
            // The row was admitted before the breaker opened.
            Phase::Open(until) if now < until => FailureEffect::Counted,
            _ => {
                let is_first_opening = self.consecutive_openings == 0;
                if is_first_failure || self.consecutive_openings == 0 {
                    self.consecutive_openings = self.consecutive_openings.saturating_add(1);
                }
                self.phase = Phase::Open(now + jittered(&BUILD, self.consecutive_openings - 1));
                // The rows that failed are not needed any more, and there may be many.
                self.failing_rows.clear();
                if is_first_opening && self.answered_calls + self.failed_calls <= FIRST_CALLS {
                    FailureEffect::OpenedFromTheStart
                } else {
                    FailureEffect::Opened
                }
            }
        }
    }

    pub(in crate::plugins) fn state(&self) -> BreakerState {
        match self.phase {
            Phase::Closed => BreakerState::Closed,
            Phase::Open(_) => BreakerState::Open,
            Phase::Probing(_) => BreakerState::Probing,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn row(number: u128) -> Uuid {
        Uuid::from_u128(number)
    }

    /// A breaker that was opened by five rows at `now`.
    fn open_breaker(now: Instant) -> Breaker {
        let mut breaker = Breaker::default();
        for number in 0..4 {
            assert_eq!(breaker.record_failure(row(number), true, now), FailureEffect::Counted);
        }
        assert_eq!(breaker.record_failure(row(4), true, now), FailureEffect::OpenedFromTheStart);
        breaker
    }

    #[test]
    fn one_bad_row_never_opens_the_breaker_however_often_it_fails() {
        let (now, mut breaker) = (Instant::now(), Breaker::default());
        for _ in 0..100 {
            assert_eq!(breaker.admit(now), Admission::Build);
            assert_eq!(breaker.record_failure(row(1), false, now), FailureEffect::Counted);
        }
    }

    #[test]
    fn an_answer_between_failures_restarts_the_count() {
        let (now, mut breaker) = (Instant::now(), Breaker::default());
        for number in 0..100 {
            if number % 4 == 0 {
                breaker.record_answer();
            }
            assert_eq!(breaker.record_failure(row(number), true, now), FailureEffect::Counted);
        }
        assert_eq!(breaker.state(), BreakerState::Closed);
    }

    #[test]
    fn an_open_breaker_admits_one_row_after_its_time_and_the_answer_closes_it() {
        let now = Instant::now();
        let mut breaker = open_breaker(now);
        let Admission::Wait(wait) = breaker.admit(now) else { panic!("the breaker is not open") };
        assert!((Duration::from_millis(800)..=Duration::from_millis(1_200)).contains(&wait), "{wait:?}");
        let later = now + wait;
        assert_eq!(breaker.admit(later), Admission::Build);
        assert_eq!(breaker.admit(later), Admission::Wait(PROBE_TIMEOUT), "only one row is tried");
        breaker.record_answer();
        assert_eq!(breaker.admit(later), Admission::Build);
        assert_eq!(breaker.state(), BreakerState::Closed);
    }

    #[test]
    fn a_failed_probe_opens_the_breaker_for_longer_and_does_not_count_as_from_the_start() {
        let now = Instant::now();
        let mut breaker = open_breaker(now);
        let later = now + Duration::from_secs(2);
        assert_eq!(breaker.admit(later), Admission::Build);
        assert_eq!(breaker.record_failure(row(9), true, later), FailureEffect::Opened);
        let Admission::Wait(wait) = breaker.admit(later) else { panic!("the breaker is not open") };
        assert!((Duration::from_millis(1_600)..=Duration::from_millis(2_400)).contains(&wait), "{wait:?}");
    }

    #[test]
    fn a_row_that_failed_before_does_not_make_other_rows_wait_longer() {
        let mut now = Instant::now();
        let mut breaker = open_breaker(now);
        for number in 0..20 {
            let Admission::Wait(wait) = breaker.admit(now) else { panic!("the breaker is not open") };
            assert!(wait <= Duration::from_millis(1_200), "{wait:?}");
            now += wait;
            assert_eq!(breaker.admit(now), Admission::Build);
            assert_eq!(breaker.record_failure(row(number % 5), false, now), FailureEffect::Opened);
        }
    }

    #[test]
    fn a_probe_without_a_result_does_not_keep_the_breaker_open() {
        let now = Instant::now();
        let mut breaker = open_breaker(now);
        let later = now + Duration::from_secs(2);
        assert_eq!(breaker.admit(later), Admission::Build);
        assert_eq!(breaker.admit(later + PROBE_TIMEOUT), Admission::Build);
    }

    #[test]
    fn a_generation_that_fails_after_its_first_calls_has_not_failed_from_the_start() {
        let (now, mut breaker) = (Instant::now(), Breaker::default());
        for _ in 0..FIRST_CALLS {
            breaker.record_answer();
        }
        let last = (0..5).map(|number| breaker.record_failure(row(number), true, now)).last();
        assert_eq!(last, Some(FailureEffect::Opened));
    }

    proptest! {
        #[test]
        fn rows_never_wait_longer_than_the_longest_backoff_and_an_answer_always_closes_the_breaker(
            steps in proptest::collection::vec((any::<bool>(), 0..400_u64, 0..8_u128), 1..200)
        ) {
            let (mut now, mut breaker) = (Instant::now(), Breaker::default());
            for (is_answered, seconds, number) in steps {
                now += Duration::from_secs(seconds);
                match breaker.admit(now) {
                    Admission::Wait(wait) => prop_assert!(wait <= Duration::from_mins(6)),
                    Admission::Build if is_answered => {
                        breaker.record_answer();
                        prop_assert_eq!(breaker.admit(now), Admission::Build);
                    }
                    Admission::Build => drop(breaker.record_failure(row(number), number % 2 == 0, now)),
                }
            }
        }
    }
}
