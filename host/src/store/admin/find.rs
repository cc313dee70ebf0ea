//! Finds one row wherever it is: among those that wait, those that are parked, or in the history.

use crate::model::row_status::{FoundRow, Pending, RowRef, RowStatus, seconds};
use crate::store::{Store, StoreError};

impl Store {
    /// Where a row is. If several had the same key, the one that waits, else the one that is parked, else the latest of the
    /// history; `None` = there is none. By its key a row of the history is found by reading, no further back than
    /// `minutes`, if they are given.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn find(&self, which: &RowRef, minutes: Option<f64>) -> Result<Option<FoundRow>, StoreError> {
        if let Some(found) = self.find_pending(which).await? {
            return Ok(Some(found));
        }
        if let Some(found) = self.find_parked(which).await? {
            return Ok(Some(found));
        }
        // Look further back only if need be.
        let windows: &[f64] = match which {
            RowRef::Id(_) => &[f64::INFINITY],
            RowRef::Key { .. } => &[15.0, 240.0, 2880.0, f64::INFINITY],
        };
        let furthest = minutes.filter(|_| matches!(which, RowRef::Key { .. })).unwrap_or(f64::INFINITY);
        for minutes in windows.iter().filter(|minutes| **minutes <= furthest) {
            if let Some(found) = self.find_finished(which, *minutes).await? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    async fn find_pending(&self, which: &RowRef) -> Result<Option<FoundRow>, StoreError> {
        let (id, kind, key) = parts(which);
        let mut connection = self.connection().await?;
        let row = connection
            .run("look for a pending row", async |connection| {
                sqlx::query!(
                    r#"
                    SELECT
                        statement_timestamp() AS "now!",
                        id, kind, key, subject, due_at, expires_at, attempts, not_before, held, last_error,
                        (
                            -- A row's lock is in the row: the transaction that has it, or had it. To ask by locking would keep
                            -- a claim from it.
                            SELECT CASE
                                WHEN application_name = 'tidings' THEN 'a delivery, pid ' || pid
                                ELSE format('the session with the pid %s (%s, user %s)', pid, coalesce(application_name, '?'), usename)
                            END
                            FROM pg_locks
                            JOIN pg_stat_activity USING (pid)
                            WHERE locktype = 'transactionid' AND granted AND transactionid = schedules.xmax
                            LIMIT 1
                        ) AS locked_by
                    FROM tidings.schedules
                    WHERE id = $1 OR kind = $2 AND key = $3
                    "#,
                    id,
                    kind,
                    key,
                )
                .fetch_optional(connection)
                .await
            })
            .await?;
        let Some(row) = row else { return Ok(None) };
        drop(connection);
        let daemons = self.count_daemons(&row.kind).await?;
        let pause = self.pauses().await?.into_iter().find(|pause| pause.kind == row.kind);
        let pending = Pending {
            now: row.now,
            due_at: row.due_at,
            expires_at: row.expires_at,
            not_before: row.not_before,
            held: row.held,
            last_error: row.last_error,
            locked_by: row.locked_by,
            daemons,
            pause,
        };
        Ok(Some(FoundRow {
            id: row.id,
            kind: row.kind,
            key: row.key,
            subject: row.subject,
            due_at: row.due_at,
            expires_at: row.expires_at,
            attempts: row.attempts,
            row_status: pending.row_status(),
        }))
    }

    async fn find_parked(&self, which: &RowRef) -> Result<Option<FoundRow>, StoreError> {
        let (id, kind, key) = parts(which);
        let mut connection = self.connection().await?;
        let row = connection
            .run("look for a parked row", async |connection| {
                sqlx::query!(
                    r#"
                    SELECT id, kind, key, subject, due_at, expires_at, attempts, parked_at, reason, plugin
                    FROM tidings.parked
                    WHERE id = $1 OR kind = $2 AND key = $3
                    ORDER BY parked_at DESC
                    LIMIT 1
                    "#,
                    id,
                    kind,
                    key,
                )
                .fetch_optional(connection)
                .await
            })
            .await?;
        Ok(row.map(|row| FoundRow {
            id: row.id,
            kind: row.kind,
            key: row.key,
            subject: row.subject,
            due_at: row.due_at,
            expires_at: row.expires_at,
            attempts: row.attempts,
            row_status: RowStatus::Parked { parked_at: row.parked_at, reason: row.reason, plugin: row.plugin },
        }))
    }

    async fn find_finished(&self, which: &RowRef, minutes: f64) -> Result<Option<FoundRow>, StoreError> {
        let (id, kind, key) = parts(which);
        let mut connection = self.connection().await?;
        let row = connection
            .run("look into the history", async |connection| {
                sqlx::query!(
                    r#"
                    SELECT id, kind, key, subject, due_at, expires_at, attempts, finished_at, outcome, plugin, detail
                    FROM tidings.deliveries
                    -- Planned for what is given, so that an id is found by its index.
                    WHERE (id = $1 OR $1 IS NULL AND kind = $2 AND key = $3)
                        AND finished_at > CASE
                            WHEN $4::float8 = 'infinity' THEN '-infinity'
                            ELSE statement_timestamp() - $4::float8 * interval '1 minute'
                        END
                    ORDER BY finished_at DESC
                    LIMIT 1
                    "#,
                    id,
                    kind,
                    key,
                    minutes,
                )
                .fetch_optional(connection)
                .await
            })
            .await?;
        Ok(row.map(|row| {
            let finished_at = row.finished_at;
            let row_status = match row.outcome.as_str() {
                "expired" => RowStatus::Expired { finished_at, reason: row.detail },
                "skipped" => RowStatus::Skipped { finished_at, reason: row.detail, plugin: row.plugin },
                // The table's constraint admits no other.
                _ => RowStatus::Delivered {
                    finished_at,
                    late_seconds: seconds(finished_at - row.due_at),
                    plugin: row.plugin,
                },
            };
            FoundRow {
                id: row.id,
                kind: row.kind,
                key: row.key,
                subject: row.subject,
                due_at: row.due_at,
                expires_at: row.expires_at,
                attempts: row.attempts,
                row_status,
            }
        }))
    }

    /// How many daemons serve a kind at this moment.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn count_daemons(&self, kind: &str) -> Result<i64, StoreError> {
        let mut connection = self.connection().await?;
        connection
            .run("ask who serves a kind", async |connection| {
                sqlx::query_scalar!(
                    r#"
                    SELECT count(*) AS "daemons!"
                    FROM pg_locks
                    WHERE locktype = 'advisory' AND granted AND mode = 'ShareLock' AND objsubid = 1
                        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
                        AND (classid::int8 << 32) | objid::int8 = hashtextextended('tidings.kind ' || $1, 0)
                    "#,
                    kind,
                )
                .fetch_one(connection)
                .await
            })
            .await
    }
}

/// Id, kind and key, as far as they are known.
fn parts(which: &RowRef) -> (Option<uuid::Uuid>, Option<&str>, Option<&str>) {
    match which {
        RowRef::Id(id) => (Some(*id), None, None),
        RowRef::Key { kind, key } => (None, Some(kind), Some(key)),
    }
}
