//! A sweep: a look that also asks what waits below the low-water mark, where looks and claims do not go.

use std::time::Duration;

use tokio::time::Instant;

use super::look::{Below, Look};
use super::{Store, StoreError};

/// So many rows below the mark are a backlog: claims that go back there are full, and step over little for each row.
pub(super) const BACKLOG: i64 = 1_000;
/// What a claim that goes back there may step over, in time.
const CHEAP: Duration = Duration::from_millis(5);

impl Store {
    /// Looks at the head of the queue and below the low-water mark. If something waits there, the mark goes back to it; or, if
    /// what lies between is so much that claims would be late by it, the few rows are moved up to the mark, where their slot is
    /// now.
    ///
    /// # Errors
    ///
    /// When the database cannot do it.
    pub async fn sweep(&self, kinds: &[String]) -> Result<Look, StoreError> {
        let doubt = self.doubt.last();
        if self.low_water.mark(doubt).is_none() {
            // So that there is one, from which on others look meanwhile.
            self.look_from(kinds, false, self.connection().await?, doubt).await?;
        }
        let known = self.low_water.known(doubt);
        let asked_at = Instant::now();
        let mut look = self.look_from(kinds, true, self.connection().await?, doubt).await?;
        let mut back_to = None;
        if let Some(below) = &look.below {
            // What is locked cannot be moved, and must not be forgotten.
            if goes_back(below.rows, asked_at.elapsed()) || self.move_up(below).await? < below.rows {
                back_to = Some(below.first);
            }
            look.outlook.due = true;
        }
        if let Some(known) = known {
            self.low_water.swept(back_to, known, doubt);
        }
        Ok(look)
    }

    /// Whether somebody has looked below the low-water mark since it was last given up.
    #[must_use]
    pub fn is_swept(&self) -> bool {
        self.low_water.is_swept(self.doubt.last())
    }

    /// Moves rows from below the mark to where they would stand if they were written now, but for those that are locked, and
    /// returns how many. A row that is held stands there since its deadline has come, and is any claim's.
    async fn move_up(&self, below: &Below) -> Result<i64, StoreError> {
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
                    below.first,
                    below.mark,
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
