//! Settles a claim: every row moves on as its settlement says, in the transaction of the claim.
//!
//! Must never fail because of a row's data, since its message may have been confirmed already: the history has no
//! unique constraint, and texts are made storable first.

use std::collections::HashMap;
use std::time::Duration;

use time::OffsetDateTime;
use tracing::warn;
use uuid::Uuid;

use crate::broker::Confirmed;
use crate::model::backoff::{REFUSED, jittered};
use crate::model::schedule::Schedule;
use crate::store::queue::claim::{Claim, Transaction};
use crate::store::{Connection, StoreError};

/// An error text is cut to this many bytes.
const TEXT_BYTES: usize = 4 * 1024;
/// If PostgreSQL refuses this many single rows before it finishes any, the others are not tried.
const MAX_REFUSED_ROWS: usize = 4;

/// What becomes of one claimed row. A row without a settlement stays as it is, due.
#[derive(Debug)]
pub struct Settlement {
    /// The row.
    pub row: Schedule,
    /// `name@version+digest8` of the plugin that was asked, if one was.
    pub plugin: Option<String>,
    /// What becomes of it.
    pub outcome: Outcome,
}

/// The ways to settle a row.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// RabbitMQ confirmed its message. Only the publisher makes a [`Confirmed`].
    Delivered {
        /// The confirm.
        confirmed: Confirmed,
        /// SHA-256 of the event.
        event_digest: String,
        /// The `now-ms` that the plugin was given, with which the event can be built again.
        built_ms: i64,
    },
    /// Its deadline came before its message was published. With the details.
    Expired(String),
    /// The plugin said that there is nothing to send. With its reason.
    Skipped(String),
    /// It is set aside for a person. With the reason.
    Parked(String),
    /// Its plugin failed, or asked for another attempt: due again later.
    Retry {
        /// Why, for people.
        error: String,
        /// From now.
        after: Duration,
        /// Whether the attempt counts towards the maximum.
        failed: bool,
    },
    /// Its plugin's breaker is open: due again later, without an attempt spent.
    Waits {
        /// Why, for people.
        error: String,
        /// From now.
        after: Duration,
    },
    /// The broker could not route its message or refused it: due again later, without an attempt spent.
    Refused {
        /// Why, for people.
        error: String,
        /// From now.
        after: Duration,
    },
}

impl Outcome {
    /// Whether the row leaves the queue for good.
    #[must_use]
    pub fn leaves_queue(&self) -> bool {
        match self {
            Self::Delivered { .. } | Self::Expired(_) | Self::Skipped(_) | Self::Parked(_) => true,
            Self::Retry { .. } | Self::Waits { .. } | Self::Refused { .. } => false,
        }
    }
}

impl Claim {
    /// Moves every row as its settlement says, and commits.
    ///
    /// # Errors
    ///
    /// When the database does not answer. Then it is unknown whether the rows moved; the next claim will show.
    pub async fn settle(mut self, settlements: &[Settlement]) -> Result<(), StoreError> {
        self.move_rows(settlements).await?;
        self.transaction.end("COMMIT").await
    }

    /// Moves the rows as [`Claim::settle`] does, except those that PostgreSQL refuses to move. It postpones these, so
    /// they delay no other row, and returns them with its messages. Costs more round trips, many if it refuses several.
    ///
    /// # Errors
    ///
    /// When the database does not answer, or refuses even to postpone those rows. Then it is unknown which rows moved.
    pub async fn settle_each(mut self, settlements: &[Settlement]) -> Result<HashMap<Uuid, String>, StoreError> {
        // Otherwise deferred constraints would be checked at the commit, for all rows together.
        self.run("check constraints at once", "SET CONSTRAINTS ALL IMMEDIATE").await?;
        let (mut refused, mut finished) = (HashMap::new(), false);
        let mut parts = vec![settlements];
        while let Some(part) = parts.pop() {
            if refused.len() >= MAX_REFUSED_ROWS && !finished {
                // The others are postponed as well. Their next delivery shows whether PostgreSQL refuses them too.
                let message: String = refused.values().next().cloned().unwrap_or_default();
                refused.extend(part.iter().map(|other| (other.row.id, message.clone())));
                continue;
            }
            self.run("set a savepoint in a claim", "SAVEPOINT part").await?;
            match self.move_rows(part).await {
                Ok(()) => finished = true,
                Err(error) => {
                    let Some(message) = error.refusal() else { return Err(error) };
                    self.run("roll back to a savepoint in a claim", "ROLLBACK TO SAVEPOINT part").await?;
                    if let [single] = part {
                        refused.insert(single.row.id, message.to_owned());
                    } else {
                        let (first, second) = part.split_at(part.len() / 2);
                        parts.extend([second, first]);
                    }
                }
            }
            self.run("release a savepoint in a claim", "RELEASE SAVEPOINT part").await?;
        }
        let mut postponed = Postponed::default();
        for Settlement { row, .. } in settlements {
            if let Some(message) = refused.get(&row.id) {
                let error = format!("PostgreSQL refuses to finish it: {message}");
                postponed.add(row.id, &error, jittered(&REFUSED, row.refusals), 0, 0, 1);
            }
        }
        self.run("set a savepoint in a claim", "SAVEPOINT part").await?;
        let result = match postponed.execute(&mut self.transaction.connection).await {
            Err(error) if error.refusal().is_some() => {
                self.run("roll back to a savepoint in a claim", "ROLLBACK TO SAVEPOINT part").await?;
                Err(error)
            }
            result => result,
        };
        self.transaction.end("COMMIT").await?;
        result.map(|()| refused)
    }

    async fn move_rows(&mut self, settlements: &[Settlement]) -> Result<(), StoreError> {
        let mut finished = Finished::default();
        let mut parked = Parked::default();
        let mut postponed = Postponed::default();
        let clock = self.clock();
        for Settlement { row: Schedule { id, .. }, plugin, outcome } in settlements {
            let (id, plugin) = (*id, plugin.as_deref());
            match outcome {
                Outcome::Delivered { confirmed, event_digest, built_ms } => {
                    let event = Some((&**event_digest, *built_ms));
                    finished.add(id, "delivered", clock.at(confirmed.at()), plugin, None, event);
                }
                Outcome::Expired(detail) => finished.add(id, "expired", clock.now(), plugin, Some(detail), None),
                Outcome::Skipped(detail) => finished.add(id, "skipped", clock.now(), plugin, Some(detail), None),
                Outcome::Waits { error, after } => postponed.add(id, error, *after, 0, 0, 0),
                Outcome::Parked(reason) => parked.add(id, reason, plugin),
                Outcome::Retry { error, after, failed } => postponed.add(id, error, *after, 1, (*failed).into(), 0),
                Outcome::Refused { error, after } => postponed.add(id, error, *after, 0, 0, 1),
            }
        }
        let connection = &mut self.transaction.connection;
        finished.execute(connection).await?;
        parked.execute(connection).await?;
        postponed.execute(connection).await
    }

    /// Runs a statement that has no parameters and returns no rows.
    async fn run(&mut self, doing: &'static str, sql: &'static str) -> Result<(), StoreError> {
        self.transaction.connection.run(doing, async |session| sqlx::query(sql).execute(session).await).await.map(drop)
    }
}

impl Transaction {
    /// Parks a row for which no plugin was called.
    pub(in crate::store) async fn park(&mut self, id: Uuid, reason: &str) -> Result<(), StoreError> {
        warn!(schedule.id = %id, reason, "parked {id}");
        let mut parked = Parked::default();
        parked.add(id, reason, None);
        parked.execute(&mut self.connection).await
    }
}

/// Rows that move to the history, as arrays of their columns.
#[derive(Debug, Default)]
struct Finished<'a> {
    ids: Vec<Uuid>,
    outcomes: Vec<&'static str>,
    finished_at: Vec<OffsetDateTime>,
    plugins: Vec<Option<String>>,
    details: Vec<Option<String>>,
    digests: Vec<Option<&'a str>>,
    built_ms: Vec<Option<i64>>,
}

impl<'a> Finished<'a> {
    fn add(
        &mut self,
        id: Uuid,
        outcome: &'static str,
        at: OffsetDateTime,
        plugin: Option<&str>,
        detail: Option<&str>,
        event: Option<(&'a str, i64)>,
    ) {
        let (digest, built_ms) = event.unzip();
        self.ids.push(id);
        self.outcomes.push(outcome);
        self.finished_at.push(at);
        self.plugins.push(plugin.map(to_storable));
        self.details.push(detail.map(to_storable));
        self.digests.push(digest);
        self.built_ms.push(built_ms);
    }

    async fn execute(&self, connection: &mut Connection) -> Result<(), StoreError> {
        if self.ids.is_empty() {
            return Ok(());
        }
        connection.run("finish rows", async |session| self.insert(session).await).await
    }

    async fn insert(&self, session: &mut sqlx::PgConnection) -> Result<(), sqlx::Error> {
        sqlx::query!(
            r#"
            WITH settled AS (
                SELECT * FROM unnest($1::uuid[], $2::text[], $3::timestamptz[], $4::text[], $5::text[], $6::text[], $7::bigint[])
                    AS settled (id, outcome, finished_at, plugin, detail, event_digest, built_ms)
            ), gone AS (
                DELETE FROM tidings.schedules WHERE id = ANY($1)
                RETURNING id, kind, key, subject, due_at, expires_at, payload, headers, attempts
            )
            INSERT INTO tidings.deliveries (
                id, kind, key, subject, due_at, finished_at, outcome, attempts, plugin, detail,
                expires_at, payload, headers, event_digest, built_ms
            )
            SELECT
                gone.id, gone.kind, gone.key, gone.subject, gone.due_at, settled.finished_at, settled.outcome,
                gone.attempts, settled.plugin, settled.detail, gone.expires_at, gone.payload, gone.headers,
                settled.event_digest, settled.built_ms
            FROM gone
            JOIN settled USING (id)
            "#,
            &self.ids,
            &self.outcomes as &[&str],
            &self.finished_at,
            &self.plugins as &[Option<String>],
            &self.details as &[Option<String>],
            &self.digests as &[Option<&str>],
            &self.built_ms as &[Option<i64>],
        )
        .execute(session)
        .await
        .map(drop)
    }
}

/// Rows that are parked, as arrays of their columns.
#[derive(Debug, Default)]
struct Parked {
    ids: Vec<Uuid>,
    reasons: Vec<String>,
    plugins: Vec<Option<String>>,
}

impl Parked {
    fn add(&mut self, id: Uuid, reason: &str, plugin: Option<&str>) {
        self.ids.push(id);
        self.reasons.push(to_storable(reason));
        self.plugins.push(plugin.map(to_storable));
    }

    async fn execute(&self, connection: &mut Connection) -> Result<(), StoreError> {
        if self.ids.is_empty() {
            return Ok(());
        }
        connection.run("park rows", async |session| self.insert(session).await).await
    }

    async fn insert(&self, session: &mut sqlx::PgConnection) -> Result<(), sqlx::Error> {
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
        .execute(session)
        .await
        .map(drop)
    }
}

/// Rows that stay in the queue and are due again later, as arrays of their columns.
#[derive(Debug, Default)]
struct Postponed {
    ids: Vec<Uuid>,
    errors: Vec<String>,
    delays: Vec<f64>,
    attempts: Vec<i32>,
    failures: Vec<i32>,
    refusals: Vec<i32>,
}

impl Postponed {
    fn add(&mut self, id: Uuid, error: &str, after: Duration, attempts: i32, failures: i32, refusals: i32) {
        self.ids.push(id);
        self.errors.push(to_storable(error));
        self.delays.push(after.as_secs_f64());
        self.attempts.push(attempts);
        self.failures.push(failures);
        self.refusals.push(refusals);
    }

    async fn execute(&self, connection: &mut Connection) -> Result<(), StoreError> {
        if self.ids.is_empty() {
            return Ok(());
        }
        connection.run("postpone rows", async |session| self.update(session).await).await
    }

    async fn update(&self, session: &mut sqlx::PgConnection) -> Result<(), sqlx::Error> {
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
        .execute(session)
        .await
        .map(drop)
    }
}

/// Replaces NUL, which PostgreSQL cannot store, and cuts the text. Plugins write some of these texts.
fn to_storable(text: &str) -> String {
    let mut text = text.replace('\0', "\u{FFFD}");
    if text.len() > TEXT_BYTES {
        text.truncate(text.floor_char_boundary(TEXT_BYTES));
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_with_nul_or_too_long_become_storable() {
        assert_eq!(to_storable("a\0b"), "a\u{FFFD}b");
        let long = to_storable(&"é".repeat(TEXT_BYTES));
        assert!(long.len() <= TEXT_BYTES + '…'.len_utf8());
        assert!(long.ends_with('…'));
    }
}
