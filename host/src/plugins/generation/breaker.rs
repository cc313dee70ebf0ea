//! The circuit breaker of one kind in one generation. Pure: the clock is handed in.
//!
//! A plugin that fails whatever it is asked must not spend the attempts of every row that waits for it. After failures
//! of several rows in a row, without an answer between them, the breaker opens: rows wait without being built. When the
//! time is over one row is tried, and its answer closes the breaker again. One bad row alone never opens it.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;
use uuid::Uuid;

use crate::model::backoff::{BUILD, jittered};

/// Different rows that must fail, without an answer between them, before the breaker opens.
const ROWS: usize = 5;
/// A generation that opens its breaker within so many calls failed from the start.
const FIRST_CALLS: u64 = 100;
/// What rows wait while another one is being tried.
const PROBE: Duration = Duration::from_secs(1);

/// What the breaker says about a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::plugins) enum Admission {
    /// Build it.
    Build,
    /// Not now; ask again after this time.
    Wait(Duration),
}

/// What a failure did to the breaker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::plugins) enum Failure {
    /// It is counted.
    Counted,
    /// It opened the breaker.
    Opened,
    /// It opened the breaker of a generation that has just begun.
    FromTheStart,
}

/// What a breaker looks like from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BreakerState {
    /// Rows are built.
    Closed,
    /// Rows wait.
    Open,
    /// One row is being tried, the others wait.
    Probing,
}

/// The breaker and what it counts.
#[derive(Debug, Default)]
pub(in crate::plugins) struct Breaker {
    phase: Phase,
    /// Calls that the plugin answered, whatever it said.
    pub(in crate::plugins) answered: u64,
    /// Calls that ended in a trap, a blown limit or a broken contract.
    pub(in crate::plugins) failed: u64,
    /// What the last one that failed said, and when.
    pub(in crate::plugins) last_error: Option<(Instant, String)>,
    failing: BTreeSet<Uuid>,
    /// Times in a row that it opened.
    openings: u32,
}

#[derive(Debug, Default)]
enum Phase {
    #[default]
    Closed,
    Open(Instant),
    /// The row that is tried, and when to try another one if nothing is heard of it.
    Probing(Instant),
}

impl Breaker {
    /// Whether to build a row now. Each `Build` must be followed by `answered`, `failed`, or nothing if it was cut off.
    pub(in crate::plugins) fn admit(&mut self, now: Instant) -> Admission {
        match self.phase {
            Phase::Closed => Admission::Build,
            Phase::Open(until) | Phase::Probing(until) if now < until => Admission::Wait(until - now),
            Phase::Open(_) | Phase::Probing(_) => {
                self.phase = Phase::Probing(now + PROBE);
                Admission::Build
            }
        }
    }

    /// The plugin answered: it is well.
    pub(in crate::plugins) fn answered(&mut self) {
        self.answered += 1;
        self.phase = Phase::Closed;
        self.failing.clear();
        self.openings = 0;
    }

    /// The plugin failed at `row`; `fresh` if that row had never failed before. A row that had tells nothing new when it
    /// is tried again: then the others wait as long as they did, not longer.
    pub(in crate::plugins) fn failed(&mut self, row: Uuid, fresh: bool, now: Instant) -> Failure {
        self.failed += 1;
        self.failing.insert(row);
        match self.phase {
            Phase::Closed if self.failing.len() < ROWS => Failure::Counted,
            // A row that was admitted before it opened.
            Phase::Open(until) if now < until => Failure::Counted,
            _ => {
                let first = self.openings == 0;
                if fresh || self.openings == 0 {
                    self.openings = self.openings.saturating_add(1);
                }
                self.phase = Phase::Open(now + jittered(&BUILD, self.openings - 1));
                // RowRef rows they were is of no more interest, and there may be many.
                self.failing.clear();
                if first && self.answered + self.failed <= FIRST_CALLS {
                    Failure::FromTheStart
                } else {
                    Failure::Opened
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

    /// A breaker that five rows have opened at `now`.
    fn opened(now: Instant) -> Breaker {
        let mut breaker = Breaker::default();
        for number in 0..4 {
            assert_eq!(breaker.failed(row(number), true, now), Failure::Counted);
        }
        assert_eq!(breaker.failed(row(4), true, now), Failure::FromTheStart);
        breaker
    }

    #[test]
    fn one_bad_row_never_opens_it_however_often_it_fails() {
        let (now, mut breaker) = (Instant::now(), Breaker::default());
        for _ in 0..100 {
            assert_eq!(breaker.admit(now), Admission::Build);
            assert_eq!(breaker.failed(row(1), false, now), Failure::Counted);
        }
    }

    #[test]
    fn an_answer_between_failures_begins_the_count_again() {
        let (now, mut breaker) = (Instant::now(), Breaker::default());
        for number in 0..100 {
            if number % 4 == 0 {
                breaker.answered();
            }
            assert_eq!(breaker.failed(row(number), true, now), Failure::Counted);
        }
        assert_eq!(breaker.state(), BreakerState::Closed);
    }

    #[test]
    fn an_open_breaker_lets_one_row_through_when_its_time_is_over_and_its_answer_closes_it() {
        let now = Instant::now();
        let mut breaker = opened(now);
        let Admission::Wait(wait) = breaker.admit(now) else { panic!("it is open") };
        assert!((Duration::from_millis(800)..=Duration::from_millis(1_200)).contains(&wait), "{wait:?}");
        let later = now + wait;
        assert_eq!(breaker.admit(later), Admission::Build);
        assert_eq!(breaker.admit(later), Admission::Wait(PROBE), "only one");
        breaker.answered();
        assert_eq!(breaker.admit(later), Admission::Build);
        assert_eq!(breaker.state(), BreakerState::Closed);
    }

    #[test]
    fn a_probe_that_fails_opens_it_for_longer_and_is_not_from_the_start_any_more() {
        let now = Instant::now();
        let mut breaker = opened(now);
        let later = now + Duration::from_secs(2);
        assert_eq!(breaker.admit(later), Admission::Build);
        assert_eq!(breaker.failed(row(9), true, later), Failure::Opened);
        let Admission::Wait(wait) = breaker.admit(later) else { panic!("it is open") };
        assert!((Duration::from_millis(1_600)..=Duration::from_millis(2_400)).contains(&wait), "{wait:?}");
    }

    #[test]
    fn rows_that_had_failed_before_do_not_make_the_others_wait_longer() {
        let mut now = Instant::now();
        let mut breaker = opened(now);
        for number in 0..20 {
            let Admission::Wait(wait) = breaker.admit(now) else { panic!("it is open") };
            assert!(wait <= Duration::from_millis(1_200), "{wait:?}");
            now += wait;
            assert_eq!(breaker.admit(now), Admission::Build);
            assert_eq!(breaker.failed(row(number % 5), false, now), Failure::Opened);
        }
    }

    #[test]
    fn a_probe_that_was_never_heard_of_does_not_keep_it_shut() {
        let now = Instant::now();
        let mut breaker = opened(now);
        let later = now + Duration::from_secs(2);
        assert_eq!(breaker.admit(later), Admission::Build);
        assert_eq!(breaker.admit(later + PROBE), Admission::Build);
    }

    #[test]
    fn a_generation_that_has_served_long_does_not_fail_from_the_start() {
        let (now, mut breaker) = (Instant::now(), Breaker::default());
        for _ in 0..FIRST_CALLS {
            breaker.answered();
        }
        let last = (0..5).map(|number| breaker.failed(row(number), true, now)).last();
        assert_eq!(last, Some(Failure::Opened));
    }

    proptest! {
        #[test]
        fn it_is_never_shut_for_longer_than_the_cap_and_an_answer_always_closes_it(
            steps in proptest::collection::vec((any::<bool>(), 0..400_u64, 0..8_u128), 1..200)
        ) {
            let (mut now, mut breaker) = (Instant::now(), Breaker::default());
            for (well, seconds, number) in steps {
                now += Duration::from_secs(seconds);
                match breaker.admit(now) {
                    Admission::Wait(wait) => prop_assert!(wait <= Duration::from_mins(6)),
                    Admission::Build if well => {
                        breaker.answered();
                        prop_assert_eq!(breaker.admit(now), Admission::Build);
                    }
                    Admission::Build => drop(breaker.failed(row(number), number % 2 == 0, now)),
                }
            }
        }
    }
}
