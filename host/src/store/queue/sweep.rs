//! A sweep: a look that also reads below the low-water mark, where other looks and claims do not. It finds the rows
//! that the proof of the mark does not cover, for instance rows that were written with the triggers off.

use std::time::Duration;

use time::OffsetDateTime;
use tokio::time::Instant;

use crate::store::queue::look::Seen;
use crate::store::{Store, StoreError};

/// From this many rows below the mark on they are a backlog: claims that go back to them are full, and step over few
/// dead entries for each row.
pub(in crate::store) const BACKLOG_ROWS: i64 = 1_000;
/// How long reading below the mark may take for claims to go back there whatever the number of rows.
const CHEAP_READ: Duration = Duration::from_millis(5);

impl Store {
    /// Looks at the head of the queue and below the low-water `mark`. If rows wait below it, the mark must go back to
    /// the first of them. But if there are few, and so many dead entries that stepping over them would delay each
    /// claim, the rows are moved up instead: their slot becomes now.
    ///
    /// # Errors
    ///
    /// When the database cannot do it.
    pub async fn sweep(&self, kinds: &[String], mark: Option<OffsetDateTime>) -> Result<Seen, StoreError> {
        let asked_at = Instant::now();
        // Where it can, on the session of the listener, which is thereby tested without a statement of its own.
        let seen = self.sweep_by_listener(kinds, mark).await;
        let mut seen = match seen {
            Some(seen) => seen,
            None => self.look_from(kinds, mark, true, self.connection().await?).await?,
        };
        let from = seen.look.from;
        if let Some(below) = &mut seen.look.below {
            // A locked row cannot be moved, and must not be missed: then the mark goes back after all.
            below.go_back =
                should_go_back(below.rows, asked_at.elapsed()) || self.move_up(below.first, from).await? < below.rows;
        }
        Ok(seen)
    }

    /// Moves rows from below the mark to the slot that they would have if they were written now, except locked rows,
    /// and returns how many. A held row is below the mark because its deadline has come; it is released, and any daemon
    /// may claim it.
    async fn move_up(&self, first: OffsetDateTime, mark: OffsetDateTime) -> Result<i64, StoreError> {
        let mut connection = self.connection().await?;
        connection
            .run("move up rows that only a sweep found", async |connection| {
                sqlx::query!(
                    r#"
                    WITH below AS MATERIALIZED (
                        SELECT id
                        FROM tidings.schedules
                        WHERE slot_at >= $1 AND slot_at < $2
                        ORDER BY slot_at
                        LIMIT $3
                        FOR UPDATE SKIP LOCKED
                    ), moved AS (
                        UPDATE tidings.schedules
                        SET held = false, line = NULL, not_before = tidings.arrival()
                        WHERE id = ANY (ARRAY(SELECT id FROM below))
                        RETURNING id
                    )
                    -- Another daemon may be the one that serves them.
                    SELECT rows AS "rows!", pg_notify('tidings', '') FROM (SELECT count(*) AS rows FROM moved) AS moved WHERE rows > 0
                    "#,
                    first,
                    mark,
                    BACKLOG_ROWS,
                )
                .fetch_optional(connection)
                .await
            })
            .await
            .map(|moved| moved.map_or(0, |moved| moved.rows))
    }
}

/// Whether the mark goes back to the rows below it; `took` is how long reading them took.
fn should_go_back(rows: i64, took: Duration) -> bool {
    rows >= BACKLOG_ROWS || took <= CHEAP_READ
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mark_goes_back_if_reading_was_fast_or_a_backlog_waits() {
        assert!(should_go_back(1, Duration::from_millis(1)));
        assert!(!should_go_back(1, Duration::from_millis(600)));
        assert!(should_go_back(BACKLOG_ROWS, Duration::from_millis(600)));
    }
}
