//! Counts rows that wait, are late, held or parked, for `tidings doctor`, the page and the metrics. Must never read
//! more than about a thousand rows for one count.

use std::time::Duration;

use uuid::Uuid;

use crate::store::{Store, StoreError};

/// No count goes further than one more than this: few enough that an index is read rather than the table, however many
/// rows there are.
pub const COUNT_LIMIT: i64 = 1_000;
/// The most kinds that are listed.
const MAX_KINDS: i64 = 20;

/// Late rows.
#[derive(Clone, Debug)]
pub struct Late {
    /// How many, up to one more than [`ENOUGH`].
    pub rows: i64,
    /// The id of the oldest.
    pub oldest: Uuid,
    /// Its kind.
    pub kind: String,
    /// For how long it has been due.
    pub overdue: Duration,
    /// The last error that was recorded for it.
    pub last_error: Option<String>,
}

/// How many rows wait.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Pending rows. Counted up to [`ENOUGH`]; beyond that, the estimate of PostgreSQL's statistics.
    pub pending: u64,
    /// Of the pending rows, those that are held, up to one more than [`ENOUGH`].
    pub held: u64,
    /// Parked rows, up to one more than [`ENOUGH`].
    pub parked: u64,
    /// For how long the first row of the queue has been due, as in [`Store::overdue`].
    pub overdue: Duration,
}

impl Store {
    /// How many rows wait, without counting a million of them. The queue is read from the low-water mark on, if there
    /// is one.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn backlog(&self) -> Result<Backlog, StoreError> {
        let mark = self.low_water_mark();
        let mut connection = self.connection().await?;
        let row = connection
            .run("count the rows that wait", async |connection| {
                sqlx::query!(
                    r#"
                    WITH RECURSIVE kinds AS (
                        -- From one kind to the next by the index, since a kind may have millions.
                        (SELECT kind FROM tidings.schedules WHERE held ORDER BY kind LIMIT 1)
                        UNION ALL
                        SELECT (
                            SELECT next.kind
                            FROM tidings.schedules AS next
                            WHERE next.held AND next.kind > kinds.kind
                            ORDER BY next.kind
                            LIMIT 1
                        )
                        FROM kinds
                        WHERE kinds.kind IS NOT NULL
                    ), head AS MATERIALIZED (
                        SELECT slot_at
                        FROM tidings.schedules
                        WHERE slot_at >= coalesce($2, '-infinity'::timestamptz)
                        ORDER BY slot_at
                        LIMIT $1
                    )
                    SELECT
                        CASE
                            WHEN (SELECT count(*) FROM head) < $1 THEN (SELECT count(*) FROM head)
                            -- The count of the statistics follows within seconds, and is never far off. A crash of the
                            -- server sets it to zero; then what the last vacuum found has to do.
                            WHEN live > 0 THEN greatest(live, $1)
                            ELSE greatest(found, $1)
                        END AS "pending!",
                        (
                            SELECT count(*)
                            FROM (
                                SELECT FROM kinds
                                CROSS JOIN LATERAL (
                                    SELECT FROM tidings.schedules AS waiting
                                    WHERE waiting.held AND waiting.kind >= kinds.kind AND waiting.kind <= kinds.kind
                                        AND waiting.line IS NULL
                                    -- In the order of its index, or the planner may take it into its head to read the table.
                                    ORDER BY waiting.kind
                                    LIMIT $1
                                ) AS held
                                LIMIT $1
                            ) AS counted
                        ) AS "held!",
                        (SELECT count(*) FROM (SELECT FROM tidings.parked LIMIT $1) AS counted) AS "parked!",
                        coalesce(
                            (
                                SELECT extract(epoch FROM statement_timestamp() - min(slot_at))::float8
                                FROM head
                                WHERE slot_at <= statement_timestamp()
                            ),
                            0
                        ) AS "overdue!"
                    FROM (
                        -- The table, or its partitions.
                        SELECT
                            sum(pg_stat_get_live_tuples(oid))::bigint AS live,
                            sum(greatest(reltuples, 0))::bigint AS found
                        FROM pg_class
                        WHERE oid = 'tidings.schedules'::regclass
                            OR oid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = 'tidings.schedules'::regclass)
                    ) AS counted
                    "#,
                    COUNT_LIMIT + 1,
                    mark,
                )
                .fetch_one(connection)
                .await
            })
            .await?;
        Ok(Backlog {
            pending: row.pending.unsigned_abs(),
            held: row.held.unsigned_abs(),
            parked: row.parked.unsigned_abs(),
            overdue: Duration::try_from_secs_f64(row.overdue).unwrap_or_default(),
        })
    }

    /// The rows that could have been claimed for longer than `limit`; `None` = there are none. As in
    /// [`Store::overdue`], a held row is among them once its deadline has passed, since then any daemon may claim it.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn late(&self, limit: Duration) -> Result<Option<Late>, StoreError> {
        let mut connection = self.connection().await?;
        let row = connection
            .run("look for late rows", async |connection| {
                sqlx::query!(
                    r#"
                    WITH late AS MATERIALIZED (
                        SELECT id, kind, last_error, slot_at
                        FROM tidings.schedules
                        WHERE slot_at <= statement_timestamp() - $1 * interval '1 second'
                        ORDER BY slot_at
                        LIMIT $2
                    )
                    SELECT
                        (SELECT count(*) FROM late) AS "rows!",
                        id,
                        kind,
                        extract(epoch FROM statement_timestamp() - slot_at)::float8 AS "seconds!",
                        last_error
                    FROM late
                    ORDER BY slot_at
                    LIMIT 1
                    "#,
                    limit.as_secs_f64(),
                    COUNT_LIMIT + 1,
                )
                .fetch_optional(connection)
                .await
            })
            .await?;
        Ok(row.map(|row| Late {
            rows: row.rows,
            oldest: row.id,
            kind: row.kind,
            overdue: Duration::try_from_secs_f64(row.seconds).unwrap_or_default(),
            last_error: row.last_error,
        }))
    }

    /// How many rows are held, because no daemon serves their kind or it is paused: for the first 20 kinds in their
    /// order, each up to one more than [`ENOUGH`].
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn held_by_kind(&self) -> Result<Vec<(String, i64)>, StoreError> {
        let mut connection = self.connection().await?;
        let rows = connection
            .run("look for held rows", async |connection| {
                sqlx::query!(
                    r#"
                    -- From one kind to the next by the index, since a kind may have millions.
                    WITH RECURSIVE kinds AS (
                        (SELECT kind FROM tidings.schedules WHERE held ORDER BY kind LIMIT 1)
                        UNION ALL
                        SELECT (
                            SELECT next.kind
                            FROM tidings.schedules AS next
                            WHERE next.held AND next.kind > kinds.kind
                            ORDER BY next.kind
                            LIMIT 1
                        )
                        FROM kinds
                        WHERE kinds.kind IS NOT NULL
                    )
                    SELECT kinds.kind AS "kind!", rows AS "rows!"
                    FROM kinds
                    CROSS JOIN LATERAL (
                        SELECT count(*) AS rows
                        FROM (
                            SELECT FROM tidings.schedules AS waiting
                            WHERE waiting.held AND waiting.kind >= kinds.kind AND waiting.kind <= kinds.kind
                                AND waiting.line IS NULL
                            ORDER BY waiting.kind
                            LIMIT $1
                        ) AS counted
                    ) AS held
                    WHERE rows > 0
                    LIMIT $2
                    "#,
                    COUNT_LIMIT + 1,
                    MAX_KINDS,
                )
                .fetch_all(connection)
                .await
            })
            .await?;
        Ok(rows.into_iter().map(|row| (row.kind, row.rows)).collect())
    }

    /// How many rows are parked, up to one more than [`ENOUGH`].
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn count_parked(&self) -> Result<i64, StoreError> {
        let mut connection = self.connection().await?;
        connection
            .run("count parked rows", async |connection| {
                sqlx::query_scalar!(
                    r#"SELECT count(*) AS "rows!" FROM (SELECT FROM tidings.parked LIMIT $1) AS counted"#,
                    COUNT_LIMIT + 1
                )
                .fetch_one(connection)
                .await
            })
            .await
    }
}
