//! The properties and headers of a message, of every type that AMQP 0-9-1 has in RabbitMQ's dialect, and how they are written as
//! JSON in the payload of a relayed row. No I/O, and no types of the AMQP client library.
//!
//! Must never lose the type of a value: a message that was taken in goes out with the headers that it came with.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Map, Number, Value, json};
use thiserror::Error;

/// How deep arrays and tables may be nested, as in a message that is taken in.
const MAX_DEPTH: usize = 32;
/// The longest short string of AMQP: its length is one byte.
const SHORT_STRING_BYTES: usize = 255;

/// The value of a header. The letters are those of RabbitMQ's dialect
/// (<https://www.rabbitmq.com/docs/specification#rabbitmq-amqp-0-9-1-errata>).
#[derive(Clone, Debug, PartialEq)]
pub enum HeaderValue {
    /// A long string that is UTF-8 (`S`).
    Text(String),
    /// A signed 64-bit number (`l`).
    Number(i64),
    /// `t`
    Boolean(bool),
    /// No value (`V`).
    Void,
    /// `b`
    I8(i8),
    /// `B`
    U8(u8),
    /// `s`
    I16(i16),
    /// `u`
    U16(u16),
    /// `I`
    I32(i32),
    /// `i`
    U32(u32),
    /// `f`
    F32(f32),
    /// `d`
    F64(f64),
    /// `value` divided by ten to the power of `scale` (`D`).
    Decimal {
        /// How many digits come after the point.
        scale: u8,
        /// All digits.
        value: u32,
    },
    /// Seconds since the Unix epoch (`T`).
    Timestamp(u64),
    /// `x`
    Bytes(Vec<u8>),
    /// A long string that is not UTF-8 (`S`).
    Binary(Vec<u8>),
    /// `A`
    Array(Vec<HeaderValue>),
    /// `F`
    Table(BTreeMap<String, HeaderValue>),
}

/// Headers by their names.
pub type Headers = BTreeMap<String, HeaderValue>;

/// The properties of a message, except its headers and `expiration`. Texts have 255 bytes at most.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Properties {
    /// `content-type`
    pub content_type: Option<String>,
    /// `content-encoding`
    pub content_encoding: Option<String>,
    /// `delivery-mode`: 2 = persistent.
    pub delivery_mode: Option<u8>,
    /// `priority`
    pub priority: Option<u8>,
    /// `correlation-id`
    pub correlation_id: Option<String>,
    /// `reply-to`
    pub reply_to: Option<String>,
    /// `message-id`
    pub message_id: Option<String>,
    /// `timestamp`, in seconds since the Unix epoch.
    pub timestamp: Option<u64>,
    /// `type`
    pub kind: Option<String>,
    /// `user-id`: who published it. RabbitMQ takes it from no other user, so a relayed message has it in a header.
    pub user_id: Option<String>,
    /// `app-id`
    pub app_id: Option<String>,
    /// `cluster-id`, which is reserved.
    pub cluster_id: Option<String>,
}

/// Why JSON is not the properties or headers of a message.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0}")]
pub struct NotProperties(String);

impl NotProperties {
    fn new(sentence: impl Into<String>) -> Self {
        Self(sentence.into())
    }
}

impl HeaderValue {
    /// The number in it, of any integer type; `None` = it is not a whole number, or not within 64 bits.
    #[must_use]
    pub fn as_number(&self) -> Option<i64> {
        match self {
            Self::Number(number) => Some(*number),
            Self::I8(number) => Some((*number).into()),
            Self::U8(number) => Some((*number).into()),
            Self::I16(number) => Some((*number).into()),
            Self::U16(number) => Some((*number).into()),
            Self::I32(number) => Some((*number).into()),
            Self::U32(number) => Some((*number).into()),
            Self::Text(_)
            | Self::Boolean(_)
            | Self::Void
            | Self::F32(_)
            | Self::F64(_)
            | Self::Decimal { .. }
            | Self::Timestamp(_)
            | Self::Bytes(_)
            | Self::Binary(_)
            | Self::Array(_)
            | Self::Table(_) => None,
        }
    }

    /// The text in it; `None` = it is not a text.
    #[must_use]
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The value in JSON. Text, 64-bit numbers, booleans, arrays and `null` are as in JSON; each other type is an object with one
    /// member, which names the type.
    #[must_use]
    pub fn to_json(&self) -> Value {
        match self {
            Self::Text(text) => text_to_json(text),
            Self::Number(number) => (*number).into(),
            Self::Boolean(value) => (*value).into(),
            Self::Void => Value::Null,
            Self::I8(number) => json!({ "i8": number }),
            Self::U8(number) => json!({ "u8": number }),
            Self::I16(number) => json!({ "i16": number }),
            Self::U16(number) => json!({ "u16": number }),
            Self::I32(number) => json!({ "i32": number }),
            Self::U32(number) => json!({ "u32": number }),
            // As text, since JSON has neither infinity nor a sign of zero, and PostgreSQL would write out each digit.
            Self::F32(number) => json!({ "f32": number.to_string() }),
            Self::F64(number) => json!({ "f64": number.to_string() }),
            Self::Decimal { scale, value } => json!({ "decimal": [scale, value] }),
            Self::Timestamp(seconds) => json!({ "timestamp": seconds }),
            Self::Bytes(bytes) => json!({ "bytes_base64": BASE64.encode(bytes) }),
            Self::Binary(bytes) => json!({ "string_base64": BASE64.encode(bytes) }),
            Self::Array(values) => values.iter().map(Self::to_json).collect(),
            Self::Table(table) => json!({ "table": headers_to_json(table) }),
        }
    }

    fn from_json(name: &str, value: &Value, depth: usize) -> Result<Self, NotProperties> {
        if depth == MAX_DEPTH {
            return Err(NotProperties::new(format!("the header {name:?} is nested deeper than {MAX_DEPTH} levels")));
        }
        Ok(match value {
            Value::Null => Self::Void,
            Value::Bool(value) => Self::Boolean(*value),
            Value::String(text) => Self::Text(text.clone()),
            Value::Number(number) => match (number.as_i64(), number.as_f64()) {
                (Some(number), _) => Self::Number(number),
                (None, Some(number)) if !is_whole(value) => Self::F64(number),
                _ => return Err(NotProperties::new(format!("the header {name:?} is a number of more than 64 bits"))),
            },
            Value::Array(values) => {
                let values = values.iter().map(|value| Self::from_json(name, value, depth + 1));
                Self::Array(values.collect::<Result<_, _>>()?)
            }
            Value::Object(object) => {
                let mut members = object.iter();
                let (Some((tag, value)), None) = (members.next(), members.next()) else {
                    return Err(NotProperties::new(format!(
                        "the header {name:?} is an object of {} members; write a table as {{\"table\": {{…}}}}",
                        object.len()
                    )));
                };
                if tag == "table" {
                    let Value::Object(table) = value else {
                        return Err(NotProperties::new(format!("the table in the header {name:?} is not an object")));
                    };
                    return Ok(Self::Table(headers_from_json(table, depth + 1)?));
                }
                Self::tagged(tag, value).ok_or_else(|| {
                    NotProperties::new(format!("the header {name:?} has no value of the type {tag:?}"))
                })?
            }
        })
    }

    /// The value of a type that JSON does not have; `None` = there is no such type, or no such value of it.
    fn tagged(tag: &str, value: &Value) -> Option<Self> {
        fn narrow<T: TryFrom<i64>>(value: &Value) -> Option<T> {
            T::try_from(value.as_i64()?).ok()
        }
        let base64 = |value: &Value| BASE64.decode(value.as_str()?).ok();
        Some(match tag {
            "i8" => Self::I8(narrow(value)?),
            "u8" => Self::U8(narrow(value)?),
            "i16" => Self::I16(narrow(value)?),
            "u16" => Self::U16(narrow(value)?),
            "i32" => Self::I32(narrow(value)?),
            "u32" => Self::U32(narrow(value)?),
            "i64" => Self::Number(value.as_i64()?),
            "f32" => Self::F32(value.as_str()?.parse().ok()?),
            "f64" => Self::F64(value.as_str()?.parse().ok()?),
            "decimal" => match value.as_array()?.as_slice() {
                [scale, value] => Self::Decimal { scale: narrow(scale)?, value: narrow(value)? },
                _ => return None,
            },
            "timestamp" => Self::Timestamp(value.as_u64()?),
            "bytes_base64" => Self::Bytes(base64(value)?),
            "string_base64" => match String::from_utf8(base64(value)?) {
                Ok(text) => Self::Text(text),
                Err(error) => Self::Binary(error.into_bytes()),
            },
            _ => return None,
        })
    }
}

/// A text in JSON.
#[must_use]
pub fn text_to_json(text: &str) -> Value {
    // PostgreSQL cannot store this character in JSON.
    if text.contains('\0') { json!({ "string_base64": BASE64.encode(text) }) } else { text.into() }
}

/// A text of at most 255 bytes that [`text_to_json`] has written; `None` = it is not one.
#[must_use]
pub fn text_of_json(value: &Value) -> Option<String> {
    match HeaderValue::from_json("", value, 0) {
        Ok(HeaderValue::Text(text)) if text.len() <= SHORT_STRING_BYTES => Some(text),
        _ => None,
    }
}

/// Whether a number is written without a fraction or an exponent.
fn is_whole(value: &Value) -> bool {
    !value.to_string().contains(['.', 'e', 'E'])
}

/// Headers as a JSON object.
#[must_use]
pub fn headers_to_json(headers: &Headers) -> Map<String, Value> {
    headers.iter().map(|(name, value)| (name.clone(), value.to_json())).collect()
}

/// Headers from a JSON object.
///
/// # Errors
///
/// When a name is longer than AMQP allows, or a value has no type that AMQP has.
pub fn headers_of_json(object: &Map<String, Value>) -> Result<Headers, NotProperties> {
    headers_from_json(object, 0)
}

fn headers_from_json(object: &Map<String, Value>, depth: usize) -> Result<Headers, NotProperties> {
    let entry = |(name, value): (&String, &Value)| {
        if name.len() > SHORT_STRING_BYTES {
            return Err(NotProperties::new(format!("the name of a header has {} bytes, more than 255", name.len())));
        }
        Ok((name.clone(), HeaderValue::from_json(name, value, depth)?))
    };
    object.iter().map(entry).collect()
}

impl Properties {
    /// The properties as a JSON object, without those that are absent.
    #[must_use]
    pub fn to_json(&self) -> Map<String, Value> {
        let Self { delivery_mode, priority, timestamp, .. } = self;
        let numbers = [
            ("delivery_mode", delivery_mode.map(Number::from)),
            ("priority", priority.map(Number::from)),
            ("timestamp", timestamp.map(Number::from)),
        ];
        let texts = self.texts().into_iter().filter_map(|(name, text)| Some((name, text_to_json(text.as_deref()?))));
        let numbers = numbers.into_iter().filter_map(|(name, number)| Some((name, Value::Number(number?))));
        texts.chain(numbers).map(|(name, value)| (name.to_owned(), value)).collect()
    }

    /// The properties in a JSON object.
    ///
    /// # Errors
    ///
    /// When a name is not that of a property, or a value cannot be one of it.
    pub fn from_json(object: &Map<String, Value>) -> Result<Self, NotProperties> {
        let mut properties = Self::default();
        for (name, value) in object {
            let wrong = |what: &str| NotProperties::new(format!("the property {name} is {value}, which is not {what}"));
            let byte = || value.as_u64().and_then(|byte| u8::try_from(byte).ok());
            match name.as_str() {
                "delivery_mode" => {
                    properties.delivery_mode = Some(byte().ok_or_else(|| wrong("a number from 0 to 255"))?);
                }
                "priority" => properties.priority = Some(byte().ok_or_else(|| wrong("a number from 0 to 255"))?),
                "timestamp" => {
                    properties.timestamp = Some(value.as_u64().ok_or_else(|| wrong("a number of seconds"))?);
                }
                name => {
                    let place = properties.text_mut(name).ok_or_else(|| {
                        NotProperties::new(format!("{name:?} is not a property of a message that can be set"))
                    })?;
                    *place = Some(text_of_json(value).ok_or_else(|| wrong("a text of at most 255 bytes"))?);
                }
            }
        }
        Ok(properties)
    }

    pub(super) fn texts(&self) -> [(&'static str, &Option<String>); 9] {
        [
            ("content_type", &self.content_type),
            ("content_encoding", &self.content_encoding),
            ("correlation_id", &self.correlation_id),
            ("reply_to", &self.reply_to),
            ("message_id", &self.message_id),
            ("type", &self.kind),
            ("user_id", &self.user_id),
            ("app_id", &self.app_id),
            ("cluster_id", &self.cluster_id),
        ]
    }

    fn text_mut(&mut self, name: &str) -> Option<&mut Option<String>> {
        Some(match name {
            "content_type" => &mut self.content_type,
            "content_encoding" => &mut self.content_encoding,
            "correlation_id" => &mut self.correlation_id,
            "reply_to" => &mut self.reply_to,
            "message_id" => &mut self.message_id,
            "type" => &mut self.kind,
            "user_id" => &mut self.user_id,
            "app_id" => &mut self.app_id,
            "cluster_id" => &mut self.cluster_id,
            _ => return None,
        })
    }
}

#[cfg(test)]
pub(crate) mod tests;
