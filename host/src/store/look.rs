//! A look at the head of the queue: what is due, when the next row will be, what waits for us. It costs the same few pages of
//! the indexes however many rows wait, and however many were delivered; it locks nothing and changes nothing.

use std::time::Duration;

use time::OffsetDateTime;

use super::low_water::Seen;
use super::sweep::BACKLOG;
use super::{Connection, Store, StoreError};
use crate::polling::Promise;
use crate::wake::Outlook;

/// What [`Store::look`] found.
#[derive(Clone, Debug)]
pub struct Look {
    /// Rows due now, and when to look again: at the next row's time, or when a pause ends.
    pub outlook: Outlook,
    /// Kinds that we serve and nobody has paused, of which rows are held: they were waiting for us.
    pub held_for_us: Vec<String>,
    /// The first row of the queue is of a kind of ours that is paused, and in the way of the others.
    pub paused_first: bool,
    /// Whether somebody promised that we look without being notified.
    pub promise: Promise,
    /// What waits below the low-water mark; only a sweep sees it.
    pub below: Option<Below>,
}

/// Rows below the low-water mark.
#[derive(Clone, Copy, Debug)]
pub struct Below {
    /// The slot of the first.
    pub first: OffsetDateTime,
    /// The mark.
    pub mark: OffsetDateTime,
    /// How many, up to what makes them a backlog.
    pub rows: i64,
}

impl Store {
    /// Looks at the head of the queue, from the low-water mark on, in one statement and no transaction. It must begin after the
    /// wake was armed.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn look(&self, kinds: &[String]) -> Result<Look, StoreError> {
        self.look_from(kinds, false, self.hot_connection().await?, self.doubt.last()).await
    }

    /// The same; a `sweep` looks below the mark as well. `doubt` is the last.
    #[expect(clippy::too_many_lines, reason = "most of them are one statement")]
    pub(super) async fn look_from(
        &self,
        kinds: &[String],
        sweep: bool,
        mut connection: Connection,
        doubt: u64,
    ) -> Result<Look, StoreError> {
        let known = self.low_water.known(doubt);
        let mark = known.and_then(|known| known.mark);
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
        if let Some(known) = known {
            let seen = Seen { known, from: row.mark, at: row.now, oldest_xid: row.oldest_xid, first: row.first_at };
            self.low_water.seen(seen, doubt);
        }
        let next_in = row.next_at.map(|next_at| Duration::try_from(next_at - row.now).unwrap_or(Duration::ZERO));
        let outlook = Outlook { due: row.due, next_in };
        Ok(Look {
            outlook,
            held_for_us: row.held_for_us,
            paused_first: row.paused_first,
            promise: Promise {
                at: row.now,
                until: row.polling_until,
                oldest_xid: row.oldest_xid,
                next_xid: row.next_xid,
            },
            below: row.below_first.map(|first| Below { first, mark: row.mark, rows: row.below_rows }),
        })
    }

    /// For how long the row at the head of the queue has been due, which nothing holds back: it is neither held nor backing
    /// off. From the low-water mark on, if there is one.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn overdue(&self) -> Result<Duration, StoreError> {
        let mark = self.low_water.mark(self.doubt.last());
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
