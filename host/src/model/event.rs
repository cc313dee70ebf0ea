//! The event that a plugin builds from a row, checked: RabbitMQ would close the channel over an event that breaks these
//! limits, and the other messages on that channel would not be confirmed. No I/O.

use std::sync::Arc;
use std::time::Duration;

use ring::digest::{Context, SHA256};
use thiserror::Error;

/// An event that [`Event::new`] has checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    routing_key: String,
    content_type: String,
    body: Vec<u8>,
    headers: Vec<(String, String)>,
}

/// The longest short string of AMQP: its length is one byte.
const SHORT_STRING_BYTES: usize = 255;
/// The longest headers of an event. All properties of a message must fit into one frame of 128 KiB, together with the row's
/// headers (16 KiB), its key and its subject.
const HEADERS_BYTES: usize = 32 * 1024;

/// The bytes that AMQP adds to each header: the length of its name, a type, the length of its value.
const HEADER_OVERHEAD: usize = 6;

/// Why an event cannot be published: the plugin broke the contract.
#[derive(Debug, Error, PartialEq, Eq)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum EventError {
    #[error("its routing-key has {0} bytes, not 1 to {SHORT_STRING_BYTES}")]
    RoutingKey(usize),
    #[error("its content-type has {0} bytes, more than {SHORT_STRING_BYTES}")]
    ContentType(usize),
    #[error("the name of a header has {0} bytes, not 1 to {SHORT_STRING_BYTES}")]
    HeaderName(usize),
    #[error("a header is named {0:?}: CC, BCC and names that begin with tidings- or x- are not the plugin's")]
    ReservedHeader(String),
    #[error("the header {0:?} appears twice")]
    RepeatedHeader(String),
    #[error("its headers have {0} bytes together, more than {HEADERS_BYTES}")]
    Headers(usize),
}

impl Event {
    /// Checks the parts of an event.
    ///
    /// # Errors
    ///
    /// When a part could not be published.
    pub fn new(
        routing_key: String,
        content_type: String,
        body: Vec<u8>,
        headers: Vec<(String, String)>,
    ) -> Result<Self, EventError> {
        if !(1..=SHORT_STRING_BYTES).contains(&routing_key.len()) {
            return Err(EventError::RoutingKey(routing_key.len()));
        }
        if content_type.len() > SHORT_STRING_BYTES {
            return Err(EventError::ContentType(content_type.len()));
        }
        let bytes: usize = headers.iter().map(|(name, value)| name.len() + value.len() + HEADER_OVERHEAD).sum();
        if bytes > HEADERS_BYTES {
            return Err(EventError::Headers(bytes));
        }
        let mut names = std::collections::HashSet::with_capacity(headers.len());
        for (name, _) in &headers {
            if !(1..=SHORT_STRING_BYTES).contains(&name.len()) {
                return Err(EventError::HeaderName(name.len()));
            }
            if name.starts_with("tidings-") || name.starts_with("x-") || name == "CC" || name == "BCC" {
                return Err(EventError::ReservedHeader(name.clone()));
            }
            if !names.insert(name) {
                return Err(EventError::RepeatedHeader(name.clone()));
            }
        }
        Ok(Self { routing_key, content_type, body, headers })
    }

    /// SHA-256 of all parts, in hexadecimal: equal exactly when the events are equal.
    #[must_use]
    pub fn digest(&self) -> String {
        let mut hash = Context::new(&SHA256);
        // Each part is preceded by its length, so that different events never give the same bytes.
        let mut add = |part: &[u8]| {
            hash.update(&(part.len() as u64).to_le_bytes());
            hash.update(part);
        };
        add(self.routing_key.as_bytes());
        add(self.content_type.as_bytes());
        add(&self.body);
        for (name, value) in &self.headers {
            add(name.as_bytes());
            add(value.as_bytes());
        }
        hex(hash.finish().as_ref())
    }

    /// The routing key.
    #[must_use]
    pub fn routing_key(&self) -> &str {
        &self.routing_key
    }

    /// The media type of the body.
    #[must_use]
    pub fn content_type(&self) -> &str {
        &self.content_type
    }

    /// The body.
    #[must_use]
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// The headers, without those of the row.
    #[must_use]
    pub fn headers(&self) -> &[(String, String)] {
        &self.headers
    }

    /// The length of the body, in bytes.
    #[must_use]
    pub fn body_len(&self) -> usize {
        self.body.len()
    }

    /// The parts, to be moved into a message: routing key, content type, body, headers.
    pub(crate) fn into_parts(self) -> (String, String, Vec<u8>, Vec<(String, String)>) {
        (self.routing_key, self.content_type, self.body, self.headers)
    }
}

/// Lower-case hexadecimal.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    let digit = |half: u8| char::from_digit(half.into(), 16).expect("half a byte");
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

/// An event, with the plugin that built it, the time of the build, and its deadline.
#[derive(Clone, Debug)]
pub struct BuiltEvent {
    /// What to publish.
    pub event: Event,
    /// The `now-ms` that the plugin was given.
    pub built_ms: i64,
    /// The event's deadline, in milliseconds since the Unix epoch: `now-ms` plus the ttl that the plugin returned. `None` =
    /// the plugin returned no ttl.
    pub expires_ms: Option<i64>,
    /// `name@version+digest8` of the plugin.
    pub plugin: Arc<str>,
}

/// The longest time to live that RabbitMQ accepts, in milliseconds: ten years of 365 days. Longer times are cut to it.
/// Source: `rabbit_misc:check_expiry`, measured on 3.10.8.
pub const LONGEST_TTL_MS: u64 = 315_360_000_000;

/// The deadline of an event that was built at `now_ms` with a time to live of `ttl_ms`.
#[must_use]
pub fn deadline_ms(now_ms: i64, ttl_ms: u64) -> i64 {
    let ttl_ms = i64::try_from(ttl_ms.min(LONGEST_TTL_MS)).expect("ten years fit");
    now_ms.saturating_add(ttl_ms)
}

/// Why a build ended without an event. The reason decides what happens to the row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BuildError {
    /// The plugin can never build this row.
    Invalid(String),
    /// The plugin asks for another attempt, after this many milliseconds if it named a time.
    Retry(String, Option<u64>),
    /// There is nothing to send.
    Skip(String),
    /// The plugin trapped, exceeded a limit or broke the contract.
    Failed(String),
    /// The plugin exceeded a limit that another attempt at the same row would exceed as well: of memory or of output. Time
    /// limits do not count: another attempt may be faster.
    TooLarge(String),
    /// The plugin was not called, since it fails for every row (its breaker is open). Another attempt is possible after this
    /// time.
    Unavailable(String, Duration),
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn event(routing_key: &str, headers: &[(&str, &str)]) -> Result<Event, EventError> {
        let headers = headers.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        Event::new(routing_key.into(), "text/plain".into(), b"x".to_vec(), headers)
    }

    #[test]
    fn an_event_that_would_close_the_channel_is_refused() {
        assert_eq!(event("", &[]), Err(EventError::RoutingKey(0)));
        assert_eq!(event(&"k".repeat(256), &[]), Err(EventError::RoutingKey(256)));
        assert_eq!(event("k", &[("", "v")]), Err(EventError::HeaderName(0)));
        assert_eq!(event("k", &[(&"n".repeat(256), "v")]), Err(EventError::HeaderName(256)));
        assert_eq!(event("k", &[("n", &"v".repeat(32 * 1024))]), Err(EventError::Headers(32 * 1024 + 7)));
        let many: Vec<String> = (0..5_000).map(|number| number.to_string()).collect();
        let many: Vec<(&str, &str)> = many.iter().map(|name| (name.as_str(), "")).collect();
        assert!(matches!(event("k", &many), Err(EventError::Headers(_))), "many small headers");
        assert_eq!(event("k", &[("n", "1"), ("n", "2")]), Err(EventError::RepeatedHeader("n".into())));
        for name in ["tidings-kind", "x-death", "CC", "BCC"] {
            assert_eq!(event("k", &[(name, "v")]), Err(EventError::ReservedHeader(name.into())));
        }
        assert!(event(&"k".repeat(255), &[("X-Trace", "v"), ("cc", "v")]).is_ok());
    }

    #[test]
    fn events_whose_joined_parts_are_equal_have_different_digests() {
        let one = event("ab", &[("c", "d")]).expect("an event");
        let other = event("a", &[("bc", "d")]).expect("an event");
        assert_eq!(one.digest(), one.clone().digest());
        assert_ne!(one.digest(), other.digest());
        assert_eq!(one.digest().len(), 64);
    }

    #[test]
    fn a_time_to_live_is_cut_to_ten_years_and_never_overflows() {
        assert_eq!(deadline_ms(1_000, 5), 1_005);
        assert_eq!(deadline_ms(1_000, 0), 1_000);
        assert_eq!(deadline_ms(0, u64::MAX), 315_360_000_000);
        assert_eq!(deadline_ms(i64::MAX, u64::MAX), i64::MAX);
    }

    /// Names that are valid, reserved, too long, or nearly so.
    fn name() -> impl Strategy<Value = String> {
        prop_oneof![
            3 => "\\PC{1,12}",
            1 => "(tidings|x|X|Tidings)-[a-z]{0,3}|B?CC|cc|",
            1 => (250..260_usize).prop_map(|length| "n".repeat(length)),
        ]
    }

    proptest! {
        #[test]
        fn an_accepted_event_is_within_the_limits_and_an_error_names_the_part_that_is_not(
            routing_key in prop_oneof!["(.|\n){0,90}", (250..260_usize).prop_map(|length| "k".repeat(length))],
            content_type in prop_oneof!["\\PC{0,90}", (250..260_usize).prop_map(|length| "t".repeat(length))],
            headers in proptest::collection::vec((name(), prop_oneof!["(.|\n){0,20}", "v{7000,9000}"]), 0..6),
        ) {
            let event = Event::new(routing_key.clone(), content_type.clone(), Vec::new(), headers.clone());
            match event {
                Ok(event) => {
                    prop_assert!((1..=255).contains(&event.routing_key().len()) && event.content_type().len() <= 255);
                    let names: std::collections::HashSet<&str> =
                        event.headers().iter().map(|(name, _)| name.as_str()).collect();
                    prop_assert_eq!(names.len(), headers.len());
                    let reserved = |name: &str| name.starts_with("tidings-") || name.starts_with("x-");
                    let fits = |name: &&str| (1..=255).contains(&name.len()) && !reserved(name);
                    prop_assert!(names.iter().all(fits) && !names.contains("CC") && !names.contains("BCC"));
                    let bytes: usize = headers.iter().map(|(name, value)| name.len() + value.len()).sum();
                    prop_assert!(bytes + headers.len() * HEADER_OVERHEAD <= HEADERS_BYTES);
                    prop_assert_eq!(event.into_parts(), (routing_key, content_type, Vec::new(), headers));
                }
                Err(error) => {
                    let sentence = error.to_string();
                    let part = match error {
                        EventError::RoutingKey(_) => "its routing-key has ",
                        EventError::ContentType(_) => "its content-type has ",
                        EventError::HeaderName(_) => "the name of a header has ",
                        EventError::ReservedHeader(_) => "a header is named ",
                        EventError::RepeatedHeader(_) => "the header ",
                        EventError::Headers(_) => "its headers have ",
                    };
                    prop_assert!(sentence.starts_with(part) && sentence.len() < 2_000, "{}", sentence);
                }
            }
        }

        #[test]
        fn a_longer_ttl_never_gives_an_earlier_deadline_and_no_deadline_is_beyond_the_longest_ttl(
            now_ms in any::<i64>(),
            ttl_ms in prop_oneof![any::<u64>(), 0..=LONGEST_TTL_MS],
        ) {
            let deadline = deadline_ms(now_ms, ttl_ms);
            prop_assert!(deadline >= now_ms && deadline <= deadline_ms(now_ms, ttl_ms.saturating_add(1)));
            prop_assert!(deadline.abs_diff(now_ms) <= LONGEST_TTL_MS.min(ttl_ms));
            if now_ms < i64::MAX - LONGEST_TTL_MS.cast_signed() {
                prop_assert_eq!(deadline.abs_diff(now_ms), LONGEST_TTL_MS.min(ttl_ms));
            }
        }
    }
}
