//! Properties and headers of a message that arrived, in the types of the model. No I/O.

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};

use crate::broker::frame_guard::field_table::UNREADABLE;
use crate::model::properties::{HeaderValue, Headers, Properties};

/// The properties of a message that arrived.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Arrived {
    /// Those that it keeps.
    pub(super) properties: Properties,
    /// Its headers.
    pub(super) headers: Headers,
    /// `expiration`
    pub(super) expiration: Option<String>,
    /// Its headers could not be read: the frame guard has put their bytes into a single header.
    pub(super) is_unreadable: bool,
}

impl From<&BasicProperties> for Arrived {
    fn from(properties: &BasicProperties) -> Self {
        let text = |text: &Option<ShortString>| text.as_ref().map(ToString::to_string);
        let headers: Headers = properties.headers().as_ref().map(headers).unwrap_or_default();
        Self {
            properties: Properties {
                content_type: text(properties.content_type()),
                content_encoding: text(properties.content_encoding()),
                delivery_mode: *properties.delivery_mode(),
                priority: *properties.priority(),
                correlation_id: text(properties.correlation_id()),
                reply_to: text(properties.reply_to()),
                message_id: text(properties.message_id()),
                timestamp: *properties.timestamp(),
                kind: text(properties.kind()),
                user_id: text(properties.user_id()),
                app_id: text(properties.app_id()),
                cluster_id: text(properties.cluster_id()),
            },
            expiration: text(properties.expiration()),
            is_unreadable: matches!(headers.get(UNREADABLE), Some(HeaderValue::Bytes(_))),
            headers,
        }
    }
}

fn headers(table: &FieldTable) -> Headers {
    table.inner().iter().map(|(name, value)| (name.to_string(), header_value(value))).collect()
}

fn header_value(value: &AMQPValue) -> HeaderValue {
    match value {
        AMQPValue::Boolean(value) => HeaderValue::Boolean(*value),
        AMQPValue::ShortShortInt(number) => HeaderValue::I8(*number),
        AMQPValue::ShortShortUInt(number) => HeaderValue::U8(*number),
        AMQPValue::ShortInt(number) => HeaderValue::I16(*number),
        AMQPValue::ShortUInt(number) => HeaderValue::U16(*number),
        AMQPValue::LongInt(number) => HeaderValue::I32(*number),
        AMQPValue::LongUInt(number) => HeaderValue::U32(*number),
        AMQPValue::LongLongInt(number) => HeaderValue::Number(*number),
        AMQPValue::Float(number) => HeaderValue::F32(*number),
        AMQPValue::Double(number) => HeaderValue::F64(*number),
        AMQPValue::DecimalValue(decimal) => HeaderValue::Decimal { scale: decimal.scale, value: decimal.value },
        // RabbitMQ has no short strings in headers.
        AMQPValue::ShortString(text) => HeaderValue::Text(text.to_string()),
        AMQPValue::LongString(text) => match str::from_utf8(text.as_bytes()) {
            Ok(text) => HeaderValue::Text(text.to_owned()),
            Err(_) => HeaderValue::Binary(text.as_bytes().to_vec()),
        },
        AMQPValue::FieldArray(values) => HeaderValue::Array(values.as_slice().iter().map(header_value).collect()),
        AMQPValue::Timestamp(seconds) => HeaderValue::Timestamp(*seconds),
        AMQPValue::FieldTable(table) => HeaderValue::Table(headers(table)),
        AMQPValue::ByteArray(bytes) => HeaderValue::Bytes(bytes.as_slice().to_vec()),
        AMQPValue::Void => HeaderValue::Void,
    }
}
