//! Announces the kinds that this daemon serves. Holds due rows of kinds that no daemon serves or that are paused, which
//! takes them out of the queue, and releases them.
//!
//! Must never hold a row that a daemon could deliver now, nor one that is past its deadline: such rows may be claimed
//! by any daemon, which finishes them as expired.
//!
//! # A kind without a plugin
//!
//! A daemon announces its kinds by a shared advisory lock for each of them, on the listener's connection, which lives
//! as long as the daemon. So PostgreSQL knows at every moment which kinds are served, without heartbeats, and a crash
//! withdraws the announcement.
//!
//! A look finds a due row, the claim gets none, and so the scheduler holds due rows of the kinds that its own daemon
//! does not serve. A row is held under the exclusive lock of its kind, which is tried without waiting: if another
//! daemon serves the kind, the lock is taken, and the row stays. A daemon that arrives at this very moment waits for
//! its shared lock. Its looks then report held rows of its kinds, and it releases them.
//!
//! # A kind is paused
//!
//! `tidings pause` writes a row into `tidings.pauses` and notifies. Every claim reads that table itself, so the pause
//! holds from its commit on, whatever a daemon knew and whenever it started. Its due rows are held, since otherwise
//! each claim would step over them. A daemon that serves the kind holds them, a few thousand at a time beside the loop,
//! when a look finds one of them at the head of the queue (`not_claimable_first`) or a claim gets nothing. No other daemon
//! holds them, since only a daemon that serves the kind releases them.
//!
//! `tidings resume` removes the row and notifies; the end of a pause with a time limit is one of the instants at which
//! the scheduler looks. From then on looks report the held rows of the kind, and they are released as when a plugin
//! arrives.

use crate::store::{Store, StoreError};

/// The most rows that one statement holds or releases: few enough that no other statement waits for it.
pub const BATCH: i64 = 5_000;

/// Announces `kinds` for as long as `connection` lives.
///
/// # Errors
///
/// When the database does not do it.
pub(super) async fn announce(connection: impl sqlx::PgExecutor<'_>, kinds: &[String]) -> Result<(), sqlx::Error> {
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

/// Withdraws the announcement of `kinds`. Their rows are held unless another daemon serves them.
///
/// # Errors
///
/// When the database does not do it.
pub(super) async fn withdraw(connection: impl sqlx::PgExecutor<'_>, kinds: &[String]) -> Result<(), sqlx::Error> {
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
    /// Holds due rows of kinds that no daemon serves, at most a few thousand of them. Returns how many, by kind.
    ///
    /// # Errors
    ///
    /// When the database cannot do it.
    pub async fn hold_unserved(&self, our_kinds: &[String]) -> Result<Vec<(String, i64)>, StoreError> {
        let mark = self.low_water_mark();
        let mut connection = self.connection().await?;
        let rows = connection
            .run("hold rows that no daemon serves", async |connection| {
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

    /// Holds due rows of those of our kinds that are paused, at most a few thousand of them. Rows past their deadline
    /// are left to the claims. Returns how many were held, by kind. After it has held some, the scheduler must look
    /// again, to see whether the pause has ended meanwhile.
    ///
    /// # Errors
    ///
    /// When the database cannot do it.
    pub async fn hold_paused(&self, our_kinds: &[String]) -> Result<Vec<(String, i64)>, StoreError> {
        let mark = self.low_water_mark();
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

    /// How many rows are held because no daemon serves them, by kind.
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
                    WHERE held AND line IS NULL AND kind <> ALL(ARRAY(SELECT kind FROM tidings.paused))
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

    /// Puts held rows of `kinds` back into the queue, due now, except rows of paused kinds: a few thousand at a time,
    /// and `after_batch` is called after each. Returns how many.
    ///
    /// # Errors
    ///
    /// When the database cannot do it.
    pub async fn release_held(&self, kinds: &[String], after_batch: impl Fn()) -> Result<u64, StoreError> {
        let mut released = 0;
        for kind in kinds {
            loop {
                let left = self.leave_lines(kind).await?;
                released += left;
                after_batch();
                if left < BATCH.unsigned_abs() {
                    break;
                }
            }
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
                                    AND line IS NULL
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
                after_batch();
                if answer.rows_affected() < BATCH.unsigned_abs() {
                    break;
                }
            }
        }
        Ok(released)
    }
}
