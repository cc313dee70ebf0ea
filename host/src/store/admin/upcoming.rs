//! Which rows are due next, for people: the first rows of the queue, and about how many come after them.

use std::time::Duration;

use serde::Serialize;
use sqlx::Row as _;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::store::{COUNT_LIMIT, Connection, Store, StoreError};

/// The first rows of the queue.
#[derive(Clone, Debug)]
pub struct Upcoming {
    /// The database clock.
    pub now: OffsetDateTime,
    /// The rows, earliest first.
    pub rows: Vec<UpcomingRow>,
    /// How many rows come after them.
    pub more: u64,
    /// There are too many to count, so `more` is an estimate of PostgreSQL's planner.
    pub more_is_estimate: bool,
}

/// A row of the queue.
#[derive(Clone, Debug, Serialize)]
pub struct UpcomingRow {
    /// When it can be claimed: when it is due or its backoff ends, or at once if that is past. For a held row, its
    /// deadline.
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
    /// When it is due.
    #[serde(with = "time::serde::rfc3339")]
    pub due_at: OffsetDateTime,
    /// Its id.
    pub id: Uuid,
    /// Its kind.
    pub kind: String,
    /// Its key, if it has one.
    pub key: Option<String>,
    /// Its subject, if it has one.
    pub subject: Option<String>,
    /// How many builds have failed, or ended with the plugin asking for another attempt.
    pub attempts: i32,
    /// It waits for a plugin or for the end of a pause, at most until its deadline.
    pub held: bool,
}

impl Store {
    /// The database's time, and the first `limit` rows of the queue, from the low-water mark on, if there is one.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn next_rows(&self, limit: i64) -> Result<(OffsetDateTime, Vec<UpcomingRow>), StoreError> {
        let mark = self.low_water_mark();
        read_head(&mut self.connection().await?, mark, None, None, limit).await
    }

    /// The first `limit` rows of the queue, if given only those due `within` a time from now and of one `kind`. Rows
    /// that are held and have no deadline are not among them.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn upcoming(
        &self,
        within: Option<Duration>,
        kind: Option<&str>,
        limit: u32,
    ) -> Result<Upcoming, StoreError> {
        let within = within.map(|time| time.as_secs_f64());
        let limit = i64::from(limit);
        let mut connection = self.connection().await?;
        let (now, rows) = read_head(&mut connection, None, within, kind, limit).await?;
        if rows.len() < usize::try_from(limit).unwrap_or(usize::MAX) {
            return Ok(Upcoming { now, rows, more: 0, more_is_estimate: false });
        }
        let counted = connection
            .run("count what is due next", async |connection| {
                sqlx::query_scalar!(
                    r#"
                    SELECT count(*) AS "rows!"
                    FROM (
                        SELECT
                        FROM tidings.schedules
                        WHERE slot_at < coalesce($1::timestamptz + $2::float8 * interval '1 second', 'infinity')
                            AND ($3::text IS NULL OR kind = $3)
                        ORDER BY slot_at
                        OFFSET $4
                        LIMIT $5
                    ) AS counted
                    "#,
                    now,
                    within,
                    kind,
                    limit,
                    COUNT_LIMIT + 1,
                )
                .fetch_one(connection)
                .await
            })
            .await?;
        if counted <= COUNT_LIMIT {
            return Ok(Upcoming { now, rows, more: counted.unsigned_abs(), more_is_estimate: false });
        }
        let estimate = connection
            .run("estimate what is due next", async |connection| {
                let explain = "EXPLAIN (FORMAT JSON) SELECT FROM tidings.schedules
                    WHERE slot_at < coalesce($1::timestamptz + $2::float8 * interval '1 second', 'infinity')
                        AND ($3::text IS NULL OR kind = $3)";
                let plan = sqlx::query(explain).bind(now).bind(within).bind(kind).fetch_one(connection).await?;
                plan.try_get_unchecked::<String, _>(0)
            })
            .await?;
        let estimate = parse_planned_rows(&estimate).saturating_sub(limit.unsigned_abs());
        Ok(Upcoming { now, rows, more: estimate.max(counted.unsigned_abs()), more_is_estimate: true })
    }
}

/// Reads the database's time, and the first rows from a slot on.
async fn read_head(
    connection: &mut Connection,
    from: Option<OffsetDateTime>,
    within: Option<f64>,
    kind: Option<&str>,
    limit: i64,
) -> Result<(OffsetDateTime, Vec<UpcomingRow>), StoreError> {
    connection
        .run("look at what is due next", async |connection| {
            // In a statement of its own, since the time is needed even if there are no rows.
            let now = sqlx::query_scalar!(r#"SELECT statement_timestamp() AS "now!""#);
            let now = now.fetch_one(&mut *connection).await?;
            let rows = sqlx::query_as!(
                UpcomingRow,
                r#"
                SELECT slot_at AS "at!", due_at, id, kind, key, subject, attempts, held
                FROM tidings.schedules
                WHERE slot_at >= coalesce($5, '-infinity'::timestamptz)
                    AND slot_at < coalesce($1::timestamptz + $2::float8 * interval '1 second', 'infinity')
                    AND ($3::text IS NULL OR kind = $3)
                ORDER BY slot_at
                LIMIT $4
                "#,
                now,
                within,
                kind,
                limit,
                from,
            )
            .fetch_all(connection)
            .await?;
            Ok((now, rows))
        })
        .await
}

/// Reads from a plan in JSON how many rows it expects; 0 = it does not say.
fn parse_planned_rows(plan: &str) -> u64 {
    let plan: serde_json::Value = serde_json::from_str(plan).unwrap_or_default();
    plan[0]["Plan"]["Plan Rows"].as_u64().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_expected_rows_are_read_from_a_plan() {
        assert_eq!(parse_planned_rows(r#"[{"Plan": {"Node Type": "Seq Scan", "Plan Rows": 4711}}]"#), 4711);
        assert_eq!(parse_planned_rows("no plan"), 0);
    }
}
