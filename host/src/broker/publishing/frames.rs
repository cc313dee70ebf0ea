//! The frames of a batch of messages, as bytes. Written by hand because each row needs them: the codec of amq-protocol,
//! which reads and writes all other frames, first makes a tree of each message's properties.
//!
//! Must never write a message that amq-protocol would read as another one; a property test compares them. No I/O.

use amq_protocol::protocol::constants::{FRAME_BODY, FRAME_END, FRAME_HEADER, FRAME_METHOD};
use uuid::Uuid;

use crate::model::message::{Message, MessageProperties};
use crate::model::properties::{HeaderValue, Properties};

/// The class `basic` of the protocol, and its method `publish` (source: AMQP 0-9-1, section 1.8).
const BASIC: u16 = 60;
const PUBLISH: u16 = 40;
/// The bit of `publish` that makes RabbitMQ return a message that no queue takes.
const MANDATORY: u8 = 1;
/// The bytes of a frame beside its payload: its type, channel, size and end.
const FRAME_OVERHEAD: usize = 8;
const PERSISTENT: u8 = 2;

/// The flags of the properties, in the order in which the properties are written.
mod flag {
    pub(super) const CONTENT_TYPE: u16 = 1 << 15;
    pub(super) const CONTENT_ENCODING: u16 = 1 << 14;
    pub(super) const HEADERS: u16 = 1 << 13;
    pub(super) const DELIVERY_MODE: u16 = 1 << 12;
    pub(super) const PRIORITY: u16 = 1 << 11;
    pub(super) const CORRELATION_ID: u16 = 1 << 10;
    pub(super) const REPLY_TO: u16 = 1 << 9;
    pub(super) const EXPIRATION: u16 = 1 << 8;
    pub(super) const MESSAGE_ID: u16 = 1 << 7;
    pub(super) const TIMESTAMP: u16 = 1 << 6;
    pub(super) const TYPE: u16 = 1 << 5;
    pub(super) const APP_ID: u16 = 1 << 3;
    pub(super) const CLUSTER_ID: u16 = 1 << 2;
}

/// Appends the frames that publish `message` to `exchange` on a channel. `max_frame_bytes` is what the connection takes in
/// one frame.
///
/// # Panics
///
/// If the exchange, the routing key or another short text has more than 255 bytes; these are checked when the event, the row
/// and the configuration are read.
pub fn write_message(frames: &mut Vec<u8>, channel: u16, exchange: &str, message: &Message, max_frame_bytes: usize) {
    write_frame(frames, FRAME_METHOD, channel, |frames| {
        frames.extend(BASIC.to_be_bytes());
        frames.extend(PUBLISH.to_be_bytes());
        // Reserved.
        frames.extend(0_u16.to_be_bytes());
        write_short(frames, exchange);
        write_short(frames, &message.routing_key);
        frames.push(MANDATORY);
    });
    write_frame(frames, FRAME_HEADER, channel, |frames| {
        frames.extend(BASIC.to_be_bytes());
        // The weight, which is always 0.
        frames.extend(0_u16.to_be_bytes());
        frames.extend((message.body.len() as u64).to_be_bytes());
        write_properties(frames, message);
    });
    for part in message.body.chunks(max_frame_bytes - FRAME_OVERHEAD) {
        write_frame(frames, FRAME_BODY, channel, |frames| frames.extend_from_slice(part));
    }
}

fn write_properties(frames: &mut Vec<u8>, message: &Message) {
    match &message.properties {
        MessageProperties::Event { content_type, timestamp, priority } => {
            write_event_properties(frames, message, content_type.as_deref(), *timestamp, *priority);
        }
        MessageProperties::Own(properties) => write_own_properties(frames, message, properties),
    }
}

fn write_event_properties(
    frames: &mut Vec<u8>,
    message: &Message,
    content_type: Option<&str>,
    timestamp: u64,
    priority: u8,
) {
    let mut flags = flag::HEADERS
        | flag::DELIVERY_MODE
        | flag::PRIORITY
        | flag::MESSAGE_ID
        | flag::TIMESTAMP
        | flag::TYPE
        | flag::APP_ID;
    if content_type.is_some() {
        flags |= flag::CONTENT_TYPE;
    }
    if message.expiration_ms.is_some() {
        flags |= flag::EXPIRATION;
    }
    frames.extend(flags.to_be_bytes());
    if let Some(content_type) = content_type {
        write_short(frames, content_type);
    }
    write_headers(frames, message);
    frames.push(PERSISTENT);
    frames.push(priority);
    if let Some(expiration_ms) = message.expiration_ms {
        write_short(frames, &expiration_ms.to_string());
    }
    write_short(frames, message.id.hyphenated().encode_lower(&mut Uuid::encode_buffer()));
    frames.extend(timestamp.to_be_bytes());
    write_short(frames, &message.kind);
    write_short(frames, "tidings");
}

fn write_own_properties(frames: &mut Vec<u8>, message: &Message, own: &Properties) {
    let flags_at = frames.len();
    let mut flags = flag::HEADERS;
    frames.extend(flags.to_be_bytes());
    let mut short = |frames: &mut Vec<u8>, flag: u16, text: Option<&str>| {
        if let Some(text) = text {
            flags |= flag;
            write_short(frames, text);
        }
    };
    short(frames, flag::CONTENT_TYPE, own.content_type.as_deref());
    short(frames, flag::CONTENT_ENCODING, own.content_encoding.as_deref());
    write_headers(frames, message);
    frames.extend(own.delivery_mode);
    frames.extend(own.priority);
    short(frames, flag::CORRELATION_ID, own.correlation_id.as_deref());
    short(frames, flag::REPLY_TO, own.reply_to.as_deref());
    short(frames, flag::EXPIRATION, message.expiration_ms.map(|ms| ms.to_string()).as_deref());
    short(frames, flag::MESSAGE_ID, own.message_id.as_deref());
    frames.extend(own.timestamp.iter().flat_map(|timestamp| timestamp.to_be_bytes()));
    short(frames, flag::TYPE, own.kind.as_deref());
    short(frames, flag::APP_ID, own.app_id.as_deref());
    short(frames, flag::CLUSTER_ID, own.cluster_id.as_deref());
    for (flag, is_there) in [
        (flag::DELIVERY_MODE, own.delivery_mode.is_some()),
        (flag::PRIORITY, own.priority.is_some()),
        (flag::TIMESTAMP, own.timestamp.is_some()),
    ] {
        flags |= if is_there { flag } else { 0 };
    }
    frames[flags_at..flags_at + 2].copy_from_slice(&flags.to_be_bytes());
}

fn write_headers(frames: &mut Vec<u8>, message: &Message) {
    write_sized(frames, |frames| {
        for (name, value) in &message.headers {
            write_short(frames, name);
            write_value(frames, value);
        }
    });
}

fn write_value(frames: &mut Vec<u8>, value: &HeaderValue) {
    /// Appends a type and the bytes of a value.
    fn plain<const N: usize>(frames: &mut Vec<u8>, kind: u8, bytes: [u8; N]) {
        frames.push(kind);
        frames.extend(bytes);
    }
    let long = |frames: &mut Vec<u8>, kind: u8, bytes: &[u8]| {
        frames.push(kind);
        write_sized(frames, |frames| frames.extend_from_slice(bytes));
    };
    match value {
        HeaderValue::Text(text) => long(frames, b'S', text.as_bytes()),
        HeaderValue::Number(number) => plain(frames, b'l', number.to_be_bytes()),
        HeaderValue::Boolean(value) => plain(frames, b't', [u8::from(*value)]),
        HeaderValue::Void => frames.push(b'V'),
        HeaderValue::I8(number) => plain(frames, b'b', number.to_be_bytes()),
        HeaderValue::U8(number) => plain(frames, b'B', [*number]),
        HeaderValue::I16(number) => plain(frames, b's', number.to_be_bytes()),
        HeaderValue::U16(number) => plain(frames, b'u', number.to_be_bytes()),
        HeaderValue::I32(number) => plain(frames, b'I', number.to_be_bytes()),
        HeaderValue::U32(number) => plain(frames, b'i', number.to_be_bytes()),
        HeaderValue::F32(number) => plain(frames, b'f', number.to_be_bytes()),
        HeaderValue::F64(number) => plain(frames, b'd', number.to_be_bytes()),
        HeaderValue::Decimal { scale, value } => {
            plain(frames, b'D', [*scale]);
            frames.extend(value.to_be_bytes());
        }
        HeaderValue::Timestamp(seconds) => plain(frames, b'T', seconds.to_be_bytes()),
        HeaderValue::Bytes(bytes) => long(frames, b'x', bytes),
        HeaderValue::Binary(bytes) => long(frames, b'S', bytes),
        HeaderValue::Array(values) => {
            frames.push(b'A');
            write_sized(frames, |frames| values.iter().for_each(|value| write_value(frames, value)));
        }
        HeaderValue::Table(table) => {
            frames.push(b'F');
            write_sized(frames, |frames| {
                for (name, value) in table {
                    write_short(frames, name);
                    write_value(frames, value);
                }
            });
        }
    }
}

/// Appends one frame, whose payload `write` appends.
fn write_frame(frames: &mut Vec<u8>, kind: u8, channel: u16, write: impl FnOnce(&mut Vec<u8>)) {
    frames.push(kind);
    frames.extend(channel.to_be_bytes());
    write_sized(frames, write);
    frames.push(FRAME_END);
}

/// Appends what `write` appends, after its length in four bytes.
fn write_sized(frames: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    let at = frames.len();
    frames.extend(0_u32.to_be_bytes());
    write(frames);
    let length = u32::try_from(frames.len() - at - 4).expect("bodies and headers are limited to far less");
    frames[at..at + 4].copy_from_slice(&length.to_be_bytes());
}

/// Appends a text after its length in one byte.
fn write_short(frames: &mut Vec<u8>, text: &str) {
    frames.push(u8::try_from(text.len()).expect("checked to have at most 255 bytes"));
    frames.extend_from_slice(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use amq_protocol::frame::{AMQPFrame, parse_frame};
    use amq_protocol::protocol::AMQPClass;
    use amq_protocol::protocol::basic::AMQPMethod;
    use proptest::prelude::*;
    use time::OffsetDateTime;

    use super::*;
    use crate::broker::properties::Arrived;
    use crate::model::event::{BuiltEvent, Event};
    use crate::model::properties::Headers;
    use crate::model::properties::tests::{properties, value};
    use crate::model::schedule::Schedule;

    /// RabbitMQ's default.
    const FRAME_BYTES: usize = 128 * 1024;

    /// All frames that were written.
    fn parse(mut bytes: &[u8]) -> Vec<AMQPFrame> {
        let mut frames = Vec::new();
        while !bytes.is_empty() {
            let (rest, frame) = parse_frame(bytes).expect("a whole frame");
            assert!(bytes.len() - rest.len() <= FRAME_BYTES, "a frame of {} bytes", bytes.len() - rest.len());
            bytes = rest;
            frames.push(frame);
        }
        frames
    }

    fn text(max: usize) -> impl Strategy<Value = String> {
        "\\PC{0,40}".prop_map(move |text| text[..text.floor_char_boundary(max)].to_owned())
    }

    fn header() -> impl Strategy<Value = (std::borrow::Cow<'static, str>, HeaderValue)> {
        (text(40).prop_map(Into::into), value())
    }

    fn message_properties() -> impl Strategy<Value = MessageProperties> {
        let event =
            (prop::option::of(text(40)), any::<u64>(), 0..=9_u8).prop_map(|(content_type, timestamp, priority)| {
                MessageProperties::Event { content_type, timestamp, priority }
            });
        prop_oneof![event, properties().prop_map(|properties| MessageProperties::Own(Box::new(properties)))]
    }

    prop_compose! {
        fn message()(
            id in any::<u128>(), kind in text(40), routing_key in text(40), properties in message_properties(),
            expiration_ms in prop::option::of(any::<u64>()), headers in prop::collection::vec(header(), 0..9),
            body in prop_oneof![Just(0), 0..400_usize, 130_000..270_000_usize],
        ) -> Message {
            let id = Uuid::from_u128(id);
            let body = (0..body).map(|at| at.to_le_bytes()[0]).collect();
            Message { id, kind, exchange: None, routing_key, properties, expiration_ms, headers, body }
        }
    }

    /// What a consumer finds in the properties of a message.
    fn expected_properties(message: &Message) -> Properties {
        match &message.properties {
            MessageProperties::Own(properties) => Properties { user_id: None, ..(**properties).clone() },
            MessageProperties::Event { content_type, timestamp, priority } => Properties {
                content_type: content_type.clone(),
                delivery_mode: Some(2),
                priority: Some(*priority),
                message_id: Some(message.id.to_string()),
                timestamp: Some(*timestamp),
                kind: Some(message.kind.clone()),
                app_id: Some("tidings".to_owned()),
                ..Properties::default()
            },
        }
    }

    proptest! {
        // Bodies are large.
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn a_message_is_read_as_it_was_written(message in message(), channel in any::<u16>()) {
            let mut bytes = Vec::new();
            write_message(&mut bytes, channel, "exchange", &message, FRAME_BYTES);
            let mut frames = parse(&bytes).into_iter();

            let Some(AMQPFrame::Method(on, AMQPClass::Basic(AMQPMethod::Publish(publish)))) = frames.next() else {
                panic!("no publish")
            };
            prop_assert_eq!(on, channel);
            prop_assert_eq!(publish.exchange.as_str(), "exchange");
            prop_assert_eq!(publish.routing_key.as_str(), &*message.routing_key);
            prop_assert!(publish.mandatory && !publish.immediate);

            let Some(AMQPFrame::Header(on, header)) = frames.next() else { panic!("no header") };
            prop_assert_eq!((on, header.class_id, header.body_size), (channel, 60, message.body.len() as u64));
            let read = Arrived::from(&header.properties);
            prop_assert_eq!(read.properties, expected_properties(&message));
            prop_assert_eq!(read.expiration, message.expiration_ms.map(|ms| ms.to_string()));
            // A name that comes twice has its last value.
            let headers: Headers = message.headers.iter().map(|(name, value)| (name.to_string(), value.clone())).collect();
            prop_assert_eq!(read.headers, headers);

            let body: Vec<u8> = frames.flat_map(|frame| match frame {
                AMQPFrame::Body(on, part) if on == channel => part,
                other => panic!("{other:?}"),
            }).collect();
            prop_assert!(body == message.body);
        }
    }

    proptest! {
        // Each case has some 50 KiB.
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn the_headers_of_any_row_and_any_event_fit_into_one_frame(
            count in prop_oneof![0..5_usize, 1_000..5_000_usize],
            value_bytes in prop_oneof![Just(0), 0..40_000_usize],
            short_bytes in 1..=255_usize,
        ) {
            // The table's CHECK allows 16 KiB of JSON text, in which each header has four quotes, a colon, a comma and
            // two spaces beside its name and its value.
            let mut left = 16 * 1024;
            let mut headers = Vec::new();
            for number in 0..count {
                let (name, value) = (format!("{number:x}"), "v".repeat(value_bytes.min(16_000) / count.max(1)));
                left -= (name.len() + value.len() + 8).min(left);
                if left == 0 {
                    break;
                }
                headers.push((name, value));
            }
            let event_headers = (0..count).map(|number| (format!("e{number:x}"), "v".repeat(value_bytes / count.max(1))));
            let text = || "k".repeat(short_bytes);
            let Ok(event) = Event::new(text(), text(), Vec::new(), event_headers.collect()) else { return Ok(()) };
            let schedule = Schedule {
                id: Uuid::max(),
                kind: "k".repeat(100),
                key: Some(text()),
                subject: Some(text()),
                due_at: OffsetDateTime::UNIX_EPOCH,
                expires_at: None,
                payload: "{}".into(),
                headers,
                attempts: u32::MAX,
                failures: 0,
                refusals: 0,
                untried_since: None,
                recurrence: None,
                nominal_at: None,
                line: None,
                priority: 4,
            };
            let built = BuiltEvent { event, built_ms: 0, expires_ms: Some(i64::MAX), plugin: "p".repeat(210).into() };
            let message = Message::new(&schedule, built, &"e".repeat(200), 1).expect("in time");
            let mut bytes = Vec::new();
            write_message(&mut bytes, 1, &"e".repeat(200), &message, FRAME_BYTES);
            parse(&bytes);
        }
    }
}
