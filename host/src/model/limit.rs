//! How many rows of a kind may go in a time, as `tidings.limit` says. No I/O.

use std::fmt;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

/// The limit of a kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limit {
    /// The kind.
    pub kind: String,
    /// At most this many rows in each `per_seconds`.
    pub count: i32,
    /// The time for `count` rows.
    pub per_seconds: f64,
    /// This many rows may go at once after a pause.
    pub burst: i32,
    /// The limit is for each subject of the kind by itself, and not for the kind as a whole.
    pub by_subject: bool,
    /// When it was set or changed.
    #[serde(with = "time::serde::rfc3339")]
    pub since: OffsetDateTime,
}

/// Where a row stands in its line.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Place {
    /// The limit for which it waits.
    pub limit: Limit,
    /// How many rows go before it; counted up to 100,000.
    pub before: i64,
    /// There are more rows before it than were counted.
    pub before_or_more: bool,
    /// About how long it waits, at least if not all rows before it were counted.
    pub in_seconds: f64,
}

impl Limit {
    /// About how long a row waits that has `before` rows before it in its line, when the line has its next turn in `turn_in_seconds`
    /// (negative: since then several rows may go at once).
    #[must_use]
    pub fn wait_seconds(&self, before: i64, turn_in_seconds: f64) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let steps = before as f64;
        (turn_in_seconds + steps * self.per_seconds / f64::from(self.count)).max(0.0)
    }
}

/// For example `at most 100 in 1 s of the kind mail`.
impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, count, per_seconds, burst, by_subject, .. } = self;
        let of = if *by_subject { "of each subject " } else { "" };
        write!(f, "at most {count} in {per_seconds} s {of}of the kind {kind}")?;
        if *burst > 1 { write!(f, ", {burst} at once") } else { Ok(()) }
    }
}

/// A time of some length, as hours, minutes and seconds.
#[must_use]
pub fn clock_time(seconds: f64) -> String {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "casts saturate, which is far away")]
    let seconds = seconds.ceil().max(0.0) as u64;
    format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(count: i32, per_seconds: f64, burst: i32, by_subject: bool) -> Limit {
        Limit { kind: "mail".into(), count, per_seconds, burst, by_subject, since: OffsetDateTime::UNIX_EPOCH }
    }

    #[test]
    fn a_limit_reads_like_a_sentence() {
        assert_eq!(limit(100, 1.0, 1, false).to_string(), "at most 100 in 1 s of the kind mail");
        assert_eq!(
            limit(5, 0.5, 3, true).to_string(),
            "at most 5 in 0.5 s of each subject of the kind mail, 3 at once"
        );
    }

    #[test]
    fn a_row_waits_a_step_for_each_row_before_it_and_never_less_than_nothing() {
        let close = |seconds: f64, expected: f64| assert!((seconds - expected).abs() < 1e-9, "{seconds}");
        close(limit(100, 1.0, 1, false).wait_seconds(75_000, 0.5), 750.5);
        close(limit(100, 1.0, 50, false).wait_seconds(10, -0.49), 0.0);
    }

    #[test]
    fn a_time_is_shown_in_hours_minutes_and_whole_seconds() {
        assert_eq!(clock_time(750.2), "00:12:31");
        assert_eq!(clock_time(-1.0), "00:00:00");
        assert_eq!(clock_time(360_000.0), "100:00:00");
    }
}
