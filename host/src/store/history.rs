//! The history, `tidings.deliveries`: its retention, and which rows were delivered last. Must never touch a row that
//! waits or is parked.

use std::time::Duration;

use crate::model::clock::unix_ms;
use crate::model::schedule::Schedule;
use crate::store::queue::claim::parse_headers;
use crate::store::{Store, StoreError};

/// The most rows that one statement removes: few enough that no other statement waits for it.
const BATCH: i64 = 10_000;

impl Store {
    /// Removes history that is older than `age`, and returns how many rows. Several daemons may do it at once.
    ///
    /// # Errors
    ///
    /// When the database cannot do it.
    pub async fn remove_history(&self, age: Duration) -> Result<u64, StoreError> {
        let mut removed = 0;
        loop {
            let mut connection = self.connection().await?;
            let answer = connection
                .run("remove old history", async |connection| {
                    sqlx::query!(
                        r#"
                        DELETE FROM tidings.deliveries
                        -- Where somebody has made partitions of the history, another row may have the same ctid.
                        WHERE finished_at < statement_timestamp() - $1::float8 * interval '1 second' AND ctid = ANY (ARRAY(
                            SELECT ctid
                            FROM tidings.deliveries
                            WHERE finished_at < statement_timestamp() - $1::float8 * interval '1 second'
                            LIMIT $2
                            FOR UPDATE SKIP LOCKED
                        ))
                        "#,
                        age.as_secs_f64(),
                        BATCH,
                    )
                    .execute(connection)
                    .await
                })
                .await?;
            removed += answer.rows_affected();
            if answer.rows_affected() < BATCH.unsigned_abs() {
                return Ok(removed);
            }
        }
    }
}

/// A delivered row, with all that is needed to build its event again.
#[derive(Clone, Debug)]
pub struct Delivered {
    /// The row as it was.
    pub schedule: Schedule,
    /// When it was confirmed, in milliseconds since the Unix epoch.
    finished_ms: i64,
    built_ms: Option<i64>,
    /// `name@version+digest8` of the plugin that built it.
    pub plugin: Option<String>,
    /// SHA-256 of the event.
    pub event_digest: Option<String>,
}

impl Delivered {
    /// The `now-ms` that the plugin was given. For a row of an older release, which did not record it, the time of the
    /// confirm.
    #[must_use]
    pub fn now_ms(&self) -> i64 {
        self.built_ms.unwrap_or(self.finished_ms)
    }
}

impl Store {
    /// The last `count` delivered rows of `kinds`, the latest first.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn last_delivered(&self, kinds: &[String], count: u32) -> Result<Vec<Delivered>, StoreError> {
        // The index on the time is a BRIN index, which gives no order. So read ever longer windows until there are
        // enough rows.
        let mut last = Vec::new();
        for minutes in [1.0, 15.0, 240.0, 2880.0, f64::INFINITY] {
            last = self.delivered_within(kinds, count, minutes).await?;
            if last.len() >= count as usize {
                break;
            }
        }
        Ok(last)
    }

    async fn delivered_within(&self, kinds: &[String], count: u32, minutes: f64) -> Result<Vec<Delivered>, StoreError> {
        let mut connection = self.connection().await?;
        let rows = connection
            .run("read the history", async |connection| {
                sqlx::query!(
                    r#"
                    SELECT
                        id, kind, key, subject, due_at, expires_at, finished_at, attempts, plugin, event_digest, built_ms,
                        payload::text AS "payload!", headers::text AS "headers!"
                    FROM tidings.deliveries
                    WHERE finished_at > CASE
                            WHEN $3::float8 = 'infinity' THEN '-infinity'
                            ELSE statement_timestamp() - $3::float8 * interval '1 minute'
                        END
                        AND kind = ANY($1)
                        AND outcome = 'delivered'
                    ORDER BY finished_at DESC
                    LIMIT $2
                    "#,
                    kinds,
                    i64::from(count),
                    minutes,
                )
                .fetch_all(connection)
                .await
            })
            .await?;
        Ok(rows
            .into_iter()
            .map(|row| Delivered {
                schedule: Schedule {
                    id: row.id,
                    kind: row.kind,
                    key: row.key,
                    subject: row.subject,
                    due_at: row.due_at,
                    expires_at: row.expires_at,
                    payload: row.payload,
                    headers: parse_headers(&row.headers),
                    attempts: u32::try_from(row.attempts).unwrap_or(0),
                    failures: 0,
                    refusals: 0,
                    untried_since: None,
                    recurrence: None,
                    nominal_at: None,
                    line: None,
                    priority: 4,
                },
                finished_ms: unix_ms(row.finished_at),
                built_ms: row.built_ms,
                plugin: row.plugin,
                event_digest: row.event_digest,
            })
            .collect())
    }
}
