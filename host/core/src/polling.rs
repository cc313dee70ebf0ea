//! Polling: while triggers do not notify, the core looks at the queue every few milliseconds.
//!
//! In PostgreSQL, transactions that notify commit one after the other. So when many notifications arrive, the listener
//! promises that all daemons poll for the next second, and the triggers are silent until then, as network drivers change from
//! interrupts to polling under load ([Linux NAPI](https://docs.kernel.org/networking/napi.html)). The promise is the time in
//! the sequence `tidings.polling_until` ([its migration](../../../migrations/0011_polling.sql)), which every session sees at
//! once. It is short, so it ends even if the daemon that made it is gone. It is notified, and binds every daemon, since each
//! may be the only one that serves its kinds.
//!
//! Polling goes on after the promise, ever less often, until every transaction that may have been silent has ended. A silent
//! trigger read the clock before the promise ended, and its transaction had its number before that. So every silent
//! transaction has a number below the next free one at any look after that end; once no number below it is running, the looks
//! have seen all of their rows. A row in a transaction that stays open is found soon after its commit.
//!
//! Polling must never be relied on for more than speed: the sweep finds what a look missed.

use std::time::Duration;

use time::OffsetDateTime;

use crate::queue::{Look, Promise};

/// The time between two looks while a promise is open.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(5);
/// A silent transaction that stays open for longer is left to the sweep.
const LONGEST_INTERVAL: Duration = Duration::from_secs(5);
/// A promise that ends later than this was made before the clock was set back.
const LONGEST_PROMISE: Duration = Duration::from_secs(2);

/// Whether to go on polling, by the looks so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Polling {
    /// The end of the promise that is over, and the number below which transactions may have been silent.
    over: Option<(OffsetDateTime, i64)>,
}

impl Polling {
    /// Notes a look, and returns the longest time until the next; `None` = there is no reason to poll.
    pub(super) fn note_look(
        &mut self,
        &Look { at, oldest_xid, promise: Promise { until, next_xid }, .. }: &Look,
    ) -> Option<Duration> {
        if at < until {
            self.over = None;
            return (until - at <= LONGEST_PROMISE).then_some(SHORTEST_INTERVAL);
        }
        let known = self.over.filter(|(over, _)| *over == until);
        let (_, silent_below) = *self.over.insert(known.unwrap_or((until, next_xid)));
        // Ever less often: a row is found after its commit within the time for which its transaction was open.
        let interval = SHORTEST_INTERVAL.max(Duration::try_from(at - until).unwrap_or(Duration::MAX));
        (oldest_xid < silent_below && interval < LONGEST_INTERVAL).then_some(interval)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::queue::Outlook;

    fn at(ms: i64) -> OffsetDateTime {
        OffsetDateTime::UNIX_EPOCH + time::Duration::milliseconds(ms)
    }

    fn look(ms: i64, until: i64, oldest_xid: i64, next_xid: i64) -> Look {
        Look {
            at: at(ms),
            from: at(0),
            first: None,
            oldest_xid,
            outlook: Outlook::default(),
            held_for_us: Vec::new(),
            not_claimable_first: false,
            turn_in: None,
            has_limits: false,
            promise: Promise { until: at(until), next_xid },
            below: None,
        }
    }

    #[test]
    fn polling_goes_on_until_the_promise_and_all_silent_transactions_have_ended() {
        let mut polling = Polling::default();
        let mut next_look_in = |ms, oldest_xid, next_xid| {
            polling.note_look(&look(ms, 1_000, oldest_xid, next_xid)).map(|after| after.as_millis())
        };
        assert_eq!(next_look_in(0, 5, 10), Some(5));
        assert_eq!(next_look_in(995, 5, 10), Some(5));
        assert_eq!(next_look_in(1_000, 5, 12), Some(5));
        assert_eq!(next_look_in(1_005, 11, 20), Some(5), "transaction 11 may have been silent");
        for _ in 0..100 {
            assert_eq!(next_look_in(1_010, 11, 30), Some(10), "looks for other reasons do not change it");
        }
        assert_eq!(next_look_in(1_020, 12, 30), None);
        for look in 0..100 {
            assert_eq!(next_look_in(2_000 + look, 12, 40), None);
        }
    }

    #[test]
    fn a_silent_transaction_that_does_not_end_is_left_to_the_sweep() {
        let mut polling = Polling::default();
        let mut ms = 1_000;
        let waits = std::iter::from_fn(|| {
            let interval = polling.note_look(&look(ms, 1_000, 3, 9))?;
            let wait = i64::try_from(interval.as_millis()).expect("short");
            ms += wait;
            Some(wait)
        });
        assert_eq!(waits.collect::<Vec<_>>(), [5, 5, 10, 20, 40, 80, 160, 320, 640, 1_280, 2_560]);
    }

    #[test]
    fn a_promise_made_before_the_clock_was_set_back_is_ignored() {
        let mut polling = Polling::default();
        assert_eq!(polling.note_look(&look(0, 3_600_000, 9, 9)), None);
        assert_eq!(polling.note_look(&look(0, 2_001, 9, 9)), None);
        assert_eq!(polling.note_look(&look(0, 2_000, 9, 9)), Some(SHORTEST_INTERVAL), "the trigger has the same limit");
    }

    proptest! {
        /// Each writer's transaction takes a number, its trigger is silent if it finds a promise, and it commits some time
        /// later.
        #[test]
        fn a_row_of_a_silent_transaction_is_seen_soon_after_its_commit(
            writers in proptest::collection::vec((0..4_000_i64, 0..200_i64, 0..2_000_i64), 1..40),
            promises in proptest::collection::vec(0..3_000_i64, 1..4),
        ) {
            let mut writers = writers;
            writers.sort_unstable();
            let number = |began: i64| i64::try_from(writers.partition_point(|(other, ..)| *other < began)).expect("few");
            let promised = |now: i64| promises.iter().filter(|made| **made <= now).map(|made| made + 1_000).max().unwrap_or(0);
            let mut polling = Polling::default();
            let mut looks = Vec::new();
            let mut next = promises.iter().copied().min().expect("at least one promise");
            while next < 20_000 {
                looks.push(next);
                let running = writers.iter().filter(|(began, ..)| *began <= next);
                let oldest = running.filter(|(began, before_write, open)| began + before_write + open > next).map(|(began, ..)| number(*began)).min();
                let next_xid = number(next + 1);
                let interval = polling.note_look(&look(next, promised(next), oldest.unwrap_or(next_xid), next_xid));
                let after = interval.map(|after| i64::try_from(after.as_millis()).expect("short"));
                // Each promise notifies all daemons.
                let woken = promises.iter().copied().filter(|made| *made > next).min();
                next = after.map(|after| next + after).into_iter().chain(woken).min().unwrap_or(i64::MAX);
            }
            for (began, before_write, open) in &writers {
                let (wrote, committed) = (began + before_write, began + before_write + open);
                if wrote < promised(wrote) {
                    let seen = looks.iter().find(|look| **look >= committed);
                    prop_assert!(seen.is_some_and(|seen| seen - committed <= open + 5), "{began} {wrote} {committed} {looks:?}");
                }
            }
        }
    }
}
