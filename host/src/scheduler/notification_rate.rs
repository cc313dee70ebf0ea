//! Recognizes a flood of notifications. In PostgreSQL, transactions that notify commit one after the other, so during a flood
//! the listener promises that all daemons poll, and the triggers are silent meanwhile. No I/O.

use std::time::Duration;

use tokio::time::Instant;

/// This many notifications within [`WINDOW`] are a flood: commits that take 12 ms each, one after the other, cause as many.
const FLOOD: usize = 16;
/// The time in which notifications are counted.
const WINDOW: Duration = Duration::from_millis(200);

/// Counts notifications, and recognizes a flood.
#[derive(Debug, Default)]
pub struct NotificationRate {
    window_start: Option<Instant>,
    notifications: usize,
}

impl NotificationRate {
    /// Counts notifications that arrived `now`. Returns whether they are a flood; then counting begins anew.
    pub fn add(&mut self, notifications: usize, now: Instant) -> bool {
        if self.window_start.is_none_or(|start| now - start > WINDOW) {
            (self.window_start, self.notifications) = (Some(now), 0);
        }
        self.notifications += notifications;
        let is_flood = self.notifications >= FLOOD;
        if is_flood {
            self.window_start = None;
        }
        is_flood
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_a_flood_and_as_many_notifications_over_a_longer_time_are_not() {
        let begun = Instant::now();
        let mut rate = NotificationRate::default();
        assert!(!rate.add(FLOOD - 1, begun));
        assert!(rate.add(1, begun + WINDOW));
        assert!(!rate.add(FLOOD - 1, begun + WINDOW), "counting begins anew");
        assert!((0..100).all(|number| !rate.add(1, begun + WINDOW * 3 + WINDOW * number / 10)), "50 in a second");
    }
}
