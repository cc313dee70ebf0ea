//! Sweeps: looks that also look below the low-water mark, for rows that no notification and no proof covers. What one costs
//! grows with what was delivered or cancelled there and cannot be cleaned away yet, so it runs beside the loop, and as rarely
//! as it is dear.

use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::{error, warn};

use crate::store::{Look, Store, StoreError};

/// Sweeps take at most one part of so many of all time, so a row that only a sweep can find is found within one interval, or
/// within so many times what it takes to look for it.
const SHARE: u32 = 100;
/// But they are no further apart than this, since one that was slow may have been so for another reason.
const FURTHEST: Duration = Duration::from_mins(10);
/// Where one is wanted at once, they are this far apart all the same.
const NEAREST: Duration = Duration::from_secs(1);
/// One that takes no longer is as good as a look.
const QUICK: Duration = Duration::from_millis(20);

/// What a sweep that has ended saw, and when it was begun; `None` = it failed, and the log says why.
#[derive(Debug)]
pub struct Swept(pub Option<(Look, Instant)>);

/// The sweeps of one loop, of which at most one is under way.
#[derive(Debug, Default)]
pub struct Sweeps {
    under_way: JoinSet<Result<(Look, Instant), StoreError>>,
    pace: Pace,
}

impl Sweeps {
    /// Begins one if it is due, where one is every `interval`. Whether one has begun that will be as quick as a look, by the last.
    pub fn begin_if_due(&mut self, store: &Store, kinds: &[String], interval: Duration) -> bool {
        let now = Instant::now();
        let is_due = self.until(store, interval).is_zero();
        if is_due {
            self.pace.began(now);
            let (store, kinds) = (store.clone(), kinds.to_vec());
            self.under_way.spawn(async move { Ok((store.sweep(&kinds).await?, now)) });
        }
        is_due && self.pace.took.is_some_and(|took| took <= QUICK)
    }

    /// Waits for the end of one, if one is under way. Cancel-safe.
    pub async fn ended(&mut self) -> Option<Swept> {
        let ended = self.under_way.join_next().await?;
        self.pace.ended(Instant::now(), matches!(ended, Ok(Ok(_))));
        match ended {
            Ok(Ok(swept)) => return Some(Swept(Some(swept))),
            Ok(Err(error)) => warn!(error = &error as &dyn std::error::Error, "a sweep failed"),
            Err(panic) => error!(error = &panic as &dyn std::error::Error, "a sweep panicked"),
        }
        Some(Swept(None))
    }

    /// How long until the next is due.
    fn until(&self, store: &Store, interval: Duration) -> Duration {
        self.pace.until(Instant::now(), interval, !store.is_swept())
    }

    /// The same for a sweep or a look, of which there is one every `interval` as well, and the last was `since`. The sweep that
    /// is under way is one.
    #[must_use]
    pub fn until_look(&self, store: &Store, interval: Duration, since: Duration) -> Duration {
        let under_way = self.pace.since(Instant::now()).filter(|_| self.pace.under_way);
        let since = under_way.map_or(since, |under_way| under_way.min(since));
        self.until(store, interval).min(interval.saturating_sub(since))
    }

    /// The database did not answer: what the last took says nothing.
    pub fn doubt(&mut self) {
        self.pace.wanted = true;
    }

    /// Gives up what is under way.
    pub fn stop(&mut self) {
        self.under_way.abort_all();
    }
}

/// When they are due. No I/O.
#[derive(Debug, Default)]
struct Pace {
    /// When the last was begun.
    began: Option<Instant>,
    under_way: bool,
    /// How long the last took that has ended.
    took: Option<Duration>,
    failed: bool,
    /// As soon as can be.
    wanted: bool,
}

impl Pace {
    fn began(&mut self, now: Instant) {
        (self.began, self.under_way, self.wanted) = (Some(now), true, false);
    }

    fn ended(&mut self, now: Instant, well: bool) {
        (self.took, self.under_way, self.failed) = (self.since(now), false, !well);
    }

    fn since(&self, now: Instant) -> Option<Duration> {
        self.began.map(|began| now.saturating_duration_since(began))
    }

    /// `overdue` = nobody has looked below the mark since it was last given up. One that cannot be seen through does not become
    /// more frequent by that.
    fn until(&self, now: Instant, interval: Duration, overdue: bool) -> Duration {
        let every = match self.took {
            _ if self.under_way => Duration::MAX,
            Some(took) if !self.wanted && (self.failed || !overdue) => interval.max(FURTHEST.min(took * SHARE)),
            _ => NEAREST,
        };
        every.saturating_sub(self.since(now).unwrap_or(NEAREST))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const INTERVAL: Duration = Duration::from_secs(5);

    fn swept(began: Instant, took: Duration, well: bool) -> Pace {
        let mut pace = Pace::default();
        pace.began(began);
        pace.ended(began + took, well);
        pace
    }

    #[test]
    fn the_first_is_due_at_once_and_while_one_is_under_way_no_other_is() {
        let now = Instant::now();
        let mut pace = Pace::default();
        assert_eq!(pace.until(now, INTERVAL, true), Duration::ZERO);
        pace.began(now);
        assert!(pace.until(now + 10 * INTERVAL, INTERVAL, true) > FURTHEST);
    }

    #[test]
    fn those_that_are_cheap_are_an_interval_apart_and_those_that_are_dear_a_hundred_times_what_one_takes() {
        let now = Instant::now();
        let until = |took, after| swept(now, took, true).until(now + after, INTERVAL, false);
        assert_eq!(until(Duration::from_millis(1), Duration::from_secs(2)), Duration::from_secs(3));
        assert_eq!(until(Duration::from_millis(600), Duration::from_secs(2)), Duration::from_secs(58));
        assert_eq!(until(Duration::from_mins(1), Duration::ZERO), FURTHEST);
    }

    #[test]
    fn when_the_mark_was_given_up_one_is_due_at_once() {
        let now = Instant::now();
        let pace = swept(now, Duration::from_millis(600), true);
        assert_eq!(pace.until(now + Duration::from_secs(2), INTERVAL, true), Duration::ZERO);
        assert_eq!(pace.until(now + Duration::from_millis(700), INTERVAL, true), Duration::from_millis(300));
    }

    #[test]
    fn one_that_failed_is_as_dear_as_if_it_had_not_unless_the_database_was_away() {
        let now = Instant::now();
        let mut pace = swept(now, Duration::from_secs(20), false);
        assert_eq!(pace.until(now + Duration::from_secs(20), INTERVAL, true), Duration::from_secs(580));
        pace.wanted = true;
        assert_eq!(pace.until(now + Duration::from_secs(20), INTERVAL, true), Duration::ZERO);
    }

    proptest! {
        #[test]
        fn sweeps_take_a_hundredth_of_all_time_and_a_row_is_found_within_a_hundred_times_what_one_takes(
            took in proptest::collection::vec(0..6_000_u64, 1..50),
        ) {
            let begun = Instant::now();
            let (mut pace, mut now, mut spent) = (Pace::default(), begun, Duration::ZERO);
            for took in took.into_iter().map(Duration::from_millis) {
                pace.began(now);
                pace.ended(now + took, true);
                spent += took;
                let until = pace.until(now + took, INTERVAL, false);
                prop_assert!(took + until <= INTERVAL.max(took * SHARE));
                now += took + until;
            }
            prop_assert!(spent * SHARE <= now - begun);
        }
    }
}
