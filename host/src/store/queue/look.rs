//! A look at the head of the queue: whether rows are due, when the next one will be, and which held rows this daemon
//! must release. It also tells when the next occurrences are to be made, and which kinds are not caught up with. It costs the same few index pages however many rows wait and were delivered. It must never lock or
//! change a row.

use std::time::Duration;

use tidings_core::queue::{Below, Look, Outlook, PROMISE, Promise};
use time::OffsetDateTime;

use crate::store::queue::sweep::BACKLOG_ROWS;
use crate::store::{Connection, Store, StoreError};

/// Promises that every daemon looks at the queue every few milliseconds for the time [`PROMISE`], so that the triggers
/// need not notify (`host/core/src/polling.rs`). Kept in a sequence, which all transactions see at once.
///
/// The promise binds all daemons, since each of them may be the only one that serves its kinds; so it is notified. And
/// it is short, so that it ends soon if this daemon dies.
///
/// # Errors
///
/// When the database cannot do it.
pub(super) async fn promise_to_poll(connection: impl sqlx::PgExecutor<'_>) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "SELECT
            setval('tidings.polling_until', ((extract(epoch FROM clock_timestamp()) + $1::float8) * 1e6)::bigint),
            pg_notify('tidings', '')",
        PROMISE.as_secs_f64(),
    )
    .fetch_one(connection)
    .await
    .map(drop)
}

/// What a look saw.
#[derive(Clone, Debug)]
pub struct Seen {
    /// What the scheduler decides by.
    pub look: Look,
    /// Time until a recurrence must be looked at; `None` = there is none.
    pub make_in: Option<Duration>,
    /// For how long the rows of some kinds may have been due when they are claimed.
    pub catch_ups: Vec<(String, Duration)>,
}

/// What a look is for, in errors.
pub(super) const LOOK: &str = "look at the queue";

/// Looks at the queue; a `sweep` looks below the mark as well.
pub(super) async fn read(
    connection: impl sqlx::PgExecutor<'_>,
    kinds: &[String],
    mark: Option<OffsetDateTime>,
    sweep: bool,
) -> Result<Seen, sqlx::Error> {
    let row =
        sqlx::query_file!("src/store/queue/look.sql", kinds, mark, sweep, BACKLOG_ROWS).fetch_one(connection).await?;
    let until = |at: OffsetDateTime| Duration::try_from(at - row.now).unwrap_or(Duration::ZERO);
    let (next_in, make_in) = (row.next_at.map(until), row.make_at.map(until));
    let missed_after =
        row.missed_after.into_iter().map(|time| Duration::try_from_secs_f64(time).unwrap_or(Duration::MAX));
    let look = Look {
        at: row.now,
        from: row.mark,
        first: row.first_at,
        oldest_xid: row.oldest_xid,
        outlook: Outlook { due: row.due, next_in },
        held_for_us: row.held_for_us,
        not_claimable_first: row.not_claimable_first,
        has_limits: row.has_limits,
        turn_in: row.turn_at.map(until),
        promise: Promise { until: row.polling_until, next_xid: row.next_xid },
        below: row.below_first.map(|first| Below { first, rows: row.below_rows, go_back: true }),
    };
    Ok(Seen { look, make_in, catch_ups: row.missed_kinds.into_iter().zip(missed_after).collect() })
}

impl Store {
    /// Looks at the head of the queue, from the low-water mark on, in one statement without a transaction. It must
    /// begin after the wake was armed.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn look(&self, kinds: &[String], mark: Option<OffsetDateTime>) -> Result<Seen, StoreError> {
        self.look_from(kinds, mark, false, self.warm_connection().await?).await
    }

    /// Does the same; a `sweep` looks below the mark as well.
    pub(in crate::store) async fn look_from(
        &self,
        kinds: &[String],
        mark: Option<OffsetDateTime>,
        sweep: bool,
        mut connection: Connection,
    ) -> Result<Seen, StoreError> {
        let read = async |connection: &mut sqlx::PgConnection| read(connection, kinds, mark, sweep).await;
        connection.run(LOOK, read).await
    }

    /// For how long the first row of the queue, from the low-water mark on if there is one, has been due; 0 = no row is
    /// due. A row that is held or backing off does not count: its slot lies ahead.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn overdue(&self) -> Result<Duration, StoreError> {
        let mark = self.low_water_mark();
        let mut connection = self.connection().await?;
        let seconds = connection
            .run("measure how late the first row is", async |connection| {
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
