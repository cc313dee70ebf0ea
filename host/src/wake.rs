//! What makes the scheduler look again, and why it does.

use std::sync::atomic::{AtomicU16, Ordering};

use tokio::sync::Notify;

/// Why the scheduler looks again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// PostgreSQL notified us.
    Notification,
    /// A notification may have been lost.
    Doubt,
    /// Other plugins serve than before, or they have news.
    Plugins,
    /// Messages can be published again.
    Broker,
    /// Held rows were released.
    Released,
    /// A lane has ended.
    Lane,
    /// Rows that cannot be claimed were held.
    Held,
    /// The next row is due.
    Due,
    /// Many notify, and were told that we look by ourselves.
    Polling,
    /// Others held the rows that are due, or a server did not see something through: asked again.
    Again,
    /// It has not looked for a while.
    Sweep,
}

impl Reason {
    /// All of them, each at the place of its number.
    pub const ALL: [Self; 11] = [
        Self::Notification,
        Self::Doubt,
        Self::Plugins,
        Self::Broker,
        Self::Released,
        Self::Lane,
        Self::Held,
        Self::Due,
        Self::Polling,
        Self::Again,
        Self::Sweep,
    ];

    /// Whether somebody else told us that something may have changed. The others are the scheduler's own doing.
    #[must_use]
    pub fn is_from_others(self) -> bool {
        matches!(self, Self::Notification | Self::Doubt | Self::Plugins | Self::Broker | Self::Released)
    }

    /// One word.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Notification => "notification",
            Self::Doubt => "doubt",
            Self::Plugins => "plugins",
            Self::Broker => "broker",
            Self::Released => "released",
            Self::Lane => "lane",
            Self::Held => "held",
            Self::Due => "due",
            Self::Polling => "polling",
            Self::Again => "again",
            Self::Sweep => "sweep",
        }
    }
}

/// The reasons of wakes that became one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Reasons(u16);

impl From<Reason> for Reasons {
    fn from(reason: Reason) -> Self {
        Self(1 << reason as u16)
    }
}

impl Reasons {
    /// These and those.
    #[must_use]
    pub fn and(self, others: Self) -> Self {
        Self(self.0 | others.0)
    }

    /// Each of them once.
    pub fn iter(self) -> impl Iterator<Item = Reason> {
        Reason::ALL.into_iter().filter(move |reason| self.0 & Self::from(*reason).0 != 0)
    }
}

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
        self.reasons.fetch_or(Reasons::from(reason).0, Ordering::Relaxed);
        self.notify.notify_one();
    }

    /// Waits for a wake, and returns the reasons since the last. Cancel-safe: a wake is consumed only by the call that
    /// returns.
    pub async fn woken(&self) -> Reasons {
        self.notify.notified().await;
        Reasons(self.reasons.swap(0, Ordering::Relaxed))
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
