//! Recognizes a flood of notifications. In PostgreSQL, transactions that notify commit one after the other, so during a flood
//! the listener promises that all daemons poll, and the triggers are silent meanwhile. No I/O.

use std::time::Duration;

use tokio::time::Instant;

/// The time in which notifications are counted.
const WINDOW: Duration = Duration::from_millis(200);
/// Notifications are a flood if the commits behind them, one after the other, take this part of the window.
const FLOODED_PART: u32 = 2;
/// So few notifications within the window are never a flood.
const MIN_FLOOD: usize = 16;
/// So many always are.
const MAX_FLOOD: usize = 100;

/// Counts notifications, and recognizes a flood.
#[derive(Debug, Default)]
pub struct NotificationRate {
    window_start: Option<Instant>,
    notifications: usize,
}

impl NotificationRate {
    /// Counts notifications that arrived `now`. Returns whether they are a flood, if a commit takes `commit_time` (zero =
    /// unknown); then counting begins anew.
    pub fn add(&mut self, notifications: usize, now: Instant, commit_time: Duration) -> bool {
        if self.window_start.is_none_or(|start| now - start > WINDOW) {
            (self.window_start, self.notifications) = (Some(now), 0);
        }
        self.notifications += notifications;
        let is_flood = self.notifications >= flood(commit_time);
        if is_flood {
            self.window_start = None;
        }
        is_flood
    }
}

/// How many notifications within the window are a flood.
fn flood(commit_time: Duration) -> usize {
    let commits = (WINDOW / FLOODED_PART).as_micros().checked_div(commit_time.as_micros());
    commits.map_or(MIN_FLOOD, |commits| usize::try_from(commits).unwrap_or(MAX_FLOOD).clamp(MIN_FLOOD, MAX_FLOOD))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_a_flood_and_as_many_notifications_over_a_longer_time_are_not() {
        let begun = Instant::now();
        let mut rate = NotificationRate::default();
        let mut add = |notifications, now| rate.add(notifications, now, Duration::ZERO);
        assert!(!add(MIN_FLOOD - 1, begun));
        assert!(add(1, begun + WINDOW));
        assert!(!add(MIN_FLOOD - 1, begun + WINDOW), "counting begins anew");
        assert!((0..100).all(|number| !add(1, begun + WINDOW * 3 + WINDOW * number / 10)), "50 in a second");
    }

    #[test]
    fn the_faster_commits_are_the_more_of_them_are_a_flood() {
        let floods = [20, 5, 2, 1].map(|ms| flood(Duration::from_millis(ms)));
        assert_eq!(floods, [16, 20, 50, 100]);
        assert_eq!((flood(Duration::ZERO), flood(Duration::from_micros(300))), (MIN_FLOOD, MAX_FLOOD));
    }
}
