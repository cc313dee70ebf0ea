//! A claim: due rows, locked in one open transaction until it is settled. Dropping it rolls back, which leaves every
//! row as it was; so does a crash.
//!
//! The transaction waits for nobody: rows that others have locked are skipped.

use tokio::time::Instant;

use super::low_water::Sample;
use super::{Connection, Store, StoreError};
use crate::clock::DatabaseClock;
use crate::schedule::Schedule;

/// The payloads of one claim have at most this many bytes together as they are stored, or it is a single row.
const CLAIM_BYTES: i64 = 8 * 1024 * 1024;

/// Due rows, at least one, locked by us.
#[derive(Debug)]
pub struct Claim {
    pub(super) transaction: Transaction,
    clock: DatabaseClock,
    /// The rows, earliest first. The loop takes them out.
    pub rows: Vec<Schedule>,
    /// More rows are due than are in this claim.
    pub more: bool,
}

/// A connection in a transaction. Dropped before its end, the connection is closed, and the server rolls back.
#[derive(Debug)]
pub(super) struct Transaction {
    pub(super) connection: Connection,
    open: bool,
}

impl Store {
    /// Locks up to `limit` due rows of `kinds`, but for those that are paused, and due rows of any kind that are past their
    /// deadline. `None` = there are none that nobody else has locked.
    ///
    /// # Errors
    ///
    /// When the database cannot do it; then nothing is locked.
    pub async fn claim(&self, kinds: &[String], limit: i64) -> Result<Option<Claim>, StoreError> {
        let doubt = self.doubt.last();
        let from = self.low_water.mark(doubt);
        let mut transaction = Transaction::begin(self.connection().await?).await?;
        let asked_at = Instant::now();
        let rows = transaction
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
                        WHERE slot_at >= coalesce($4, '-infinity'::timestamptz)
                            AND slot_at <= statement_timestamp()
                            AND due_at <= statement_timestamp()
                            AND (
                                kind = ANY($1) AND kind <> ALL(ARRAY(SELECT kind FROM tidings.paused))
                                OR expires_at <= statement_timestamp()
                            )
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
                        statement_timestamp() AS "now!",
                        pg_current_xact_id()::text::bigint AS "xid!"
                    FROM measured
                    WHERE bytes_before < $3
                    ORDER BY measured.slot_at
                    "#,
                    kinds,
                    limit,
                    CLAIM_BYTES,
                    from,
                )
                .fetch_all(connection)
                .await
            })
            .await?;

        let Some(first) = rows.first() else {
            transaction.end("ROLLBACK").await?;
            return Ok(None);
        };
        self.low_water.sample(Sample { at: first.now, xid: first.xid }, doubt);
        Ok(Some(Claim {
            clock: DatabaseClock::new(first.now, asked_at),
            more: first.locked_rows == limit
                || usize::try_from(first.locked_rows).is_ok_and(|locked| locked > rows.len()),
            rows: rows
                .into_iter()
                .map(|row| Schedule {
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
                })
                .collect(),
            transaction,
        }))
    }
}

impl Claim {
    /// Whether the rows are still ours, after a long time in which the server may have given us up.
    ///
    /// # Errors
    ///
    /// When they are not.
    pub async fn confirm_held(&mut self) -> Result<(), StoreError> {
        let connection = &mut self.transaction.connection;
        let alive = async |connection: &mut sqlx::PgConnection| sqlx::query("SELECT 1").execute(connection).await;
        connection.run("say whether a claim still holds", alive).await.map(drop)
    }

    /// The database clock, as of this claim.
    #[must_use]
    pub fn clock(&self) -> DatabaseClock {
        self.clock
    }
}

impl Transaction {
    async fn begin(mut connection: Connection) -> Result<Self, StoreError> {
        connection.run("begin to claim", async |connection| sqlx::query("BEGIN").execute(connection).await).await?;
        Ok(Self { connection, open: true })
    }

    /// Ends it with `COMMIT` or `ROLLBACK`.
    pub(super) async fn end(mut self, how: &'static str) -> Result<(), StoreError> {
        self.connection.run("end a claim", async |connection| sqlx::query(how).execute(connection).await).await?;
        self.open = false;
        Ok(())
    }
}

impl Drop for Transaction {
    fn drop(&mut self) {
        if self.open {
            self.connection.discard();
        }
    }
}

/// The headers of a row: the table's constraint has seen to it that they are an object of strings.
pub(super) fn headers(json: &str) -> Vec<(String, String)> {
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
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_headers_of_a_row_are_read_from_its_json() {
        assert_eq!(headers("{}"), []);
        assert_eq!(headers(r#"{"b": "2", "a": "\u00e9"}"#), [("a".into(), "é".into()), ("b".into(), "2".into())]);
    }

    proptest! {
        #[test]
        fn whatever_names_and_values_are_they_are_read_as_they_were_written(
            object in proptest::collection::btree_map("\\PC{0,9}|(.|\n){0,9}", "\\PC{0,20}|(.|\n){0,20}", 0..6),
        ) {
            let listed: Vec<(String, String)> = object.clone().into_iter().collect();
            let written = serde_json::to_string(&object).expect("strings");
            prop_assert_eq!(headers(&written), listed.clone());
            // As PostgreSQL may write it: all that is not ASCII escaped, with spaces, in another order.
            let text = |text: &String| {
                let units: Vec<String> = text.encode_utf16().map(|unit| format!("\\u{unit:04x}")).collect();
                format!("\"{}\"", units.concat())
            };
            let entries: Vec<String> = object.iter().rev().map(|(name, value)| format!("{}: {}", text(name), text(value))).collect();
            prop_assert_eq!(headers(&format!("{{{}}}", entries.join(", "))), listed);
        }
    }
}
