//! Parses the properties of a dead letter, and makes those with which it is published again. No I/O.
//!
//! Must never fail or panic, whatever the headers contain, because anyone who may publish can have written them, and
//! never add more to them than fits into a frame.

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};

use crate::broker::frame_guard::field_table::UNREADABLE;
use crate::model::dead_letter::{DeadLetter, Unreadable, UnreadableHeaders};

/// The headers that a replay removes: those that RabbitMQ adds to a dead letter and would take for its history, and
/// `CC`, which would send copies to other queues.
const REMOVED_ON_REPLAY: [&str; 12] = [
    "x-death",
    "x-first-death-exchange",
    "x-first-death-queue",
    "x-first-death-reason",
    "x-last-death-exchange",
    "x-last-death-queue",
    "x-last-death-reason",
    "x-delivery-count",
    "x-acquired-count",
    "CC",
    PARKED_REASON,
    INTAKE_QUEUE,
];
/// The header with the queue of the intake that refused a message: a person may put it back there.
pub(in crate::broker) const INTAKE_QUEUE: &str = "tidings-intake";
/// The header with the routing key with which a message was published.
pub(in crate::broker) const ROUTING_KEY: &str = "tidings-routing-key";
/// The header that says why a message was parked.
pub(in crate::broker) const PARKED_REASON: &str = "tidings-parked-reason";
/// The length to which a reason is cut, in bytes: it must fit into `field_table::RESERVED_BYTES`. A reason may be
/// longer, because it may contain a queue's name with characters that are escaped, in six bytes each.
const MAX_REASON_BYTES: usize = 400;

/// Where a dead letter is published.
#[derive(Clone, Debug)]
pub enum Destination {
    /// The queue in which it died.
    OriginalQueue {
        /// The name of the queue.
        queue: String,
        /// `expiration`; `None` = it never expires.
        expiration_ms: Option<u64>,
        /// `tidings-replay`.
        replays: i64,
        /// `tidings-routing-key`, for the queue of an intake; `None` = that header stays as it is.
        routing_key: Option<String>,
    },
    /// `tidings.parking`, with the reason.
    ParkingQueue(String),
    /// The end of `tidings.dead`, with its headers unchanged.
    DeadQueue,
}

/// Parses the headers of a dead letter.
#[must_use]
pub fn parse(properties: &BasicProperties) -> DeadLetter {
    let no_headers = FieldTable::default();
    let headers = properties.headers().as_ref().unwrap_or(&no_headers);
    let death = match headers.inner().get("x-death") {
        // The first entry is the newest.
        Some(AMQPValue::FieldArray(deaths)) => match deaths.as_slice().first() {
            Some(AMQPValue::FieldTable(death)) => Some(death),
            _ => None,
        },
        _ => None,
    };
    let unreadable = match headers.inner().get(UNREADABLE) {
        Some(AMQPValue::ByteArray(bytes)) if bytes.is_empty() => Some(UnreadableHeaders::TooLong),
        Some(AMQPValue::ByteArray(_)) => Some(UnreadableHeaders::Carried),
        _ => None,
    };
    let number_of = |name: &str| headers.inner().get(name).and_then(number);
    let text_of_death = |name: &str| death.and_then(|death| text(death, name));
    DeadLetter {
        unreadable,
        id: properties.message_id().as_ref().map(ToString::to_string),
        kind: text(headers, "tidings-kind"),
        // RabbitMQ's word counts before one that a publisher may have written.
        queue: text_of_death("queue").or_else(|| text(headers, INTAKE_QUEUE)).filter(|queue| queue.len() <= 255),
        reason: text_of_death("reason"),
        died_at: death.and_then(|death| match death.inner().get("time") {
            Some(AMQPValue::Timestamp(seconds)) => Some(*seconds),
            _ => None,
        }),
        expires_ms: headers.inner().get("tidings-expires-ms").map(|value| number(value).ok_or(Unreadable)),
        due_ms: number_of("tidings-due-ms"),
        traceparent: text(headers, "traceparent"),
        tracestate: text(headers, "tracestate"),
        routing_key: text(headers, ROUTING_KEY).or_else(|| death.and_then(first_routing_key)),
        of_intake: false,
        replays: number_of("tidings-replay").unwrap_or(0),
    }
}

/// Why a dead letter was parked; `None` = it was not.
#[must_use]
pub fn parked_reason(properties: &BasicProperties) -> Option<String> {
    properties.headers().as_ref().and_then(|headers| text(headers, PARKED_REASON))
}

/// The properties with which a dead letter is published to `destination`. A replay removes what RabbitMQ added, and
/// sets the remaining time to live and the number of replays; all else stays as it was.
#[must_use]
pub fn properties_for(destination: &Destination, properties: &BasicProperties) -> BasicProperties {
    let mut headers = properties.headers().clone().unwrap_or_default();
    let mut expiration = None;
    match destination {
        Destination::OriginalQueue { expiration_ms, replays, routing_key, .. } => {
            headers = headers.inner().iter().filter(|(name, _)| !REMOVED_ON_REPLAY.contains(&name.as_str())).fold(
                FieldTable::default(),
                |mut kept, (name, value)| {
                    kept.insert(name.clone(), value.clone());
                    kept
                },
            );
            headers.insert("tidings-replay".into(), AMQPValue::LongLongInt(*replays));
            if let Some(key) = routing_key {
                headers.insert(ROUTING_KEY.into(), AMQPValue::LongString(key.as_str().into()));
            }
            expiration = *expiration_ms;
        }
        // It keeps RabbitMQ's headers, for the person who will look at it.
        Destination::ParkingQueue(reason) => {
            headers.insert(PARKED_REASON.into(), AMQPValue::LongString(truncate_reason(reason).into()));
        }
        Destination::DeadQueue => {}
    }
    copy_properties(properties, headers, expiration)
}

pub(in crate::broker) fn truncate_reason(reason: &str) -> String {
    let end = reason.floor_char_boundary(MAX_REASON_BYTES);
    if end == reason.len() { reason.to_owned() } else { format!("{}…", &reason[..end]) }
}

/// Copies every property except `user_id`, which must be the user who publishes, and the old `expiration`.
fn copy_properties(old: &BasicProperties, headers: FieldTable, expiration_ms: Option<u64>) -> BasicProperties {
    let mut new = BasicProperties::default().with_headers(headers);
    if let Some(value) = old.content_type() {
        new = new.with_content_type(value.clone());
    }
    if let Some(value) = old.content_encoding() {
        new = new.with_content_encoding(value.clone());
    }
    if let Some(value) = old.delivery_mode() {
        new = new.with_delivery_mode(*value);
    }
    if let Some(value) = old.priority() {
        new = new.with_priority(*value);
    }
    if let Some(value) = old.correlation_id() {
        new = new.with_correlation_id(value.clone());
    }
    if let Some(value) = old.reply_to() {
        new = new.with_reply_to(value.clone());
    }
    if let Some(value) = old.message_id() {
        new = new.with_message_id(value.clone());
    }
    if let Some(value) = old.timestamp() {
        new = new.with_timestamp(*value);
    }
    if let Some(value) = old.kind() {
        new = new.with_type(value.clone());
    }
    if let Some(value) = old.app_id() {
        new = new.with_app_id(value.clone());
    }
    if let Some(expiration_ms) = expiration_ms {
        new = new.with_expiration(expiration_ms.to_string().into());
    }
    new
}

fn first_routing_key(death: &FieldTable) -> Option<String> {
    match death.inner().get("routing-keys")? {
        AMQPValue::FieldArray(keys) => match keys.as_slice().first()? {
            AMQPValue::LongString(key) => String::from_utf8(key.as_bytes().to_vec()).ok(),
            _ => None,
        },
        _ => None,
    }
}

fn text(table: &FieldTable, name: &str) -> Option<String> {
    match table.inner().get(name)? {
        AMQPValue::LongString(text) => String::from_utf8(text.as_bytes().to_vec()).ok(),
        AMQPValue::ShortString(text) => Some(text.to_string()),
        _ => None,
    }
}

fn number(value: &AMQPValue) -> Option<i64> {
    match value {
        AMQPValue::ShortShortInt(number) => Some((*number).into()),
        AMQPValue::ShortShortUInt(number) => Some((*number).into()),
        AMQPValue::ShortInt(number) => Some((*number).into()),
        AMQPValue::ShortUInt(number) => Some((*number).into()),
        AMQPValue::LongInt(number) => Some((*number).into()),
        AMQPValue::LongUInt(number) => Some((*number).into()),
        AMQPValue::LongLongInt(number) => Some(*number),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use amq_protocol::frame::{AMQPContentHeader, AMQPFrame, WriteContext, gen_frame};
    use lapin::types::{FieldArray, ShortString};
    use proptest::prelude::*;

    use super::*;
    use crate::broker::frame_guard::field_table;
    use crate::model::dead_letter::Fate;
    use crate::model::event::LONGEST_TTL_MS;

    /// A value of any type; the types that are parsed are more frequent.
    fn value() -> impl Strategy<Value = AMQPValue> {
        let flat = prop_oneof![
            Just(AMQPValue::Void),
            any::<bool>().prop_map(AMQPValue::Boolean),
            any::<i8>().prop_map(AMQPValue::ShortShortInt),
            any::<u32>().prop_map(AMQPValue::LongUInt),
            any::<i64>().prop_map(AMQPValue::LongLongInt),
            any::<f64>().prop_map(AMQPValue::Double),
            any::<u64>().prop_map(AMQPValue::Timestamp),
            ".{0,90}".prop_map(|text| AMQPValue::LongString(text.into())),
            proptest::collection::vec(any::<u8>(), 0..300).prop_map(|bytes| AMQPValue::LongString(bytes.into())),
            proptest::collection::vec(any::<u8>(), 0..9).prop_map(|bytes| AMQPValue::ByteArray(bytes.into())),
        ];
        flat.prop_recursive(4, 24, 4, |value| {
            prop_oneof![
                table(value.clone()).prop_map(AMQPValue::FieldTable),
                proptest::collection::vec(value, 0..4)
                    .prop_map(|values| AMQPValue::FieldArray(FieldArray::from(values))),
            ]
        })
    }

    /// A table in which the names that are parsed are more frequent than others.
    fn table(value: impl Strategy<Value = AMQPValue>) -> impl Strategy<Value = FieldTable> {
        let name = prop_oneof![
            4 => proptest::sample::select(&[
                "x-death", "queue", "reason", "time", "tidings-kind", "tidings-due-ms", "tidings-expires-ms",
                "tidings-replay", "tidings-parked-reason", UNREADABLE, "CC",
            ][..]).prop_map(str::to_owned),
            1 => "[a-z]{0,9}",
        ];
        proptest::collection::vec((name, value), 0..6).prop_map(|entries| {
            entries.into_iter().fold(FieldTable::default(), |mut table, (name, value)| {
                table.insert(name.into(), value);
                table
            })
        })
    }

    /// The properties of a dead letter, genuine or forged.
    fn properties() -> impl Strategy<Value = BasicProperties> {
        let death = (table(value()), "\\PC{0,9}|[\u{1}-\u{1f}]{0,255}").prop_map(|(mut death, queue)| {
            death.insert("queue".into(), AMQPValue::LongString(queue.into()));
            AMQPValue::FieldArray(FieldArray::from(vec![AMQPValue::FieldTable(death)]))
        });
        (table(value()), proptest::option::of(death), proptest::option::of("[!-~]{0,255}")).prop_map(
            |(mut headers, death, id)| {
                if let Some(death) = death {
                    headers.insert("x-death".into(), death);
                }
                let properties = BasicProperties::default().with_headers(headers);
                match id {
                    Some(id) => properties.with_message_id(id.into()),
                    None => properties,
                }
            },
        )
    }

    /// The payload of a header frame, written by the client library.
    fn frame_payload(properties: BasicProperties) -> Vec<u8> {
        let header = AMQPContentHeader { class_id: 60, body_size: 0, properties };
        let frame = AMQPFrame::Header(1, header);
        let (frame, _) = gen_frame(&frame)(WriteContext::from(Vec::new())).expect("a frame").into_inner();
        frame[7..frame.len() - 1].to_vec()
    }

    #[test]
    fn the_newest_entry_of_x_death_is_used() {
        let death = |queue: &str| {
            let mut death = FieldTable::default();
            death.insert("queue".into(), AMQPValue::LongString(queue.into()));
            death.insert("time".into(), AMQPValue::Timestamp(7));
            AMQPValue::FieldTable(death)
        };
        let mut headers = FieldTable::default();
        headers.insert("x-death".into(), AMQPValue::FieldArray(vec![death("new"), death("old")].into()));
        headers.insert("tidings-expires-ms".into(), AMQPValue::LongString("5".into()));
        let dead_letter = parse(&BasicProperties::default().with_headers(headers));
        let expected = DeadLetter {
            queue: Some("new".into()),
            died_at: Some(7),
            expires_ms: Some(Err(Unreadable)),
            ..dead_letter.clone()
        };
        assert_eq!(dead_letter, expected);
        assert_eq!(parse(&BasicProperties::default()), DeadLetter::default());
    }

    #[test]
    fn a_reason_with_a_long_escaped_queue_name_is_cut_to_fit_into_the_frame() {
        let reason = format!("the queue {:?} it died in is gone", "\u{7f}".repeat(255));
        let parked = properties_for(&Destination::ParkingQueue(reason), &BasicProperties::default());
        let reason = parked_reason(&parked).expect("a reason");
        assert!(reason.starts_with("the queue") && reason.ends_with('…') && reason.len() <= MAX_REASON_BYTES + 3);
        assert_eq!(truncate_reason("short"), "short");
    }

    proptest! {
        #[test]
        fn any_headers_can_be_parsed_and_every_fate_is_within_rabbitmqs_limits(
            properties in properties(),
            now_ms in any::<i64>(),
            max in 0..3_u32,
        ) {
            let dead_letter = parse(&properties);
            let _ = (dead_letter.since_ms(), parked_reason(&properties));
            match dead_letter.fate(now_ms, max) {
                Fate::Replay { queue, expiration_ms, replays, .. } => {
                    prop_assert!(ShortString::try_new(queue.as_str()).is_ok() && !queue.is_empty());
                    prop_assert!(expiration_ms.is_none_or(|left| (1..=LONGEST_TTL_MS).contains(&left)));
                    prop_assert!(replays >= 1);
                }
                Fate::Park(reason) => {
                    let names = ["tidings-unreadable", "tidings-expires-ms", "x-death", "TIDINGS_REPLAY_MAX"];
                    prop_assert!(names.iter().any(|name| reason.contains(name)), "{}", reason);
                }
                Fate::Leave(reason) => prop_assert!(!reason.is_empty()),
                Fate::Expired => {}
            }
        }

        #[test]
        fn a_dead_letter_that_is_published_again_fits_into_its_old_frames_and_is_readable(
            properties in properties(),
            reason in ".{0,900}",
            replays in any::<i64>(),
            routing_key in proptest::option::of("\\PC{0,63}"),
            expiration_ms in proptest::option::of(1..=LONGEST_TTL_MS),
        ) {
            let payload = frame_payload(properties.clone());
            // The smallest frames that the guard lets it pass in.
            let max_frame_bytes = payload.len() + field_table::RESERVED_BYTES;
            prop_assert_eq!(field_table::replacement(&payload, max_frame_bytes), None);
            let original = Destination::OriginalQueue { queue: String::new(), expiration_ms, replays, routing_key };
            for destination in [original, Destination::ParkingQueue(reason), Destination::DeadQueue] {
                let payload = frame_payload(properties_for(&destination, &properties));
                let frame_bytes = payload.len() + 8;
                prop_assert!(frame_bytes <= max_frame_bytes, "{frame_bytes} bytes in {max_frame_bytes}");
                prop_assert_eq!(field_table::replacement(&payload, usize::MAX), None);
            }
        }
    }
}
