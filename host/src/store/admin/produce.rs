//! Schedules and cancels rows by hand, as an application would: through the functions of the schema, with a
//! notification, and with a lock timeout that is long enough for a claim in flight to end.

use std::time::Duration;

use time::OffsetDateTime;
use uuid::Uuid;

use crate::store::{Store, StoreError};

/// A row to schedule.
#[derive(Clone, Debug)]
pub struct NewSchedule {
    /// Its kind.
    pub kind: String,
    /// When it is due; `Err` = this long from now, by the database clock.
    pub due: Result<OffsetDateTime, Duration>,
    /// Its key, if it has one.
    pub key: Option<String>,
    /// Its subject, if it has one.
    pub subject: Option<String>,
    /// Its deadline, if it has one; `Err` = this long after its due time.
    pub expires: Option<Result<OffsetDateTime, Duration>>,
    /// Its payload, as JSON text.
    pub payload: String,
    /// Its headers, as a JSON object of strings.
    pub headers: String,
    /// What to do if its key is taken by a pending row: `replace`, `keep` or `error`.
    pub on_conflict: &'static str,
    /// It is due later by a part of this, which follows from its key.
    pub spread: Duration,
    /// Which of the rows that are due goes first, from 0 to 9.
    pub priority: i32,
}

impl Store {
    /// Schedules a row. Returns its id or, if `keep` kept another row, that row's id.
    ///
    /// # Errors
    ///
    /// When the database cannot do it, or a value breaks a rule of the schema.
    pub async fn schedule(&self, new: &NewSchedule) -> Result<Uuid, StoreError> {
        let (due_at, due_in) = (new.due.ok(), new.due.err().map(|time| time.as_secs_f64()));
        let expires_at = new.expires.and_then(Result::ok);
        let expires_in = new.expires.and_then(Result::err).map(|time| time.as_secs_f64());
        let mut connection = self.connection().await?;
        connection
            .run("schedule a row", async |connection| {
                sqlx::query_scalar!(
                    r#"
                    -- Our own statements do without a notification, and give up waiting for a lock after 5 s; a claim may
                    -- keep one for 15 s.
                    WITH settings AS MATERIALIZED (
                        SELECT
                            set_config('tidings.notify', 'on', true),
                            set_config('lock_timeout', '18s', true),
                            coalesce($2, clock_timestamp() + $3::float8 * interval '1 second') AS due_at
                    )
                    SELECT tidings.schedule(
                        kind => $1,
                        due_at => due_at,
                        payload => ($4::text)::jsonb,
                        key => $5,
                        subject => $6,
                        expires_at => coalesce($7, due_at + $8::float8 * interval '1 second'),
                        headers => ($9::text)::jsonb,
                        on_conflict => $10,
                        spread => $11::float8 * interval '1 second',
                        priority => $12
                    ) AS "id!"
                    FROM settings
                    "#,
                    new.kind,
                    due_at,
                    due_in,
                    new.payload,
                    new.key,
                    new.subject,
                    expires_at,
                    expires_in,
                    new.headers,
                    new.on_conflict,
                    new.spread.as_secs_f64(),
                    new.priority,
                )
                .fetch_one(connection)
                .await
            })
            .await
    }

    /// Removes the pending row with this kind and key. Returns whether there was one.
    ///
    /// # Errors
    ///
    /// When the database cannot do it.
    pub async fn cancel(&self, kind: &str, key: &str) -> Result<bool, StoreError> {
        let mut connection = self.connection().await?;
        connection
            .run("cancel a row", async |connection| {
                sqlx::query_scalar!(
                    r#"
                    WITH settings AS MATERIALIZED (SELECT set_config('lock_timeout', '18s', true))
                    SELECT tidings.cancel($1, $2) AS "cancelled!" FROM settings
                    "#,
                    kind,
                    key,
                )
                .fetch_one(connection)
                .await
            })
            .await
    }

    /// Removes every pending row about `subject`. Returns how many there were.
    ///
    /// # Errors
    ///
    /// When the database cannot do it.
    pub async fn cancel_subject(&self, subject: &str) -> Result<i64, StoreError> {
        let mut connection = self.connection().await?;
        connection
            .run("cancel the rows of a subject", async |connection| {
                sqlx::query_scalar!(
                    r#"
                    WITH settings AS MATERIALIZED (SELECT set_config('lock_timeout', '18s', true))
                    SELECT tidings.cancel_subject($1) AS "cancelled!" FROM settings
                    "#,
                    subject,
                )
                .fetch_one(connection)
                .await
            })
            .await
    }
}
