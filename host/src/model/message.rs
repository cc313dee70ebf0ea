//! The message that is published: the public message contract, field by field. No I/O, and no types of the AMQP client
//! library.

use std::borrow::Cow;

use uuid::Uuid;

use crate::model::event::{BuiltEvent, LONGEST_TTL_MS};
use crate::model::properties::{HeaderValue, Headers, Properties};
use crate::model::relay;
use crate::model::relay::Relayed;
use crate::model::schedule::Schedule;

/// The header with the row's id, in a message that has a `message_id` of its own.
pub const ID: &str = "tidings-id";
/// The header with the user who published a message that was taken in.
const USER_ID: &str = "tidings-user-id";

/// One message, ready to be published.
#[derive(Clone, Debug)]
pub struct Message {
    /// The schedule's id.
    pub id: Uuid,
    /// The schedule's kind.
    pub kind: String,
    /// The exchange; `None` = the daemon's.
    pub exchange: Option<String>,
    /// The routing key, at most 255 bytes; that of an event has at least 1.
    pub routing_key: String,
    /// Its properties.
    pub properties: MessageProperties,
    /// Time until its deadline, 1 ms to ten years, in milliseconds; `None` = it never expires.
    pub expiration_ms: Option<u64>,
    /// In the order of the contract: the daemon's headers, then the row's, then the event's.
    pub headers: Vec<(Cow<'static, str>, HeaderValue)>,
    /// The body.
    pub body: Vec<u8>,
}

/// The properties of a message, except those that each message has.
#[derive(Clone, Debug)]
pub enum MessageProperties {
    /// Those of an event. The row's id is its `message_id`, the kind its `type`.
    Event {
        /// The event's media type, at most 255 bytes; absent if the event's is empty.
        content_type: Option<String>,
        /// When it is published, in seconds since the Unix epoch, by the database's clock.
        timestamp: u64,
        /// That of the row.
        priority: u8,
    },
    /// Those that a relayed message came with.
    Own(Box<Properties>),
}

/// The deadline, in milliseconds since the Unix epoch, has passed: the event must not be published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expired(pub i64);

impl Message {
    /// The message for `built`, published to `exchange` at `now_ms`.
    ///
    /// # Errors
    ///
    /// [`Expired`] when the row's deadline or the event's has passed.
    pub fn new(schedule: &Schedule, built: BuiltEvent, exchange: &str, now_ms: i64) -> Result<Self, Expired> {
        let expires_ms = earlier(schedule.expires_ms(), built.expires_ms);
        let expiration_ms = time_left(expires_ms, now_ms)?;
        let (routing_key, content_type, body, event_headers) = built.event.into_parts();
        let mut headers = own_headers(schedule, expires_ms, &built.plugin, exchange, &routing_key);
        let row_headers =
            schedule.headers.iter().filter(|(name, _)| event_headers.iter().all(|(other, _)| other != name));
        headers.extend(row_headers.map(|(name, value)| (name.clone().into(), HeaderValue::Text(value.clone()))));
        headers.extend(event_headers.into_iter().map(|(name, value)| (name.into(), HeaderValue::Text(value))));

        let properties = MessageProperties::Event {
            content_type: Some(content_type).filter(|content_type| !content_type.is_empty()),
            timestamp: u64::try_from(now_ms / 1000).unwrap_or(0),
            priority: schedule.priority,
        };
        let (id, kind) = (schedule.id, schedule.kind.clone());
        Ok(Self { id, kind, exchange: None, routing_key, properties, expiration_ms, headers, body })
    }

    /// The message of a row of the kind `relay`, published at `now_ms`.
    ///
    /// # Errors
    ///
    /// [`Expired`] when the row's deadline has passed.
    pub fn relayed(schedule: &Schedule, relayed: Relayed, now_ms: i64) -> Result<Self, Expired> {
        let expiration_ms = time_left(schedule.expires_ms(), now_ms)?;
        let Relayed { exchange, routing_key, mut properties, headers: own, body } = relayed;
        let mut headers = own_headers(schedule, schedule.expires_ms(), relay::LABEL, &exchange, &routing_key);
        headers.push((ID.into(), HeaderValue::Text(schedule.id.to_string())));
        headers.extend(properties.user_id.take().map(|user| (USER_ID.into(), HeaderValue::Text(user))));
        let row_headers = schedule.headers.iter().filter(|(name, _)| !own.contains_key(name));
        headers.extend(row_headers.map(|(name, value)| (name.clone().into(), HeaderValue::Text(value.clone()))));
        headers.extend(own.into_iter().map(|(name, value)| (name.into(), value)));
        properties.message_id.get_or_insert_with(|| schedule.id.to_string());
        properties.kind.get_or_insert_with(|| schedule.kind.clone());
        Ok(Self {
            id: schedule.id,
            kind: schedule.kind.clone(),
            exchange: Some(exchange),
            routing_key,
            properties: MessageProperties::Own(Box::new(properties)),
            expiration_ms,
            headers,
            body,
        })
    }

    /// A message that is put aside into one of the daemon's queues, as it came.
    #[must_use]
    pub fn to_queue(id: Uuid, queue: String, mut properties: Properties, mut headers: Headers, body: Vec<u8>) -> Self {
        headers.insert(ID.to_owned(), HeaderValue::Text(id.to_string()));
        headers.extend(properties.user_id.take().map(|user| (USER_ID.to_owned(), HeaderValue::Text(user))));
        Self {
            id,
            kind: String::new(),
            // The default exchange: to the queue of this name and to no other.
            exchange: Some(String::new()),
            routing_key: queue,
            properties: MessageProperties::Own(Box::new(properties)),
            expiration_ms: None,
            headers: headers.into_iter().map(|(name, value)| (name.into(), value)).collect(),
            body,
        }
    }
}

/// The time until a deadline, in milliseconds; `None` = there is none.
fn time_left(expires_ms: Option<i64>, now_ms: i64) -> Result<Option<u64>, Expired> {
    let Some(deadline) = expires_ms else { return Ok(None) };
    match u64::try_from(deadline.saturating_sub(now_ms)) {
        Ok(0) | Err(_) => Err(Expired(deadline)),
        Ok(left) => Ok(Some(left.min(LONGEST_TTL_MS))),
    }
}

/// The headers that the daemon adds to each message.
fn own_headers(
    schedule: &Schedule,
    expires_ms: Option<i64>,
    plugin: &str,
    exchange: &str,
    routing_key: &str,
) -> Vec<(Cow<'static, str>, HeaderValue)> {
    let text = |name: &'static str, value: &str| (name.into(), HeaderValue::Text(value.to_owned()));
    let number = |name: &'static str, value: i64| (name.into(), HeaderValue::Number(value));
    let mut headers = vec![text("tidings-kind", &schedule.kind)];
    headers.extend(schedule.key.iter().map(|key| text("tidings-key", key)));
    headers.extend(schedule.subject.iter().map(|subject| text("tidings-subject", subject)));
    headers.push(number("tidings-due-ms", schedule.due_ms()));
    headers.extend(expires_ms.map(|deadline| number("tidings-expires-ms", deadline)));
    headers.extend(schedule.recurrence.iter().map(|recurrence| text("tidings-recurrence", recurrence)));
    headers.extend(schedule.nominal_ms().map(|nominal| number("tidings-nominal-ms", nominal)));
    headers.push(number("tidings-attempt", schedule.attempt().into()));
    headers.push(number("tidings-replay", 0));
    headers.push(text("tidings-plugin", plugin));
    headers.push(text("tidings-exchange", exchange));
    headers.push(text("tidings-routing-key", routing_key));
    headers
}

/// The earlier of two deadlines; `None` = no deadline.
fn earlier(first: Option<i64>, second: Option<i64>) -> Option<i64> {
    match (first, second) {
        (Some(first), Some(second)) => Some(first.min(second)),
        (first, second) => first.or(second),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use time::OffsetDateTime;

    use super::*;
    use crate::model::event::Event;

    const NOW_MS: i64 = 1_795_291_200_123;

    fn schedule(expires_ms: Option<i64>) -> Schedule {
        let at = |ms: i64| OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000).expect("a time");
        Schedule {
            id: Uuid::from_u128(7),
            kind: "game-reminder".into(),
            key: Some("k".into()),
            subject: None,
            due_at: at(NOW_MS - 5),
            expires_at: expires_ms.map(at),
            payload: "{}".into(),
            headers: vec![("traceparent".into(), "00-1".into()), ("both".into(), "row".into())],
            attempts: 2,
            failures: 1,
            refusals: 0,
            untried_since: None,
            recurrence: None,
            nominal_at: None,
            line: None,
            priority: 4,
        }
    }

    fn built(expires_ms: Option<i64>) -> BuiltEvent {
        let headers = vec![("both".to_owned(), "event".to_owned())];
        let event = Event::new("a.b".into(), "text/plain".into(), b"body".to_vec(), headers).expect("an event");
        BuiltEvent { event, built_ms: 0, expires_ms, plugin: "p@1+00000000".into() }
    }

    #[test]
    fn the_headers_follow_the_contract_and_the_events_headers_replace_the_rows() {
        let message = Message::new(&schedule(Some(NOW_MS + 9_000)), built(None), "tidings", NOW_MS).expect("a message");
        let text = |value: &str| HeaderValue::Text(value.into());
        let expected = [
            ("tidings-kind", text("game-reminder")),
            ("tidings-key", text("k")),
            ("tidings-due-ms", HeaderValue::Number(NOW_MS - 5)),
            ("tidings-expires-ms", HeaderValue::Number(NOW_MS + 9_000)),
            ("tidings-attempt", HeaderValue::Number(3)),
            ("tidings-replay", HeaderValue::Number(0)),
            ("tidings-plugin", text("p@1+00000000")),
            ("tidings-exchange", text("tidings")),
            ("tidings-routing-key", text("a.b")),
            ("traceparent", text("00-1")),
            ("both", text("event")),
        ];
        assert_eq!(message.headers, expected.map(|(name, value)| (name.into(), value)));
        assert!(matches!(message.properties, MessageProperties::Event { timestamp: 1_795_291_200, .. }));
        assert_eq!(message.expiration_ms, Some(9_000));
    }

    #[test]
    fn without_a_deadline_there_is_neither_expiration_nor_its_header() {
        let message = Message::new(&schedule(None), built(None), "tidings", NOW_MS).expect("a message");
        assert_eq!(message.expiration_ms, None);
        assert!(message.headers.iter().all(|(name, _)| name != "tidings-expires-ms"));
    }

    #[test]
    fn at_the_very_millisecond_of_its_deadline_an_event_is_expired() {
        assert_eq!(Message::new(&schedule(Some(NOW_MS)), built(None), "t", NOW_MS).err(), Some(Expired(NOW_MS)));
        assert_eq!(Message::new(&schedule(None), built(Some(NOW_MS)), "t", NOW_MS).err(), Some(Expired(NOW_MS)));
        let last = Message::new(&schedule(None), built(Some(NOW_MS + 1)), "t", NOW_MS).expect("a message");
        assert_eq!(last.expiration_ms, Some(1));
    }

    proptest! {
        #[test]
        fn the_expiration_is_the_time_until_the_earlier_deadline_cut_to_the_longest_ttl(
            row in proptest::option::of(0..253_402_300_799_999_i64),
            event in proptest::option::of(any::<i64>()),
            now in 0..253_402_300_799_999_i64,
        ) {
            let deadline = [row, event].into_iter().flatten().min();
            match (Message::new(&schedule(row), built(event), "t", now), deadline) {
                (Ok(message), None) => prop_assert_eq!(message.expiration_ms, None),
                (Ok(message), Some(deadline)) => {
                    prop_assert!(deadline > now);
                    prop_assert_eq!(message.expiration_ms, Some((deadline - now).cast_unsigned().min(LONGEST_TTL_MS)));
                }
                (Err(Expired(at)), deadline) => {
                    prop_assert_eq!(Some(at), deadline);
                    prop_assert!(at <= now);
                }
            }
        }
    }
}
