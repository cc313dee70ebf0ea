//! Reads and writes times: an instant in RFC 3339, a time span such as 90s, 2h or 3days.

use std::time::Duration;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

pub(super) use crate::model::display::show;

/// The longest span that is accepted: the calendar ends with the year 9999.
const LONGEST: Duration = Duration::from_hours(24 * 365 * 7_900);

/// Reads an instant.
pub(super) fn parse_instant(text: &str) -> Result<OffsetDateTime, String> {
    let instant = OffsetDateTime::parse(text, &Rfc3339);
    instant.map_err(|_| "not an instant in RFC 3339, such as 2026-12-24T18:00:00Z or 2026-12-24T19:00:00+01:00".into())
}

/// Reads a time span.
pub(super) fn parse_span(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(span) if span <= LONGEST => Ok(span),
        Ok(_) => Err("more than 7900 years".into()),
        Err(error) => Err(format!("not a time span, such as 90s, 15min, 2h or 3days: {error}")),
    }
}

/// Writes how far `instant` is from `now` in words, to the second.
pub(super) fn format_relative(instant: OffsetDateTime, now: OffsetDateTime) -> String {
    let distance = instant - now;
    let words = crate::cli::format_age(distance.unsigned_abs());
    if distance.is_negative() { format!("{words} ago") } else { format!("in {words}") }
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    #[test]
    fn an_instant_needs_an_offset_and_a_span_needs_a_unit() {
        assert_eq!(parse_instant("2026-12-24T19:00:00+01:00"), Ok(datetime!(2026-12-24 18:00 UTC)));
        for text in ["2026-12-24", "2026-12-24T18:00:00", "tomorrow", "infinity", ""] {
            assert!(parse_instant(text).is_err(), "{text}");
        }
        assert_eq!(parse_span("3days"), Ok(Duration::from_hours(72)));
        for text in ["3", "-1s", "soon", "9999999999999y", "8000years", ""] {
            assert!(parse_span(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_instant_is_shown_in_utc_to_the_millisecond() {
        assert_eq!(show(datetime!(2026-12-24 19:00:00.1239 +1)), "2026-12-24T18:00:00.123Z");
        assert_eq!(format_relative(datetime!(2026-01-01 0:01 UTC), datetime!(2026-01-01 0:00 UTC)), "in 1m");
        assert_eq!(format_relative(datetime!(2026-01-01 0:00 UTC), datetime!(2026-01-01 2:00 UTC)), "2h ago");
    }
}
