//! When sweeps are due. What one costs grows with what was delivered or cancelled below the low-water mark and cannot be
//! cleaned away yet, so there is one as rarely as it is dear.

use std::time::Duration;

use super::Moment;

/// Sweeps take at most one part of so many of all time, so a row that only a sweep can find is found within one interval, or
/// within so many times what it takes to look for it.
const SHARE: u32 = 100;
/// But they are no further apart than this, since one that was slow may have been so for another reason.
const FURTHEST: Duration = Duration::from_mins(10);
/// Where one is wanted at once, they are this far apart all the same.
const NEAREST: Duration = Duration::from_secs(1);
/// One that takes no longer is as good as a look.
const QUICK: Duration = Duration::from_millis(20);

/// When the next is due, of which there is one at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) enum SweepSchedule {
    /// There was none.
    #[default]
    First,
    /// It began then; `doubted` = the database did not answer meanwhile; `outdated` = it was asked for before what is known now.
    UnderWay { began: Moment, doubted: bool, outdated: bool },
    /// It began then, and took so long; `None` = what it took says nothing.
    Ended { began: Moment, took: Option<Duration>, well: bool },
}

impl SweepSchedule {
    /// One begins. Whether it will be as quick as a look, by the last.
    pub(super) fn begin(&mut self, now: Moment) -> bool {
        let is_quick = matches!(self, Self::Ended { took: Some(took), .. } if *took <= QUICK);
        *self = Self::UnderWay { began: now, doubted: false, outdated: false };
        is_quick
    }

    /// Somebody else has asked the database meanwhile, or wants to.
    pub(super) fn outdate(&mut self) {
        if let Self::UnderWay { outdated, .. } = self {
            *outdated = true;
        }
    }

    /// It has ended, well or not. Whether nobody has asked the database since it began.
    pub(super) fn end(&mut self, now: Moment, well: bool) -> bool {
        let Self::UnderWay { began, doubted, outdated } = *self else { return false };
        *self = Self::Ended { began, took: (!doubted).then_some(now.saturating_sub(began)), well };
        !outdated
    }

    /// The database did not answer: what the last took says nothing, nor what this one takes.
    pub(super) fn doubt(&mut self) {
        match self {
            Self::First => {}
            Self::UnderWay { doubted, .. } => *doubted = true,
            Self::Ended { took, .. } => *took = None,
        }
    }

    /// How long until the next is due, where one is every `interval`. `overdue` = nobody has looked below the mark since it was
    /// last given up. One that cannot be seen through does not become more frequent by that.
    pub(super) fn until(&self, now: Moment, interval: Duration, overdue: bool) -> Duration {
        match *self {
            Self::First => Duration::ZERO,
            Self::UnderWay { .. } => Duration::MAX,
            Self::Ended { began, took, well } => {
                let apart = match took {
                    Some(took) if !well || !overdue => interval.max(FURTHEST.min(took * SHARE)),
                    _ => NEAREST,
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

    fn swept(began: Moment, took: Duration, well: bool) -> SweepSchedule {
        let mut sweep_schedule = SweepSchedule::default();
        sweep_schedule.begin(began);
        sweep_schedule.end(began + took, well);
        sweep_schedule
    }

    #[test]
    fn the_first_is_due_at_once_and_while_one_is_under_way_no_other_is() {
        let mut sweep_schedule = SweepSchedule::default();
        assert_eq!(sweep_schedule.until(NOW, INTERVAL, true), Duration::ZERO);
        sweep_schedule.begin(NOW);
        assert!(sweep_schedule.until(NOW + 10 * INTERVAL, INTERVAL, true) > FURTHEST);
    }

    #[test]
    fn those_that_are_cheap_are_an_interval_apart_and_those_that_are_dear_a_hundred_times_what_one_takes() {
        let until = |took, after| swept(NOW, took, true).until(NOW + after, INTERVAL, false);
        assert_eq!(until(Duration::from_millis(1), Duration::from_secs(2)), Duration::from_secs(3));
        assert_eq!(until(Duration::from_millis(600), Duration::from_secs(2)), Duration::from_secs(58));
        assert_eq!(until(Duration::from_mins(1), Duration::ZERO), FURTHEST);
    }

    #[test]
    fn when_the_mark_was_given_up_one_is_due_at_once() {
        let sweep_schedule = swept(NOW, Duration::from_millis(600), true);
        assert_eq!(sweep_schedule.until(NOW + Duration::from_secs(2), INTERVAL, true), Duration::ZERO);
        assert_eq!(sweep_schedule.until(NOW + Duration::from_millis(700), INTERVAL, true), Duration::from_millis(300));
    }

    #[test]
    fn one_that_failed_is_as_dear_as_if_it_had_not_unless_the_database_was_away() {
        let mut sweep_schedule = swept(NOW, Duration::from_secs(20), false);
        assert_eq!(sweep_schedule.until(NOW + Duration::from_secs(20), INTERVAL, true), Duration::from_secs(580));
        sweep_schedule.doubt();
        assert_eq!(sweep_schedule.until(NOW + Duration::from_secs(20), INTERVAL, true), Duration::ZERO);
    }

    proptest! {
        #[test]
        fn sweeps_take_a_hundredth_of_all_time_and_a_row_is_found_within_a_hundred_times_what_one_takes(
            took in proptest::collection::vec(0..6_000_u64, 1..50),
        ) {
            let (mut sweep_schedule, mut now, mut spent) = (SweepSchedule::default(), NOW, Duration::ZERO);
            for took in took.into_iter().map(Duration::from_millis) {
                sweep_schedule.begin(now);
                sweep_schedule.end(now + took, true);
                spent += took;
                let until = sweep_schedule.until(now + took, INTERVAL, false);
                prop_assert!(took + until <= INTERVAL.max(took * SHARE));
                now += took + until;
            }
            prop_assert!(NOW + spent * SHARE <= now);
        }
    }
}
