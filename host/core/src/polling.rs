//! Looking without being notified, while many notify. In PostgreSQL transactions that notify commit one after the other, so
//! under load the daemon asks for silence and looks every few milliseconds instead, as network drivers leave interrupts for
//! polling ([Linux NAPI](https://docs.kernel.org/networking/napi.html)). Never relied on for more than speed: a promise is
//! short and ends by itself, and the sweep finds what anybody missed.
//!
//! The promise is `tidings.polling_until` ([its migration](../../../../migrations/0011_polling.sql)). A trigger that is silent
//! read the clock before that time, and its transaction had its number before that. So every silent transaction has a number
//! below the next that would be given at any look after that time; once none below is running, all of them have been seen.

use std::time::Duration;

use time::OffsetDateTime;

use crate::queue::{Look, Promise};

/// The time between two looks.
const EVERY: Duration = Duration::from_millis(5);
/// Whatever is open for longer is for the sweep.
const PATIENCE: Duration = Duration::from_secs(5);
/// A promise that is further ahead than this is from before the clock was set back.
const FAR: Duration = Duration::from_secs(2);

/// Whether to look again without being notified, by the looks so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Polling {
    /// The promise that is over, and the number below which transactions may have been silent.
    over: Option<(OffsetDateTime, i64)>,
}

impl Polling {
    /// Takes note of a look. The longest time until the next; `None` = no promise is open.
    pub(super) fn looked(
        &mut self,
        &Look { at, oldest_xid, promise: Promise { until, next_xid }, .. }: &Look,
    ) -> Option<Duration> {
        if at < until {
            self.over = None;
            return (until - at <= FAR).then_some(EVERY);
        }
        let known = self.over.filter(|(over, _)| *over == until);
        let (_, silent_below) = *self.over.insert(known.unwrap_or((until, next_xid)));
        // Ever less often: a row is not found later, after its commit, than its transaction was open.
        let every = EVERY.max(Duration::try_from(at - until).unwrap_or(Duration::MAX));
        (oldest_xid < silent_below && every < PATIENCE).then_some(every)
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
            paused_first: false,
            promise: Promise { until: at(until), next_xid },
            below: None,
        }
    }

    #[test]
    fn it_looks_for_as_long_as_was_promised_and_until_all_who_were_silent_have_ended() {
        let mut polling = Polling::default();
        let mut looked = |ms, oldest_xid, next_xid| {
            polling.looked(&look(ms, 1_000, oldest_xid, next_xid)).map(|after| after.as_millis())
        };
        assert_eq!(looked(0, 5, 10), Some(5));
        assert_eq!(looked(995, 5, 10), Some(5));
        assert_eq!(looked(1_000, 5, 12), Some(5));
        assert_eq!(looked(1_005, 11, 20), Some(5), "11 may have been silent");
        for _ in 0..100 {
            assert_eq!(looked(1_010, 11, 30), Some(10), "however often it looks for other reasons");
        }
        assert_eq!(looked(1_020, 12, 30), None);
        for look in 0..100 {
            assert_eq!(looked(2_000 + look, 12, 40), None);
        }
    }

    #[test]
    fn a_transaction_that_does_not_end_is_left_to_the_sweep() {
        let mut polling = Polling::default();
        let mut ms = 1_000;
        let waits = std::iter::from_fn(|| {
            let every = polling.looked(&look(ms, 1_000, 3, 9))?;
            let wait = i64::try_from(every.as_millis()).expect("short");
            ms += wait;
            Some(wait)
        });
        assert_eq!(waits.collect::<Vec<_>>(), [5, 5, 10, 20, 40, 80, 160, 320, 640, 1_280, 2_560]);
    }

    #[test]
    fn a_promise_of_a_clock_that_was_set_back_is_none() {
        let mut polling = Polling::default();
        assert_eq!(polling.looked(&look(0, 3_600_000, 9, 9)), None);
        assert_eq!(polling.looked(&look(0, 2_001, 9, 9)), None);
        assert_eq!(polling.looked(&look(0, 2_000, 9, 9)), Some(EVERY), "as for the trigger");
    }

    proptest! {
        /// Writers take a number, are silent if they find a promise, and commit some time later.
        #[test]
        fn a_row_of_a_silent_transaction_is_seen_soon_after_the_commit(
            writers in proptest::collection::vec((0..4_000_i64, 0..200_i64, 0..2_000_i64), 1..40),
            promises in proptest::collection::vec(0..3_000_i64, 1..4),
        ) {
            let mut writers = writers;
            writers.sort_unstable();
            let number = |began: i64| i64::try_from(writers.partition_point(|(other, ..)| *other < began)).expect("few");
            let promised = |now: i64| promises.iter().filter(|made| **made <= now).map(|made| made + 1_000).max().unwrap_or(0);
            let mut polling = Polling::default();
            let mut looks = Vec::new();
            let mut next = promises.iter().copied().min().expect("one");
            while next < 20_000 {
                looks.push(next);
                let running = writers.iter().filter(|(began, ..)| *began <= next);
                let oldest = running.filter(|(began, thought, open)| began + thought + open > next).map(|(began, ..)| number(*began)).min();
                let next_xid = number(next + 1);
                let every = polling.looked(&look(next, promised(next), oldest.unwrap_or(next_xid), next_xid));
                let after = every.map(|after| i64::try_from(after.as_millis()).expect("short"));
                // A promise wakes, whoever made it.
                let woken = promises.iter().copied().filter(|made| *made > next).min();
                next = after.map(|after| next + after).into_iter().chain(woken).min().unwrap_or(i64::MAX);
            }
            for (began, thought, open) in &writers {
                let (wrote, committed) = (began + thought, began + thought + open);
                if wrote < promised(wrote) {
                    let seen = looks.iter().find(|look| **look >= committed);
                    prop_assert!(seen.is_some_and(|seen| seen - committed <= open + 5), "{began} {wrote} {committed} {looks:?}");
                }
            }
        }
    }
}
