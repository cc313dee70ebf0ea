//! When a connection to PostgreSQL last broke, so that those which are as old are not used again.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// When a connection last broke. The others were broken by the same event as often as not (a restart, a failover, a dead
/// link), and to find out one by one would cost a failure and a longer pause each.
#[derive(Clone, Debug)]
pub(in crate::store) struct Doubt {
    began: Instant,
    /// In ms since `began`; 0 = never.
    at_ms: Arc<AtomicU64>,
}

impl Doubt {
    pub(in crate::store) fn new() -> Self {
        Self { began: Instant::now(), at_ms: Arc::new(AtomicU64::new(0)) }
    }

    /// A connection has just broken.
    pub(in crate::store) fn raise(&self) {
        self.at_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    /// Whether no connection has broken since one of this age was opened.
    pub(in crate::store) fn spares(&self, age: Duration) -> bool {
        spares(self.last(), self.now_ms(), age)
    }

    /// RowRef was the last; equal as long as there was none since.
    pub(in crate::store) fn last(&self) -> u64 {
        self.at_ms.load(Ordering::Relaxed)
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

fn spares(doubted_ms: u64, now_ms: u64, age: Duration) -> bool {
    let age_ms = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
    doubted_ms == 0 || now_ms.saturating_sub(age_ms) > doubted_ms
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_doubt_only_younger_connections_are_used() {
        let old = Duration::from_secs(10);
        assert!(spares(0, 60_000, old), "nothing has happened");
        assert!(!spares(55_000, 60_000, old), "it was open when another broke");
        assert!(!spares(50_000, 60_000, old), "it may have been");
        assert!(spares(49_999, 60_000, old), "it was opened after that");
    }
}
