//! A dead letter (a message that a consumer rejected, or that no consumer took in time), and what a pass does with it. No
//! I/O, and no types of the AMQP client library.

use std::ops::AddAssign;

use crate::model::event::LONGEST_TTL_MS;

/// The properties of a dead letter that decide what a pass does with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeadLetter {
    /// The headers could not be read, for this reason. Then no field below is known, except perhaps `id`.
    pub unreadable: Option<UnreadableHeaders>,
    /// `message_id`, for people. A dead letter that this program did not publish may have none.
    pub id: Option<String>,
    /// `tidings-kind`.
    pub kind: Option<String>,
    /// The queue in which it died: the newest entry of `x-death`.
    pub queue: Option<String>,
    /// Why it died there: `rejected`, `expired`, `maxlen` or `delivery_limit`.
    pub reason: Option<String>,
    /// When it died there, in seconds since the Unix epoch, by the broker's clock.
    pub died_at: Option<u64>,
    /// `tidings-due-ms`.
    pub due_ms: Option<i64>,
    /// `tidings-expires-ms`; an error if it is not a number.
    pub expires_ms: Option<Result<i64, Unreadable>>,
    /// `traceparent`: the span that it carries. Any text, if this program did not publish the dead letter.
    pub traceparent: Option<String>,
    /// `tracestate`, likewise.
    pub tracestate: Option<String>,
    /// The routing key with which it was published.
    pub routing_key: Option<String>,
    /// It died in the queue of an intake.
    pub of_intake: bool,
    /// `tidings-replay`: how often it was replayed; 0 if the header is absent or unreadable.
    pub replays: i64,
}

/// The value of a header has the wrong type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unreadable;

/// What becomes of headers that could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnreadableHeaders {
    /// They are kept as they came, in the header `tidings-unreadable`.
    Carried,
    /// They are too long to be published again.
    TooLong,
}

/// What a pass does with a dead letter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Removes it: its deadline has passed.
    Expired,
    /// Publishes it again to the queue in which it died.
    Replay {
        /// The queue.
        queue: String,
        /// Time until its deadline, in milliseconds; `None` = it never expires.
        expiration_ms: Option<u64>,
        /// How often it will have been replayed then.
        replays: i64,
        /// For the queue of an intake: the routing key with which it was published. A replay goes by the name of the queue.
        routing_key: Option<String>,
    },
    /// Parks it, with the reason.
    Park(String),
    /// Leaves it where it is, with the reason why it cannot be moved.
    Leave(&'static str),
}

/// How many dead letters a pass handled, and how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PassCounts {
    /// Removed, since their deadline had passed.
    pub expired: u64,
    /// Published again to their queues.
    pub replayed: u64,
    /// Parked.
    pub parked: u64,
    /// Left where they were, since their queue refused them or they were not selected.
    pub left: u64,
    /// The earliest [`DeadLetter::since_ms`] of them.
    pub oldest_ms: Option<i64>,
}

impl PassCounts {
    /// How many dead letters were handled in all.
    #[must_use]
    pub fn letters(&self) -> u64 {
        self.expired + self.replayed + self.parked + self.left
    }
}

impl AddAssign for PassCounts {
    fn add_assign(&mut self, other: Self) {
        self.expired += other.expired;
        self.replayed += other.replayed;
        self.parked += other.parked;
        self.left += other.left;
        self.oldest_ms = [self.oldest_ms, other.oldest_ms].into_iter().flatten().min();
    }
}

impl DeadLetter {
    /// The time from which its age counts, in milliseconds since the Unix epoch: its due time or, without one, the time at
    /// which it died.
    #[must_use]
    pub fn since_ms(&self) -> Option<i64> {
        let died_ms =
            self.died_at.and_then(|seconds| i64::try_from(seconds).ok()).map(|seconds| seconds.saturating_mul(1000));
        self.due_ms.or(died_ms)
    }

    /// Notes whether it died in the queue of an intake, by its name; the daemon publishes to `exchange`. What expires there had no
    /// daemon that took it in time.
    pub fn find_intake(&mut self, exchange: &str) {
        let of_intake = |queue: &str| queue.strip_prefix(exchange).is_some_and(|rest| rest.starts_with(".intake."));
        self.of_intake = self.queue.as_deref().is_some_and(of_intake);
    }

    /// What a pass does with it at `now_ms`, by the database's clock. `max` is how often a dead letter may be replayed; 0 =
    /// without limit.
    #[must_use]
    pub fn fate(&self, now_ms: i64, max: u32) -> Fate {
        match self.unreadable {
            None => {}
            Some(UnreadableHeaders::Carried) => {
                return Fate::Park(
                    "its headers cannot be read; the header tidings-unreadable has them as they came".into(),
                );
            }
            Some(UnreadableHeaders::TooLong) => {
                return Fate::Leave(
                    "its headers are too long to be published again; drop it, or take it out of the queue by hand",
                );
            }
        }
        if self.of_intake && self.reason.as_deref() == Some("expired") {
            return Fate::Expired;
        }
        let expiration_ms = match self.expires_ms {
            None => None,
            Some(Err(Unreadable)) => return Fate::Park("its tidings-expires-ms is not a number".into()),
            Some(Ok(deadline)) => match u64::try_from(deadline.saturating_sub(now_ms)) {
                Ok(0) | Err(_) => return Fate::Expired,
                Ok(left) => Some(left.min(LONGEST_TTL_MS)),
            },
        };
        let Some(queue) = self.queue.clone().filter(|queue| !queue.is_empty()) else {
            return Fate::Park("it has no x-death that names the queue it died in".into());
        };
        if max > 0 && self.replays >= i64::from(max) {
            return Fate::Park(format!(
                "it was replayed {} times, as often as TIDINGS_REPLAY_MAX allows",
                self.replays
            ));
        }
        let routing_key = self.routing_key.clone().filter(|_| self.of_intake);
        Fate::Replay { queue, expiration_ms, replays: self.replays.max(0).saturating_add(1), routing_key }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn dead_letter(expires_ms: Option<i64>) -> DeadLetter {
        DeadLetter { queue: Some("q".into()), expires_ms: expires_ms.map(Ok), ..DeadLetter::default() }
    }

    #[test]
    fn a_dead_letter_without_a_deadline_is_replayed_without_limit() {
        let often_replayed = DeadLetter { replays: 1_000_000, ..dead_letter(None) };
        let fate = often_replayed.fate(5, 0);
        assert_eq!(
            fate,
            Fate::Replay { queue: "q".into(), expiration_ms: None, replays: 1_000_001, routing_key: None }
        );
    }

    #[test]
    fn a_dead_letter_is_replayed_with_the_time_until_its_deadline_as_expiration() {
        for (now, left) in [(0, Some(1_000)), (999, Some(1)), (1_000, None), (1_001, None)] {
            match (dead_letter(Some(1_000)).fate(now, 0), left) {
                (Fate::Replay { expiration_ms, .. }, Some(left)) => assert_eq!(expiration_ms, Some(left)),
                (Fate::Expired, None) => {}
                (fate, _) => panic!("{fate:?} at {now}"),
            }
        }
    }

    #[test]
    fn a_dead_letter_is_parked_after_the_maximum_number_of_replays() {
        let replayed = |replays| DeadLetter { replays, ..dead_letter(None) }.fate(0, 3);
        assert!(matches!(replayed(2), Fate::Replay { replays: 3, .. }));
        assert!(matches!(replayed(3), Fate::Park(reason) if reason.contains("replayed 3 times")));
    }

    #[test]
    fn a_dead_letter_without_a_queue_or_with_an_odd_deadline_is_parked_with_the_reason() {
        let nowhere = DeadLetter { queue: None, ..dead_letter(None) };
        assert!(matches!(nowhere.fate(0, 0), Fate::Park(reason) if reason.contains("x-death")));
        let odd = DeadLetter { expires_ms: Some(Err(Unreadable)), ..dead_letter(None) };
        assert!(matches!(odd.fate(0, 0), Fate::Park(reason) if reason.contains("tidings-expires-ms")));
    }

    #[test]
    fn what_expired_in_the_queue_of_an_intake_is_not_replayed_and_what_was_rejected_there_is() {
        let fate = |queue: &str, reason: &str| {
            let mut dead_letter =
                DeadLetter { queue: Some(queue.into()), reason: Some(reason.into()), ..DeadLetter::default() };
            dead_letter.find_intake("tidings");
            dead_letter.fate(0, 0)
        };
        assert_eq!(fate("tidings.intake.orders", "expired"), Fate::Expired);
        assert!(matches!(fate("tidings.intake.orders", "maxlen"), Fate::Replay { .. }));
        assert!(matches!(fate("shop.intake.orders", "expired"), Fate::Replay { .. }));
    }

    proptest! {
        #[test]
        fn no_dead_letter_is_replayed_after_its_deadline_or_more_often_than_the_maximum(
            expires_ms in proptest::option::of(any::<i64>()),
            replays in any::<i64>(),
            now_ms in any::<i64>(),
            max in any::<u32>(),
        ) {
            match (DeadLetter { replays, ..dead_letter(expires_ms) }).fate(now_ms, max) {
                Fate::Replay { expiration_ms, replays, .. } => {
                    prop_assert!(expires_ms.is_none_or(|deadline| deadline > now_ms));
                    prop_assert_eq!(expires_ms.is_some(), expiration_ms.is_some());
                    prop_assert!(expiration_ms.is_none_or(|left| (1..=LONGEST_TTL_MS).contains(&left)));
                    prop_assert!(replays >= 1);
                }
                Fate::Expired => prop_assert!(expires_ms.is_some_and(|deadline| deadline <= now_ms)),
                Fate::Park(_) => prop_assert!(max > 0 && replays >= i64::from(max)),
                Fate::Leave(_) => prop_assert!(false, "it can be read"),
            }
        }
    }
}
