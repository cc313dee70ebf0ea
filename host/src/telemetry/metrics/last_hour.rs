//! The last hour, minute by minute, for the page: the outcomes of attempts at rows, and the lateness of delivered rows.
//! It has only what this daemon did, is kept in memory, and ends with the process. Minutes are counted from the start
//! of the daemon by the monotonic clock.

use std::collections::VecDeque;
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, Instant};

use serde::Serialize;
use sketches_ddsketch::{Config, DDSketch};

/// The time that one entry sums up.
const MINUTE: Duration = Duration::from_mins(1);
/// The current minute and the sixty before it.
const MINUTES: u64 = 61;
/// The relative error of a quantile.
const RELATIVE_ERROR: f64 = 0.02;
/// Enough bins for that error from a microsecond to a year. A sketch grows only as far as its values need.
const MAX_BINS: u32 = 1024;
/// Less counts as no lateness.
const MIN_LATENESS_SECONDS: f64 = 1e-6;

static HOUR: LazyLock<Mutex<Hour>> = LazyLock::new(|| Mutex::new(Hour::new(Instant::now())));

/// The last hour as the page shows it.
#[derive(Debug, Serialize)]
pub struct LastHour {
    /// How much of the current minute has passed, in seconds.
    pub seconds: f64,
    /// The minutes, the oldest first; the last is the current one.
    pub minutes: Vec<Minute>,
}

/// What happened in one minute.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Minute {
    /// Rows whose messages were confirmed.
    pub delivered: u64,
    /// Rows whose deadline had passed.
    pub expired: u64,
    /// Rows whose plugin had nothing to send.
    pub skipped: u64,
    /// Rows that were parked.
    pub parked: u64,
    /// Attempts that are repeated later: the plugin failed or asked for it, or no queue took the message.
    pub again: u64,
    /// Rows that were held because no daemon serves their kind or it is paused.
    pub held: u64,
    /// The median lateness of delivered rows in seconds, to 2 %; `None` = no row was delivered.
    pub p50: Option<f64>,
    /// The 99th percentile of the lateness.
    pub p99: Option<f64>,
    /// The greatest lateness, in seconds.
    pub max: Option<f64>,
}

/// The minutes in which something happened, each with its number since the start.
struct Hour {
    began: Instant,
    minutes: VecDeque<(u64, Minute, DDSketch)>,
}

/// Counts rows of one kind: `outcomes` in the order of [`crate::telemetry::metrics::kinds`], `lateness` in seconds.
pub(in crate::telemetry) fn count(outcomes: [u64; 8], lateness: &[f64]) {
    let mut hour = HOUR.lock().expect("the lock is not poisoned");
    hour.count(Instant::now(), outcomes, lateness);
}

/// The last hour of this daemon.
#[must_use]
pub fn last_hour() -> LastHour {
    HOUR.lock().expect("the lock is not poisoned").show(Instant::now())
}

/// Starts the first minute. Without this call it starts with the first row.
pub(in crate::telemetry) fn start() {
    LazyLock::force(&HOUR);
}

impl Hour {
    fn new(began: Instant) -> Self {
        Self { began, minutes: VecDeque::new() }
    }

    fn minute_number(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.began).as_secs() / MINUTE.as_secs()
    }

    fn count(&mut self, now: Instant, outcomes: [u64; 8], lateness: &[f64]) {
        let current = self.minute_number(now);
        if self.minutes.back().is_none_or(|(number, ..)| *number != current) {
            self.minutes.push_back((
                current,
                Minute::default(),
                DDSketch::new(Config::new(RELATIVE_ERROR, MAX_BINS, MIN_LATENESS_SECONDS)),
            ));
        }
        while self.minutes.front().is_some_and(|(number, ..)| number + MINUTES <= current) {
            self.minutes.pop_front();
        }
        let (_, minute, sketch) = self.minutes.back_mut().expect("it was just put there");
        let [delivered, expired, skipped, parked, retried, waits, refused, held] = outcomes;
        minute.delivered += delivered;
        minute.expired += expired;
        minute.skipped += skipped;
        minute.parked += parked;
        minute.again += retried + waits + refused;
        minute.held += held;
        for seconds in lateness {
            sketch.add(*seconds);
        }
    }

    fn show(&self, now: Instant) -> LastHour {
        let current = self.minute_number(now);
        let mut minutes = vec![Minute::default(); usize::try_from(MINUTES).expect("few")];
        for (number, minute, sketch) in &self.minutes {
            let ago = current.saturating_sub(*number);
            let Some(index) = (MINUTES - 1).checked_sub(ago) else { continue };
            let quantile = |q| sketch.quantile(q).ok().flatten();
            let shown = Minute { p50: quantile(0.5), p99: quantile(0.99), max: sketch.max(), ..minute.clone() };
            minutes[usize::try_from(index).expect("few")] = shown;
        }
        let seconds = now.saturating_duration_since(self.began).as_secs_f64() % MINUTE.as_secs_f64();
        LastHour { seconds, minutes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE_DELIVERED: [u64; 8] = [1, 0, 0, 0, 0, 0, 0, 0];

    #[test]
    fn the_hour_has_61_minutes_and_drops_older_ones() {
        let began = Instant::now();
        let mut hour = Hour::new(began);
        assert_eq!(hour.show(began).minutes, vec![Minute::default(); 61]);
        for minute in 0..200_u32 {
            hour.count(began + MINUTE * minute, ONE_DELIVERED, &[1.0]);
        }
        assert_eq!(hour.minutes.len(), 61);
        let now = began + MINUTE * 199 + Duration::from_secs(15);
        let shown = hour.show(now);
        assert!(shown.minutes.iter().all(|minute| minute.delivered == 1), "{shown:?}");
        assert!((shown.seconds - 15.0).abs() < 1e-6);
        // Half an hour without rows.
        let later = hour.show(now + MINUTE * 30).minutes;
        assert_eq!(later.iter().map(|minute| minute.delivered).sum::<u64>(), 31);
        assert_eq!((later[30].delivered, later[31].delivered), (1, 0));
        assert_eq!(hour.show(now + MINUTE * 500).minutes, vec![Minute::default(); 61]);
    }

    #[test]
    fn the_quantiles_are_right_to_2_percent_at_any_scale_of_lateness() {
        let began = Instant::now();
        for scale in [1e-5, 1e-3, 1.0, 1e4, 1e7] {
            let mut hour = Hour::new(began);
            let lateness: Vec<f64> = (1..=1_000).map(|number| f64::from(number) * scale).collect();
            hour.count(began, [1_000, 0, 0, 0, 1, 2, 3, 0], &lateness);
            let minute = hour.show(began).minutes.pop().expect("there are 61");
            for (actual, expected) in [(minute.p50, 500.0), (minute.p99, 990.0), (minute.max, 1_000.0)] {
                let actual = actual.expect("some were delivered") / scale;
                assert!((actual / expected - 1.0).abs() < 0.021, "{actual} {expected} {scale}");
            }
            assert_eq!((minute.delivered, minute.again), (1_000, 6));
        }
    }
}
