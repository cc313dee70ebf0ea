//! Kinds that are served, and rows of kinds that are not or that a person has paused: held, out of the queue, until a
//! daemon comes that serves them, or the pause ends.
//!
//! A daemon announces its kinds by holding a shared advisory lock for each, on a connection that lives as long as it
//! does. So whether anybody serves a kind is known to the server at every moment, without a heartbeat, and a crash
//! withdraws the announcement. A row is held under the exclusive lock of its kind: a daemon that arrives at this very
//! moment waits, and then finds the row held and releases it.

use crate::store::{Store, StoreError};

/// Rows that are held or released by one statement: few enough that nobody waits for it.
const BATCH: i64 = 5_000;

/// Announces `kinds` for as long as `connection` lives.
///
/// # Errors
///
/// When the database does not do it.
pub(crate) async fn announce(connection: impl sqlx::PgExecutor<'_>, kinds: &[String]) -> Result<(), sqlx::Error> {
    if kinds.is_empty() {
        return Ok(());
    }
    sqlx::query!(
        r#"
        SELECT count(pg_advisory_lock_shared(hashtextextended('tidings.kind ' || kind, 0))) AS "announced!"
        FROM unnest($1::text[]) AS kind
        "#,
        kinds,
    )
    .fetch_one(connection)
    .await
    .map(drop)
}

/// Withdraws `kinds`: whether another daemon serves them decides what becomes of their rows.
///
/// # Errors
///
/// When the database does not do it.
pub(crate) async fn withdraw(connection: impl sqlx::PgExecutor<'_>, kinds: &[String]) -> Result<(), sqlx::Error> {
    if kinds.is_empty() {
        return Ok(());
    }
    sqlx::query!(
        r#"
        SELECT count(pg_advisory_unlock_shared(hashtextextended('tidings.kind ' || kind, 0))) AS "withdrawn!"
        FROM unnest($1::text[]) AS kind
        "#,
        kinds,
    )
    .fetch_one(connection)
    .await
    .map(drop)
}

impl Store {
    /// Holds due rows of kinds that no daemon serves, at most a few thousand at a time. Returns how many, by kind.
    ///
    /// # Errors
    ///
    /// When the database cannot do it.
    pub async fn hold_unserved(&self, our_kinds: &[String]) -> Result<Vec<(String, i64)>, StoreError> {
        let mark = self.mark();
        let mut connection = self.connection().await?;
        let rows = connection
            .run("hold rows that nobody serves", async |connection| {
                sqlx::query!(
                    r#"
                    WITH due AS MATERIALIZED (
                        SELECT id, kind
                        FROM tidings.schedules
                        WHERE slot_at >= coalesce($3, statement_timestamp() - interval '1 minute')
                            AND slot_at <= statement_timestamp()
                            AND kind <> ALL($1)
                            -- Past its deadline a row is any claim's, and no slot is later.
                            AND (expires_at <= statement_timestamp()) IS NOT TRUE
                        ORDER BY slot_at
                        LIMIT $2
                        FOR UPDATE SKIP LOCKED
                    ), abandoned AS MATERIALIZED (
                        SELECT kind
                        FROM (SELECT DISTINCT kind FROM due) AS kinds
                        WHERE pg_try_advisory_xact_lock(hashtextextended('tidings.kind ' || kind, 0))
                    ), held AS (
                        UPDATE tidings.schedules AS waiting
                        SET held = true, last_error = 'held: no plugin serves the kind "' || waiting.kind || '" yet'
                        -- An array, not a join: the planner would rather read the whole table for that.
                        WHERE id = ANY (ARRAY(SELECT id FROM due JOIN abandoned USING (kind)))
                        RETURNING waiting.kind
                    )
                    SELECT kind AS "kind!", count(*) AS "rows!" FROM held GROUP BY kind ORDER BY kind
                    "#,
                    our_kinds,
                    BATCH,
                    mark,
                )
                .fetch_all(connection)
                .await
            })
            .await?;
        Ok(rows.into_iter().map(|row| (row.kind, row.rows)).collect())
    }

    /// Holds due rows of those of our kinds that are paused, at most a few thousand at a time: a claim leaves them alone, and
    /// would have to step over them each time. Those past their deadline are left to it. Returns how many, by kind.
    ///
    /// Only a daemon that serves the kind does it, since it also releases them: whenever it has held some, it looks again,
    /// and sees if the pause has ended meanwhile.
    ///
    /// # Errors
    ///
    /// When the database cannot do it.
    pub async fn hold_paused(&self, our_kinds: &[String]) -> Result<Vec<(String, i64)>, StoreError> {
        let mark = self.mark();
        let mut connection = self.connection().await?;
        let rows = connection
            .run("hold rows that are paused", async |connection| {
                sqlx::query!(
                    r#"
                    WITH due AS MATERIALIZED (
                        SELECT id
                        FROM tidings.schedules
                        WHERE slot_at >= coalesce($3, statement_timestamp() - interval '1 minute')
                            AND slot_at <= statement_timestamp()
                            AND kind = ANY($1)
                            AND kind = ANY(ARRAY(SELECT kind FROM tidings.paused))
                            AND (expires_at <= statement_timestamp()) IS NOT TRUE
                        ORDER BY slot_at
                        LIMIT $2
                        FOR UPDATE SKIP LOCKED
                    ), held AS (
                        UPDATE tidings.schedules AS waiting
                        SET held = true, last_error = 'held: the kind "' || waiting.kind || '" is paused'
                        -- An array, as above.
                        WHERE id = ANY (ARRAY(SELECT id FROM due))
                        RETURNING waiting.kind
                    )
                    SELECT kind AS "kind!", count(*) AS "rows!" FROM held GROUP BY kind ORDER BY kind
                    "#,
                    our_kinds,
                    BATCH,
                    mark,
                )
                .fetch_all(connection)
                .await
            })
            .await?;
        Ok(rows.into_iter().map(|row| (row.kind, row.rows)).collect())
    }

    /// How many rows are held since no daemon serves them, by kind.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn held(&self) -> Result<Vec<(String, i64)>, StoreError> {
        let mut connection = self.connection().await?;
        let rows = connection
            .run("count held rows", async |connection| {
                sqlx::query!(
                    r#"
                    SELECT kind AS "kind!", count(*) AS "rows!"
                    FROM tidings.schedules
                    WHERE held AND kind <> ALL(ARRAY(SELECT kind FROM tidings.paused))
                    GROUP BY kind
                    ORDER BY kind
                    "#
                )
                .fetch_all(connection)
                .await
            })
            .await?;
        Ok(rows.into_iter().map(|row| (row.kind, row.rows)).collect())
    }

    /// Puts held rows of `kinds`, but for those that are paused, back into the queue, due now, a few thousand at a time, and
    /// calls `some` after each. Returns how many.
    ///
    /// # Errors
    ///
    /// When the database cannot do it.
    pub async fn release_held(&self, kinds: &[String], some: impl Fn()) -> Result<u64, StoreError> {
        let mut released = 0;
        for kind in kinds {
            loop {
                let mut connection = self.connection().await?;
                let answer = connection
                    .run("release held rows", async |connection| {
                        sqlx::query!(
                            r#"
                            UPDATE tidings.schedules
                            SET held = false, last_error = NULL, not_before = tidings.arrival()
                            WHERE id = ANY (ARRAY(
                                SELECT id
                                FROM tidings.schedules
                                WHERE held
                                    -- In the order of its index, or the planner would rather read the whole table if
                                    -- most rows are held.
                                    AND kind >= $1 AND kind <= $1
                                    AND NOT EXISTS (SELECT FROM tidings.paused WHERE paused.kind = $1)
                                ORDER BY kind
                                LIMIT $2
                                FOR UPDATE SKIP LOCKED
                            ))
                            "#,
                            kind,
                            BATCH,
                        )
                        .execute(connection)
                        .await
                    })
                    .await?;
                released += answer.rows_affected();
                some();
                if answer.rows_affected() < BATCH.unsigned_abs() {
                    break;
                }
            }
        }
        Ok(released)
    }
}
