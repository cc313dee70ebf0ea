//! How long a commit takes, by the last row that came alone. Must never be relied on for more than speed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The time, shared by all clones.
#[derive(Clone, Debug, Default)]
pub(in crate::store) struct CommitTime(Arc<AtomicU64>);

impl CommitTime {
    pub(in crate::store) fn set(&self, took: Duration) {
        self.0.store(u64::try_from(took.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Zero = unknown.
    pub(in crate::store) fn get(&self) -> Duration {
        Duration::from_micros(self.0.load(Ordering::Relaxed))
    }
}
