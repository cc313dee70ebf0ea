//! Recurrences, for people: makes, lists, stops, pauses and resumes them.

use std::time::Duration;

use time::OffsetDateTime;

use crate::model::recurrence::{CatchUp, Recurrence, RecurrenceCounts};
use crate::store::{COUNT_LIMIT, Store, StoreError};

/// A recurrence to make or to change.
#[derive(Clone, Debug)]
pub struct NewRecurrence {
    /// Its name.
    pub name: String,
    /// The kind of its occurrences.
    pub kind: String,
    /// Its rule.
    pub rule: String,
    /// The name of its time zone.
    pub time_zone: String,
    /// The payload of its occurrences, as JSON text.
    pub payload: String,
    /// The subject of its occurrences, if they have one.
    pub subject: Option<String>,
    /// The headers of its occurrences, as a JSON object of strings.
    pub headers: String,
    /// How long an occurrence lives.
    pub expires_after: Option<Duration>,
    /// `latest`, `all` or `none`.
    pub catch_up: &'static str,
    /// Instants that were missed for longer than this are not made.
    pub catch_up_within: Option<Duration>,
    /// Occurrences are due later by a part of this.
    pub spread: Duration,
    /// No instant is before this.
    pub starts_at: Option<OffsetDateTime>,
    /// No instant is after this.
    pub ends_at: Option<OffsetDateTime>,
    /// So many occurrences are made, and no more.
    pub max_count: Option<i64>,
    /// Which of its occurrences and of other rows that are due goes first, from 0, the last, to 9.
    pub priority: i32,
    /// What to do if the name is taken: `replace`, `keep` or `error`.
    pub on_conflict: &'static str,
}

/// Which recurrences to list.
#[derive(Clone, Copy, Debug, Default)]
pub struct RecurrenceFilter<'a> {
    /// Only these.
    pub names: Option<&'a [String]>,
    /// Only those of this kind.
    pub kind: Option<&'a str>,
    /// Only those whose names come after this.
    pub after: Option<&'a str>,
}

impl Store {
    /// Makes or changes a recurrence. Returns its first instant; `None` = a daemon has yet to compute it.
    ///
    /// # Errors
    ///
    /// When the database cannot do it, or a value breaks a rule of the schema.
    pub async fn repeat(&self, new: &NewRecurrence) -> Result<Option<OffsetDateTime>, StoreError> {
        let seconds = |time: Duration| time.as_secs_f64();
        let mut connection = self.connection().await?;
        connection
            .run("make a recurrence", async |connection| {
                sqlx::query_scalar!(
                    r#"
                    WITH settings AS MATERIALIZED (
                        SELECT set_config('tidings.notify', 'on', true), set_config('lock_timeout', '18s', true)
                    )
                    SELECT tidings.repeat(
                        name => $1, kind => $2, rule => $3, time_zone => $4, payload => ($5::text)::jsonb, subject => $6,
                        headers => ($7::text)::jsonb, expires_after => $8::float8 * interval '1 second', catch_up => $9,
                        catch_up_within => $10::float8 * interval '1 second', spread => $11::float8 * interval '1 second',
                        starts_at => $12, ends_at => $13, max_count => $14, on_conflict => $15, priority => $16
                    )
                    FROM settings
                    "#,
                    new.name,
                    new.kind,
                    new.rule,
                    new.time_zone,
                    new.payload,
                    new.subject,
                    new.headers,
                    new.expires_after.map(seconds),
                    new.catch_up,
                    new.catch_up_within.map(seconds),
                    seconds(new.spread),
                    new.starts_at,
                    new.ends_at,
                    new.max_count,
                    new.on_conflict,
                    new.priority,
                )
                .fetch_one(connection)
                .await
            })
            .await
    }

    /// Removes a recurrence, and its occurrences that wait. Returns whether there was one.
    ///
    /// # Errors
    ///
    /// When the database cannot do it.
    pub async fn stop_repeating(&self, name: &str) -> Result<bool, StoreError> {
        let mut connection = self.connection().await?;
        connection
            .run("stop a recurrence", async |connection| {
                sqlx::query_scalar!(
                    r#"
                    WITH settings AS MATERIALIZED (SELECT set_config('lock_timeout', '18s', true))
                    SELECT tidings.stop_repeating($1) AS "stopped!" FROM settings
                    "#,
                    name,
                )
                .fetch_one(connection)
                .await
            })
            .await
    }

    /// Pauses a recurrence, or lets it go on. What it made and is not due yet is taken back. Returns whether that changed
    /// something; `None` = there is no such recurrence.
    ///
    /// # Errors
    ///
    /// When the database cannot do it.
    pub async fn pause_recurrence(&self, name: &str, paused: bool) -> Result<Option<bool>, StoreError> {
        let mut connection = self.connection().await?;
        connection
            .run("pause or resume a recurrence", async |connection| {
                sqlx::query_scalar!(
                    r#"
                    WITH settings AS MATERIALIZED (
                        SELECT set_config('tidings.notify', 'on', true), set_config('lock_timeout', '18s', true)
                    )
                    SELECT tidings.pause_recurrence($1, $2) FROM settings
                    "#,
                    name,
                    paused,
                )
                .fetch_one(connection)
                .await
            })
            .await
    }

    /// Lists recurrences by name, at most so many.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn recurrences(&self, filter: RecurrenceFilter<'_>, limit: i64) -> Result<Vec<Recurrence>, StoreError> {
        let mut connection = self.connection().await?;
        let rows = connection
            .run("list the recurrences", async |connection| {
                sqlx::query!(
                    r#"
                    SELECT
                        name, kind, rule, time_zone, subject, catch_up, anchor, starts_at, ends_at, max_count, next_at, last_at,
                        count, problem, paused, ended, priority,
                        extract(epoch FROM catch_up_within)::float8 AS catch_up_within,
                        extract(epoch FROM expires_after)::float8 AS expires_after,
                        extract(epoch FROM spread)::float8 AS "spread!",
                        extract(epoch FROM tidings.spread_offset(name, spread))::float8 AS "offset!"
                    FROM tidings.recurrences
                    WHERE name > coalesce($3, '') AND ($1::text[] IS NULL OR name = ANY($1)) AND ($2::text IS NULL OR kind = $2)
                    ORDER BY name
                    LIMIT $4
                    "#,
                    filter.names,
                    filter.kind,
                    filter.after,
                    limit,
                )
                .fetch_all(connection)
                .await
            })
            .await?;
        let recurrences = rows.into_iter().map(|row| Recurrence {
            name: row.name,
            kind: row.kind,
            rule: row.rule,
            time_zone: row.time_zone,
            subject: row.subject,
            catch_up: CatchUp::from_column(&row.catch_up),
            catch_up_within_seconds: row.catch_up_within,
            expires_after_seconds: row.expires_after,
            spread_seconds: row.spread,
            offset_seconds: row.offset,
            priority: row.priority,
            anchor: row.anchor,
            starts_at: row.starts_at,
            ends_at: row.ends_at,
            max_count: row.max_count,
            next_at: row.next_at,
            last_at: row.last_at,
            count: row.count,
            problem: row.problem,
            paused: row.paused,
            ended: row.ended,
        });
        Ok(recurrences.collect())
    }

    /// Lists the recurrences that go on, those first whose next occurrence comes first, at most so many.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn next_recurrences(&self, kind: Option<&str>, limit: i64) -> Result<Vec<Recurrence>, StoreError> {
        let mut connection = self.connection().await?;
        let names = connection
            .run("list the next recurrences", async |connection| {
                sqlx::query_scalar!(
                    r#"
                    SELECT name
                    FROM tidings.recurrences
                    WHERE make_at < 'infinity' AND next_at IS NOT NULL AND ($1::text IS NULL OR kind = $1)
                    ORDER BY make_at
                    LIMIT $2
                    "#,
                    kind,
                    limit,
                )
                .fetch_all(connection)
                .await
            })
            .await?;
        drop(connection);
        self.recurrences_named(&names).await
    }

    /// Lists recurrences with a problem by name, at most so many.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn recurrences_with_problem(&self, limit: i64) -> Result<Vec<Recurrence>, StoreError> {
        let mut connection = self.connection().await?;
        let names = connection
            .run("list the problems of recurrences", async |connection| {
                sqlx::query_scalar!(
                    "SELECT name FROM tidings.recurrences WHERE problem IS NOT NULL ORDER BY name LIMIT $1",
                    limit,
                )
                .fetch_all(connection)
                .await
            })
            .await?;
        drop(connection);
        self.recurrences_named(&names).await
    }

    /// Reads these recurrences, in the order of their names here. One that is gone is left out.
    async fn recurrences_named(&self, names: &[String]) -> Result<Vec<Recurrence>, StoreError> {
        let limit = i64::try_from(names.len()).unwrap_or(i64::MAX);
        let filter = RecurrenceFilter { names: Some(names), ..RecurrenceFilter::default() };
        let mut recurrences = self.recurrences(filter, limit).await?;
        recurrences.sort_by_key(|recurrence| names.iter().position(|name| *name == recurrence.name));
        Ok(recurrences)
    }

    /// How many recurrences there are, and how many have a problem, each up to one more than a thousand.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn count_recurrences(&self) -> Result<RecurrenceCounts, StoreError> {
        let mut connection = self.connection().await?;
        let row = connection
            .run("count the recurrences", async |connection| {
                sqlx::query!(
                    r#"
                    SELECT
                        (SELECT count(*) FROM (SELECT FROM tidings.recurrences LIMIT $1) AS counted) AS "all!",
                        (
                            SELECT count(*)
                            FROM (SELECT FROM tidings.recurrences WHERE problem IS NOT NULL LIMIT $1) AS counted
                        ) AS "problems!"
                    "#,
                    COUNT_LIMIT + 1,
                )
                .fetch_one(connection)
                .await
            })
            .await?;
        Ok(RecurrenceCounts { all: row.all.unsigned_abs(), problems: row.problems.unsigned_abs() })
    }
}
