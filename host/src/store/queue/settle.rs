//! Settles a claim: every row moves on as its settlement says, in the transaction of the claim.
//!
//! Must never fail because of a row's data, since its message may have been confirmed already: the history has no
//! unique constraint, and texts are made storable first.

use std::collections::HashMap;

use tokio::time::Instant;
use tracing::warn;
use uuid::Uuid;

use crate::model::backoff::{REFUSED, jittered};
use crate::store::StoreError;
use crate::store::queue::claim::{Claim, Transaction};
use crate::store::queue::moves::{Moves, Parked, Postponed};
use crate::store::queue::prepared::Message;
use crate::store::queue::settlement::Settlement;
use crate::store::queue::turns::Turns;

/// If PostgreSQL refuses this many single rows before it finishes any, the others are not tried.
const MAX_REFUSED_ROWS: usize = 4;

impl Claim {
    /// Moves every row as its settlement says, and commits.
    ///
    /// # Errors
    ///
    /// When the database does not answer. Then it is unknown whether the rows moved; the next claim will show.
    pub async fn settle(mut self, settlements: &[Settlement]) -> Result<(), StoreError> {
        let moves = Moves::of(settlements, self.clock(), self.history);
        let turn = Turns::of(&self.lines, settlements, self.clock()).message();
        if let Some(message) = moves.message() {
            let begun = Instant::now();
            self.transaction.end_with(message.and_commit(turn)).await?;
            self.commit_time.set(begun.elapsed());
            return Ok(());
        }
        moves.execute(&mut self.transaction.connection).await?;
        self.commit(turn).await
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
            match Moves::of(part, self.clock(), self.history).execute(&mut self.transaction.connection).await {
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
        let turn = Turns::of(&self.lines, settlements, self.clock()).message();
        self.commit(turn).await?;
        result.map(|()| refused)
    }

    /// Takes turns, if there are any, and commits.
    async fn commit(self, turn: Option<Message>) -> Result<(), StoreError> {
        match turn {
            Some(turn) => self.transaction.end_with(turn.and_commit(None)).await,
            None => self.transaction.end("COMMIT").await,
        }
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
