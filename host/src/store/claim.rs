//! A claim: due rows, locked in one open transaction until it is settled. Dropping it rolls back, which leaves every
//! row as it was; so does a crash.
//!
//! The transaction waits for nobody: rows that others have locked are skipped.

use std::time::Duration;

use time::OffsetDateTime;
use tokio::time::Instant;

use super::low_water::Sample;
use super::{Connection, Store, StoreError};
use crate::clock::DatabaseClock;
use crate::schedule::Schedule;
use crate::wake::Outlook;

/// The payloads of one claim have at most this many bytes together as they are stored, or it is a single row.
const CLAIM_BYTES: i64 = 8 * 1024 * 1024;

/// What a claim came to.
#[derive(Debug)]
pub struct Claimed {
    /// The rows; `None` = there are none that nobody else has locked.
    pub claim: Option<Claim>,
    /// When the next row is due that is not yet, and whether more are due than were claimed.
    pub outlook: Outlook,
    /// For how long the first row had been due.
    pub behind: Duration,
    /// The database's time.
    pub at: OffsetDateTime,
    /// When it was asked.
    pub asked_at: Instant,
}

/// Due rows, at least one, locked by us.
#[derive(Debug)]
pub struct Claim {
    pub(super) transaction: Transaction,
    clock: DatabaseClock,
    /// The rows, earliest first. The loop takes them out.
    pub rows: Vec<Schedule>,
}

/// A connection in a transaction. Dropped before its end, the connection is closed, and the server rolls back.
#[derive(Debug)]
pub(super) struct Transaction {
    pub(super) connection: Connection,
    open: bool,
}

impl Store {
    /// Locks up to `limit` due rows of `kinds`, but for those that are paused, and due rows of any kind that are past their
    /// deadline: those that have been due for longest, of all or of those that came due from `since` on. Before `not_before`,
    /// everything is made ready and nothing is asked.
    ///
    /// # Errors
    ///
    /// When the database cannot do it; then nothing is locked.
    #[expect(clippy::too_many_lines, reason = "most of them are one statement")]
    pub async fn claim(
        &self,
        kinds: &[String],
        limit: i64,
        since: Option<OffsetDateTime>,
        not_before: Instant,
    ) -> Result<Claimed, StoreError> {
        let doubt = self.doubt.last();
        let from = since.max(self.low_water.mark(doubt));
        let mut transaction = Transaction::begin(self.hot_connection().await?).await?;
        let early = not_before.saturating_duration_since(Instant::now());
        if !early.is_zero() {
            futures_timer::Delay::new(early).await;
        }
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
                        WHERE slot_at >= coalesce($4, statement_timestamp() - interval '1 minute')
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
                        id AS "id?",
                        kind AS "kind?",
                        key AS "key?",
                        subject AS "subject?",
                        due_at AS "due_at?",
                        expires_at AS "expires_at?",
                        payload::text,
                        headers::text,
                        attempts AS "attempts?",
                        failures AS "failures?",
                        refusals AS "refusals?",
                        slot_at AS "slot_at?",
                        locked_rows,
                        statement_timestamp() AS "now!",
                        CASE WHEN id IS NOT NULL THEN pg_current_xact_id()::text::bigint END AS xid,
                        next_at
                    FROM (
                        SELECT least(
                            (
                                SELECT slot_at
                                FROM tidings.schedules
                                WHERE slot_at > statement_timestamp() AND slot_at < 'infinity'
                                ORDER BY slot_at
                                LIMIT 1
                            ),
                            (SELECT min(until) FROM tidings.paused)
                        ) AS next_at
                    ) AS ahead
                    -- A claim without rows has an answer as well.
                    LEFT JOIN measured ON bytes_before < $3
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

        let answered = rows.first().expect("a row, or what is ahead alone");
        let at = answered.now;
        let next_in = answered.next_at.map(|next_at| Duration::try_from(next_at - at).unwrap_or(Duration::ZERO));
        let behind = answered.slot_at.map(|slot_at| Duration::try_from(at - slot_at).unwrap_or(Duration::ZERO));
        let (locked, xid) = (answered.locked_rows.unwrap_or(0), answered.xid);
        let rows: Vec<Schedule> = rows
            .into_iter()
            .filter_map(|row| {
                Some(Schedule {
                    id: row.id?,
                    kind: row.kind?,
                    key: row.key,
                    subject: row.subject,
                    due_at: row.due_at?,
                    expires_at: row.expires_at,
                    payload: row.payload?,
                    headers: headers(&row.headers?),
                    attempts: count(row.attempts?),
                    failures: count(row.failures?),
                    refusals: count(row.refusals?),
                })
            })
            .collect();
        let due = locked == limit || usize::try_from(locked).is_ok_and(|locked| locked > rows.len());
        let (outlook, behind) = (Outlook { due, next_in }, behind.unwrap_or_default());
        let Some(xid) = xid else {
            transaction.end("ROLLBACK").await?;
            return Ok(Claimed { claim: None, outlook, behind, at, asked_at });
        };
        self.low_water.sample(Sample { at, xid }, doubt);
        let claim = Claim { transaction, clock: DatabaseClock::new(at, asked_at), rows };
        Ok(Claimed { claim: Some(claim), outlook, behind, at, asked_at })
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
