//! What a look at the queue tells others than the core: when the next occurrences are to be made, and which kinds are not caught
//! up with.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::store::Seen;

/// For how long the rows of some kinds may have been due when they are claimed.
pub type CatchUps = HashMap<String, Duration>;

/// What the last look told.
#[derive(Debug)]
pub struct LookNotes {
    make_at: watch::Sender<Option<Instant>>,
    catch_ups: ArcSwap<CatchUps>,
}

impl LookNotes {
    /// Nothing is known yet. `make_at` is told when the next occurrences are to be made.
    #[must_use]
    pub fn new(make_at: watch::Sender<Option<Instant>>) -> Self {
        Self { make_at, catch_ups: ArcSwap::default() }
    }

    /// Notes what a look saw that was sent at this moment.
    pub(super) fn note(&self, asked_at: Instant, seen: &Seen) {
        self.make_at.send_replace(seen.make_in.map(|time| asked_at + time));
        let catch_ups = self.catch_ups.load();
        let is_same = catch_ups.len() == seen.catch_ups.len()
            && seen.catch_ups.iter().all(|(kind, within)| catch_ups.get(kind) == Some(within));
        if !is_same {
            self.catch_ups.store(Arc::new(seen.catch_ups.iter().cloned().collect()));
        }
    }

    /// The kinds that are not caught up with.
    pub(super) fn catch_ups(&self) -> Arc<CatchUps> {
        self.catch_ups.load_full()
    }
}
