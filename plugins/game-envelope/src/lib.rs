//! The envelope that the game services expect around an event, and the times in it. The game plugins share this crate,
//! which uses nothing of Tidings.

use serde::{Deserialize, Deserializer, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use time::macros::format_description;

/// An event in the form that the game services parse.
#[derive(Debug, Serialize)]
struct Envelope<'a, D> {
    event_type: &'a str,
    timestamp: String,
    data: D,
    trace_id: Option<&'a str>,
}

/// Wraps `data` into the envelope, made at `now_ms` (milliseconds since the Unix epoch).
///
/// # Errors
///
/// When `now_ms` is not between the years 0 and 9999, or `data` cannot be written as JSON.
pub fn wrap(event_type: &str, now_ms: u64, data: impl Serialize) -> Result<Vec<u8>, String> {
    // The format of Python's datetime.isoformat(), which every version of fromisoformat() can parse.
    const ISO: &[time::format_description::BorrowedFormatItem<'_>] =
        format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:6]+00:00");
    let timestamp = OffsetDateTime::from_unix_timestamp_nanos(i128::from(now_ms) * 1_000_000)
        .map_err(|error| format!("now-ms {now_ms} is not a time: {error}"))?
        .format(ISO)
        .map_err(|error| format!("now-ms {now_ms} cannot be written: {error}"))?;
    serde_json::to_vec(&Envelope { event_type, timestamp, data, trace_id: None })
        .map_err(|error| format!("the event cannot be written as JSON: {error}"))
}

/// An instant that was given as RFC 3339 text. It is written with the same text again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instant {
    text: String,
    unix_ms: i64,
}

impl Instant {
    /// Milliseconds since the Unix epoch, rounded down.
    #[must_use]
    pub fn unix_ms(&self) -> i64 {
        self.unix_ms
    }
}

impl<'de> Deserialize<'de> for Instant {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let instant = OffsetDateTime::parse(&text, &Rfc3339).map_err(|error| {
            serde::de::Error::custom(format!("{text:?} is not an RFC 3339 time such as 2026-11-21T20:00:00Z: {error}"))
        })?;
        let unix_ms =
            i64::try_from(instant.unix_timestamp_nanos().div_euclid(1_000_000)).map_err(serde::de::Error::custom)?;
        Ok(Self { text, unix_ms })
    }
}

impl Serialize for Instant {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_instant_keeps_its_text_and_has_its_milliseconds() {
        let instant: Instant = serde_json::from_str(r#""2026-11-21T21:00:00.9996+01:00""#).expect("a good time");
        assert_eq!(instant.unix_ms(), 1_795_291_200_999);
        assert_eq!(serde_json::to_string(&instant).expect("text"), r#""2026-11-21T21:00:00.9996+01:00""#);
    }

    #[test]
    fn a_time_without_an_offset_is_refused_with_a_reason() {
        let error = serde_json::from_str::<Instant>(r#""2026-11-21T21:00:00""#).expect_err("no offset");
        assert!(error.to_string().contains("is not an RFC 3339 time"), "{error}");
    }

    #[test]
    fn the_envelope_has_the_four_fields_that_the_services_parse() {
        let body = wrap("game.test", 1_795_291_200_007, serde_json::json!({"a": 1})).expect("an envelope");
        assert_eq!(
            String::from_utf8(body).expect("UTF-8"),
            r#"{"event_type":"game.test","timestamp":"2026-11-21T20:00:00.007000+00:00","data":{"a":1},"trace_id":null}"#
        );
    }

    proptest! {
        #[test]
        fn a_time_is_written_with_its_own_text_again_or_refused_with_an_error_that_has_the_text(
            text in prop_oneof![
                "[0-9]{4}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-6][0-9]:[0-6][0-9](\\.[0-9]{1,12})?(Z|[+-][0-2][0-9]:[0-6][0-9])",
                "[0-9]{4}-[01][0-9]-[0-3][0-9].?[0-2][0-9]:[0-9:Z+-]{0,9}",
                "\\PC{0,30}",
            ],
        ) {
            let json = serde_json::to_string(&text).expect("a string");
            match serde_json::from_str::<Instant>(&json) {
                Ok(instant) => prop_assert_eq!(serde_json::to_string(&instant).expect("a string"), json),
                Err(error) => {
                    let expected = format!("{text:?} is not an RFC 3339 time");
                    prop_assert!(error.to_string().contains(&expected), "{}", error);
                }
            }
        }

        #[test]
        fn an_envelope_has_the_time_that_was_given_or_the_error_names_it(
            now_ms in prop_oneof![any::<u64>(), 0..253_402_300_800_100_u64],
        ) {
            match wrap("game.test", now_ms, ()) {
                Ok(body) => {
                    let envelope: serde_json::Value = serde_json::from_slice(&body).expect("JSON");
                    let instant: Instant = serde_json::from_value(envelope["timestamp"].clone()).expect("a time");
                    prop_assert_eq!(instant.unix_ms().cast_unsigned(), now_ms);
                }
                Err(sentence) => {
                    let time = format!("now-ms {now_ms} ");
                    prop_assert!(sentence.starts_with(&time), "{}", sentence);
                }
            }
        }
    }
}
