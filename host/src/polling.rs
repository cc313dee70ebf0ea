//! Looking without being notified, while many notify. In PostgreSQL transactions that notify commit one after the other, so
//! under load the daemon asks for silence and looks every few milliseconds instead, as network drivers leave interrupts for
//! polling ([Linux NAPI](https://docs.kernel.org/networking/napi.html)). Never relied on for more than speed: a promise is
//! short and ends by itself, and the sweep finds what anybody missed.
//!
//! The promise is `tidings.polling_until` ([its migration](../../migrations/0011_polling.sql)). A trigger that is silent
//! read the clock before that time, and its transaction had its number before that. So every silent transaction has a number
//! below the next that would be given at any look after that time; once none below is running, all of them have been seen.

use std::time::Duration;

use time::OffsetDateTime;
use tokio::time::Instant;

/// How long one promise lasts. Between two, a few transactions notify again, which tells whether it is worth another.
pub const PROMISE: Duration = Duration::from_secs(1);
/// So many notifications ...
const MANY: usize = 16;
/// ... in this time are worth a promise. Commits that take 12 ms, one after the other, are as many.
const SOON: Duration = Duration::from_millis(200);
/// The time between two looks.
const EVERY: Duration = Duration::from_millis(5);
/// Whatever is open for longer is for the sweep.
const PATIENCE: Duration = Duration::from_secs(5);
/// A promise that is further ahead than this is from before the clock was set back.
const FAR: Duration = Duration::from_secs(2);

/// Tells when notifications are too many.
#[derive(Debug, Default)]
pub struct Flood {
    since: Option<Instant>,
    notifications: usize,
}

impl Flood {
    /// Counts notifications that came `now`. True if there were too many lately; then it begins anew.
    pub fn add(&mut self, notifications: usize, now: Instant) -> bool {
        if self.since.is_none_or(|since| now - since > SOON) {
            (self.since, self.notifications) = (Some(now), 0);
        }
        self.notifications += notifications;
        let flood = self.notifications >= MANY;
        if flood {
            self.since = None;
        }
        flood
    }
}

/// What a look says of promises.
#[derive(Clone, Copy, Debug)]
pub struct Promise {
    /// The database's time, before the look.
    pub at: OffsetDateTime,
    /// Until when somebody promised to look.
    pub until: OffsetDateTime,
    /// The lowest number of a transaction that was running.
    pub oldest_xid: i64,
    /// No transaction had this number or a higher one.
    pub next_xid: i64,
}

/// Whether to look again without being notified, by the looks so far.
#[derive(Debug, Default)]
pub struct Polling {
    /// The promise that is over.
    over: Option<OffsetDateTime>,
    /// Transactions below this number may have been silent.
    silent_below: i64,
    every: Option<Duration>,
}

impl Polling {
    /// The longest time until the next look; `None` = no promise is open.
    #[must_use]
    pub fn every(&self) -> Option<Duration> {
        self.every
    }

    /// Takes note of a look.
    pub fn looked(&mut self, Promise { at, until, oldest_xid, next_xid }: Promise) {
        if at < until && until - at < FAR {
            (self.over, self.every) = (None, Some(EVERY));
            return;
        }
        if self.over.replace(until) == Some(until) {
            // Ever less often: a row is not found later, after its commit, than its transaction was open.
            self.every = self.every.map(|every| every * 2);
        } else {
            (self.silent_below, self.every) = (next_xid, Some(EVERY));
        }
        self.every = self.every.filter(|every| oldest_xid < self.silent_below && *every < PATIENCE);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(ms: i64) -> OffsetDateTime {
        OffsetDateTime::UNIX_EPOCH + time::Duration::milliseconds(ms)
    }

    #[test]
    fn a_burst_is_a_flood_and_the_same_number_over_time_is_none() {
        let begun = Instant::now();
        let mut flood = Flood::default();
        assert!(!flood.add(MANY - 1, begun));
        assert!(flood.add(1, begun + SOON));
        assert!(!flood.add(MANY - 1, begun + SOON), "it begins anew");
        assert!((0..100).all(|number| !flood.add(1, begun + SOON * 3 + SOON * number / 10)), "50 in a second");
    }

    #[test]
    fn it_looks_for_as_long_as_was_promised_and_until_all_who_were_silent_have_ended() {
        let mut polling = Polling::default();
        let mut looked = |ms, oldest_xid, next_xid| {
            polling.looked(Promise { at: at(ms), until: at(1_000), oldest_xid, next_xid });
            polling.every().map(|after| after.as_millis())
        };
        assert_eq!(looked(0, 5, 10), Some(5));
        assert_eq!(looked(995, 5, 10), Some(5));
        assert_eq!(looked(1_000, 5, 12), Some(5));
        assert_eq!(looked(1_005, 11, 20), Some(10), "11 may have been silent");
        assert_eq!(looked(1_015, 11, 30), Some(20));
        assert_eq!(looked(1_035, 12, 30), None);
        for look in 0..100 {
            assert_eq!(looked(2_000 + look, 12, 40), None);
        }
    }

    #[test]
    fn a_transaction_that_does_not_end_is_left_to_the_sweep() {
        let mut polling = Polling::default();
        let promise = Promise { at: at(5_000), until: at(1_000), oldest_xid: 3, next_xid: 9 };
        let waits = std::iter::from_fn(|| {
            polling.looked(promise);
            polling.every()
        });
        assert_eq!(
            waits.map(|wait| wait.as_millis()).collect::<Vec<_>>(),
            [5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560]
        );
    }

    #[test]
    fn a_promise_of_a_clock_that_was_set_back_is_none() {
        let mut polling = Polling::default();
        let promise = Promise { at: at(0), until: at(3_600_000), oldest_xid: 9, next_xid: 9 };
        polling.looked(promise);
        assert_eq!(polling.every(), None);
    }

    proptest! {
        /// Writers take a number, are silent if they find a promise, and commit some time later.
        #[test]
        fn whoever_was_silent_is_seen_soon_after_the_commit(
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
                let promise = Promise { at: at(next), until: at(promised(next)), oldest_xid: oldest.unwrap_or(next_xid), next_xid };
                polling.looked(promise);
                let after = polling.every().map(|after| i64::try_from(after.as_millis()).expect("short"));
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
