//! A recurrence, as the database has it. No I/O.

use std::time::Duration;

use serde::Serialize;
use time::OffsetDateTime;

/// What is made of instants that were missed, while no daemon ran or the recurrence was paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CatchUp {
    /// One occurrence for all that were missed: that of the latest.
    Latest,
    /// Every one.
    All,
    /// None.
    None,
}

impl CatchUp {
    /// Reads it from its column.
    #[must_use]
    pub fn from_column(text: &str) -> Self {
        match text {
            "all" => Self::All,
            "none" => Self::None,
            // A constraint admits no other word.
            _ => Self::Latest,
        }
    }
}

/// A recurrence that a daemon must look at, locked: to make occurrences, or to compute its next instant.
#[derive(Clone, Debug)]
pub struct DueRecurrence {
    /// Its name.
    pub name: String,
    /// Its rule.
    pub rule: String,
    /// The name of its time zone.
    pub time_zone: String,
    /// The instant from which `every` counts.
    pub anchor: OffsetDateTime,
    /// No instant is before this.
    pub starts_at: Option<OffsetDateTime>,
    /// No instant is after this.
    pub ends_at: Option<OffsetDateTime>,
    /// How many occurrences may still be made; `None` = any number.
    pub left: Option<u64>,
    /// What is made of missed instants.
    pub catch_up: CatchUp,
    /// Instants that were missed for longer than this are not made.
    pub catch_up_within: Option<Duration>,
    /// How much later than its instant an occurrence is due.
    pub offset: Duration,
    /// The next instant whose occurrence is not made yet; `None` = it must be computed.
    pub next_at: Option<OffsetDateTime>,
    /// Instants up to here are made, or will not be.
    pub passed_at: OffsetDateTime,
    /// For how long a daemon should have looked at it.
    pub lag: Duration,
}

/// What becomes of a recurrence that a daemon has looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MadeRecurrence {
    /// Its name.
    pub name: String,
    /// The instants whose occurrences are made, earliest first.
    pub instants: Vec<OffsetDateTime>,
    /// The next instant whose occurrence is not made yet; `None` = there is none.
    pub next_at: Option<OffsetDateTime>,
    /// Instants up to here are made, or will not be.
    pub passed_at: OffsetDateTime,
    /// What follows.
    pub then: Then,
}

/// What follows after a daemon has looked at a recurrence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Then {
    /// A daemon looks at it again shortly before its next instant.
    Continue,
    /// More missed instants are to be made; a daemon looks at it again in a moment.
    Backlog,
    /// No occurrence will follow.
    Ended,
    /// No occurrence can be made, for this reason, until it is changed.
    Problem(String),
}

/// A recurrence, for people.
#[derive(Clone, Debug, Serialize)]
pub struct Recurrence {
    /// Its name.
    pub name: String,
    /// The kind of its occurrences.
    pub kind: String,
    /// Its rule.
    pub rule: String,
    /// The name of its time zone.
    pub time_zone: String,
    /// The subject of its occurrences, if they have one.
    pub subject: Option<String>,
    /// What is made of missed instants.
    pub catch_up: CatchUp,
    /// Instants that were missed for longer than this are not made, in seconds.
    pub catch_up_within_seconds: Option<f64>,
    /// How long an occurrence lives, in seconds.
    pub expires_after_seconds: Option<f64>,
    /// Occurrences are due later by a part of this, in seconds.
    pub spread_seconds: f64,
    /// By how much they are due later, in seconds.
    pub offset_seconds: f64,
    /// The priority of its occurrences, from 0 to 9.
    pub priority: i16,
    /// The instant from which `every` counts.
    #[serde(skip)]
    pub anchor: OffsetDateTime,
    /// No instant is before this.
    #[serde(with = "time::serde::rfc3339::option")]
    pub starts_at: Option<OffsetDateTime>,
    /// No instant is after this.
    #[serde(with = "time::serde::rfc3339::option")]
    pub ends_at: Option<OffsetDateTime>,
    /// So many occurrences are made, and no more.
    pub max_count: Option<i64>,
    /// The next instant whose occurrence is not made yet.
    #[serde(with = "time::serde::rfc3339::option")]
    pub next_at: Option<OffsetDateTime>,
    /// The latest instant whose occurrence was made.
    #[serde(with = "time::serde::rfc3339::option")]
    pub last_at: Option<OffsetDateTime>,
    /// How many occurrences were made.
    pub count: i64,
    /// Why no occurrence can be made.
    pub problem: Option<String>,
    /// A person stopped it.
    pub paused: bool,
    /// `ends_at` or `max_count` is reached.
    pub ended: bool,
}

/// How many recurrences there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RecurrenceCounts {
    /// All of them, up to one more than a thousand.
    pub all: u64,
    /// Those with a problem, up to one more than a thousand.
    pub problems: u64,
}
