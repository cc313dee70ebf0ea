//! A message that a consumer rejected, or that nobody took in time, and what becomes of it. No I/O, and nothing of AMQP's
//! client library.

use std::ops::AddAssign;

use crate::model::event::LONGEST_TTL_MS;

/// What a dead letter says of itself, as far as its fate depends on it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeadLetter {
    /// Its headers could not be read, and nothing below is known but for its id perhaps.
    pub unreadable: Option<Unsendable>,
    /// `message_id`, for people; a foreign letter may have none.
    pub id: Option<String>,
    /// `tidings-kind`.
    pub kind: Option<String>,
    /// The queue it died in: the newest entry of `x-death`.
    pub queue: Option<String>,
    /// Why it died there: `rejected`, `expired`, `maxlen` or `delivery_limit`.
    pub reason: Option<String>,
    /// When it died there, in seconds since the Unix epoch, by the broker's clock.
    pub died_at: Option<u64>,
    /// `tidings-due-ms`
    pub due_ms: Option<i64>,
    /// `tidings-expires-ms`, or that it cannot be read.
    pub expires_ms: Option<Result<i64, Unreadable>>,
    /// `traceparent`: the span that it carries. A foreign letter's may be anything.
    pub traceparent: Option<String>,
    /// `tracestate`, the same.
    pub tracestate: Option<String>,
    /// `tidings-replay`: how often it was replayed. Absent or unreadable is never.
    pub replays: i64,
}

/// A header whose value is of no type that it can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unreadable;

/// Headers that could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsendable {
    /// They are carried along as they came.
    Carried,
    /// They are so long that nobody can publish them again.
    TooLong,
}

/// What becomes of a dead letter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Its deadline has come: nobody may see it any more.
    Expired,
    /// It goes back into the queue it died in.
    Replay {
        /// The queue.
        queue: String,
        /// What is left of its life, in milliseconds; `None` = it never expires.
        expiration_ms: Option<u64>,
        /// How often it will have been replayed.
        replays: i64,
    },
    /// It is set aside for a person, with the reason.
    Park(String),
    /// It lies where it is, since nothing can be done with it, with the reason.
    Leave(&'static str),
}

/// What became of letters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PassCounts {
    /// Past their deadline: gone.
    pub expired: u64,
    /// Back in their queues.
    pub replayed: u64,
    /// Set aside.
    pub parked: u64,
    /// Left where they were, since their queue did not take them, or they were not asked for.
    pub left: u64,
    /// Since when the oldest of them has been on its way, in milliseconds since the Unix epoch.
    pub oldest_ms: Option<i64>,
}

impl PassCounts {
    /// How many they were.
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
    /// Since when it has been on its way, in milliseconds since the Unix epoch: since it was due, or, if it does not say,
    /// since it died.
    #[must_use]
    pub fn since_ms(&self) -> Option<i64> {
        let died_ms =
            self.died_at.and_then(|seconds| i64::try_from(seconds).ok()).map(|seconds| seconds.saturating_mul(1000));
        self.due_ms.or(died_ms)
    }

    /// What becomes of it at `now_ms`, by the database clock. `max` is how often a letter may be replayed; 0 = as often as
    /// it takes.
    #[must_use]
    pub fn fate(&self, now_ms: i64, max: u32) -> Fate {
        match self.unreadable {
            None => {}
            Some(Unsendable::Carried) => {
                return Fate::Park("its headers cannot be read; tidings-unreadable has them as they came".into());
            }
            Some(Unsendable::TooLong) => {
                return Fate::Leave(
                    "its headers are too long to be published again; drop it, or take it out of the queue by hand",
                );
            }
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
        Fate::Replay { queue, expiration_ms, replays: self.replays.max(0).saturating_add(1) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn letter(expires_ms: Option<i64>) -> DeadLetter {
        DeadLetter { queue: Some("q".into()), expires_ms: expires_ms.map(Ok), ..DeadLetter::default() }
    }

    #[test]
    fn a_letter_without_a_deadline_goes_back_as_often_as_it_takes() {
        let tireless = DeadLetter { replays: 1_000_000, ..letter(None) };
        let fate = tireless.fate(5, 0);
        assert_eq!(fate, Fate::Replay { queue: "q".into(), expiration_ms: None, replays: 1_000_001 });
    }

    #[test]
    fn a_letter_goes_back_with_what_is_left_of_its_life_to_the_millisecond() {
        for (now, left) in [(0, Some(1_000)), (999, Some(1)), (1_000, None), (1_001, None)] {
            match (letter(Some(1_000)).fate(now, 0), left) {
                (Fate::Replay { expiration_ms, .. }, Some(left)) => assert_eq!(expiration_ms, Some(left)),
                (Fate::Expired, None) => {}
                (fate, _) => panic!("{fate:?} at {now}"),
            }
        }
    }

    #[test]
    fn the_tireless_are_parked_if_there_is_a_maximum() {
        let replayed = |replays| DeadLetter { replays, ..letter(None) }.fate(0, 3);
        assert!(matches!(replayed(2), Fate::Replay { replays: 3, .. }));
        assert!(matches!(replayed(3), Fate::Park(reason) if reason.contains("replayed 3 times")));
    }

    #[test]
    fn what_cannot_go_back_is_parked_with_the_reason() {
        let nowhere = DeadLetter { queue: None, ..letter(None) };
        assert!(matches!(nowhere.fate(0, 0), Fate::Park(reason) if reason.contains("x-death")));
        let odd = DeadLetter { expires_ms: Some(Err(Unreadable)), ..letter(None) };
        assert!(matches!(odd.fate(0, 0), Fate::Park(reason) if reason.contains("tidings-expires-ms")));
    }

    proptest! {
        #[test]
        fn any_letter_has_a_fate_and_none_is_replayed_past_its_deadline(
            expires_ms in proptest::option::of(any::<i64>()),
            replays in any::<i64>(),
            now_ms in any::<i64>(),
            max in any::<u32>(),
        ) {
            match (DeadLetter { replays, ..letter(expires_ms) }).fate(now_ms, max) {
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
