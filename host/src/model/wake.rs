//! Wakes a loop. A wake is a hint to look again: it carries nothing but its reason. Whatever may have been missed (a lost
//! connection, an error) must be a wake as well.

use std::sync::atomic::{AtomicU16, Ordering};

use tidings_core::reason::{Reason, Reasons};
use tokio::sync::Notify;

/// Wakes one loop. A wake that comes while the loop does not wait is kept, so it is not lost between a look and the next
/// wait. Several wakes become one.
#[derive(Debug, Default)]
pub struct Wake {
    notify: Notify,
    /// The reasons of wakes that no call of [`Wake::woken`] has returned yet.
    reasons: AtomicU16,
}

impl Wake {
    /// Wakes the loop.
    pub fn wake(&self, reason: Reason) {
        // Set before the permit, so that the call that takes the permit finds the reason. An earlier call may take it
        // instead.
        self.reasons.fetch_or(Reasons::from(reason).bits(), Ordering::Relaxed);
        self.notify.notify_one();
    }

    /// Waits for a wake, and returns the reasons since the last call. Cancel-safe: only a call that returns consumes a wake.
    pub async fn woken(&self) -> Reasons {
        self.notify.notified().await;
        Reasons::from_bits(self.reasons.swap(0, Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn wakes_before_the_wait_are_kept_and_become_one() {
        let wake = Wake::default();
        wake.wake(Reason::Notification);
        wake.wake(Reason::Broker);
        let reasons: Vec<Reason> = wake.woken().await.iter().collect();
        assert_eq!(reasons, [Reason::Notification, Reason::Broker]);
        let second = tokio::time::timeout(Duration::from_millis(1), wake.woken()).await;
        assert!(second.is_err(), "two wakes become one");
    }
}
