//! A claim: due rows, locked in one open transaction until it is settled. Dropping the claim closes its connection, and
//! the server rolls back, which leaves every row as it was; so does a crash.
//!
//! Must never wait for a lock: rows that another transaction has locked are skipped.
//!
//! **Size.** A claim is limited in bytes of JSON text, counted while PostgreSQL reads the rows, since a compressed
//! payload can be far longer as text than as it is stored. A row that does not fit is neither read nor locked, except
//! the first such row, which shows that there are more. A row that is larger than a whole claim goes alone. Only one
//! such row is delivered at a time, and the other lanes skip further ones meanwhile. A row is parked if its payload is
//! longer than 32 MiB as text, or if PostgreSQL cannot write it as text at all (`large_payload.rs`).
//!
//! **Age.** PostgreSQL ends a transaction in which nothing has happened for 30 s, and then another daemon may deliver
//! its rows. So before a delivery publishes the rows of a claim that is older than 5 s, it checks that the transaction
//! still lives ([`Claim::confirm_held`]): a daemon that was frozen must not publish what another may have published.
//!
//! **Turns.** A claim of rows whose turn has come locks their lines as well (`turns.rs`), so no other claim takes of them meanwhile.

use std::time::Duration;

use sqlx::{FromRow, PgConnection};
use tidings_core::queue::Outlook;
use time::OffsetDateTime;
use time::macros::datetime;
use tokio::time::Instant;
use uuid::Uuid;

use crate::model::clock::DatabaseClock;
use crate::model::schedule::{DEFAULT_PRIORITY, Schedule};
use crate::store::queue::commit_time::CommitTime;
use crate::store::queue::prepared::Message;
use crate::store::queue::settlement::{History, Settling};
use crate::store::queue::turns::{Line, Turns};
use crate::store::{Connection, Store, StoreError};

/// The most bytes of JSON text that the payloads of one claim have together, unless it is a single row. Several claims
/// are delivered at once, and each holds its payloads, the bodies of its messages and their frames in memory.
pub(crate) const CLAIM_BYTES: i64 = 2 * 1024 * 1024;

/// Which rows to claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Where they wait.
    pub rows: Rows,
    /// At most this many rows.
    pub limit: i64,
    /// No row that is so large that it would have to go alone.
    pub no_large: bool,
}

/// Where rows wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// In the queue, due now.
    Due {
        /// Only rows whose slot is at this time or later; `None` = only those of the last minute.
        since: Option<OffsetDateTime>,
        /// Which of them come first.
        order: Order,
    },
    /// In lines whose turn has come.
    Turns,
}

/// Which of the due rows a claim takes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Those that have been due for longest.
    Slot,
    /// Those that have been due for longest, among the first 20,000: many of them may be of limited kinds, which this claim does not
    /// take.
    BoundedSlot,
    /// Equally many of each kind, and of each kind those that have been due for longest, a step of priority counting like a minute. No
    /// row of another kind is read, so none whose deadline has passed.
    Kind,
}

/// The result of a claim.
#[derive(Debug)]
pub struct Claimed {
    /// The rows; `None` = no wanted row was free.
    pub claim: Option<Claim>,
    /// Whether more rows are due than were claimed, and when the next row becomes due; for turns, when another line has one.
    pub outlook: Outlook,
    /// For how long the row had been due that was due first.
    pub behind: Duration,
    /// The database's time.
    pub at: OffsetDateTime,
    /// When the statement was sent.
    pub asked_at: Instant,
}

/// Due rows, at least one, locked by us.
#[derive(Debug)]
pub struct Claim {
    pub(in crate::store) transaction: Transaction,
    clock: DatabaseClock,
    pub(in crate::store) commit_time: CommitTime,
    /// Which of its rows are written into the history.
    pub(in crate::store) history: History,
    /// The rows, in the order of [`Order`]. The delivery takes them out.
    pub rows: Vec<Schedule>,
    /// The number of the transaction, assigned after the database read the time of the claim.
    pub xid: i64,
    /// The lines that its rows come from, locked by us. A line may have no row here, because it is empty.
    pub(in crate::store) lines: Vec<Line>,
    /// It is a single row whose payload is larger than all payloads of a claim may be together.
    pub large: bool,
}

/// One row of the answer to a claim, or its last line, which has only the columns from `now` on.
#[derive(FromRow)]
struct ClaimedRow {
    id: Option<Uuid>,
    kind: Option<String>,
    key: Option<String>,
    subject: Option<String>,
    due_at: Option<BinaryTime>,
    expires_at: Option<BinaryTime>,
    payload: Option<String>,
    fits: Option<bool>,
    headers: Option<String>,
    attempts: Option<i32>,
    failures: Option<i32>,
    refusals: Option<i32>,
    slot_at: Option<BinaryTime>,
    untried_since: Option<BinaryTime>,
    recurrence: Option<String>,
    nominal_at: Option<BinaryTime>,
    units: Option<i64>,
    line: Option<String>,
    priority: Option<i16>,
    now: Option<BinaryTime>,
    xid: Option<i64>,
    next_at: Option<BinaryTime>,
    lines: Option<String>,
    shares: Option<String>,
}

/// A time as PostgreSQL sends it in binary form.
#[derive(Clone, Copy, sqlx::Type)]
#[sqlx(transparent)]
struct BinaryTime([u8; 8]);

impl BinaryTime {
    fn get(self) -> OffsetDateTime {
        // Microseconds since the beginning of the year 2000 (source: PostgreSQL's documentation, date/time types).
        datetime!(2000-01-01 00:00 UTC) + time::Duration::microseconds(i64::from_be_bytes(self.0))
    }
}

/// A connection in a transaction. If it is dropped before its end, the connection is closed, and the server rolls back.
#[derive(Debug)]
pub(in crate::store) struct Transaction {
    pub(in crate::store) connection: Connection,
    open: bool,
}

impl Store {
    /// Locks due rows, in the order that is `wanted`, as many as are `wanted` and fit into [`CLAIM_BYTES`]: rows of `kinds` that
    /// are not paused, and, unless the order is [`Order::Kind`], rows of any kind whose deadline has passed. No other row is
    /// locked, except the first that does not fit. The transaction begins with the claim.
    ///
    /// # Errors
    ///
    /// When the database cannot do it; then no row is locked.
    pub async fn claim(&self, kinds: &[String], wanted: Wanted) -> Result<Claimed, StoreError> {
        let claimed = self.try_claim(kinds, wanted).await;
        if claimed.as_ref().is_err_and(StoreError::is_out_of_memory) {
            // The cause may be a row's payload, and then the next claim would fail for it as well.
            self.park_unreadable().await?;
        }
        claimed
    }

    async fn try_claim(&self, kinds: &[String], wanted: Wanted) -> Result<Claimed, StoreError> {
        let Settling { history, synchronous_commit } = self.settling;
        let message = Message::claim(kinds, wanted, synchronous_commit).into_sql();
        let mut connection = self.warm_connection().await?;
        let asked_at = Instant::now();
        let claim = async |session: &mut PgConnection| {
            let rows = sqlx::raw_sql(message).fetch_all(session).await?;
            let rows = rows.iter().skip(usize::from(wanted.rows == Rows::Turns));
            rows.map(ClaimedRow::from_row).collect::<Result<Vec<_>, _>>()
        };
        let mut rows = connection.run("claim due rows", claim).await?;
        let mut transaction = Transaction { connection, open: true };

        let summary = rows.pop().expect("the statement ends with a row without an id");
        let at = summary.now.expect("the clock is never null").get();
        let next_in = summary.next_at.map(|next_at| Duration::try_from(next_at.get() - at).unwrap_or(Duration::ZERO));
        let lines = summary.lines.map_or_else(Vec::new, |lines| Line::read(&lines));
        let first_slot = rows.iter().filter_map(|row| row.slot_at).map(BinaryTime::get).min();
        let behind = first_slot.map(|slot_at| Duration::try_from(at - slot_at).unwrap_or(Duration::ZERO));
        let is_cut = rows.last().is_some_and(|row| row.fits == Some(false));
        let units: i64 = rows.iter().filter(|row| row.fits == Some(true)).filter_map(|row| row.units).sum();
        let large = rows.iter().find(|row| row.fits == Some(true) && row.payload.is_none()).and_then(|row| row.id);
        let mut large_payload = None;
        if let Some(id) = large {
            large_payload = transaction.read_large(id).await?;
            if large_payload.is_none() {
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
                    due_at: row.due_at?.get(),
                    expires_at: row.expires_at.map(BinaryTime::get),
                    payload: row
                        .payload
                        .or_else(|| if row.fits == Some(true) { large_payload.take() } else { None })?,
                    headers: parse_headers(&row.headers?),
                    attempts: to_u32(row.attempts?),
                    failures: to_u32(row.failures?),
                    refusals: to_u32(row.refusals?),
                    untried_since: row.untried_since.map(BinaryTime::get),
                    recurrence: row.recurrence,
                    nominal_at: row.nominal_at.map(BinaryTime::get),
                    line: row.line,
                    priority: u8::try_from(row.priority?).unwrap_or(DEFAULT_PRIORITY),
                })
            })
            .collect();
        let due = is_cut || units == wanted.limit || has_full_share(&rows, summary.shares.as_deref());
        let (outlook, behind) = (Outlook { due, next_in }, behind.unwrap_or_default());
        let (Some(xid), false) = (summary.xid, rows.is_empty()) else {
            // Without rows there is nothing to commit, unless a row was parked, or a line is empty.
            if let Some(turn) = Turns::of(&lines, &[], DatabaseClock::new(at, asked_at)).message() {
                transaction.end_with(turn.and_commit(None)).await?;
            } else {
                transaction.end(if large.is_some() { "COMMIT" } else { "ROLLBACK" }).await?;
            }
            return Ok(Claimed { claim: None, outlook, behind, at, asked_at });
        };
        let (clock, commit_time) = (DatabaseClock::new(at, asked_at), self.commit_time.clone());
        let claim = Claim { transaction, clock, commit_time, history, rows, xid, lines, large: large.is_some() };
        Ok(Claimed { claim: Some(claim), outlook, behind, at, asked_at })
    }
}

impl Claim {
    /// Checks that the transaction still holds its rows, after a time in which the server may have ended the session.
    ///
    /// # Errors
    ///
    /// When it does not.
    pub async fn confirm_held(&mut self) -> Result<(), StoreError> {
        let connection = &mut self.transaction.connection;
        let ping = async |connection: &mut sqlx::PgConnection| sqlx::query("SELECT 1").execute(connection).await;
        connection.run("say whether a claim still holds", ping).await.map(drop)
    }

    /// The database clock, as of this claim.
    #[must_use]
    pub fn clock(&self) -> DatabaseClock {
        self.clock
    }
}

impl Transaction {
    pub(in crate::store) async fn begin(mut connection: Connection) -> Result<Self, StoreError> {
        connection.run("begin a claim", async |connection| sqlx::query("BEGIN").execute(connection).await).await?;
        Ok(Self { connection, open: true })
    }

    /// Ends it with `COMMIT` or `ROLLBACK`.
    pub(in crate::store) async fn end(mut self, how: &'static str) -> Result<(), StoreError> {
        self.connection.run("end a claim", async |connection| sqlx::query(how).execute(connection).await).await?;
        self.open = false;
        Ok(())
    }

    /// Sends a message that ends with the commit.
    pub(in crate::store) async fn end_with(mut self, finish: Message) -> Result<(), StoreError> {
        let finish = finish.into_sql();
        self.connection.run("finish rows", async |connection| sqlx::raw_sql(finish).execute(connection).await).await?;
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

/// Parses the headers of a row. A constraint of the table ensures that they are an object of strings.
#[must_use]
pub fn parse_headers(json: &str) -> Vec<(String, String)> {
    if json == "{}" {
        return Vec::new();
    }
    let object: std::collections::BTreeMap<String, String> =
        serde_json::from_str(json).expect("a CHECK of tidings.schedules admits only objects of strings");
    object.into_iter().collect()
}

/// Whether a claim got as many rows of a kind and priority as it wanted, or wanted none although there were some, so there may be
/// more. `shares` is from its answer: of each kind and priority that has rows, how many it wanted.
fn has_full_share(rows: &[Schedule], shares: Option<&str>) -> bool {
    let Some(shares) = shares else { return false };
    let shares: Vec<(String, u8, usize)> = serde_json::from_str(shares).expect("the statement of the claim makes it");
    shares.iter().any(|(kind, priority, share)| {
        rows.iter().filter(|row| row.kind == *kind && row.priority == *priority).count() >= *share
    })
}

fn to_u32(number: i32) -> u32 {
    u32::try_from(number).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_headers_of_a_row_are_read_from_its_json() {
        assert_eq!(parse_headers("{}"), []);
        assert_eq!(parse_headers(r#"{"b": "2", "a": "\u00e9"}"#), [("a".into(), "é".into()), ("b".into(), "2".into())]);
    }

    proptest! {
        #[test]
        fn headers_are_read_with_the_names_and_values_they_were_written_with(
            object in proptest::collection::btree_map("\\PC{0,9}|(.|\n){0,9}", "\\PC{0,20}|(.|\n){0,20}", 0..6),
        ) {
            let listed: Vec<(String, String)> = object.clone().into_iter().collect();
            let written = serde_json::to_string(&object).expect("strings");
            prop_assert_eq!(parse_headers(&written), listed.clone());
            // PostgreSQL may write the same object escaped, with spaces, and in another order.
            let text = |text: &String| {
                let units: Vec<String> = text.encode_utf16().map(|unit| format!("\\u{unit:04x}")).collect();
                format!("\"{}\"", units.concat())
            };
            let entries: Vec<String> = object.iter().rev().map(|(name, value)| format!("{}: {}", text(name), text(value))).collect();
            prop_assert_eq!(parse_headers(&format!("{{{}}}", entries.join(", "))), listed);
        }
    }
}
