//! The turns of rows whose kind is limited. Due rows of a limited kind are moved into lines ([`Store::line_up`]), beside the loop.
//! A claim takes as many rows of a line as its limit allows at that moment, and locks the line; when the claim is settled, in the
//! same transaction, the line's next turn moves on by the rows whose messages were sent. If the daemon dies, both are undone.
//!
//! Must never wait for a line that a claim has locked: that claim's delivery may take seconds. So claims lock a line by an advisory
//! lock that is tried, and the row in `tidings.lines` is written only right before the commit.
//!
//! A line is known to be empty when its last row has left. Rows may be added at the same moment, which the statement that says so
//! cannot see, so each addition counts up the line's generation, and who finds it empty says so of the generation that it saw.

use std::collections::BTreeMap;

use crate::model::clock::DatabaseClock;
use crate::store::queue::kinds::BATCH;
use crate::store::queue::prepared::{self, Message, array, numbers};
use crate::store::queue::settlement::{Outcome, Settlement};
use crate::store::{Store, StoreError};

/// A line that a claim has locked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::store) struct Line {
    kind: String,
    /// Empty for rows without a subject, and for a kind that is limited as a whole.
    subject: String,
    generation: i64,
}

impl Line {
    /// Reads the lines from the answer to a claim.
    pub(super) fn read(json: &str) -> Vec<Self> {
        let mut lines: Vec<(String, String, i64)> =
            serde_json::from_str(json).expect("the statement of the claim makes it");
        // Lines are locked in this order, as by those who add rows to them, so that nobody waits in a circle.
        lines.sort();
        lines.into_iter().map(|(kind, subject, generation)| Self { kind, subject, generation }).collect()
    }
}

/// What the rows of a claim take of the limits of its lines, as arrays of the parameters of the statement.
#[derive(Debug, Default)]
pub(super) struct Turns {
    kinds: Vec<String>,
    subjects: Vec<String>,
    generations: Vec<i64>,
    sent: Vec<i64>,
    sent_at: Vec<String>,
}

impl Turns {
    /// Counts the rows whose messages were sent. `clock` is that of the claim.
    pub(super) fn of(lines: &[Line], settlements: &[Settlement], clock: DatabaseClock) -> Self {
        let mut sent: BTreeMap<(&str, &str), (i64, time::OffsetDateTime)> = BTreeMap::new();
        for Settlement { row, outcome, .. } in settlements {
            if let (Some(line), Outcome::Delivered { confirmed, .. }) = (&row.line, outcome) {
                let at = clock.at(confirmed.at());
                let (rows, last) = sent.entry((&row.kind, line)).or_insert((0, at));
                (*rows, *last) = (*rows + 1, at.max(*last));
            }
        }
        let mut turns = Self::default();
        for Line { kind, subject, generation } in lines {
            let (rows, at) = sent.get(&(&**kind, &**subject)).copied().unwrap_or((0, clock.now()));
            turns.kinds.push(kind.clone());
            turns.subjects.push(subject.clone());
            turns.generations.push(*generation);
            turns.sent.push(rows);
            turns.sent_at.push(prepared::time(at));
        }
        turns
    }

    /// The message that takes the turns; `None` = the claim has no lines.
    pub(super) fn message(&self) -> Option<Message> {
        let texts = |texts: &[String]| array(texts.iter().map(|text| Some(&**text)));
        let counts = |counts: &[i64]| numbers(counts.iter().map(|count| Some(*count)));
        (!self.kinds.is_empty()).then(|| {
            Message::turn(&[
                texts(&self.kinds),
                texts(&self.subjects),
                counts(&self.generations),
                counts(&self.sent),
                texts(&self.sent_at),
            ])
        })
    }
}

impl Store {
    /// Moves due rows of those of our kinds that are limited into their lines, at most a few thousand of them. Rows past their
    /// deadline are left to the claims. Returns how many were moved, by kind.
    ///
    /// # Errors
    ///
    /// When the database cannot do it.
    pub async fn line_up(&self, our_kinds: &[String]) -> Result<Vec<(String, i64)>, StoreError> {
        let mark = self.low_water_mark();
        let mut connection = self.connection().await?;
        let rows = connection
            .run("move rows of limited kinds into their lines", async |connection| {
                sqlx::query!(
                    r#"
                    WITH due AS MATERIALIZED (
                        SELECT id, kind
                        FROM tidings.schedules
                        WHERE slot_at >= coalesce($3, statement_timestamp() - interval '1 minute')
                            AND slot_at <= statement_timestamp()
                            AND kind = ANY($1)
                            AND kind = ANY(ARRAY(SELECT kind FROM tidings.limits))
                            AND kind <> ALL(ARRAY(SELECT kind FROM tidings.paused))
                            AND (expires_at <= statement_timestamp()) IS NOT TRUE
                        ORDER BY slot_at
                        LIMIT $2
                        FOR UPDATE SKIP LOCKED
                    ), limited AS MATERIALIZED (
                        -- So that no limit is changed or taken back before its rows are in their lines.
                        SELECT kind, by FROM tidings.limits WHERE kind IN (SELECT kind FROM due) FOR SHARE SKIP LOCKED
                    ), lined AS (
                        UPDATE tidings.schedules AS waiting
                        SET held = true,
                            line = CASE
                                WHEN (SELECT by FROM limited WHERE limited.kind = waiting.kind) = 'subject'
                                    THEN coalesce(subject, '')
                                ELSE ''
                            END,
                            not_before = statement_timestamp(),
                            last_error = coalesce(last_error, 'waits for its turn (tidings.limit)')
                        -- An array, not a join: the planner would rather read the whole table for that.
                        WHERE id = ANY (ARRAY(SELECT id FROM due JOIN limited USING (kind)))
                        RETURNING waiting.kind, line
                    ), added AS (
                        INSERT INTO tidings.lines AS present (kind, subject)
                        SELECT DISTINCT kind COLLATE "C", line COLLATE "C" FROM lined ORDER BY 1, 2
                        ON CONFLICT (kind, subject) DO UPDATE SET waiting = true, generation = present.generation + 1
                    )
                    SELECT kind AS "kind!", count(*) AS "rows!" FROM lined GROUP BY kind ORDER BY kind
                    "#,
                    our_kinds,
                    BATCH,
                    mark,
                )
                .fetch_all(connection)
                .await
            })
            .await?;
        Ok(rows.into_iter().map(|row| (row.kind, row.rows)).collect())
    }

    /// Puts rows of a kind from lines that are no more, because its limit was taken back or counts by something else, back into the
    /// queue: at most a few thousand. Returns how many.
    ///
    /// # Errors
    ///
    /// When the database cannot do it.
    pub(super) async fn leave_lines(&self, kind: &str) -> Result<u64, StoreError> {
        let mut connection = self.connection().await?;
        let left = connection
            .run("put rows from lines back into the queue", async |connection| {
                sqlx::query!(
                    r#"
                    UPDATE tidings.schedules
                    SET held = false,
                        line = NULL,
                        last_error = nullif(last_error, 'waits for its turn (tidings.limit)'),
                        not_before = tidings.arrival()
                    WHERE id = ANY (ARRAY(
                        SELECT id
                        FROM tidings.schedules AS lined
                        WHERE held AND kind >= $1 AND kind <= $1 AND line IS NOT NULL
                            AND line IS DISTINCT FROM (
                                SELECT CASE WHEN by = 'subject' THEN coalesce(lined.subject, '') ELSE '' END
                                FROM tidings.limits
                                WHERE kind = $1
                            )
                        ORDER BY kind, line
                        LIMIT $2
                        FOR UPDATE SKIP LOCKED
                    ))
                    "#,
                    kind,
                    BATCH,
                )
                .execute(connection)
                .await
            })
            .await?
            .rows_affected();
        if left < BATCH.unsigned_abs() {
            self.end_lines(kind).await?;
        }
        Ok(left)
    }

    /// Forgets the lines of a kind that are no more, unless rows are left in them.
    async fn end_lines(&self, kind: &str) -> Result<(), StoreError> {
        let mut connection = self.connection().await?;
        connection
            .run("forget lines that are no more", async |connection| {
                sqlx::query!(
                    r#"
                    WITH ended AS (
                        DELETE FROM tidings.lifted
                        WHERE kind = $1
                            AND NOT EXISTS (
                                SELECT FROM tidings.schedules AS lined
                                WHERE held AND kind >= $1 AND kind <= $1 AND line IS NOT NULL
                                    AND line IS DISTINCT FROM (
                                        SELECT CASE WHEN by = 'subject' THEN coalesce(lined.subject, '') ELSE '' END
                                        FROM tidings.limits
                                        WHERE kind = $1
                                    )
                            )
                        RETURNING kind
                    )
                    DELETE FROM tidings.lines
                    WHERE kind IN (SELECT kind FROM ended)
                        AND (
                            subject <> '' AND kind NOT IN (SELECT kind FROM tidings.limits WHERE by = 'subject')
                            OR kind NOT IN (SELECT kind FROM tidings.limits)
                        )
                    "#,
                    kind,
                )
                .execute(connection)
                .await
            })
            .await
            .map(drop)
    }
}
