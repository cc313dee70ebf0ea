//! What makes the scheduler look again, and why it does.

use std::sync::atomic::{AtomicU16, Ordering};

use tidings_core::reason::{Reason, Reasons};
use tokio::sync::Notify;

/// Makes the scheduler look again. A wake that comes while nobody waits is kept, so the order of looking and arming does
/// not matter; several become one.
#[derive(Debug, Default)]
pub struct Wake {
    notify: Notify,
    /// Only to be counted: nothing depends on them.
    reasons: AtomicU16,
}

impl Wake {
    /// Makes the scheduler look again.
    pub fn wake(&self, reason: Reason) {
        // Before the permit, so that whoever takes that finds the reason; an earlier one may have taken it along.
        self.reasons.fetch_or(Reasons::from(reason).bits(), Ordering::Relaxed);
        self.notify.notify_one();
    }

    /// Waits for a wake, and returns the reasons since the last. Cancel-safe: a wake is consumed only by the call that
    /// returns.
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
    async fn a_wake_between_the_look_and_the_wait_is_not_lost_and_wakes_once() {
        let wake = Wake::default();
        wake.wake(Reason::Notification);
        wake.wake(Reason::Broker);
        let reasons: Vec<Reason> = wake.woken().await.iter().collect();
        assert_eq!(reasons, [Reason::Notification, Reason::Broker]);
        let second = tokio::time::timeout(Duration::from_millis(1), wake.woken()).await;
        assert!(second.is_err(), "two wakes become one");
    }
}
