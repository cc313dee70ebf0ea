//! Holds due rows that no claim may take: rows of kinds that no daemon serves, and of paused kinds. Held rows are out of the
//! queue, or each claim would step over them. They come back when a daemon serves their kind, or when the pause ends. A row
//! that a daemon could deliver now must never be held.
//!
//! **A kind without a plugin.** A look says that rows are due, and the claim gets nothing, so the core tells the loop to hold
//! due rows of kinds that this daemon does not serve. PostgreSQL knows whether another daemon serves a kind: each daemon
//! holds a shared advisory lock for each kind that it serves, on the listener's connection. A row is held under the exclusive
//! lock, which is tried without waiting. A daemon that starts later finds the held rows of its kinds in its look, and
//! releases them.
//!
//! **A paused kind.** `tidings pause` writes a row into `tidings.paused` and notifies. From that commit on, no claim takes a
//! row of the kind. A daemon that serves the kind finds a due row of it at the head of the queue (`not_claimable_first` of
//! its look), or its claim gets nothing; then it holds the due rows of the kind, a few thousand at a time, beside the loop.
//! A row whose deadline has passed may be claimed by any daemon. After `tidings resume`, or when the pause has ended, a look
//! finds the held rows, and they are released as above. The end of a pause is one of the moments that each look reports.
//!
//! **A limited kind.** `tidings.limit` says how many rows of a kind may go in a time. Its due rows are moved into lines in the same way,
//! and leave them by claims of turns (`store/queue/turns.rs`).

use std::collections::BTreeMap;

use tokio::time::Instant;
use tracing::{debug, warn};

use crate::store::{BATCH, Store, StoreError};
use crate::telemetry::count_held;

/// How many rows were held, by kind.
#[derive(Debug, Default)]
pub struct Held {
    /// Rows of kinds that no daemon serves.
    unserved: BTreeMap<String, i64>,
    /// Rows of paused kinds.
    paused: BTreeMap<String, i64>,
    /// Rows of limited kinds.
    limited: BTreeMap<String, i64>,
}

/// Holds due rows of kinds that are paused or that no daemon serves, and moves those of limited kinds into their lines, batch by batch.
/// Of a million rows each full batch keeps a processor and the disk busy, which the claims need as well; so this rests after each, for
/// as long as it took.
///
/// # Errors
///
/// When the database does not answer. The batches before stay held.
pub async fn hold(store: &Store, our_kinds: &[String]) -> Result<Held, StoreError> {
    let mut held = Held::default();
    while add(&mut held.paused, Instant::now(), store.hold_paused(our_kinds).await?).await {}
    while add(&mut held.limited, Instant::now(), store.line_up(our_kinds).await?).await {}
    while add(&mut held.unserved, Instant::now(), store.hold_unserved(our_kinds).await?).await {}
    Ok(held)
}

/// Adds the rows of a batch that was begun at this time, and rests if it was a full one. Returns whether there were any.
async fn add(held: &mut BTreeMap<String, i64>, begun_at: Instant, batch: Vec<(String, i64)>) -> bool {
    let rows: i64 = batch.iter().map(|(_, rows)| rows).sum();
    for (kind, rows) in batch {
        *held.entry(kind).or_default() += rows;
    }
    if rows >= BATCH {
        tokio::time::sleep(begun_at.elapsed()).await;
    }
    rows > 0
}

impl Held {
    /// Counts the held rows in the metrics and logs them. Returns whether there are any.
    #[must_use]
    pub fn report(&self) -> bool {
        let Self { unserved, paused, limited } = self;
        for (kind, rows) in unserved.iter().chain(paused) {
            count_held(kind, rows.unsigned_abs());
        }
        for (kind, rows) in unserved {
            warn!(schedule.kind = kind, rows, "held rows of the kind {kind:?}: no plugin serves it");
        }
        for (kind, rows) in paused {
            debug!(schedule.kind = kind, rows, "held rows of the kind {kind:?}: it is paused");
        }
        for (kind, rows) in limited {
            debug!(schedule.kind = kind, rows, "rows of the kind {kind:?} wait for their turn: it is limited");
        }
        !unserved.is_empty() || !paused.is_empty() || !limited.is_empty()
    }
}
