//! The row that waits, as the loop and the plugins see it. No I/O.

use time::OffsetDateTime;
use uuid::Uuid;

use crate::model::clock::unix_ms;

/// One due row of `tidings.schedules`, locked by a claim.
#[derive(Clone, Debug)]
pub struct Schedule {
    /// Becomes the message's id.
    pub id: Uuid,
    /// Selects the plugin.
    pub kind: String,
    /// Natural name within the kind.
    pub key: Option<String>,
    /// What the row is about.
    pub subject: Option<String>,
    /// When it was due.
    pub due_at: OffsetDateTime,
    /// Its deadline; `None` = never expires.
    pub expires_at: Option<OffsetDateTime>,
    /// JSON text.
    pub payload: String,
    /// The row's own headers.
    pub headers: Vec<(String, String)>,
    /// Builds so far that ended in a trap, a blown limit or the plugin's wish to retry.
    pub attempts: u32,
    /// Those of them that count towards the maximum: traps and blown limits.
    pub failures: u32,
    /// Times in a row that the broker would not take the message.
    pub refusals: u32,
}

impl Schedule {
    /// The due time in milliseconds since the Unix epoch.
    #[must_use]
    pub fn due_ms(&self) -> i64 {
        unix_ms(self.due_at)
    }

    /// The deadline in milliseconds since the Unix epoch.
    #[must_use]
    pub fn expires_ms(&self) -> Option<i64> {
        self.expires_at.map(unix_ms)
    }

    /// RowRef attempt this is; 1 on the first.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.attempts.saturating_add(1)
    }
}
