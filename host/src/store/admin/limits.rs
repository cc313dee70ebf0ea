//! Limits and lines, for people: which limits there are, how many rows wait for their turn, and where one row stands. Must never
//! lock or change anything.

use serde::Serialize;
use uuid::Uuid;

use crate::model::limit::{Limit, Place};
use crate::store::{Store, StoreError};

/// The most rows that are counted.
pub const MAX_COUNTED: i64 = 100_000;

/// A limit, and what waits because of it.
#[derive(Clone, Debug, Serialize)]
pub struct LimitStatus {
    /// The limit.
    #[serde(flatten)]
    pub limit: Limit,
    /// How many rows wait for their turn, up to 100,001.
    pub waiting: i64,
    /// In how many lines, up to 100,001.
    pub lines: i64,
    /// For how long the first row of the first line has been due, in seconds; 0 = none waits.
    pub oldest_seconds: f64,
}

impl Store {
    /// Lists the limits with what waits because of them, by kind.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn limits(&self) -> Result<Vec<LimitStatus>, StoreError> {
        let mut connection = self.connection().await?;
        let rows = connection
            .run("list the limits", async |connection| {
                sqlx::query!(
                    r#"
                    SELECT
                        kind, count, extract(epoch FROM per)::float8 AS "per_seconds!", burst, by = 'subject' AS "by_subject!", since,
                        (
                            SELECT count(*)
                            FROM (
                                SELECT FROM tidings.schedules AS waiting
                                WHERE waiting.held AND waiting.kind = limits.kind AND waiting.line IS NOT NULL
                                ORDER BY waiting.kind, waiting.line
                                LIMIT $1
                            ) AS counted
                        ) AS "waiting!",
                        (
                            SELECT count(*)
                            FROM (SELECT FROM tidings.lines WHERE lines.kind = limits.kind AND waiting LIMIT $1) AS counted
                        ) AS "lines!",
                        coalesce(
                            (
                                SELECT extract(epoch FROM statement_timestamp() - min(due_at))::float8
                                FROM (
                                    SELECT due_at FROM tidings.schedules AS waiting
                                    WHERE waiting.held AND waiting.kind = limits.kind AND waiting.line IS NOT NULL
                                    ORDER BY waiting.kind, waiting.line, due_at AT TIME ZONE 'UTC' - priority * interval '1 minute'
                                    LIMIT 1
                                ) AS first
                            ),
                            0
                        ) AS "oldest_seconds!"
                    FROM tidings.limits
                    ORDER BY kind
                    "#,
                    MAX_COUNTED + 1,
                )
                .fetch_all(connection)
                .await
            })
            .await?;
        Ok(rows
            .into_iter()
            .map(|row| LimitStatus {
                limit: Limit {
                    kind: row.kind,
                    count: row.count,
                    per_seconds: row.per_seconds,
                    burst: row.burst,
                    by_subject: row.by_subject,
                    since: row.since,
                },
                waiting: row.waiting,
                lines: row.lines,
                oldest_seconds: row.oldest_seconds,
            })
            .collect())
    }

    /// Where a row stands in its line; `None` = it is in none by now.
    pub(super) async fn find_place(&self, id: Uuid) -> Result<Option<Place>, StoreError> {
        let mut connection = self.connection().await?;
        let row = connection
            .run("find the place of a row in its line", async |connection| {
                sqlx::query!(
                    r#"
                    SELECT
                        limits.kind, limits.count, extract(epoch FROM per)::float8 AS "per_seconds!", burst,
                        by = 'subject' AS "by_subject!", since,
                        extract(
                            epoch FROM greatest(free_at, statement_timestamp() - interval '1 hour') - statement_timestamp()
                        )::float8 - (burst - 1) * step AS "turn_in!",
                        (
                            SELECT count(*)
                            FROM (
                                SELECT FROM tidings.schedules AS other
                                WHERE other.held AND other.kind = mine.kind AND other.line = mine.line
                                    AND other.due_at AT TIME ZONE 'UTC' - other.priority * interval '1 minute'
                                        < mine.due_at AT TIME ZONE 'UTC' - mine.priority * interval '1 minute'
                                LIMIT $2
                            ) AS counted
                        ) AS "before!"
                    FROM tidings.schedules AS mine
                    JOIN tidings.lines ON lines.kind = mine.kind AND lines.subject = mine.line
                    JOIN tidings.limits ON limits.kind = mine.kind
                    WHERE mine.id = $1
                    "#,
                    id,
                    MAX_COUNTED + 1,
                )
                .fetch_optional(connection)
                .await
            })
            .await?;
        Ok(row.map(|row| {
            let limit = Limit {
                kind: row.kind,
                count: row.count,
                per_seconds: row.per_seconds,
                burst: row.burst,
                by_subject: row.by_subject,
                since: row.since,
            };
            let before = row.before.min(MAX_COUNTED);
            let in_seconds = limit.wait_seconds(before, row.turn_in);
            Place { limit, before, before_or_more: row.before > MAX_COUNTED, in_seconds }
        }))
    }
}
