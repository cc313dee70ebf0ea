//! A sweep: a look that also asks what waits below the low-water mark, where looks and claims do not go.

use std::time::Duration;

use tidings_core::queue::Look;
use time::OffsetDateTime;
use tokio::time::Instant;

use crate::store::{Store, StoreError};

/// So many rows below the mark are a backlog: claims that go back there are full, and step over little for each row.
pub(in crate::store) const BACKLOG: i64 = 1_000;
/// What a claim that goes back there may step over, in time.
const CHEAP: Duration = Duration::from_millis(5);

impl Store {
    /// Looks at the head of the queue and below the low-water `mark`. If something waits there, the mark goes back to it; or, if
    /// what lies between is so much that claims would be late by it, the few rows are moved up to the mark, where their slot is
    /// now.
    ///
    /// # Errors
    ///
    /// When the database cannot do it.
    pub async fn sweep(&self, kinds: &[String], mark: Option<OffsetDateTime>) -> Result<Look, StoreError> {
        let asked_at = Instant::now();
        let mut look = self.look_from(kinds, mark, true, self.connection().await?).await?;
        if let Some(below) = &mut look.below {
            // What is locked cannot be moved, and must not be forgotten.
            below.go_back =
                goes_back(below.rows, asked_at.elapsed()) || self.move_up(below.first, look.from).await? < below.rows;
        }
        Ok(look)
    }

    /// Moves rows from below the mark to where they would stand if they were written now, but for those that are locked, and
    /// returns how many. A row that is held stands there since its deadline has come, and is any claim's.
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
                        SET held = false, not_before = tidings.arrival()
                        WHERE id = ANY (ARRAY(SELECT id FROM below))
                        RETURNING id
                    )
                    -- Another daemon may be the one that serves them.
                    SELECT rows AS "rows!", pg_notify('tidings', '') FROM (SELECT count(*) AS rows FROM moved) AS moved WHERE rows > 0
                    "#,
                    first,
                    mark,
                    BACKLOG,
                )
                .fetch_optional(connection)
                .await
            })
            .await
            .map(|moved| moved.map_or(0, |moved| moved.rows))
    }
}

/// Whether the mark goes back to rows below it, of which there are so many, when to look for all of them took so long.
fn goes_back(rows: i64, took: Duration) -> bool {
    rows >= BACKLOG || took <= CHEAP
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_go_back_if_that_is_cheap_or_if_there_is_much_to_claim() {
        assert!(goes_back(1, Duration::from_millis(1)));
        assert!(!goes_back(1, Duration::from_millis(600)));
        assert!(goes_back(BACKLOG, Duration::from_millis(600)));
    }
}
