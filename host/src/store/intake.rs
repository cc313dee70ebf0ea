//! What intakes ask of the queue: rows are written, removed and moved as messages say, in one transaction.
//!
//! Must never write a row for a redelivered message whose row is there, or was finished within the history.

use std::collections::HashSet;
use std::time::Duration;

use sqlx::PgConnection;
use tokio::time::Instant;
use uuid::Uuid;

use crate::model::clock::DatabaseClock;
use crate::model::intake::{NewRow, OnConflict, Step, Taken, Target, When};
use crate::store::queue::claim::Transaction;
use crate::store::{Store, StoreError};

/// How often a row that is to be kept, and is gone when it is looked for, is written again.
const TRIES: usize = 4;

/// An instant as the statements take it: at `at`, or else so long after the message was received or sent.
struct Instants {
    at: Vec<Option<f64>>,
    delays: Vec<f64>,
    sent: Vec<Option<f64>>,
}

impl Instants {
    fn of(instants: impl Iterator<Item = When>) -> Self {
        let mut columns = Self { at: Vec::new(), delays: Vec::new(), sent: Vec::new() };
        for when in instants {
            let (at, delay_ms, sent) = match when {
                When::At(at_ms) => (Some(seconds(at_ms)), 0, None),
                When::After(delay_ms) => (None, delay_ms, None),
                // The publisher may have published at the end of that second, and a row is never early.
                When::AfterSent { delay_ms, sent } => (None, delay_ms, Some(seconds(sent.saturating_add(1) * 1_000))),
            };
            columns.at.push(at);
            columns.delays.push(seconds(delay_ms));
            columns.sent.push(sent);
        }
        columns
    }
}

#[expect(clippy::cast_precision_loss, reason = "milliseconds until the year 9999 have 48 bits")]
fn seconds(ms: i64) -> f64 {
    ms as f64 / 1_000.0
}

impl Store {
    /// The database's clock.
    ///
    /// # Errors
    ///
    /// When the database does not answer.
    pub async fn clock(&self) -> Result<DatabaseClock, StoreError> {
        let mut connection = self.connection().await?;
        let asked_at = Instant::now();
        let now = connection
            .run("say what time it is", async |connection| {
                sqlx::query_scalar!(r#"SELECT clock_timestamp() AS "now!""#).fetch_one(connection).await
            })
            .await?;
        Ok(DatabaseClock::new(now, asked_at))
    }

    /// Carries out the requests in `steps`, which are `count` together, and returns what became of each, in the order of their
    /// places. They were received `age` ago.
    ///
    /// # Errors
    ///
    /// When the database cannot do it. Then nothing was done, unless the commit failed. [`StoreError::fault_of_values`] says whether
    /// one of the requests is the cause.
    pub async fn take_in(&self, steps: &[Step<'_>], count: usize, age: Duration) -> Result<Vec<Taken>, StoreError> {
        let mut taken = vec![Taken::Kept; count];
        let mut connection = self.connection().await?;
        if let [step] = steps
            && step.is_one_statement()
        {
            // It is a transaction by itself, which saves two round trips.
            let run = async |session: &mut PgConnection| carry_out(session, step, age, &mut taken).await;
            connection.run("write rows of an intake", run).await?;
            return Ok(taken);
        }
        let mut transaction = Transaction::begin(connection).await?;
        for step in steps {
            let run = async |session: &mut PgConnection| carry_out(session, step, age, &mut taken).await;
            transaction.connection.run("write rows of an intake", run).await?;
        }
        transaction.end("COMMIT").await?;
        Ok(taken)
    }
}

async fn carry_out(
    session: &mut PgConnection,
    step: &Step<'_>,
    age: Duration,
    taken: &mut [Taken],
) -> Result<(), sqlx::Error> {
    for (at, target) in &step.cancel {
        taken[*at] = Taken::Changed(cancel(session, target).await?);
    }
    for (at, target, when) in &step.reschedule {
        taken[*at] = Taken::Changed(reschedule(session, target, *when, age).await?);
    }
    for (rows, replace) in [(&step.same, false), (&step.replace, true)] {
        if rows.is_empty() {
            continue;
        }
        let written = insert(session, rows.iter().map(|(_, row)| *row), replace, age).await?;
        for (at, row) in rows {
            // A row without an id of its message finds nothing that could be the same.
            let is_written = row.id.is_none_or(|id| written.contains(&id));
            taken[*at] = if is_written { Taken::Scheduled } else { Taken::Kept };
        }
    }
    for (at, row) in &step.careful {
        taken[*at] = insert_carefully(session, row, age).await?;
    }
    Ok(())
}

/// Writes rows, and returns the ids of those that were written. If the key of a row is taken, it gives way or, with `replace`,
/// takes the place of the other.
async fn insert(
    session: &mut PgConnection,
    rows: impl Iterator<Item = &NewRow> + Clone,
    replace: bool,
    age: Duration,
) -> Result<HashSet<Uuid>, sqlx::Error> {
    let ids: Vec<Option<Uuid>> = rows.clone().map(|row| row.id).collect();
    let redelivered: Vec<bool> = rows.clone().map(|row| row.redelivered).collect();
    let kinds: Vec<&str> = rows.clone().map(|row| &*row.kind).collect();
    let keys: Vec<Option<&str>> = rows.clone().map(|row| row.key.as_deref()).collect();
    let subjects: Vec<Option<&str>> = rows.clone().map(|row| row.subject.as_deref()).collect();
    let Instants { at, delays, sent } = Instants::of(rows.clone().map(|row| row.due));
    let expires: Vec<Option<f64>> = rows.clone().map(|row| row.expires_ms.map(seconds)).collect();
    let expires_after: Vec<Option<f64>> = rows.clone().map(|row| row.expires_after_ms.map(seconds)).collect();
    let priorities: Vec<i16> = rows.clone().map(|row| row.priority.into()).collect();
    let payloads: Vec<&str> = rows.clone().map(|row| &*row.payload).collect();
    let headers: Vec<&str> = rows.map(|row| &*row.headers).collect();
    let written = sqlx::query_file_scalar!(
        "src/store/intake.sql",
        &ids as &[Option<Uuid>],
        &redelivered,
        &kinds as &[&str],
        &keys as &[Option<&str>],
        &subjects as &[Option<&str>],
        &at as &[Option<f64>],
        &delays,
        &sent as &[Option<f64>],
        &expires as &[Option<f64>],
        &expires_after as &[Option<f64>],
        &payloads as &[&str],
        &headers as &[&str],
        age.as_secs_f64(),
        replace,
        &priorities,
    );
    written.fetch_all(session).await.map(|written| written.into_iter().collect())
}

/// Writes a row unless its key is taken. A row in delivery that has the key is waited for, as `tidings.schedule` does.
async fn insert_carefully(session: &mut PgConnection, row: &NewRow, age: Duration) -> Result<Taken, sqlx::Error> {
    for _ in 0..TRIES {
        let own = || uuid::Builder::from_random_bytes(fastrand::u128(..).to_ne_bytes()).into_uuid();
        let one = NewRow { id: Some(row.id.unwrap_or_else(own)), ..row.clone() };
        if !insert(session, std::iter::once(&one), false, age).await?.is_empty() {
            return Ok(Taken::Scheduled);
        }
        let other = sqlx::query_scalar!(
            r#"
            WITH patience AS MATERIALIZED (SELECT set_config('lock_timeout', '18s', true))
            SELECT id FROM tidings.schedules, patience WHERE kind = $1 AND key = $2 FOR KEY SHARE OF schedules
            "#,
            row.kind,
            row.key,
        );
        match other.fetch_optional(&mut *session).await? {
            // It was delivered or cancelled meanwhile; or the message is a redelivered one, and its row was.
            None if row.redelivered => return Ok(Taken::Kept),
            None => {}
            Some(id) if row.on_conflict == OnConflict::Error && row.id != Some(id) => {
                let (kind, key) = (&row.kind, row.key.as_deref().unwrap_or_default());
                return Ok(Taken::Refused(format!("key {key:?} of kind {kind:?} is already scheduled, with id {id}")));
            }
            Some(_) => return Ok(Taken::Kept),
        }
    }
    let (kind, key) = (&row.kind, row.key.as_deref().unwrap_or_default());
    Ok(Taken::Refused(format!(
        "the row of key {key:?} of kind {kind:?} was not written: another row has its id, or its key was taken and set free {TRIES} \
         times meanwhile; publish it again, with an id of its own"
    )))
}

async fn cancel(session: &mut PgConnection, target: &Target) -> Result<u64, sqlx::Error> {
    let (kind, key, subject) = target.columns();
    let cancelled = sqlx::query!(
        r#"
        WITH patience AS MATERIALIZED (SELECT set_config('lock_timeout', '18s', true))
        DELETE FROM tidings.schedules USING patience WHERE kind = $1 AND key = $2 OR subject = $3
        "#,
        kind,
        key,
        subject,
    );
    cancelled.execute(session).await.map(|done| done.rows_affected())
}

async fn reschedule(
    session: &mut PgConnection,
    target: &Target,
    when: When,
    age: Duration,
) -> Result<u64, sqlx::Error> {
    let (kind, key, subject) = target.columns();
    let Instants { at, delays, sent } = Instants::of(std::iter::once(when));
    let moved = sqlx::query!(
        r#"
        WITH settings AS MATERIALIZED (
            SELECT
                set_config('lock_timeout', '18s', true),
                set_config('tidings.notify', 'on', true),
                coalesce(
                    to_timestamp($4),
                    least(clock_timestamp() - make_interval(secs => $7), to_timestamp($6)) + make_interval(secs => $5)
                ) AS due_at
        )
        UPDATE tidings.schedules SET id = tidings.uuid_v7(), due_at = settings.due_at FROM settings
        WHERE kind = $1 AND key = $2 OR subject = $3
        "#,
        kind,
        key,
        subject,
        at[0],
        delays[0],
        sent[0],
        age.as_secs_f64(),
    );
    moved.execute(session).await.map(|done| done.rows_affected())
}
