//! Tells when notifications are too many. In PostgreSQL transactions that notify commit one after the other, so under load the
//! daemon promises to look by itself, and asks for silence.

use std::time::Duration;

use tokio::time::Instant;

/// So many notifications ...
const MANY: usize = 16;
/// ... in this time are worth a promise. Commits that take 12 ms, one after the other, are as many.
const SOON: Duration = Duration::from_millis(200);

/// Tells when notifications are too many.
#[derive(Debug, Default)]
pub struct NotificationRate {
    since: Option<Instant>,
    notifications: usize,
}

impl NotificationRate {
    /// Counts notifications that came `now`. True if there were too many lately; then it begins anew.
    pub fn add(&mut self, notifications: usize, now: Instant) -> bool {
        if self.since.is_none_or(|since| now - since > SOON) {
            (self.since, self.notifications) = (Some(now), 0);
        }
        self.notifications += notifications;
        let flood = self.notifications >= MANY;
        if flood {
            self.since = None;
        }
        flood
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_a_flood_and_the_same_number_over_time_is_none() {
        let begun = Instant::now();
        let mut flood = NotificationRate::default();
        assert!(!flood.add(MANY - 1, begun));
        assert!(flood.add(1, begun + SOON));
        assert!(!flood.add(MANY - 1, begun + SOON), "it begins anew");
        assert!((0..100).all(|number| !flood.add(1, begun + SOON * 3 + SOON * number / 10)), "50 in a second");
    }
}
