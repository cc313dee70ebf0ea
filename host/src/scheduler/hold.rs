//! Takes rows out of the queue that nobody can claim, or each claim would step over them: they come back when their plugin
//! does, or when their pause ends. Never a row that a daemon could deliver now.

use std::collections::BTreeMap;

use tracing::{debug, warn};

use crate::store::{Store, StoreError};
use crate::telemetry::count_held;

/// How many rows were held, by kind.
#[derive(Debug, Default)]
pub struct Held {
    /// Since no daemon serves it.
    unserved: BTreeMap<String, i64>,
    /// Since it is paused.
    paused: BTreeMap<String, i64>,
}

/// Holds what is due, and is paused or not served, batch by batch.
///
/// # Errors
///
/// When the database does not answer. What was held before is.
pub async fn hold(store: &Store, our_kinds: &[String]) -> Result<Held, StoreError> {
    let mut held = Held::default();
    while add(&mut held.paused, store.hold_paused(our_kinds).await?) {}
    while add(&mut held.unserved, store.hold_unserved(our_kinds).await?) {}
    Ok(held)
}

/// Adds the rows of a batch, and says whether there were any.
fn add(held: &mut BTreeMap<String, i64>, batch: Vec<(String, i64)>) -> bool {
    let some = !batch.is_empty();
    for (kind, rows) in batch {
        *held.entry(kind).or_default() += rows;
    }
    some
}

impl Held {
    /// Counts and logs them. Whether there are any.
    #[must_use]
    pub fn report(&self) -> bool {
        let Self { unserved, paused } = self;
        for (kind, rows) in unserved.iter().chain(paused) {
            count_held(kind, rows.unsigned_abs());
        }
        for (kind, rows) in unserved {
            warn!(schedule.kind = kind, rows, "held rows of the kind {kind:?}: no plugin serves it");
        }
        for (kind, rows) in paused {
            debug!(schedule.kind = kind, rows, "held rows of the kind {kind:?}: it is paused");
        }
        !unserved.is_empty() || !paused.is_empty()
    }
}
