//! A look at the head of the queue: what is due, when the next row will be, what waits for us. It costs the same few pages of
//! the indexes however many rows wait, and however many were delivered; it locks nothing and changes nothing.

use std::time::Duration;

use tidings_core::queue::{Below, Look, Outlook, Promise};
use time::OffsetDateTime;

use crate::store::queue::sweep::BACKLOG;
use crate::store::{Connection, Store, StoreError};

impl Store {
    /// Looks at the head of the queue, from the low-water mark on, in one statement and no transaction. It must begin after the
    /// wake was armed.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn look(&self, kinds: &[String], mark: Option<OffsetDateTime>) -> Result<Look, StoreError> {
        self.look_from(kinds, mark, false, self.hot_connection().await?).await
    }

    /// The same; a `sweep` looks below the mark as well.
    pub(in crate::store) async fn look_from(
        &self,
        kinds: &[String],
        mark: Option<OffsetDateTime>,
        sweep: bool,
        mut connection: Connection,
    ) -> Result<Look, StoreError> {
        let row = connection
            .run("look at the queue", async |connection| {
                // Each part reads one entry of an index, however many rows wait, whatever the planner believes: held rows are
                // asked for in the order of their index, kind by kind, and pauses are few.
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
                    BACKLOG,
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

    /// For how long the row at the head of the queue has been due, which nothing holds back: it is neither held nor backing
    /// off. From the low-water mark on, if there is one.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn overdue(&self) -> Result<Duration, StoreError> {
        let mark = self.mark();
        let mut connection = self.connection().await?;
        let seconds = connection
            .run("ask how late we are", async |connection| {
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
