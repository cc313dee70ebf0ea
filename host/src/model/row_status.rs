//! The status of a row and its reason, as `tidings explain` shows it, decided from what the store has read. No I/O.

use std::str::FromStr;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use crate::model::limit::Place;

/// Which row a command or a request is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RowRef {
    /// The row with this id.
    Id(Uuid),
    /// The row with this kind and key.
    Key {
        /// The kind.
        kind: String,
        /// The key.
        key: String,
    },
}

impl RowRef {
    /// The recurrence and the instant, if it may name an occurrence as NAME/INSTANT.
    #[must_use]
    pub fn as_occurrence(&self) -> Option<(String, OffsetDateTime)> {
        let Self::Key { kind, key } = self else { return None };
        let text = format!("{kind}/{key}");
        let (name, instant) = text.rsplit_once('/')?;
        let instant = OffsetDateTime::parse(instant, &Rfc3339).ok()?;
        Some((name.to_owned(), instant.to_offset(time::UtcOffset::UTC)))
    }
}

impl FromStr for RowRef {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(id) = Uuid::try_parse(text) {
            return Ok(Self::Id(id));
        }
        // A kind never contains a slash; a key may.
        match text.split_once('/') {
            Some((kind, key)) if !kind.is_empty() && !key.is_empty() => {
                Ok(Self::Key { kind: kind.to_owned(), key: key.to_owned() })
            }
            _ => Err("neither an id, such as 0199a6b2-1c2d-7000-8000-000000000001, nor KIND/KEY".into()),
        }
    }
}

/// A kind that the operator has paused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pause {
    /// The kind.
    pub kind: String,
    /// When the pause began.
    #[serde(with = "time::serde::rfc3339")]
    pub since: OffsetDateTime,
    /// When the pause ends by itself; `None` = it lasts until the operator resumes the kind.
    #[serde(with = "time::serde::rfc3339::option")]
    pub until: Option<OffsetDateTime>,
    /// The operator's reason, for people.
    pub reason: Option<String>,
    /// The login role that paused it.
    pub by: String,
}

/// A row that was found, and its status.
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
    /// Builds so far that failed, or for which the plugin asked for another attempt.
    pub attempts: i32,
    /// Its status.
    #[serde(flatten)]
    pub row_status: RowStatus,
}

/// The status of a row, and its reason.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum RowStatus {
    /// The row is not due yet.
    Waiting {
        /// When it is due.
        #[serde(with = "time::serde::rfc3339")]
        until: OffsetDateTime,
        /// The pause of its kind, if the kind is paused now.
        pause: Option<Pause>,
    },
    /// The row is due, and no daemon has claimed it yet.
    Due {
        /// For how long it has been due.
        late_seconds: f64,
        /// How many daemons serve its kind.
        daemons: i64,
        /// Its deadline has passed, so it will be finished as expired.
        past_deadline: bool,
    },
    /// The row is due and locked, by a delivery or by a session that edits it.
    Locked {
        /// For how long it has been due.
        late_seconds: f64,
        /// Who has locked it, for people.
        by: String,
    },
    /// An attempt has failed, and the next follows later.
    BackingOff {
        /// When the next attempt follows.
        #[serde(with = "time::serde::rfc3339")]
        until: OffsetDateTime,
        /// Why the last attempt failed.
        last_error: Option<String>,
    },
    /// The row is held until a daemon serves its kind.
    Held {
        /// How many daemons serve its kind now. They are about to release it.
        daemons: i64,
    },
    /// The row is due, and its kind is limited: it waits for its turn.
    WaitsForTurn {
        /// Where it stands.
        #[serde(flatten)]
        place: Place,
    },
    /// The row is due, and its kind is paused.
    Paused {
        /// The pause.
        pause: Pause,
    },
    /// The row is parked: set aside for the operator.
    Parked {
        /// When it was parked.
        #[serde(with = "time::serde::rfc3339")]
        parked_at: OffsetDateTime,
        /// Why it was parked.
        reason: String,
        /// `name@version+digest8` of the plugin that could not build it.
        plugin: Option<String>,
    },
    /// RabbitMQ has confirmed the row's message.
    Delivered {
        /// When RabbitMQ confirmed it, by the database's clock.
        #[serde(with = "time::serde::rfc3339")]
        finished_at: OffsetDateTime,
        /// How long after its due time that was.
        late_seconds: f64,
        /// `name@version+digest8` of the plugin that built it.
        plugin: Option<String>,
    },
    /// The row's deadline passed before its message was published.
    Expired {
        /// When it was finished.
        #[serde(with = "time::serde::rfc3339")]
        finished_at: OffsetDateTime,
        /// How the daemon found that.
        reason: Option<String>,
    },
    /// The row's plugin decided that there is nothing to send.
    Skipped {
        /// When it was finished.
        #[serde(with = "time::serde::rfc3339")]
        finished_at: OffsetDateTime,
        /// The plugin's reason.
        reason: Option<String>,
        /// `name@version+digest8` of the plugin.
        plugin: Option<String>,
    },
}

/// What the store has read about a row that is still in `tidings.schedules`.
#[derive(Clone, Debug)]
pub struct Pending {
    /// The database's time.
    pub now: OffsetDateTime,
    /// When it is due.
    pub due_at: OffsetDateTime,
    /// Its deadline.
    pub expires_at: Option<OffsetDateTime>,
    /// When the row was written, or when its backoff ends.
    pub not_before: OffsetDateTime,
    /// It is held: out of the queue, since its kind was paused or not served.
    pub held: bool,
    /// Why the last attempt failed.
    pub last_error: Option<String>,
    /// Who has locked it, for people.
    pub locked_by: Option<String>,
    /// How many daemons serve its kind.
    pub daemons: i64,
    /// The pause of its kind, if the kind is paused.
    pub pause: Option<Pause>,
    /// Where it stands in its line, if its kind is limited and it is in one.
    pub place: Option<Place>,
}

impl Pending {
    /// The status of the row. If several causes delay it, the status names only one: first the due time, then a lock, a
    /// deadline that has passed, a pause, a missing plugin, a limit, a backoff.
    #[must_use]
    pub fn row_status(self) -> RowStatus {
        let Self { now, due_at, expires_at, not_before, held, last_error, locked_by, daemons, pause, place } = self;
        let late_seconds = seconds(now - due_at);
        let past_deadline = expires_at.is_some_and(|deadline| deadline <= now);
        match (locked_by, pause) {
            (_, pause) if due_at > now => RowStatus::Waiting { until: due_at, pause },
            (Some(by), _) => RowStatus::Locked { late_seconds, by },
            // The next claim finishes it, also if it is held or paused.
            _ if past_deadline => RowStatus::Due { late_seconds, daemons, past_deadline },
            (None, Some(pause)) => RowStatus::Paused { pause },
            (None, None) if place.is_some() && daemons > 0 => {
                let place = place.expect("it was just seen");
                RowStatus::WaitsForTurn { place }
            }
            (None, None) if held => RowStatus::Held { daemons },
            (None, None) if not_before > now => RowStatus::BackingOff { until: not_before, last_error },
            (None, None) => RowStatus::Due { late_seconds, daemons, past_deadline },
        }
    }
}

/// A time span in seconds, to the microsecond.
#[must_use]
pub fn seconds(time: time::Duration) -> f64 {
    time.as_seconds_f64()
}

#[cfg(test)]
mod tests {
    use time::Duration;

    use super::*;

    const NOW: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;

    /// A row that has been due for two seconds, and that nothing delays.
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
            place: None,
        }
    }

    fn pause() -> Pause {
        Pause { kind: "k".into(), since: NOW, until: None, reason: None, by: "bob".into() }
    }

    #[test]
    fn a_row_that_nothing_delays_is_due() {
        let expected = RowStatus::Due { late_seconds: 2.0, daemons: 1, past_deadline: false };
        assert_eq!(due().row_status(), expected);
    }

    #[test]
    fn a_row_that_is_not_due_waits_even_if_it_is_held_or_locked_or_paused() {
        let due_at = NOW + Duration::SECOND;
        let row = Pending { due_at, held: true, locked_by: Some("me".into()), pause: Some(pause()), ..due() };
        assert_eq!(row.row_status(), RowStatus::Waiting { until: due_at, pause: Some(pause()) });
    }

    #[test]
    fn a_due_row_of_a_paused_kind_is_paused_whether_it_is_held_or_not() {
        for held in [true, false] {
            let row = Pending { held, pause: Some(pause()), not_before: NOW + Duration::HOUR, ..due() };
            assert_eq!(row.row_status(), RowStatus::Paused { pause: pause() });
        }
    }

    #[test]
    fn a_row_past_its_deadline_is_due_even_if_it_is_held_or_paused() {
        let row = Pending { held: true, pause: Some(pause()), expires_at: Some(NOW), ..due() };
        assert!(matches!(row.row_status(), RowStatus::Due { past_deadline: true, .. }));
    }

    #[test]
    fn a_row_whose_attempt_failed_backs_off_unless_it_is_held() {
        let row = Pending { not_before: NOW + Duration::SECOND, last_error: Some("it trapped".into()), ..due() };
        let until = NOW + Duration::SECOND;
        let expected = RowStatus::BackingOff { until, last_error: Some("it trapped".into()) };
        assert_eq!(row.clone().row_status(), expected);
        assert_eq!(Pending { held: true, daemons: 0, ..row }.row_status(), RowStatus::Held { daemons: 0 });
    }

    #[test]
    fn a_row_is_named_by_an_id_or_by_a_kind_and_a_key_that_may_contain_slashes() {
        let id = "0199a6b2-1c2d-7000-8000-000000000001";
        assert!(matches!(id.parse(), Ok(RowRef::Id(_))));
        assert_eq!("a/b/c".parse(), Ok(RowRef::Key { kind: "a".into(), key: "b/c".into() }));
        for text in ["", "a", "a/", "/b", "0199a6b2"] {
            assert!(text.parse::<RowRef>().is_err(), "{text}");
        }
    }
}
