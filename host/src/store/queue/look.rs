//! A look at the head of the queue: whether rows are due, when the next one will be, and which held rows this daemon
//! must release. It costs the same few index pages however many rows wait and were delivered. It must never lock or
//! change a row.

use std::time::Duration;

use tidings_core::queue::{Below, Look, Outlook, PROMISE, Promise};
use time::OffsetDateTime;

use crate::store::queue::sweep::BACKLOG_ROWS;
use crate::store::{Connection, Store, StoreError};

/// Promises that every daemon looks at the queue every few milliseconds for the time [`PROMISE`], so that the triggers
/// need not notify (`host/core/src/polling.rs`). Kept in a sequence, which all transactions see at once.
///
/// The promise binds all daemons, since each of them may be the only one that serves its kinds; so it is notified. And
/// it is short, so that it ends soon if this daemon dies.
///
/// # Errors
///
/// When the database cannot do it.
pub(super) async fn promise_to_poll(connection: impl sqlx::PgExecutor<'_>) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "SELECT
            setval('tidings.polling_until', ((extract(epoch FROM clock_timestamp()) + $1::float8) * 1e6)::bigint),
            pg_notify('tidings', '')",
        PROMISE.as_secs_f64(),
    )
    .fetch_one(connection)
    .await
    .map(drop)
}

impl Store {
    /// Looks at the head of the queue, from the low-water mark on, in one statement without a transaction. It must
    /// begin after the wake was armed.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn look(&self, kinds: &[String], mark: Option<OffsetDateTime>) -> Result<Look, StoreError> {
        self.look_from(kinds, mark, false, self.warm_connection().await?).await
    }

    /// Does the same; a `sweep` looks below the mark as well.
    pub(in crate::store) async fn look_from(
        &self,
        kinds: &[String],
        mark: Option<OffsetDateTime>,
        sweep: bool,
        mut connection: Connection,
    ) -> Result<Look, StoreError> {
        let row = connection
            .run("look at the queue", async |connection| {
                // Each part reads one index entry, however many rows wait and whatever the planner estimates: held rows
                // are read in the order of their index, kind by kind, and there are few pauses.
                sqlx::query!(
                    r#"
                    WITH ours AS MATERIALIZED (
                        SELECT kind FROM unnest($1::text[]) AS kind EXCEPT SELECT kind FROM tidings.paused
                    ), head AS MATERIALIZED (
                        SELECT slot_at, expires_at, kind
                        FROM tidings.schedules
                        WHERE slot_at >= coalesce($2, statement_timestamp() - interval '1 minute')
                        ORDER BY slot_at
                        LIMIT 1
                    ), below AS MATERIALIZED (
                        SELECT slot_at
                        FROM tidings.schedules
                        WHERE $3 AND slot_at < coalesce($2, statement_timestamp() - interval '1 minute')
                        ORDER BY slot_at
                        LIMIT $4
                    )
                    SELECT
                        statement_timestamp() AS "now!",
                        (SELECT min(slot_at) FROM below) AS below_first,
                        (SELECT count(*) FROM below) AS "below_rows!",
                        coalesce($2, statement_timestamp() - interval '1 minute') AS "mark!",
                        pg_snapshot_xmin(pg_current_snapshot())::text::bigint AS "oldest_xid!",
                        -- A snapshot ends after the highest number that has ended; there may be some above that are running.
                        pg_snapshot_xmax(pg_current_snapshot())::text::bigint
                            + age(pg_snapshot_xmax(pg_current_snapshot())::xid) AS "next_xid!",
                        (SELECT to_timestamp(last_value / 1e6::float8) FROM tidings.polling_until) AS "polling_until!",
                        (SELECT slot_at FROM head WHERE slot_at < 'infinity') AS first_at,
                        coalesce((SELECT slot_at <= statement_timestamp() FROM head), false) AS "due!",
                        coalesce(
                            (
                                SELECT
                                    slot_at <= statement_timestamp()
                                    AND (expires_at <= statement_timestamp()) IS NOT TRUE
                                    AND kind = ANY($1)
                                    AND kind IN (SELECT kind FROM tidings.paused)
                                FROM head
                            ),
                            false
                        ) AS "paused_first!",
                        least(
                            -- Only if the head is due is there a reason to go down the index once more.
                            CASE
                                WHEN (SELECT slot_at > statement_timestamp() FROM head) THEN
                                    (SELECT slot_at FROM head WHERE slot_at < 'infinity')
                                ELSE
                                    (
                                        SELECT slot_at
                                        FROM tidings.schedules
                                        WHERE slot_at > statement_timestamp() AND slot_at < 'infinity'
                                        ORDER BY slot_at
                                        LIMIT 1
                                    )
                            END,
                            (SELECT min(until) FROM tidings.paused)
                        ) AS next_at,
                        ARRAY(
                            SELECT kind
                            FROM ours
                            WHERE kind = (
                                SELECT waiting.kind
                                FROM tidings.schedules AS waiting
                                WHERE waiting.held AND waiting.kind >= ours.kind
                                ORDER BY waiting.kind
                                LIMIT 1
                            )
                        ) AS "held_for_us!"
                    "#,
                    kinds,
                    mark,
                    sweep,
                    BACKLOG_ROWS,
                )
                .fetch_one(connection)
                .await
            })
            .await?;
        let next_in = row.next_at.map(|next_at| Duration::try_from(next_at - row.now).unwrap_or(Duration::ZERO));
        Ok(Look {
            at: row.now,
            from: row.mark,
            first: row.first_at,
            oldest_xid: row.oldest_xid,
            outlook: Outlook { due: row.due, next_in },
            held_for_us: row.held_for_us,
            paused_first: row.paused_first,
            promise: Promise { until: row.polling_until, next_xid: row.next_xid },
            below: row.below_first.map(|first| Below { first, rows: row.below_rows, go_back: true }),
        })
    }

    /// For how long the first row of the queue, from the low-water mark on if there is one, has been due; 0 = no row is
    /// due. A row that is held or backing off does not count: its slot lies ahead.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn overdue(&self) -> Result<Duration, StoreError> {
        let mark = self.low_water_mark();
        let mut connection = self.connection().await?;
        let seconds = connection
            .run("measure how late the first row is", async |connection| {
                sqlx::query_scalar!(
                    r#"
                    SELECT coalesce(
                        (
                            SELECT extract(epoch FROM statement_timestamp() - slot_at)::float8
                            FROM tidings.schedules
                            WHERE slot_at >= coalesce($1, '-infinity'::timestamptz)
                                AND slot_at <= statement_timestamp()
                            ORDER BY slot_at
                            LIMIT 1
                        ),
                        0
                    ) AS "seconds!"
                    "#,
                    mark,
                )
                .fetch_one(connection)
                .await
            })
            .await?;
        Ok(Duration::try_from_secs_f64(seconds).unwrap_or_default())
    }
}
