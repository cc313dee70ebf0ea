//! What a letter says of itself, and what it says when it is sent on. Anybody may have written its headers: whatever is in
//! them, it has an answer, and whatever is added to them fits into a frame. No I/O.

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};

use crate::broker::frame_guard::field_table::UNREADABLE;
use crate::model::dead_letter::{DeadLetter, Unreadable, Unsendable};

/// What the broker itself adds to a message on its way, and would take for its history if it were published again; and what
/// would send copies elsewhere.
const NOT_CARRIED_ON: [&str; 10] = [
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
];
/// The header with which a parked letter says why.
const PARKED_REASON: &str = "tidings-parked-reason";
/// A reason is cut to this many bytes. It may name a queue, whose name may be of characters that are written out, six bytes
/// each; and it must fit into the room that `headers` keeps.
const REASON_BYTES: usize = 400;

/// Where a letter is sent.
#[derive(Clone, Debug)]
pub enum SendTo {
    /// Back into its queue.
    Back {
        /// The queue.
        queue: String,
        /// `expiration`; `None` = it never expires.
        expiration_ms: Option<u64>,
        /// `tidings-replay`.
        replays: i64,
    },
    /// To the parked ones, with the reason.
    Park(String),
    /// To the end of the dead letters, as it is.
    Tail,
}

/// What a letter says of itself.
#[must_use]
pub fn read(properties: &BasicProperties) -> DeadLetter {
    let none = FieldTable::default();
    let headers = properties.headers().as_ref().unwrap_or(&none);
    let death = match headers.inner().get("x-death") {
        // The newest is the first.
        Some(AMQPValue::FieldArray(deaths)) => match deaths.as_slice().first() {
            Some(AMQPValue::FieldTable(death)) => Some(death),
            _ => None,
        },
        _ => None,
    };
    let unreadable = match headers.inner().get(UNREADABLE) {
        Some(AMQPValue::ByteArray(bytes)) if bytes.is_empty() => Some(Unsendable::TooLong),
        Some(AMQPValue::ByteArray(_)) => Some(Unsendable::Carried),
        _ => None,
    };
    let whole = |name: &str| headers.inner().get(name).and_then(number);
    let of_death = |name: &str| death.and_then(|death| text(death, name));
    DeadLetter {
        unreadable,
        id: properties.message_id().as_ref().map(ToString::to_string),
        kind: text(headers, "tidings-kind"),
        queue: of_death("queue").filter(|queue| queue.len() <= 255),
        reason: of_death("reason"),
        died_at: death.and_then(|death| match death.inner().get("time") {
            Some(AMQPValue::Timestamp(seconds)) => Some(*seconds),
            _ => None,
        }),
        expires_ms: headers.inner().get("tidings-expires-ms").map(|value| number(value).ok_or(Unreadable)),
        due_ms: whole("tidings-due-ms"),
        traceparent: text(headers, "traceparent"),
        tracestate: text(headers, "tracestate"),
        replays: whole("tidings-replay").unwrap_or(0),
    }
}

/// Why a letter was parked, if it was.
#[must_use]
pub fn parked_reason(properties: &BasicProperties) -> Option<String> {
    properties.headers().as_ref().and_then(|headers| text(headers, PARKED_REASON))
}

/// What a letter is sent on with: everything as it was but what the broker added, its remaining life and the count.
#[must_use]
pub fn sent_on(properties: &BasicProperties, sending: &SendTo) -> BasicProperties {
    let mut headers = properties.headers().clone().unwrap_or_default();
    let mut expiration = None;
    match sending {
        SendTo::Back { expiration_ms, replays, .. } => {
            headers = headers
                .inner()
                .iter()
                .filter(|(name, _)| !NOT_CARRIED_ON.contains(&name.as_str()) && name.as_str() != PARKED_REASON)
                .fold(FieldTable::default(), |mut kept, (name, value)| {
                    kept.insert(name.clone(), value.clone());
                    kept
                });
            headers.insert("tidings-replay".into(), AMQPValue::LongLongInt(*replays));
            expiration = *expiration_ms;
        }
        // With its history, for the person who will look at it.
        SendTo::Park(reason) => {
            headers.insert(PARKED_REASON.into(), AMQPValue::LongString(cut(reason).into()));
        }
        SendTo::Tail => {}
    }
    carried_on(properties, headers, expiration)
}

fn cut(reason: &str) -> String {
    let end = reason.floor_char_boundary(REASON_BYTES);
    if end == reason.len() { reason.to_owned() } else { format!("{}…", &reason[..end]) }
}

/// Every property but those that must not be carried on: the user, which must be whoever publishes, and the old life.
fn carried_on(old: &BasicProperties, headers: FieldTable, expiration_ms: Option<u64>) -> BasicProperties {
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

    /// A value of any type, and those that matter here more often.
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

    /// Names that are read, and others.
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

    /// The properties of a letter that died, or that says so.
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

    /// The payload of the header frame, as the library writes it.
    fn written(properties: BasicProperties) -> Vec<u8> {
        let header = AMQPContentHeader { class_id: 60, body_size: 0, properties };
        let frame = AMQPFrame::Header(1, header);
        let (frame, _) = gen_frame(&frame)(WriteContext::from(Vec::new())).expect("a frame").into_inner();
        frame[7..frame.len() - 1].to_vec()
    }

    #[test]
    fn the_newest_death_is_the_one_that_counts() {
        let death = |queue: &str| {
            let mut death = FieldTable::default();
            death.insert("queue".into(), AMQPValue::LongString(queue.into()));
            death.insert("time".into(), AMQPValue::Timestamp(7));
            AMQPValue::FieldTable(death)
        };
        let mut headers = FieldTable::default();
        headers.insert("x-death".into(), AMQPValue::FieldArray(vec![death("new"), death("old")].into()));
        headers.insert("tidings-expires-ms".into(), AMQPValue::LongString("5".into()));
        let letter = read(&BasicProperties::default().with_headers(headers));
        let expected = DeadLetter {
            queue: Some("new".into()),
            died_at: Some(7),
            expires_ms: Some(Err(Unreadable)),
            ..letter.clone()
        };
        assert_eq!(letter, expected);
        assert_eq!(read(&BasicProperties::default()), DeadLetter::default());
    }

    #[test]
    fn a_reason_that_names_a_queue_of_characters_that_are_written_out_still_fits_into_the_frame() {
        let reason = format!("the queue {:?} it died in is gone", "\u{7f}".repeat(255));
        let parked = sent_on(&BasicProperties::default(), &SendTo::Park(reason));
        let reason = parked_reason(&parked).expect("a reason");
        assert!(reason.starts_with("the queue") && reason.ends_with('…') && reason.len() <= REASON_BYTES + 3);
        assert_eq!(cut("short"), "short");
    }

    proptest! {
        #[test]
        fn any_headers_are_read_and_no_fate_is_beyond_what_the_broker_takes(
            properties in properties(),
            now_ms in any::<i64>(),
            max in 0..3_u32,
        ) {
            let letter = read(&properties);
            let _ = (letter.since_ms(), parked_reason(&properties));
            match letter.fate(now_ms, max) {
                Fate::Replay { queue, expiration_ms, replays } => {
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
        fn what_is_sent_on_fits_into_the_frames_that_it_came_in_and_can_be_read_again(
            properties in properties(),
            reason in ".{0,900}",
            replays in any::<i64>(),
            expiration_ms in proptest::option::of(1..=LONGEST_TTL_MS),
        ) {
            let payload = written(properties.clone());
            // The shortest frames in which it is not too long.
            let longest = payload.len() + field_table::ROOM;
            prop_assert_eq!(field_table::instead(&payload, longest), None);
            let back = SendTo::Back { queue: String::new(), expiration_ms, replays };
            for sending in [back, SendTo::Park(reason), SendTo::Tail] {
                let payload = written(sent_on(&properties, &sending));
                prop_assert!(payload.len() + 8 <= longest, "{} bytes in {longest}", payload.len() + 8);
                prop_assert_eq!(field_table::instead(&payload, usize::MAX), None);
            }
        }
    }
}
