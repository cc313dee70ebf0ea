//! A claim: due rows, locked in one open transaction until it is settled. Dropping it rolls back, which leaves every
//! row as it was; so does a crash.
//!
//! The transaction waits for nobody: rows that others have locked are skipped. Nothing in it may fail because of a
//! row's data, since its messages may have been confirmed already: no unique constraint on history, texts made fit
//! beforehand.

use std::time::Duration;

use time::OffsetDateTime;
use tokio::time::Instant;
use uuid::Uuid;

use super::{Connection, Store, StoreError, clock};
use crate::broker::Confirmed;
use crate::clock::DatabaseClock;
use crate::schedule::Schedule;

/// The payloads of one claim have at most this many bytes together as they are stored, or it is a single row.
const CLAIM_BYTES: i64 = 8 * 1024 * 1024;
/// An error text is cut to this many bytes.
const TEXT_BYTES: usize = 4 * 1024;

/// Due rows, locked by us.
#[derive(Debug)]
pub struct Claim {
    connection: Connection,
    clock: DatabaseClock,
    open: bool,
    /// The rows, earliest first. The loop takes them out.
    pub rows: Vec<Schedule>,
    /// More rows are due than are in this claim.
    pub more: bool,
}

/// What becomes of one claimed row. A row without a settlement stays as it is, and due.
#[derive(Debug)]
pub struct Settlement {
    /// The row.
    pub id: Uuid,
    /// `name@version+digest8` of the plugin that was asked, if one was.
    pub plugin: Option<String>,
    /// What becomes of it.
    pub outcome: Outcome,
}

/// The ways to settle a row.
#[derive(Debug)]
pub enum Outcome {
    /// Its message was confirmed, which only the publisher can say.
    Delivered {
        /// The confirm.
        confirmed: Confirmed,
        /// SHA-256 of the event.
        event_digest: String,
    },
    /// Its deadline has come before its message was published.
    Expired(String),
    /// The plugin says that there is nothing to send.
    Skipped(String),
    /// It is set aside for a person.
    Parked(String),
    /// Its plugin failed, or asks for another attempt: due again later.
    Retry {
        /// Why, for people.
        error: String,
        /// From now.
        after: Duration,
        /// Whether it counts towards the maximum.
        failed: bool,
    },
    /// The broker could not route its message or refused it: due again later, without an attempt spent.
    Refused {
        /// Why, for people.
        error: String,
        /// From now.
        after: Duration,
    },
}

impl Store {
    /// Locks up to `limit` due rows of `kinds`, and due rows of any kind that are past their deadline.
    ///
    /// # Errors
    ///
    /// When the database cannot do it; then nothing is locked.
    pub async fn claim(&self, kinds: &[String], limit: i64) -> Result<Claim, StoreError> {
        let mut connection = self.connection().await?;
        connection.run("begin to claim", async |connection| sqlx::query("BEGIN").execute(connection).await).await?;
        // From here on dropping the claim rolls back.
        let mut claim = Claim {
            connection,
            clock: clock(OffsetDateTime::UNIX_EPOCH, Instant::now()),
            open: true,
            rows: Vec::new(),
            more: false,
        };
        let asked_at = Instant::now();
        let rows = claim
            .connection
            .run("claim due rows", async |connection| {
                sqlx::query!(
                    r#"
                    -- Materialized, so that the locking part runs once and locks no more than its limit.
                    WITH locked AS MATERIALIZED (
                        SELECT id, kind, key, subject, due_at, expires_at, payload, headers, attempts, failures, refusals, slot_at
                        FROM tidings.schedules
                        -- The clock must be a stable function to be compared with an index. The due time is checked as
                        -- well: whatever happens to the slot, nothing is early.
                        WHERE slot_at <= statement_timestamp()
                            AND due_at <= statement_timestamp()
                            AND (kind = ANY($1) OR expires_at <= statement_timestamp())
                        ORDER BY slot_at
                        LIMIT $2
                        FOR UPDATE SKIP LOCKED
                    ), measured AS (
                        SELECT
                            locked.*,
                            count(*) OVER () AS locked_rows,
                            sum(pg_column_size(payload)) OVER (ORDER BY slot_at ROWS UNBOUNDED PRECEDING)
                                - pg_column_size(payload) AS bytes_before
                        FROM locked
                    )
                    SELECT
                        id AS "id!",
                        kind AS "kind!",
                        key,
                        subject,
                        due_at AS "due_at!",
                        expires_at,
                        payload::text AS "payload!",
                        headers::text AS "headers!",
                        attempts AS "attempts!",
                        failures AS "failures!",
                        refusals AS "refusals!",
                        locked_rows AS "locked_rows!",
                        statement_timestamp() AS "now!"
                    FROM measured
                    WHERE bytes_before < $3
                    ORDER BY measured.slot_at
                    "#,
                    kinds,
                    limit,
                    CLAIM_BYTES,
                )
                .fetch_all(connection)
                .await
            })
            .await?;

        let claimed = i64::try_from(rows.len()).expect("a claim is small");
        for row in rows {
            claim.clock = clock(row.now, asked_at);
            claim.more = row.locked_rows == limit || row.locked_rows > claimed;
            claim.rows.push(Schedule {
                id: row.id,
                kind: row.kind,
                key: row.key,
                subject: row.subject,
                due_at: row.due_at,
                expires_at: row.expires_at,
                payload: row.payload,
                headers: headers(&row.headers),
                attempts: count(row.attempts),
                failures: count(row.failures),
                refusals: count(row.refusals),
            });
        }
        Ok(claim)
    }
}

impl Claim {
    /// The database clock, as of this claim. Meaningless if it has no rows.
    #[must_use]
    pub fn clock(&self) -> DatabaseClock {
        self.clock
    }

    /// Gives the rows back as they were.
    ///
    /// # Errors
    ///
    /// When the database does not answer; the rows are given back all the same.
    pub async fn release(mut self) -> Result<(), StoreError> {
        self.connection
            .run("give back a claim", async |connection| sqlx::query("ROLLBACK").execute(connection).await)
            .await?;
        self.open = false;
        Ok(())
    }

    /// Moves every row as its settlement says, and commits.
    ///
    /// # Errors
    ///
    /// When the database does not answer. Then nobody knows whether it committed; the next claim will show.
    pub async fn settle(mut self, settlements: Vec<Settlement>) -> Result<(), StoreError> {
        let mut finished = Finished::default();
        let mut parked = Parked::default();
        let mut moved = Moved::default();
        let now = self.clock.now();
        for Settlement { id, plugin, outcome } in settlements {
            let plugin = plugin.as_deref();
            match outcome {
                Outcome::Delivered { confirmed, event_digest } => {
                    finished.add(id, "delivered", self.clock.at(confirmed.at()), plugin, None, Some(event_digest));
                }
                Outcome::Expired(detail) => finished.add(id, "expired", now, plugin, Some(&detail), None),
                Outcome::Skipped(detail) => finished.add(id, "skipped", now, plugin, Some(&detail), None),
                Outcome::Parked(reason) => parked.add(id, &reason, plugin),
                Outcome::Retry { error, after, failed } => moved.add(id, &error, after, 1, failed.into(), 0),
                Outcome::Refused { error, after } => moved.add(id, &error, after, 0, 0, 1),
            }
        }
        if !finished.ids.is_empty() {
            self.connection.run("finish rows", async |connection| finished.execute(connection).await).await?;
        }
        if !parked.ids.is_empty() {
            self.connection.run("park rows", async |connection| parked.execute(connection).await).await?;
        }
        if !moved.ids.is_empty() {
            self.connection.run("make rows wait", async |connection| moved.execute(connection).await).await?;
        }
        self.connection
            .run("commit a claim", async |connection| sqlx::query("COMMIT").execute(connection).await)
            .await?;
        self.open = false;
        Ok(())
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.open {
            self.connection.discard();
        }
    }
}

/// Rows that move to the history, column by column.
#[derive(Debug, Default)]
struct Finished {
    ids: Vec<Uuid>,
    outcomes: Vec<String>,
    finished_at: Vec<OffsetDateTime>,
    plugins: Vec<Option<String>>,
    details: Vec<Option<String>>,
    digests: Vec<Option<String>>,
}

impl Finished {
    fn add(
        &mut self,
        id: Uuid,
        outcome: &str,
        at: OffsetDateTime,
        plugin: Option<&str>,
        detail: Option<&str>,
        digest: Option<String>,
    ) {
        self.ids.push(id);
        self.outcomes.push(outcome.to_owned());
        self.finished_at.push(at);
        self.plugins.push(plugin.map(storable));
        self.details.push(detail.map(storable));
        self.digests.push(digest);
    }

    async fn execute(&self, connection: &mut sqlx::PgConnection) -> Result<(), sqlx::Error> {
        sqlx::query!(
            r#"
            WITH settled AS (
                SELECT * FROM unnest($1::uuid[], $2::text[], $3::timestamptz[], $4::text[], $5::text[], $6::text[])
                    AS settled (id, outcome, finished_at, plugin, detail, event_digest)
            ), gone AS (
                DELETE FROM tidings.schedules WHERE id = ANY($1)
                RETURNING id, kind, key, subject, due_at, expires_at, payload, headers, attempts
            )
            INSERT INTO tidings.deliveries (
                id, kind, key, subject, due_at, finished_at, outcome, attempts, plugin, detail,
                expires_at, payload, headers, event_digest
            )
            SELECT
                gone.id, gone.kind, gone.key, gone.subject, gone.due_at, settled.finished_at, settled.outcome,
                gone.attempts, settled.plugin, settled.detail, gone.expires_at, gone.payload, gone.headers,
                settled.event_digest
            FROM gone
            JOIN settled USING (id)
            "#,
            &self.ids,
            &self.outcomes,
            &self.finished_at,
            &self.plugins as &[Option<String>],
            &self.details as &[Option<String>],
            &self.digests as &[Option<String>],
        )
        .execute(connection)
        .await
        .map(drop)
    }
}

/// Rows that are set aside, column by column.
#[derive(Debug, Default)]
struct Parked {
    ids: Vec<Uuid>,
    reasons: Vec<String>,
    plugins: Vec<Option<String>>,
}

impl Parked {
    fn add(&mut self, id: Uuid, reason: &str, plugin: Option<&str>) {
        self.ids.push(id);
        self.reasons.push(storable(reason));
        self.plugins.push(plugin.map(storable));
    }

    async fn execute(&self, connection: &mut sqlx::PgConnection) -> Result<(), sqlx::Error> {
        sqlx::query!(
            r#"
            WITH settled AS (
                SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[]) AS settled (id, reason, plugin)
            ), gone AS (
                DELETE FROM tidings.schedules WHERE id = ANY($1)
                RETURNING id, kind, key, subject, due_at, expires_at, payload, headers, attempts, last_error, created_at
            )
            INSERT INTO tidings.parked (
                id, kind, key, subject, due_at, expires_at, payload, headers, attempts, last_error, created_at, reason, plugin
            )
            SELECT
                gone.id, gone.kind, gone.key, gone.subject, gone.due_at, gone.expires_at, gone.payload, gone.headers,
                gone.attempts, gone.last_error, gone.created_at, settled.reason, settled.plugin
            FROM gone
            JOIN settled USING (id)
            "#,
            &self.ids,
            &self.reasons,
            &self.plugins as &[Option<String>],
        )
        .execute(connection)
        .await
        .map(drop)
    }
}

/// Rows that stay and wait, column by column.
#[derive(Debug, Default)]
struct Moved {
    ids: Vec<Uuid>,
    errors: Vec<String>,
    delays: Vec<f64>,
    attempts: Vec<i32>,
    failures: Vec<i32>,
    refusals: Vec<i32>,
}

impl Moved {
    fn add(&mut self, id: Uuid, error: &str, after: Duration, attempts: i32, failures: i32, refusals: i32) {
        self.ids.push(id);
        self.errors.push(storable(error));
        self.delays.push(after.as_secs_f64());
        self.attempts.push(attempts);
        self.failures.push(failures);
        self.refusals.push(refusals);
    }

    async fn execute(&self, connection: &mut sqlx::PgConnection) -> Result<(), sqlx::Error> {
        sqlx::query!(
            r#"
            UPDATE tidings.schedules AS waiting
            SET attempts = waiting.attempts + settled.attempts,
                failures = waiting.failures + settled.failures,
                -- In a row: another outcome begins the count again.
                refusals = CASE WHEN settled.refusals = 0 THEN 0 ELSE waiting.refusals + settled.refusals END,
                last_error = settled.error,
                -- A row that expires meanwhile comes back then, to be finished.
                not_before = least(
                    clock_timestamp() + settled.delay * interval '1 second',
                    CASE WHEN waiting.expires_at IS NOT NULL THEN greatest(waiting.expires_at, clock_timestamp()) END
                )
            FROM unnest($1::uuid[], $2::text[], $3::float8[], $4::int4[], $5::int4[], $6::int4[])
                AS settled (id, error, delay, attempts, failures, refusals)
            WHERE waiting.id = settled.id
            "#,
            &self.ids,
            &self.errors,
            &self.delays,
            &self.attempts,
            &self.failures,
            &self.refusals,
        )
        .execute(connection)
        .await
        .map(drop)
    }
}

/// A text that PostgreSQL takes: without NUL, which it cannot store, and not endless. Plugins write some of them.
fn storable(text: &str) -> String {
    let mut text = text.replace('\0', "\u{FFFD}");
    if text.len() > TEXT_BYTES {
        text.truncate(text.floor_char_boundary(TEXT_BYTES));
        text.push('…');
    }
    text
}

/// The headers of a row: the table's constraint has seen to it that they are an object of strings.
fn headers(json: &str) -> Vec<(String, String)> {
    if json == "{}" {
        return Vec::new();
    }
    let object: std::collections::BTreeMap<String, String> =
        serde_json::from_str(json).expect("a CHECK of tidings.schedules admits only objects of strings");
    object.into_iter().collect()
}

fn count(number: i32) -> u32 {
    u32::try_from(number).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_with_nul_or_without_end_can_be_stored() {
        assert_eq!(storable("a\0b"), "a\u{FFFD}b");
        let long = storable(&"é".repeat(TEXT_BYTES));
        assert!(long.len() <= TEXT_BYTES + '…'.len_utf8());
        assert!(long.ends_with('…'));
    }

    #[test]
    fn the_headers_of_a_row_are_read_from_its_json() {
        assert_eq!(headers("{}"), []);
        assert_eq!(headers(r#"{"b": "2", "a": "\u00e9"}"#), [("a".into(), "é".into()), ("b".into(), "2".into())]);
    }
}
