//! How a claim ends: every row moves on as its settlement says, in one transaction with the claim.
//!
//! Nothing here may fail because of a row's data, since its message may have been confirmed already: no unique constraint
//! on history, texts made fit beforehand.

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

/// If as many rows in a row are refused each alone, and none is finished, the others are not tried.
const ENOUGH_REFUSED: usize = 4;

/// What becomes of one claimed row. A row without a settlement stays as it is, and due.
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
    /// Its message was confirmed, which only the publisher can say.
    Delivered {
        /// The confirm.
        confirmed: Confirmed,
        /// SHA-256 of the event.
        event_digest: String,
        /// The `now-ms` that the plugin was given: with it the event can be built again.
        built_ms: i64,
    },
    /// Its deadline has come before its message was published.
    Expired(String),
    /// The plugin says that there is nothing to send.
    Skipped(String),
    /// It is set aside for a person.
    Parked(String),
    /// Its plugin failed, or asks for another attempt: due again later.
    Retry {
        /// Why, for people.
        error: String,
        /// From now.
        after: Duration,
        /// Whether it counts towards the maximum.
        failed: bool,
    },
    /// Its plugin is not asked for a while, since it fails at everything: due again later, without an attempt spent.
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
    pub fn is_the_end(&self) -> bool {
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
    /// When the database does not answer. Then nobody knows whether it committed; the next claim will show.
    pub async fn settle(mut self, settlements: &[Settlement]) -> Result<(), StoreError> {
        self.move_rows(settlements).await?;
        self.transaction.end("COMMIT").await
    }

    /// Moves the rows as [`Claim::settle`] does, but for those that PostgreSQL refuses to move: they wait, and hold up no
    /// other. Returns them, with its words. Takes some round trips more, and many when it refuses some of many.
    ///
    /// # Errors
    ///
    /// When the database does not answer, or refuses even to let those rows wait. Then nobody knows which rows moved.
    pub async fn settle_each(mut self, settlements: &[Settlement]) -> Result<HashMap<Uuid, String>, StoreError> {
        // What would be checked for all of them when they are committed is checked row by row.
        self.run("check at once", "SET CONSTRAINTS ALL IMMEDIATE").await?;
        let (mut refused, mut finished) = (HashMap::new(), false);
        let mut parts = vec![settlements];
        while let Some(part) = parts.pop() {
            if refused.len() >= ENOUGH_REFUSED && !finished {
                // They wait as well, and show later whether they are refused.
                let words: String = refused.values().next().cloned().unwrap_or_default();
                refused.extend(part.iter().map(|other| (other.row.id, words.clone())));
                continue;
            }
            self.run("mark a place in a claim", "SAVEPOINT part").await?;
            match self.move_rows(part).await {
                Ok(()) => finished = true,
                Err(error) => {
                    let Some(words) = error.refusal() else { return Err(error) };
                    self.run("go back in a claim", "ROLLBACK TO SAVEPOINT part").await?;
                    if let [one] = part {
                        refused.insert(one.row.id, words.to_owned());
                    } else {
                        let (first, second) = part.split_at(part.len() / 2);
                        parts.extend([second, first]);
                    }
                }
            }
            self.run("go on in a claim", "RELEASE SAVEPOINT part").await?;
        }
        let mut moved = Moved::default();
        for Settlement { row, .. } in settlements {
            if let Some(words) = refused.get(&row.id) {
                let error = format!("PostgreSQL refuses to finish it: {words}");
                moved.add(row.id, &error, jittered(&REFUSED, row.refusals), 0, 0, 1);
            }
        }
        self.run("mark a place in a claim", "SAVEPOINT part").await?;
        let waits = match moved.execute(&mut self.transaction.connection).await {
            Err(error) if error.refusal().is_some() => {
                self.run("go back in a claim", "ROLLBACK TO SAVEPOINT part").await?;
                Err(error)
            }
            moved => moved,
        };
        self.transaction.end("COMMIT").await?;
        waits.map(|()| refused)
    }

    async fn move_rows(&mut self, settlements: &[Settlement]) -> Result<(), StoreError> {
        let mut finished = Finished::default();
        let mut parked = Parked::default();
        let mut moved = Moved::default();
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
                Outcome::Waits { error, after } => moved.add(id, error, *after, 0, 0, 0),
                Outcome::Parked(reason) => parked.add(id, reason, plugin),
                Outcome::Retry { error, after, failed } => moved.add(id, error, *after, 1, (*failed).into(), 0),
                Outcome::Refused { error, after } => moved.add(id, error, *after, 0, 0, 1),
            }
        }
        let connection = &mut self.transaction.connection;
        finished.execute(connection).await?;
        parked.execute(connection).await?;
        moved.execute(connection).await
    }

    /// Runs a statement without parameters and without an answer.
    async fn run(&mut self, doing: &'static str, sql: &'static str) -> Result<(), StoreError> {
        self.transaction.connection.run(doing, async |session| sqlx::query(sql).execute(session).await).await.map(drop)
    }
}

impl Transaction {
    /// Sets a row aside of which no plugin was asked.
    pub(in crate::store) async fn park(&mut self, id: Uuid, reason: &str) -> Result<(), StoreError> {
        warn!(schedule.id = %id, reason, "parked {id}");
        let mut parked = Parked::default();
        parked.add(id, reason, None);
        parked.execute(&mut self.connection).await
    }
}

/// Rows that move to the history, column by column.
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
        self.plugins.push(plugin.map(storable));
        self.details.push(detail.map(storable));
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

/// Rows that are set aside, column by column.
#[derive(Debug, Default)]
struct Parked {
    ids: Vec<Uuid>,
    reasons: Vec<String>,
    plugins: Vec<Option<String>>,
}

impl Parked {
    fn add(&mut self, id: Uuid, reason: &str, plugin: Option<&str>) {
        self.ids.push(id);
        self.reasons.push(storable(reason));
        self.plugins.push(plugin.map(storable));
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

/// Rows that stay and wait, column by column.
#[derive(Debug, Default)]
struct Moved {
    ids: Vec<Uuid>,
    errors: Vec<String>,
    delays: Vec<f64>,
    attempts: Vec<i32>,
    failures: Vec<i32>,
    refusals: Vec<i32>,
}

impl Moved {
    fn add(&mut self, id: Uuid, error: &str, after: Duration, attempts: i32, failures: i32, refusals: i32) {
        self.ids.push(id);
        self.errors.push(storable(error));
        self.delays.push(after.as_secs_f64());
        self.attempts.push(attempts);
        self.failures.push(failures);
        self.refusals.push(refusals);
    }

    async fn execute(&self, connection: &mut Connection) -> Result<(), StoreError> {
        if self.ids.is_empty() {
            return Ok(());
        }
        connection.run("make rows wait", async |session| self.update(session).await).await
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

/// A text that PostgreSQL takes: without NUL, which it cannot store, and not endless. Plugins write some of them.
fn storable(text: &str) -> String {
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
    fn a_text_with_nul_or_without_end_can_be_stored() {
        assert_eq!(storable("a\0b"), "a\u{FFFD}b");
        let long = storable(&"é".repeat(TEXT_BYTES));
        assert!(long.len() <= TEXT_BYTES + '…'.len_utf8());
        assert!(long.ends_with('…'));
    }
}
