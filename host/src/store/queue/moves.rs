//! The rows of a claim, by where they move when it is settled: out of the queue and into the history, to the parked rows, or back
//! into the queue for later. Sends one statement for each.
//!
//! Must never fail because of a row's data, since its message may have been confirmed already: texts are made storable
//! first.

use std::time::Duration;

use time::OffsetDateTime;
use uuid::Uuid;

use crate::model::clock::DatabaseClock;
use crate::model::schedule::Schedule;
use crate::store::queue::prepared;
use crate::store::queue::prepared::{Message, array, numbers};
use crate::store::queue::settlement::{History, Outcome, Settlement};
use crate::store::{Connection, StoreError};

/// So few finished rows are sent together with the COMMIT. More are sent in PostgreSQL's binary form, which takes it less time
/// to read than literals.
const MAX_ROWS_IN_MESSAGE: usize = 32;
/// An error text is cut to this many bytes.
const TEXT_BYTES: usize = 4 * 1024;

/// The rows of a claim, by where they move.
pub(super) struct Moves<'a> {
    finished: Finished<'a>,
    parked: Parked,
    postponed: Postponed,
}

impl<'a> Moves<'a> {
    /// Sorts the rows by where they move. `clock` is that of their claim.
    pub(super) fn of(settlements: &'a [Settlement], clock: DatabaseClock, history: History) -> Self {
        let mut finished = Finished { recorded: history.outcomes(), ..Finished::default() };
        let mut parked = Parked::default();
        let mut postponed = Postponed::default();
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
        Self { finished, parked, postponed }
    }

    /// The message that makes all moves, if the rows are few and all of them are finished.
    pub(super) fn message(&self) -> Option<Message> {
        let others = self.parked.ids.len() + self.postponed.ids.len();
        let is_small = others == 0 && (1..=MAX_ROWS_IN_MESSAGE).contains(&self.finished.ids.len());
        is_small.then(|| self.finished.message())
    }

    pub(super) async fn execute(&self, connection: &mut Connection) -> Result<(), StoreError> {
        self.finished.execute(connection).await?;
        self.parked.execute(connection).await?;
        self.postponed.execute(connection).await
    }
}

/// Rows that leave the queue for good, as arrays of the columns of the history.
#[derive(Debug, Default)]
pub(super) struct Finished<'a> {
    /// The outcomes that are written into the history.
    recorded: &'static [&'static str],
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

    /// The message that finishes them.
    fn message(&self) -> Message {
        let ids: Vec<String> = self.ids.iter().map(Uuid::to_string).collect();
        let finished_at: Vec<String> = self.finished_at.iter().map(|at| prepared::time(*at)).collect();
        Message::finish(&[
            array(ids.iter().map(|id| Some(&**id))),
            array(self.outcomes.iter().map(|outcome| Some(*outcome))),
            array(finished_at.iter().map(|at| Some(&**at))),
            array(self.plugins.iter().map(Option::as_deref)),
            array(self.details.iter().map(Option::as_deref)),
            array(self.digests.iter().copied()),
            numbers(self.built_ms.iter().copied()),
            array(self.recorded.iter().map(|outcome| Some(*outcome))),
        ])
    }

    async fn execute(&self, connection: &mut Connection) -> Result<(), StoreError> {
        if self.ids.is_empty() {
            return Ok(());
        }
        connection.run("finish rows", async |session| self.insert(session).await).await
    }

    async fn insert(&self, session: &mut sqlx::PgConnection) -> Result<(), sqlx::Error> {
        sqlx::query_file!(
            "src/store/queue/finish.sql",
            &self.ids,
            &self.outcomes as &[&str],
            &self.finished_at,
            &self.plugins as &[Option<String>],
            &self.details as &[Option<String>],
            &self.digests as &[Option<&str>],
            &self.built_ms as &[Option<i64>],
            self.recorded as &[&str],
        )
        .execute(session)
        .await
        .map(drop)
    }
}

/// Rows that are parked, as arrays of their columns.
#[derive(Debug, Default)]
pub(super) struct Parked {
    ids: Vec<Uuid>,
    reasons: Vec<String>,
    plugins: Vec<Option<String>>,
}

impl Parked {
    pub(super) fn add(&mut self, id: Uuid, reason: &str, plugin: Option<&str>) {
        self.ids.push(id);
        self.reasons.push(to_storable(reason));
        self.plugins.push(plugin.map(to_storable));
    }

    pub(super) async fn execute(&self, connection: &mut Connection) -> Result<(), StoreError> {
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
                RETURNING id, kind, key, subject, due_at, expires_at, payload, headers, attempts, last_error, created_at,
                    recurrence, nominal_at, priority
            )
            INSERT INTO tidings.parked (
                id, kind, key, subject, due_at, expires_at, payload, headers, attempts, last_error, created_at, recurrence,
                nominal_at, priority, reason, plugin
            )
            SELECT
                gone.id, gone.kind, gone.key, gone.subject, gone.due_at, gone.expires_at, gone.payload, gone.headers,
                gone.attempts, gone.last_error, gone.created_at, gone.recurrence, gone.nominal_at, gone.priority, settled.reason, settled.plugin
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
pub(super) struct Postponed {
    ids: Vec<Uuid>,
    errors: Vec<String>,
    delays: Vec<f64>,
    attempts: Vec<i32>,
    failures: Vec<i32>,
    refusals: Vec<i32>,
}

impl Postponed {
    pub(super) fn add(&mut self, id: Uuid, error: &str, after: Duration, attempts: i32, failures: i32, refusals: i32) {
        self.ids.push(id);
        self.errors.push(to_storable(error));
        self.delays.push(after.as_secs_f64());
        self.attempts.push(attempts);
        self.failures.push(failures);
        self.refusals.push(refusals);
    }

    pub(super) async fn execute(&self, connection: &mut Connection) -> Result<(), StoreError> {
        if self.ids.is_empty() {
            return Ok(());
        }
        connection.run("postpone rows", async |session| self.update(session).await).await
    }

    async fn update(&self, session: &mut sqlx::PgConnection) -> Result<(), sqlx::Error> {
        sqlx::query!(
            r#"
            UPDATE tidings.schedules AS waiting
            SET held = false,
                line = NULL,
                attempts = waiting.attempts + settled.attempts,
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
