//! Where a row is, and why: what `tidings explain` tells. Decided from what the database says of it, with no I/O.

use std::str::FromStr;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use uuid::Uuid;

/// RowRef row is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RowRef {
    /// The one with this id.
    Id(Uuid),
    /// The one with this key of its kind.
    Key {
        /// The kind.
        kind: String,
        /// The key.
        key: String,
    },
}

impl FromStr for RowRef {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(id) = Uuid::try_parse(text) {
            return Ok(Self::Id(id));
        }
        // A kind has no slash; a key may have.
        match text.split_once('/') {
            Some((kind, key)) if !kind.is_empty() && !key.is_empty() => {
                Ok(Self::Key { kind: kind.to_owned(), key: key.to_owned() })
            }
            _ => Err("neither an id, such as 0199a6b2-1c2d-7000-8000-000000000001, nor KIND/KEY".into()),
        }
    }
}

/// A kind that a person stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pause {
    /// RowRef.
    pub kind: String,
    /// When the pause began.
    #[serde(with = "time::serde::rfc3339")]
    pub since: OffsetDateTime,
    /// When it ends by itself; `None` = only when somebody resumes the kind.
    #[serde(with = "time::serde::rfc3339::option")]
    pub until: Option<OffsetDateTime>,
    /// Why, for people.
    pub reason: Option<String>,
    /// The login role of whoever paused it.
    pub by: String,
}

/// A row that was found, and where it is.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FoundRow {
    /// The row's id.
    pub id: Uuid,
    /// Its kind.
    pub kind: String,
    /// Its key, if it has one.
    pub key: Option<String>,
    /// Its subject, if it has one.
    pub subject: Option<String>,
    /// When it is or was due.
    #[serde(with = "time::serde::rfc3339")]
    pub due_at: OffsetDateTime,
    /// Its deadline, if it has one.
    #[serde(with = "time::serde::rfc3339::option")]
    pub expires_at: Option<OffsetDateTime>,
    /// Builds so far that failed, or that the plugin wanted to try again.
    pub attempts: i32,
    /// Where it is, and why.
    #[serde(flatten)]
    pub row_status: RowStatus,
}

/// Where a row is, and why.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum RowStatus {
    /// It is not due yet.
    Waiting {
        /// When it is due.
        #[serde(with = "time::serde::rfc3339")]
        until: OffsetDateTime,
        /// Its kind is paused now.
        pause: Option<Pause>,
    },
    /// It is due, and nobody has taken it yet.
    Due {
        /// For how long.
        late_seconds: f64,
        /// How many daemons serve its kind.
        daemons: i64,
        /// Its deadline has come: it will be finished as expired.
        past_deadline: bool,
    },
    /// It is due, and somebody has locked it: a delivery, or a session that edits it.
    Locked {
        /// For how long it has been due.
        late_seconds: f64,
        /// Who, for people.
        by: String,
    },
    /// It was tried, and is tried again later.
    BackingOff {
        /// When.
        #[serde(with = "time::serde::rfc3339")]
        until: OffsetDateTime,
        /// Why it was not delivered.
        last_error: Option<String>,
    },
    /// It waits for a daemon that serves its kind.
    Held {
        /// How many do now: they are about to release it.
        daemons: i64,
    },
    /// It is due, and a person has stopped its kind.
    Paused {
        /// Who, when, why.
        pause: Pause,
    },
    /// It was set aside for a person.
    Parked {
        /// When.
        #[serde(with = "time::serde::rfc3339")]
        parked_at: OffsetDateTime,
        /// Why.
        reason: String,
        /// `name@version+digest8` of the plugin that could not build it.
        plugin: Option<String>,
    },
    /// Its message was confirmed.
    Delivered {
        /// When, by the database clock.
        #[serde(with = "time::serde::rfc3339")]
        finished_at: OffsetDateTime,
        /// How long after its due time.
        late_seconds: f64,
        /// `name@version+digest8` of the plugin that built it.
        plugin: Option<String>,
    },
    /// Its deadline came first.
    Expired {
        /// When it was finished.
        #[serde(with = "time::serde::rfc3339")]
        finished_at: OffsetDateTime,
        /// When that was found.
        reason: Option<String>,
    },
    /// Its plugin said that there is nothing to send.
    Skipped {
        /// When.
        #[serde(with = "time::serde::rfc3339")]
        finished_at: OffsetDateTime,
        /// Why.
        reason: Option<String>,
        /// `name@version+digest8` of the plugin.
        plugin: Option<String>,
    },
}

/// What the database says of a row that waits.
#[derive(Clone, Debug)]
pub struct Pending {
    /// The database clock.
    pub now: OffsetDateTime,
    /// When it is due.
    pub due_at: OffsetDateTime,
    /// Its deadline.
    pub expires_at: Option<OffsetDateTime>,
    /// When it was written, or the end of its backoff.
    pub not_before: OffsetDateTime,
    /// It was taken out of the queue, since its kind was paused or not served.
    pub held: bool,
    /// Why it is still here although it was due.
    pub last_error: Option<String>,
    /// Who has locked it.
    pub locked_by: Option<String>,
    /// How many daemons serve its kind.
    pub daemons: i64,
    /// Its kind is paused.
    pub pause: Option<Pause>,
}

impl Pending {
    /// Where it is, and why. What keeps a row longest is told first: an edit by a lock, its due time, its pause.
    #[must_use]
    pub fn row_status(self) -> RowStatus {
        let Self { now, due_at, expires_at, not_before, held, last_error, locked_by, daemons, pause } = self;
        let late_seconds = seconds(now - due_at);
        let past_deadline = expires_at.is_some_and(|deadline| deadline <= now);
        match (locked_by, pause) {
            (_, pause) if due_at > now => RowStatus::Waiting { until: due_at, pause },
            (Some(by), _) => RowStatus::Locked { late_seconds, by },
            // It is finished by the next claim, whatever held it.
            _ if past_deadline => RowStatus::Due { late_seconds, daemons, past_deadline },
            (None, Some(pause)) => RowStatus::Paused { pause },
            (None, None) if held => RowStatus::Held { daemons },
            (None, None) if not_before > now => RowStatus::BackingOff { until: not_before, last_error },
            (None, None) => RowStatus::Due { late_seconds, daemons, past_deadline },
        }
    }
}

/// A time in seconds, to the microsecond.
#[must_use]
pub fn seconds(time: time::Duration) -> f64 {
    time.as_seconds_f64()
}

#[cfg(test)]
mod tests {
    use time::Duration;

    use super::*;

    const NOW: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;

    /// Due for two seconds, and kept by nothing.
    fn due() -> Pending {
        let written = NOW - Duration::seconds(9);
        Pending {
            now: NOW,
            due_at: NOW - Duration::seconds(2),
            expires_at: None,
            not_before: written,
            held: false,
            last_error: None,
            locked_by: None,
            daemons: 1,
            pause: None,
        }
    }

    fn pause() -> Pause {
        Pause { kind: "k".into(), since: NOW, until: None, reason: None, by: "bob".into() }
    }

    #[test]
    fn a_row_that_nothing_keeps_is_due() {
        let expected = RowStatus::Due { late_seconds: 2.0, daemons: 1, past_deadline: false };
        assert_eq!(due().row_status(), expected);
    }

    #[test]
    fn a_row_before_its_time_waits_whatever_else_is() {
        let due_at = NOW + Duration::SECOND;
        let row = Pending { due_at, held: true, locked_by: Some("me".into()), pause: Some(pause()), ..due() };
        assert_eq!(row.row_status(), RowStatus::Waiting { until: due_at, pause: Some(pause()) });
    }

    #[test]
    fn a_paused_row_is_paused_whether_it_is_held_already_or_not() {
        for held in [true, false] {
            let row = Pending { held, pause: Some(pause()), not_before: NOW + Duration::HOUR, ..due() };
            assert_eq!(row.row_status(), RowStatus::Paused { pause: pause() });
        }
    }

    #[test]
    fn a_row_past_its_deadline_is_due_to_be_finished_even_if_it_is_held_or_paused() {
        let row = Pending { held: true, pause: Some(pause()), expires_at: Some(NOW), ..due() };
        assert!(matches!(row.row_status(), RowStatus::Due { past_deadline: true, .. }));
    }

    #[test]
    fn a_row_that_was_tried_backs_off_unless_it_is_held() {
        let row = Pending { not_before: NOW + Duration::SECOND, last_error: Some("it trapped".into()), ..due() };
        let until = NOW + Duration::SECOND;
        let expected = RowStatus::BackingOff { until, last_error: Some("it trapped".into()) };
        assert_eq!(row.clone().row_status(), expected);
        assert_eq!(Pending { held: true, daemons: 0, ..row }.row_status(), RowStatus::Held { daemons: 0 });
    }

    #[test]
    fn an_id_is_told_from_a_kind_and_a_key_which_may_have_slashes() {
        let id = "0199a6b2-1c2d-7000-8000-000000000001";
        assert!(matches!(id.parse(), Ok(RowRef::Id(_))));
        assert_eq!("a/b/c".parse(), Ok(RowRef::Key { kind: "a".into(), key: "b/c".into() }));
        for text in ["", "a", "a/", "/b", "0199a6b2"] {
            assert!(text.parse::<RowRef>().is_err(), "{text}");
        }
    }
}
