//! Remembers when a connection to PostgreSQL last broke, so that no connection that was open then is used again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

/// When a connection last broke. The same event (a restart, a failover, a dead link) has often broken the others as
/// well, and finding out about each in turn would cost a failure and an ever longer pause.
#[derive(Clone, Debug)]
pub(in crate::store) struct Doubt {
    created_at: Instant,
    /// When a connection last broke, in ms since `created_at`; 0 = never.
    raised_at_ms: Arc<watch::Sender<u64>>,
}

impl Doubt {
    pub(in crate::store) fn new() -> Self {
        Self { created_at: Instant::now(), raised_at_ms: Arc::new(watch::Sender::new(0)) }
    }

    /// Records that a connection has just broken.
    pub(in crate::store) fn raise(&self) {
        self.raised_at_ms.send_replace(self.now_ms());
    }

    /// Whether a connection of this age may be used: none has broken since it was opened.
    pub(in crate::store) fn can_use(&self, age: Duration) -> bool {
        is_younger(age, self.last_ms(), self.now_ms())
    }

    /// When a connection last broke. The number stays the same until the next one breaks.
    pub(in crate::store) fn last_ms(&self) -> u64 {
        *self.raised_at_ms.borrow()
    }

    /// Tells when the next one breaks.
    pub(in crate::store) fn subscribe(&self) -> watch::Receiver<u64> {
        self.raised_at_ms.subscribe()
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.created_at.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// Whether a connection of this age was opened after `raised_at_ms`; 0 = no connection has broken.
fn is_younger(age: Duration, raised_at_ms: u64, now_ms: u64) -> bool {
    let age_ms = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
    raised_at_ms == 0 || now_ms.saturating_sub(age_ms) > raised_at_ms
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_connections_opened_after_the_last_one_broke_are_used() {
        let age = Duration::from_secs(10);
        assert!(is_younger(age, 0, 60_000), "no connection has broken");
        assert!(!is_younger(age, 55_000, 60_000), "it was open when another broke");
        assert!(!is_younger(age, 50_000, 60_000), "it may have been open when another broke");
        assert!(is_younger(age, 49_999, 60_000), "it was opened after another broke");
    }
}
