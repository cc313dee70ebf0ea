//! The last hour, minute by minute, for the page: what attempts at rows came to, and how late what was delivered was. It is
//! this daemon's alone, lives in memory, and is gone when the daemon ends; by the monotonic clock, from its start.

use std::collections::VecDeque;
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, Instant};

use serde::Serialize;
use sketches_ddsketch::{Config, DDSketch};

/// What is summed up.
const MINUTE: Duration = Duration::from_mins(1);
/// The minute that has begun, and the sixty before it.
const MINUTES: u64 = 61;
/// How far a quantile may be from the truth, as a part of it.
const ERROR: f64 = 0.02;
/// Enough for that from a microsecond to a year; a sketch grows only as far as it must.
const BINS: u32 = 1024;
/// Less is no lateness, in seconds.
const LEAST: f64 = 1e-6;

static HOUR: LazyLock<Mutex<Hour>> = LazyLock::new(|| Mutex::new(Hour::new(Instant::now())));

/// The last hour, for people.
#[derive(Debug, Serialize)]
pub struct LastHour {
    /// How much of the last minute is over, in seconds.
    pub seconds: f64,
    /// The minutes, the oldest first; the last one has only begun.
    pub minutes: Vec<Minute>,
}

/// What happened in one minute.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Minute {
    /// Rows whose messages were confirmed.
    pub delivered: u64,
    /// Rows whose deadline had come.
    pub expired: u64,
    /// Rows for which there was nothing to send.
    pub skipped: u64,
    /// Rows that were set aside.
    pub parked: u64,
    /// Attempts that are made again later: the plugin failed or asked for it, or no queue took the message.
    pub again: u64,
    /// Rows that were held, since nobody serves their kind or it is paused.
    pub held: u64,
    /// How late half of the delivered were at most, in seconds, to two in a hundred; `None` = nothing was delivered.
    pub p50: Option<f64>,
    /// The same of 99 in a hundred.
    pub p99: Option<f64>,
    /// How late the latest was, in seconds.
    pub max: Option<f64>,
}

/// The minutes in which something happened, by their number since the beginning.
struct Hour {
    began: Instant,
    minutes: VecDeque<(u64, Minute, DDSketch)>,
}

/// Counts rows of one kind; `outcomes` as [`crate::telemetry::metrics::kinds`] has them, `lateness` in seconds.
pub(in crate::telemetry) fn count(outcomes: [u64; 8], lateness: &[f64]) {
    let mut hour = HOUR.lock().expect("nobody panics with it");
    hour.count(Instant::now(), outcomes, lateness);
}

/// The last hour of this daemon.
#[must_use]
pub fn last_hour() -> LastHour {
    HOUR.lock().expect("nobody panics with it").show(Instant::now())
}

/// Begins the hour. Without this it begins with the first row.
pub(in crate::telemetry) fn begin() {
    LazyLock::force(&HOUR);
}

impl Hour {
    fn new(began: Instant) -> Self {
        Self { began, minutes: VecDeque::new() }
    }

    fn minute(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.began).as_secs() / MINUTE.as_secs()
    }

    fn count(&mut self, now: Instant, outcomes: [u64; 8], lateness: &[f64]) {
        let this = self.minute(now);
        if self.minutes.back().is_none_or(|(number, ..)| *number != this) {
            self.minutes.push_back((this, Minute::default(), DDSketch::new(Config::new(ERROR, BINS, LEAST))));
        }
        while self.minutes.front().is_some_and(|(number, ..)| number + MINUTES <= this) {
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
        let this = self.minute(now);
        let mut minutes = vec![Minute::default(); usize::try_from(MINUTES).expect("few")];
        for (number, minute, sketch) in &self.minutes {
            let ago = this.saturating_sub(*number);
            let Some(at) = (MINUTES - 1).checked_sub(ago) else { continue };
            let quantile = |q| sketch.quantile(q).ok().flatten();
            let shown = Minute { p50: quantile(0.5), p99: quantile(0.99), max: sketch.max(), ..minute.clone() };
            minutes[usize::try_from(at).expect("few")] = shown;
        }
        let seconds = now.saturating_duration_since(self.began).as_secs_f64() % MINUTE.as_secs_f64();
        LastHour { seconds, minutes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: [u64; 8] = [1, 0, 0, 0, 0, 0, 0, 0];

    #[test]
    fn an_hour_has_61_minutes_and_forgets_what_is_older() {
        let began = Instant::now();
        let mut hour = Hour::new(began);
        assert_eq!(hour.show(began).minutes, vec![Minute::default(); 61]);
        for minute in 0..200_u32 {
            hour.count(began + MINUTE * minute, ONE, &[1.0]);
        }
        assert_eq!(hour.minutes.len(), 61);
        let now = began + MINUTE * 199 + Duration::from_secs(15);
        let shown = hour.show(now);
        assert!(shown.minutes.iter().all(|minute| minute.delivered == 1), "{shown:?}");
        assert!((shown.seconds - 15.0).abs() < 1e-6);
        // Half an hour in which nothing happened.
        let later = hour.show(now + MINUTE * 30).minutes;
        assert_eq!(later.iter().map(|minute| minute.delivered).sum::<u64>(), 31);
        assert_eq!((later[30].delivered, later[31].delivered), (1, 0));
        assert_eq!(hour.show(now + MINUTE * 500).minutes, vec![Minute::default(); 61]);
    }

    #[test]
    fn the_quantiles_are_right_to_two_in_a_hundred_whatever_the_lateness() {
        let began = Instant::now();
        for scale in [1e-5, 1e-3, 1.0, 1e4, 1e7] {
            let mut hour = Hour::new(began);
            let lateness: Vec<f64> = (1..=1_000).map(|number| f64::from(number) * scale).collect();
            hour.count(began, [1_000, 0, 0, 0, 1, 2, 3, 0], &lateness);
            let minute = hour.show(began).minutes.pop().expect("there are 61");
            for (is, should_be) in [(minute.p50, 500.0), (minute.p99, 990.0), (minute.max, 1_000.0)] {
                let is = is.expect("some were delivered") / scale;
                assert!((is / should_be - 1.0).abs() < 0.021, "{is} {should_be} {scale}");
            }
            assert_eq!((minute.delivered, minute.again), (1_000, 6));
        }
    }
}
