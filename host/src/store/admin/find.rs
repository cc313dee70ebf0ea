//! Finds one row: among those that wait, among those that are parked, or in the history. Must never lock it.

use crate::model::row_status::{FoundRow, Pending, RowRef, RowStatus, seconds};
use crate::store::recurrences::making::occurrence_key;
use crate::store::{RecurrenceFilter, Store, StoreError};

impl Store {
    /// Finds a row and tells where it is and why; `None` = there is none. If several rows had the same key, the answer
    /// is the row that waits, else the row that was parked last, else the latest of the history. The history has no
    /// index of keys: there a key is looked for by reading, no further back than `max_minutes` if that is given. A key may
    /// also be that of an occurrence, as NAME/INSTANT.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn find(&self, row_ref: &RowRef, max_minutes: Option<f64>) -> Result<Option<FoundRow>, StoreError> {
        if let Some((name, instant)) = row_ref.as_occurrence()
            && let Some(recurrence) = self
                .recurrences(RecurrenceFilter { names: Some(std::slice::from_ref(&name)), ..Default::default() }, 1)
                .await?
                .pop()
        {
            let occurrence = RowRef::Key { kind: recurrence.kind, key: occurrence_key(&name, instant) };
            if let Some(found) = self.find_row(&occurrence, max_minutes).await? {
                return Ok(Some(found));
            }
        }
        self.find_row(row_ref, max_minutes).await
    }

    async fn find_row(&self, row_ref: &RowRef, max_minutes: Option<f64>) -> Result<Option<FoundRow>, StoreError> {
        if let Some(found) = self.find_pending(row_ref).await? {
            return Ok(Some(found));
        }
        if let Some(found) = self.find_parked(row_ref).await? {
            return Ok(Some(found));
        }
        // In minutes. A longer part of the history is read only if the shorter one does not have the row.
        let windows: &[f64] = match row_ref {
            RowRef::Id(_) => &[f64::INFINITY],
            RowRef::Key { .. } => &[15.0, 240.0, 2880.0, f64::INFINITY],
        };
        let furthest = max_minutes.filter(|_| matches!(row_ref, RowRef::Key { .. })).unwrap_or(f64::INFINITY);
        for minutes in windows.iter().filter(|minutes| **minutes <= furthest) {
            if let Some(found) = self.find_finished(row_ref, *minutes).await? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    async fn find_pending(&self, row_ref: &RowRef) -> Result<Option<FoundRow>, StoreError> {
        let (id, kind, key) = split_ref(row_ref);
        let mut connection = self.connection().await?;
        let row = connection
            .run("look for a pending row", async |connection| {
                sqlx::query!(
                    r#"
                    SELECT
                        statement_timestamp() AS "now!",
                        id, kind, key, subject, due_at, expires_at, attempts, not_before, held, last_error, line,
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
        let place = if row.line.is_some() { self.find_place(row.id).await? } else { None };
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
            place,
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

    async fn find_parked(&self, row_ref: &RowRef) -> Result<Option<FoundRow>, StoreError> {
        let (id, kind, key) = split_ref(row_ref);
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

    async fn find_finished(&self, row_ref: &RowRef, minutes: f64) -> Result<Option<FoundRow>, StoreError> {
        let (id, kind, key) = split_ref(row_ref);
        let mut connection = self.connection().await?;
        let row = connection
            .run("look for a row in the history", async |connection| {
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
                // A constraint of the table allows no other outcome.
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

    /// Counts the daemons that serve a kind at this moment.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn count_daemons(&self, kind: &str) -> Result<i64, StoreError> {
        let mut connection = self.connection().await?;
        connection
            .run("count the daemons that serve a kind", async |connection| {
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

/// Returns either the id, or the kind and the key.
fn split_ref(row_ref: &RowRef) -> (Option<uuid::Uuid>, Option<&str>, Option<&str>) {
    match row_ref {
        RowRef::Id(id) => (Some(*id), None, None),
        RowRef::Key { kind, key } => (None, Some(kind), Some(key)),
    }
}
