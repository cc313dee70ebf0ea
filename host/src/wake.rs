//! When the dispatcher looks again: woken by others, or after a wait that one pure function decides.

use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use tokio::sync::Notify;

use crate::backoff;

/// Why the dispatcher looks again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// PostgreSQL notified us.
    Notification,
    /// A notification may have been lost.
    Doubt,
    /// Other plugins serve than before, or they have news.
    Plugins,
    /// Messages can be published again.
    Broker,
    /// Held rows were released.
    Released,
    /// A lane has ended.
    Lane,
    /// Rows that cannot be claimed were held.
    Held,
    /// The next row is due.
    Due,
    /// Many notify, and were told that we look by ourselves.
    Polling,
    /// Others held the rows that are due, or a server did not see something through: asked again.
    Again,
    /// It has not looked for a while.
    Sweep,
}

impl Reason {
    /// All of them, each at the place of its number.
    pub const ALL: [Self; 11] = [
        Self::Notification,
        Self::Doubt,
        Self::Plugins,
        Self::Broker,
        Self::Released,
        Self::Lane,
        Self::Held,
        Self::Due,
        Self::Polling,
        Self::Again,
        Self::Sweep,
    ];

    /// One word.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Notification => "notification",
            Self::Doubt => "doubt",
            Self::Plugins => "plugins",
            Self::Broker => "broker",
            Self::Released => "released",
            Self::Lane => "lane",
            Self::Held => "held",
            Self::Due => "due",
            Self::Polling => "polling",
            Self::Again => "again",
            Self::Sweep => "sweep",
        }
    }
}

/// The reasons of wakes that became one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reasons(u16);

impl From<Reason> for Reasons {
    fn from(reason: Reason) -> Self {
        Self(1 << reason as u16)
    }
}

impl Reasons {
    /// Each of them once.
    pub fn iter(self) -> impl Iterator<Item = Reason> {
        Reason::ALL.into_iter().filter(move |reason| self.0 & Self::from(*reason).0 != 0)
    }
}

/// Makes the dispatcher look again. A wake that comes while nobody waits is kept, so the order of looking and arming does
/// not matter; several become one.
#[derive(Debug, Default)]
pub struct Wake {
    notify: Notify,
    /// Only to be counted: nothing depends on them.
    reasons: AtomicU16,
}

impl Wake {
    /// Makes the dispatcher look again.
    pub fn wake(&self, reason: Reason) {
        // Before the permit, so that whoever takes that finds the reason; an earlier one may have taken it along.
        self.reasons.fetch_or(Reasons::from(reason).0, Ordering::Relaxed);
        self.notify.notify_one();
    }

    /// Waits for a wake, and returns the reasons since the last. Cancel-safe: a wake is consumed only by the call that
    /// returns.
    pub async fn woken(&self) -> Reasons {
        self.notify.notified().await;
        Reasons(self.reasons.swap(0, Ordering::Relaxed))
    }
}

/// A transaction for a row that is due at a known time is begun at least so long before it.
pub const HEAD_START: Duration = Duration::from_micros(500);
/// And at most so long: nothing else is claimed meanwhile.
const LONGEST_HEAD_START: Duration = Duration::from_secs(1);

/// How long before a row's time a transaction for it is begun. To begin takes a round trip, after which nothing is asked until
/// the time has come: what it takes is known from the transactions before.
#[derive(Clone, Copy, Debug, Default)]
pub struct HeadStart {
    last: Duration,
    before_last: Duration,
}

impl HeadStart {
    /// A transaction took so long to begin.
    pub fn took(&mut self, begin: Duration) {
        self.before_last = std::mem::replace(&mut self.last, begin);
    }

    /// How long before. One that was slow by chance, to connect anew for instance, does not count.
    #[must_use]
    pub fn get(&self) -> Duration {
        HEAD_START + self.last.min(self.before_last).min(LONGEST_HEAD_START)
    }
}

/// The shortest wait.
const SHORTEST: Duration = Duration::from_micros(200);

/// What a look at the queue found, by the database clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outlook {
    /// Rows are due. Some of them may be locked.
    pub due: bool,
    /// Time until the first row that is not due yet; `None` = there is none.
    pub next_in: Option<Duration>,
}

/// How long to wait from now on, if nobody wakes us, and why to look then.
///
/// `elapsed` is the time since the question behind `outlook` was sent. `empty_claims` counts the claims in a row that
/// came to nothing although rows are due, since others hold their locks or the broker does not confirm. `polling` is the
/// longest time between two looks while nobody notifies. Whatever the outlook, the wait ends with the next sweep; and it is at
/// least a fraction of a millisecond, so that a clock that is a little behind does not make us spin.
#[must_use]
pub fn wait(
    outlook: Outlook,
    elapsed: Duration,
    empty_claims: u32,
    polling: Option<Duration>,
    sweep: Duration,
) -> (Duration, Reason) {
    let next = outlook.next_in.map_or(Duration::MAX, |next_in| next_in.saturating_sub(elapsed));
    let again = match empty_claims {
        0 => Duration::MAX,
        claims if outlook.due => backoff::LOCKED.delay(claims - 1),
        _ => Duration::MAX,
    };
    let (mut after, mut why) = (sweep, Reason::Sweep);
    let polling = polling.map_or(Duration::MAX, |every| every.saturating_sub(elapsed));
    for (earlier, reason) in [(again, Reason::Again), (polling, Reason::Polling), (next, Reason::Due)] {
        if earlier < after {
            (after, why) = (earlier, reason);
        }
    }
    (after.max(SHORTEST), why)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SWEEP: Duration = Duration::from_secs(5);

    fn next_in(ms: u64) -> Outlook {
        Outlook { due: false, next_in: Some(Duration::from_millis(ms)) }
    }

    #[test]
    fn the_head_start_is_what_transactions_take_to_begin_but_for_one_that_was_slow_by_chance() {
        let mut head_start = HeadStart::default();
        assert_eq!(head_start.get(), HEAD_START);
        let link = Duration::from_millis(30);
        head_start.took(link);
        head_start.took(link);
        assert_eq!(head_start.get(), HEAD_START + link);
        head_start.took(10 * link);
        assert_eq!(head_start.get(), HEAD_START + link);
        head_start.took(link);
        assert_eq!(head_start.get(), HEAD_START + link);
        head_start.took(Duration::ZERO);
        assert_eq!(head_start.get(), HEAD_START, "the link is near again");
        for _ in 0..2 {
            head_start.took(Duration::from_secs(20));
        }
        assert_eq!(head_start.get(), HEAD_START + LONGEST_HEAD_START);
    }

    #[test]
    fn an_empty_queue_waits_for_the_sweep() {
        assert_eq!(wait(Outlook::default(), Duration::ZERO, 0, None, SWEEP), (SWEEP, Reason::Sweep));
    }

    #[test]
    fn a_row_due_before_the_sweep_ends_the_wait_exactly_then() {
        let due = (Duration::from_millis(1_200), Reason::Due);
        assert_eq!(wait(next_in(1_234), Duration::from_millis(34), 0, None, SWEEP), due);
    }

    #[test]
    fn a_row_far_away_costs_nothing_before_the_sweep() {
        assert_eq!(wait(next_in(u64::MAX), Duration::ZERO, 0, None, SWEEP).0, SWEEP);
    }

    #[test]
    fn a_row_that_became_due_since_the_question_is_looked_at_at_once_but_without_spinning() {
        assert_eq!(wait(next_in(10), Duration::from_millis(25), 0, None, SWEEP).0, SHORTEST);
    }

    #[test]
    fn due_rows_that_others_hold_are_asked_for_again_ever_less_often() {
        let due = Outlook { due: true, next_in: None };
        let waits: Vec<u128> =
            (1..6).map(|claims| wait(due, Duration::ZERO, claims, None, SWEEP).0.as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1_000]);
    }

    #[test]
    fn while_nobody_notifies_the_wait_is_short() {
        let every = Some(Duration::from_millis(5));
        let polling = (Duration::from_millis(3), Reason::Polling);
        assert_eq!(wait(next_in(60), Duration::from_millis(2), 0, every, SWEEP), polling);
        assert_eq!(wait(next_in(4), Duration::ZERO, 0, every, SWEEP), (Duration::from_millis(4), Reason::Due));
    }

    #[test]
    fn rows_held_by_others_do_not_hide_the_next_one() {
        let outlook = Outlook { due: true, next_in: Some(Duration::from_millis(7)) };
        assert_eq!(wait(outlook, Duration::ZERO, 4, None, SWEEP), (Duration::from_millis(7), Reason::Due));
    }

    #[tokio::test]
    async fn a_wake_between_the_look_and_the_wait_is_not_lost_and_wakes_once() {
        let wake = Wake::default();
        wake.wake(Reason::Notification);
        wake.wake(Reason::Broker);
        let reasons: Vec<Reason> = wake.woken().await.iter().collect();
        assert_eq!(reasons, [Reason::Notification, Reason::Broker]);
        let second = tokio::time::timeout(Duration::from_millis(1), wake.woken()).await;
        assert!(second.is_err(), "two wakes become one");
    }

    proptest! {
        #[test]
        fn the_wait_is_never_longer_than_the_sweep_and_never_past_the_next_row(
            due in any::<bool>(),
            next_ms in proptest::option::of(any::<u64>()),
            elapsed_ms in 0..100_000_u64,
            empty_claims in any::<u32>(),
        ) {
            let outlook = Outlook { due, next_in: next_ms.map(Duration::from_millis) };
            let (wait, _) = wait(outlook, Duration::from_millis(elapsed_ms), empty_claims, None, SWEEP);
            prop_assert!(wait >= SHORTEST);
            prop_assert!(wait <= SWEEP);
            if let Some(next_ms) = next_ms {
                prop_assert!(wait <= Duration::from_millis(next_ms.saturating_sub(elapsed_ms)).max(SHORTEST));
            }
        }
    }
}
