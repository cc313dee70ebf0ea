//! A claimed row, as the scheduler and the plugins see it. No I/O.

use time::OffsetDateTime;
use uuid::Uuid;

use crate::model::clock::unix_ms;

/// The priority of a row for which none was given.
pub const DEFAULT_PRIORITY: u8 = 4;
/// The priority of a row that goes before all others that have waited as long.
pub const HIGHEST_PRIORITY: u8 = 9;

/// One due row of `tidings.schedules`, locked by a claim.
#[derive(Clone, Debug)]
pub struct Schedule {
    /// The row's id, which is also the message's id.
    pub id: Uuid,
    /// The kind, which selects the plugin.
    pub kind: String,
    /// The key: its natural name within the kind.
    pub key: Option<String>,
    /// The subject: what the row is about.
    pub subject: Option<String>,
    /// When it was due.
    pub due_at: OffsetDateTime,
    /// Its deadline; `None` = it never expires.
    pub expires_at: Option<OffsetDateTime>,
    /// The payload, as JSON text.
    pub payload: String,
    /// The row's own headers.
    pub headers: Vec<(String, String)>,
    /// Builds so far that ended in a trap, an exceeded limit or a request of the plugin to retry.
    pub attempts: u32,
    /// Attempts that count towards the maximum: traps and exceeded limits.
    pub failures: u32,
    /// How often in a row RabbitMQ refused the message, or PostgreSQL refused to finish the row.
    pub refusals: u32,
    /// Since when it has been due without an attempt to deliver it; `None` = there was one, or a person put it back.
    pub untried_since: Option<OffsetDateTime>,
    /// The name of the recurrence that made it; `None` = none did.
    pub recurrence: Option<String>,
    /// The instant that the rule of its recurrence says.
    pub nominal_at: Option<OffsetDateTime>,
    /// The subject of its line, if its kind is limited and it waited for its turn.
    pub line: Option<String>,
    /// Which of the rows that are due goes first, from 0, the last, to 9; also the property of the message.
    pub priority: u8,
}

impl Schedule {
    /// The due time in milliseconds since the Unix epoch.
    #[must_use]
    pub fn due_ms(&self) -> i64 {
        unix_ms(self.due_at)
    }

    /// The nominal instant in milliseconds since the Unix epoch.
    #[must_use]
    pub fn nominal_ms(&self) -> Option<i64> {
        self.nominal_at.map(unix_ms)
    }

    /// The deadline in milliseconds since the Unix epoch.
    #[must_use]
    pub fn expires_ms(&self) -> Option<i64> {
        self.expires_at.map(unix_ms)
    }

    /// The number of this attempt; 1 for the first.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.attempts.saturating_add(1)
    }
}
