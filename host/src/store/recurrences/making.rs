//! Makes occurrences: locks recurrences whose time has come, puts their occurrences into the queue, and moves them on, in one
//! transaction.
//!
//! Must never wait for a lock: a recurrence that another transaction has locked is made by that, or at the next look.

use std::time::Duration;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::model::recurrence::{CatchUp, DueRecurrence, MadeRecurrence, Then};
use crate::store::queue::claim::Transaction;
use crate::store::{Store, StoreError};

/// Missed instants of one recurrence are made in batches this far apart, so that other rows are delivered in between.
const BACKLOG_PAUSE: Duration = Duration::from_millis(250);
/// A recurrence whose occurrences PostgreSQL refuses is tried again after this.
const REFUSAL_PAUSE: Duration = Duration::from_mins(1);

/// Recurrences whose time has come, locked in one open transaction. Dropping it lets the server roll back.
#[derive(Debug)]
pub struct Making {
    transaction: Transaction,
    /// The recurrences, those first whose time came first.
    pub due: Vec<DueRecurrence>,
    /// The database's time.
    pub now: OffsetDateTime,
}

impl Store {
    /// Locks the recurrences whose time has come, at most so many; `None` = none is free.
    ///
    /// # Errors
    ///
    /// When the database cannot do it.
    pub async fn begin_making(&self, limit: i64) -> Result<Option<Making>, StoreError> {
        let mut transaction = Transaction::begin(self.connection().await?).await?;
        let rows = transaction
            .connection
            .run("lock recurrences", async |connection| {
                sqlx::query!(
                    r#"
                    SELECT
                        name, rule, time_zone, anchor, starts_at, ends_at, catch_up, next_at, passed_at,
                        max_count - count AS "left_over?",
                        extract(epoch FROM catch_up_within)::float8 AS catch_up_within,
                        extract(epoch FROM tidings.spread_offset(name, spread))::float8 AS "offset!",
                        extract(epoch FROM statement_timestamp() - make_at)::float8 AS "lag!",
                        -- A daemon that stands still in this transaction must not keep others from what is due soon.
                        (SELECT set_config('idle_in_transaction_session_timeout', '5s', true)) AS patience,
                        statement_timestamp() AS "now!"
                    FROM tidings.recurrences
                    WHERE make_at <= statement_timestamp()
                    ORDER BY make_at
                    LIMIT $1
                    FOR UPDATE SKIP LOCKED
                    "#,
                    limit,
                )
                .fetch_all(connection)
                .await
            })
            .await?;
        let Some(now) = rows.first().map(|row| row.now) else {
            transaction.end("ROLLBACK").await?;
            return Ok(None);
        };
        let seconds = |seconds: f64| Duration::try_from_secs_f64(seconds).unwrap_or_default();
        let due = rows.into_iter().map(|row| DueRecurrence {
            name: row.name,
            rule: row.rule,
            time_zone: row.time_zone,
            anchor: row.anchor,
            starts_at: row.starts_at,
            ends_at: row.ends_at,
            left: row.left_over.map(|left| u64::try_from(left).unwrap_or(0)),
            catch_up: CatchUp::from_column(&row.catch_up),
            catch_up_within: row.catch_up_within.map(seconds),
            offset: seconds(row.offset),
            next_at: row.next_at,
            passed_at: row.passed_at,
            lag: seconds(row.lag),
        });
        Ok(Some(Making { transaction, due: due.collect(), now }))
    }

    /// Has the next instants computed again that were computed by an older release of the time zone database than this one,
    /// or could not be computed. Returns of how many recurrences.
    ///
    /// # Errors
    ///
    /// When the database cannot do it.
    pub async fn compute_again(&self, release: &str) -> Result<u64, StoreError> {
        let mut connection = self.connection().await?;
        let changed = connection
            .run("have the instants of recurrences computed again", async |connection| {
                sqlx::query!(
                    r#"
                    WITH notified AS MATERIALIZED (SELECT set_config('tidings.notify', 'on', true))
                    UPDATE tidings.recurrences
                    SET next_at = NULL, problem = NULL, not_before = NULL
                    FROM notified
                    WHERE NOT ended
                        AND (
                            not_before = 'infinity'
                            -- What was missed is caught up with as it was computed.
                            OR time_zone_version < $1 AND next_at > statement_timestamp() AND rule !~* '^\s*every\s'
                        )
                    "#,
                    release,
                )
                .execute(connection)
                .await
            })
            .await?;
        Ok(changed.rows_affected())
    }

    /// Notes that PostgreSQL refuses the occurrences of a recurrence. It is tried again after a minute.
    ///
    /// # Errors
    ///
    /// When the database cannot do it.
    pub async fn note_refusal(&self, name: &str, problem: &str) -> Result<(), StoreError> {
        let mut connection = self.connection().await?;
        connection
            .run("note the problem of a recurrence", async |connection| {
                sqlx::query!(
                    r#"
                    UPDATE tidings.recurrences
                    SET problem = $2, not_before = clock_timestamp() + $3 * interval '1 second'
                    WHERE name = $1
                    "#,
                    name,
                    problem,
                    REFUSAL_PAUSE.as_secs_f64(),
                )
                .execute(connection)
                .await
            })
            .await
            .map(drop)
    }
}

impl Making {
    /// Puts the occurrences into the queue, moves the recurrences on, and commits. Returns how many occurrences there are.
    /// `release` is that of the time zone database.
    ///
    /// # Errors
    ///
    /// When the database cannot do it. Then nothing is made, unless the commit failed, which may have made everything.
    pub async fn commit(mut self, made: &[MadeRecurrence], release: &str) -> Result<u64, StoreError> {
        let (mut names, mut instants, mut keys) = (Vec::new(), Vec::new(), Vec::new());
        for recurrence in made {
            for instant in &recurrence.instants {
                names.push(recurrence.name.clone());
                instants.push(*instant);
                keys.push(occurrence_key(&recurrence.name, *instant));
            }
        }
        let mut occurrences = 0;
        if !names.is_empty() {
            let inserted = self
                .transaction
                .connection
                .run("make occurrences", async |connection| {
                    sqlx::query!(
                        r#"
                        -- The other daemons look as well: any of them may be the one that serves the kind.
                        WITH notified AS MATERIALIZED (SELECT set_config('tidings.notify', 'on', true))
                        INSERT INTO tidings.schedules (
                            kind, key, subject, due_at, expires_at, payload, headers, recurrence, nominal_at, priority
                        )
                        SELECT
                            kind, made.key, subject, due_at, due_at + expires_after, payload, headers, name, made.nominal_at, priority
                        FROM unnest($1::text[], $2::timestamptz[], $3::text[]) AS made (name, nominal_at, key)
                        JOIN tidings.recurrences USING (name)
                        CROSS JOIN LATERAL (SELECT made.nominal_at + tidings.spread_offset(name, spread) AS due_at) AS due
                        CROSS JOIN notified
                        -- Somebody else took the key.
                        ON CONFLICT (kind, key) WHERE key IS NOT NULL DO NOTHING
                        "#,
                        &names,
                        &instants,
                        &keys,
                    )
                    .execute(connection)
                    .await
                })
                .await?;
            occurrences = inserted.rows_affected();
        }
        self.move_on(made, release).await?;
        self.transaction.end("COMMIT").await?;
        Ok(occurrences)
    }

    async fn move_on(&mut self, made: &[MadeRecurrence], release: &str) -> Result<(), StoreError> {
        let names: Vec<String> = made.iter().map(|made| made.name.clone()).collect();
        let next_at: Vec<Option<OffsetDateTime>> = made.iter().map(|made| made.next_at).collect();
        let last_at: Vec<Option<OffsetDateTime>> = made.iter().map(|made| made.instants.last().copied()).collect();
        let counts: Vec<i64> = made.iter().map(|made| i64::try_from(made.instants.len()).unwrap_or(0)).collect();
        let passed_at: Vec<OffsetDateTime> = made.iter().map(|made| made.passed_at).collect();
        let ended: Vec<bool> = made.iter().map(|made| made.then == Then::Ended).collect();
        let pauses: Vec<Option<f64>> =
            made.iter().map(|made| (made.then == Then::Backlog).then(|| BACKLOG_PAUSE.as_secs_f64())).collect();
        let problems: Vec<Option<String>> = made
            .iter()
            .map(|made| match &made.then {
                Then::Problem(problem) => Some(problem.clone()),
                Then::Continue | Then::Backlog | Then::Ended => None,
            })
            .collect();
        self.transaction
            .connection
            .run("move recurrences on", async |connection| {
                sqlx::query!(
                    r#"
                    UPDATE tidings.recurrences AS recurrences
                    SET next_at = made.next_at,
                        last_at = coalesce(made.last_at, recurrences.last_at),
                        count = recurrences.count + made.occurrences,
                        passed_at = made.passed_at,
                        ended = made.ended,
                        problem = made.problem,
                        time_zone_version = $9,
                        not_before = CASE
                            WHEN made.problem IS NOT NULL THEN 'infinity'
                            ELSE clock_timestamp() + made.pause * interval '1 second'
                        END
                    FROM unnest(
                        $1::text[], $2::timestamptz[], $3::timestamptz[], $4::int8[], $5::timestamptz[], $6::bool[],
                        $7::float8[], $8::text[]
                    ) AS made (name, next_at, last_at, occurrences, passed_at, ended, pause, problem)
                    WHERE recurrences.name = made.name
                    "#,
                    &names,
                    &next_at as &[Option<OffsetDateTime>],
                    &last_at as &[Option<OffsetDateTime>],
                    &counts,
                    &passed_at,
                    &ended,
                    &pauses as &[Option<f64>],
                    &problems as &[Option<String>],
                    release,
                )
                .execute(connection)
                .await
            })
            .await
            .map(drop)
    }
}

/// The key of the occurrence of an instant.
pub(in crate::store) fn occurrence_key(name: &str, instant: OffsetDateTime) -> String {
    // To the millisecond, and without a fraction if it is a whole second.
    let fraction = instant.nanosecond() / 1_000_000 * 1_000_000;
    let instant = instant.replace_nanosecond(fraction).unwrap_or(instant);
    format!("{name}/{}", instant.format(&Rfc3339).expect("its year has four digits"))
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    #[test]
    fn the_key_of_an_occurrence_is_the_name_and_the_instant() {
        let key = |at| occurrence_key("reports/daily", at);
        assert_eq!(key(datetime!(2026-03-29 01:00 UTC)), "reports/daily/2026-03-29T01:00:00Z");
        assert_eq!(key(datetime!(2026-03-29 01:00:00.120_456 UTC)), "reports/daily/2026-03-29T01:00:00.12Z");
        let longest = occurrence_key(&"n".repeat(230), datetime!(9999-12-31 23:59:59.123 UTC));
        assert_eq!(longest.len(), 255, "a key has 255 bytes at most");
    }
}
