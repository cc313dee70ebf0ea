//! When sweeps are due. A sweep steps over all index entries below the low-water mark that were delivered or cancelled and
//! cannot be vacuumed yet, so the longer the last sweep took, the later the next one is due.

use std::time::Duration;

use super::Moment;

/// Sweeps begin at least this many times the last one's duration apart, so they take at most a hundredth of all time. A row
/// that only a sweep can find is found within one interval, or within this many times the duration of a sweep.
const COST_FACTOR: u32 = 100;
/// Sweeps are never further apart than this, since the last one may have been slow for another reason.
const LONGEST_INTERVAL: Duration = Duration::from_mins(10);
/// Sweeps are at least this far apart, even where one is due at once.
const SHORTEST_INTERVAL: Duration = Duration::from_secs(1);
/// A sweep that takes no longer than this also takes the place of a look.
const QUICK: Duration = Duration::from_millis(20);

/// The last sweep, by which the next is due. One sweep runs at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) enum SweepSchedule {
    /// There was no sweep yet.
    #[default]
    NeverSwept,
    /// A sweep runs. `doubted`: the database has failed meanwhile. `outdated`: a look or a claim has answered since, or a
    /// look is requested.
    Running { began: Moment, doubted: bool, outdated: bool },
    /// The last sweep. `took`: its duration; `None` = unknown, since the database failed meanwhile.
    Ended { began: Moment, took: Option<Duration>, succeeded: bool },
}

impl SweepSchedule {
    /// Begins a sweep. Returns whether it should be as quick as a look, by the duration of the last.
    pub(super) fn begin(&mut self, now: Moment) -> bool {
        let is_quick = matches!(self, Self::Ended { took: Some(took), .. } if *took <= QUICK);
        *self = Self::Running { began: now, doubted: false, outdated: false };
        is_quick
    }

    /// Marks a running sweep as outdated: a look or a claim has answered meanwhile, or a look is requested.
    pub(super) fn mark_outdated(&mut self) {
        if let Self::Running { outdated, .. } = self {
            *outdated = true;
        }
    }

    /// Ends a sweep. Returns whether what it saw is the latest news of the queue.
    pub(super) fn end(&mut self, now: Moment, succeeded: bool) -> bool {
        let Self::Running { began, doubted, outdated } = *self else { return false };
        *self = Self::Ended { began, took: (!doubted).then_some(now.saturating_sub(began)), succeeded };
        !outdated
    }

    /// Discards the duration of the last or the running sweep, since the database has failed.
    pub(super) fn discard_duration(&mut self) {
        match self {
            Self::NeverSwept => {}
            Self::Running { doubted, .. } => *doubted = true,
            Self::Ended { took, .. } => *took = None,
        }
    }

    /// How long until the next sweep is due, where quick sweeps are an `interval` apart. `overdue`: no sweep has looked below
    /// the mark since it was last given up. A sweep that failed does not become more frequent for that reason.
    pub(super) fn time_until_next(&self, now: Moment, interval: Duration, overdue: bool) -> Duration {
        match *self {
            Self::NeverSwept => Duration::ZERO,
            Self::Running { .. } => Duration::MAX,
            Self::Ended { began, took, succeeded } => {
                let apart = match took {
                    Some(took) if !succeeded || !overdue => interval.max(LONGEST_INTERVAL.min(took * COST_FACTOR)),
                    _ => SHORTEST_INTERVAL,
                };
                apart.saturating_sub(now.saturating_sub(began))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const INTERVAL: Duration = Duration::from_secs(5);
    const NOW: Moment = Moment::from_hours(1);

    fn after_sweep(began: Moment, took: Duration, succeeded: bool) -> SweepSchedule {
        let mut sweep_schedule = SweepSchedule::default();
        sweep_schedule.begin(began);
        sweep_schedule.end(began + took, succeeded);
        sweep_schedule
    }

    #[test]
    fn the_first_sweep_is_due_at_once_and_none_is_due_while_one_runs() {
        let mut sweep_schedule = SweepSchedule::default();
        assert_eq!(sweep_schedule.time_until_next(NOW, INTERVAL, true), Duration::ZERO);
        sweep_schedule.begin(NOW);
        assert!(sweep_schedule.time_until_next(NOW + 10 * INTERVAL, INTERVAL, true) > LONGEST_INTERVAL);
    }

    #[test]
    fn cheap_sweeps_are_an_interval_apart_and_expensive_ones_a_hundred_times_their_duration() {
        let until = |took, after| after_sweep(NOW, took, true).time_until_next(NOW + after, INTERVAL, false);
        assert_eq!(until(Duration::from_millis(1), Duration::from_secs(2)), Duration::from_secs(3));
        assert_eq!(until(Duration::from_millis(600), Duration::from_secs(2)), Duration::from_secs(58));
        assert_eq!(until(Duration::from_mins(1), Duration::ZERO), LONGEST_INTERVAL);
    }

    #[test]
    fn a_sweep_is_due_at_once_when_the_mark_was_given_up() {
        let sweep_schedule = after_sweep(NOW, Duration::from_millis(600), true);
        assert_eq!(sweep_schedule.time_until_next(NOW + Duration::from_secs(2), INTERVAL, true), Duration::ZERO);
        assert_eq!(
            sweep_schedule.time_until_next(NOW + Duration::from_millis(700), INTERVAL, true),
            Duration::from_millis(300)
        );
    }

    #[test]
    fn a_failed_sweep_counts_with_its_duration_unless_the_database_was_away() {
        let mut sweep_schedule = after_sweep(NOW, Duration::from_secs(20), false);
        assert_eq!(
            sweep_schedule.time_until_next(NOW + Duration::from_secs(20), INTERVAL, true),
            Duration::from_secs(580)
        );
        sweep_schedule.discard_duration();
        assert_eq!(sweep_schedule.time_until_next(NOW + Duration::from_secs(20), INTERVAL, true), Duration::ZERO);
    }

    proptest! {
        #[test]
        fn sweeps_take_at_most_a_hundredth_of_all_time_and_find_a_row_within_a_hundred_times_their_duration(
            took in proptest::collection::vec(0..6_000_u64, 1..50),
        ) {
            let (mut sweep_schedule, mut now, mut spent) = (SweepSchedule::default(), NOW, Duration::ZERO);
            for took in took.into_iter().map(Duration::from_millis) {
                sweep_schedule.begin(now);
                sweep_schedule.end(now + took, true);
                spent += took;
                let until = sweep_schedule.time_until_next(now + took, INTERVAL, false);
                prop_assert!(took + until <= INTERVAL.max(took * COST_FACTOR));
                now += took + until;
            }
            prop_assert!(NOW + spent * COST_FACTOR <= now);
        }
    }
}
