//! A claim: due rows, locked in one open transaction until it is settled. Dropping it rolls back, which leaves every
//! row as it was; so does a crash.
//!
//! The transaction waits for nobody: rows that others have locked are skipped.

use std::time::Duration;

use tidings_core::queue::Outlook;
use time::OffsetDateTime;
use tokio::time::Instant;

use crate::model::clock::DatabaseClock;
use crate::model::schedule::Schedule;
use crate::store::{Connection, Store, StoreError};

/// The payloads of one claim have at most this many bytes together, as JSON text, or it is a single row. Several claims are on
/// their way at once, and each holds its payloads, their bodies and the frames of these.
pub(crate) const CLAIM_BYTES: i64 = 2 * 1024 * 1024;

/// RowRef rows to claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// At most so many.
    pub limit: i64,
    /// Of those whose slot is at this time or later; `None` = of those of the last minute.
    pub since: Option<OffsetDateTime>,
    /// None that would have to go alone.
    pub no_large: bool,
}

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
    /// How long it took until it could be asked.
    pub begin: Duration,
}

/// Due rows, at least one, locked by us.
#[derive(Debug)]
pub struct Claim {
    pub(in crate::store) transaction: Transaction,
    clock: DatabaseClock,
    /// The rows, earliest first. The loop takes them out.
    pub rows: Vec<Schedule>,
    /// The number of the transaction, which it took after the database told its time.
    pub xid: i64,
    /// It is a row that goes alone, since its payload is larger than those of a claim may be together.
    pub large: bool,
}

/// A connection in a transaction. Dropped before its end, the connection is closed, and the server rolls back.
#[derive(Debug)]
pub(in crate::store) struct Transaction {
    pub(in crate::store) connection: Connection,
    open: bool,
}

impl Store {
    /// Locks due rows of `kinds`, but for those that are paused, and due rows of any kind that are past their deadline: those
    /// that have been due for longest, as many as are `wanted` and fit into [`CLAIM_BYTES`]. No more is read or locked, but for
    /// the first that does not fit. Before `not_before`, everything is made ready and nothing is asked.
    ///
    /// # Errors
    ///
    /// When the database cannot do it; then nothing is locked.
    pub async fn claim(&self, kinds: &[String], wanted: Wanted, not_before: Instant) -> Result<Claimed, StoreError> {
        let claimed = self.try_claim(kinds, wanted, not_before).await;
        if claimed.as_ref().is_err_and(StoreError::is_out_of_memory) {
            // A row's doing, perhaps, and so would it be the next time.
            self.park_unreadable().await?;
        }
        claimed
    }

    #[expect(clippy::too_many_lines, reason = "most of them are one statement")]
    async fn try_claim(&self, kinds: &[String], wanted: Wanted, not_before: Instant) -> Result<Claimed, StoreError> {
        let Wanted { limit, since, no_large } = wanted;
        let begun_at = Instant::now();
        let mut transaction = Transaction::begin(self.hot_connection().await?).await?;
        let begin = begun_at.elapsed();
        let early = not_before.saturating_duration_since(Instant::now());
        if !early.is_zero() {
            futures_timer::Delay::new(early).await;
        }
        let asked_at = Instant::now();
        let mut rows = transaction
            .connection
            .run("claim due rows", async |connection| {
                sqlx::query!(
                    r#"
                    -- A row has as many units as its payload needs of $2, which are CLAIM_BYTES together. The series makes one
                    -- after the other, and the LIMIT ends the scan with the last: what lies behind is neither read nor locked.
                    -- A row that does not fit has no last unit, and no payload; the first always fits.
                    SELECT
                        id AS "id?",
                        kind AS "kind?",
                        key AS "key?",
                        subject AS "subject?",
                        due_at AS "due_at?",
                        expires_at AS "expires_at?",
                        -- What is larger goes alone, and is read in pieces.
                        CASE WHEN unit = units AND octet_length(text) <= $3 THEN text END AS "payload?",
                        unit = units AS "fits?",
                        headers::text AS "headers?",
                        attempts AS "attempts?",
                        failures AS "failures?",
                        refusals AS "refusals?",
                        slot_at AS "slot_at?",
                        units AS "units?",
                        NULL AS "now?",
                        NULL AS "xid?",
                        NULL AS "next_at?"
                    FROM (
                        SELECT weighed.*, generate_series(1, units) AS unit
                        FROM (
                            SELECT
                                said.*,
                                CASE WHEN text IS NULL THEN $2::bigint ELSE least(1 + octet_length(text) * $2 / $3, $2) END AS units
                            FROM (
                                SELECT
                                    locked.*,
                                    -- How much is stored is known without reading it. Compressed, it may be little.
                                    CASE WHEN pg_column_size(payload) < $3 THEN payload::text END AS text
                                FROM (
                                    SELECT
                                        id, kind, key, subject, due_at, expires_at, payload, headers, attempts, failures,
                                        refusals, slot_at
                                    FROM tidings.schedules
                                    -- The clock must be a stable function to be compared with an index. The due time is
                                    -- checked as well: whatever happens to the slot, nothing is early.
                                    WHERE slot_at >= coalesce($4, statement_timestamp() - interval '1 minute')
                                        AND slot_at <= statement_timestamp()
                                        AND due_at <= statement_timestamp()
                                        AND (
                                            kind = ANY($1) AND kind <> ALL(ARRAY(SELECT kind FROM tidings.paused))
                                            OR expires_at <= statement_timestamp()
                                        )
                                        AND (
                                            NOT $5
                                            OR pg_column_size(payload)
                                                <= CASE WHEN pg_column_compression(payload) IS NULL THEN $3::bigint ELSE $3 / 128 END
                                        )
                                    ORDER BY slot_at
                                    FOR UPDATE SKIP LOCKED
                                ) AS locked
                                -- So that the text is made once.
                                OFFSET 0
                            ) AS said
                        ) AS weighed
                        LIMIT $2
                    ) AS taken
                    WHERE unit IN (1, units)
                    -- A claim without rows has an answer as well. This part comes last, when the number has been taken.
                    UNION ALL
                    SELECT
                        NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
                        statement_timestamp(),
                        pg_current_xact_id_if_assigned()::text::bigint,
                        least(
                            (
                                SELECT slot_at
                                FROM tidings.schedules
                                WHERE slot_at > statement_timestamp() AND slot_at < 'infinity'
                                ORDER BY slot_at
                                LIMIT 1
                            ),
                            (SELECT min(until) FROM tidings.paused)
                        )
                    "#,
                    kinds,
                    limit,
                    CLAIM_BYTES,
                    since,
                    no_large,
                )
                .fetch_all(connection)
                .await
            })
            .await?;

        let answered = rows.pop().expect("what is ahead, after the rows");
        let at = answered.now.expect("the time, which is never null");
        let next_in = answered.next_at.map(|next_at| Duration::try_from(next_at - at).unwrap_or(Duration::ZERO));
        let first_slot = rows.first().and_then(|row| row.slot_at);
        let behind = first_slot.map(|slot_at| Duration::try_from(at - slot_at).unwrap_or(Duration::ZERO));
        let is_cut = rows.last().is_some_and(|row| row.fits == Some(false));
        let units: i64 = rows.iter().filter(|row| row.fits == Some(true)).filter_map(|row| row.units).sum();
        let large = rows.iter().find(|row| row.fits == Some(true) && row.payload.is_none()).and_then(|row| row.id);
        let mut whole = None;
        if let Some(id) = large {
            whole = transaction.read_large(id).await?;
            if whole.is_none() {
                transaction.park(id, "its payload is too long as JSON text").await?;
            }
        }
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
                    payload: row.payload.or_else(|| if row.fits == Some(true) { whole.take() } else { None })?,
                    headers: headers(&row.headers?),
                    attempts: count(row.attempts?),
                    failures: count(row.failures?),
                    refusals: count(row.refusals?),
                })
            })
            .collect();
        let due = is_cut || units == limit;
        let (outlook, behind) = (Outlook { due, next_in }, behind.unwrap_or_default());
        let (Some(xid), false) = (answered.xid, rows.is_empty()) else {
            // Without a row nothing was changed, unless one was parked.
            transaction.end(if large.is_some() { "COMMIT" } else { "ROLLBACK" }).await?;
            return Ok(Claimed { claim: None, outlook, behind, at, asked_at, begin });
        };
        let claim = Claim { transaction, clock: DatabaseClock::new(at, asked_at), rows, xid, large: large.is_some() };
        Ok(Claimed { claim: Some(claim), outlook, behind, at, asked_at, begin })
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
    pub(in crate::store) async fn begin(mut connection: Connection) -> Result<Self, StoreError> {
        connection.run("begin to claim", async |connection| sqlx::query("BEGIN").execute(connection).await).await?;
        Ok(Self { connection, open: true })
    }

    /// Ends it with `COMMIT` or `ROLLBACK`.
    pub(in crate::store) async fn end(mut self, how: &'static str) -> Result<(), StoreError> {
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
pub(in crate::store) fn headers(json: &str) -> Vec<(String, String)> {
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
