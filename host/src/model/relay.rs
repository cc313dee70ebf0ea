//! The built-in kind `relay`: its row holds a whole message in its payload, and the daemon publishes that message when the row
//! is due. The payload's form is public (`host/docs/intake.md`), so such rows may be inserted by SQL as well. No I/O.
//!
//! Must never change a message but as the contract says: `x-delay` is negated, headers that begin with `tidings-` are the
//! daemon's, and what RabbitMQ would refuse from another user goes into a header.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Map, Value};
use thiserror::Error;

use crate::model::properties::{
    HeaderValue, Headers, NotProperties, Properties, headers_of_json, headers_to_json, text_of_json, text_to_json,
};

/// The kind.
pub const KIND: &str = "relay";
/// What stands in the history, in `tidings-plugin` and in spans, where the label of a plugin does otherwise.
pub const LABEL: &str = concat!("relay@", env!("CARGO_PKG_VERSION"));
/// The daemon's headers begin so: those of a publisher are read, and not passed on.
pub const OWN_HEADERS: &str = "tidings-";

/// The longest headers and properties together, in bytes as RabbitMQ counts them: they must fit into one frame of 128 KiB
/// together with the row's headers (16 KiB) and the daemon's own, in which key and subject may have 255 bytes each.
const MAX_PROPERTIES_BYTES: usize = 96 * 1024;

/// A message, as it is to be published.
#[derive(Clone, Debug, PartialEq)]
pub struct Relayed {
    /// The exchange to which it is published.
    pub exchange: String,
    /// Its routing key.
    pub routing_key: String,
    /// Its properties.
    pub properties: Properties,
    /// Its headers.
    pub headers: Headers,
    /// Its body.
    pub body: Vec<u8>,
}

/// Why a payload is not a message.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum NotRelayed {
    #[error("the payload is not an object")]
    NotAnObject,
    #[error("the payload has no {0}, or it is not a text of at most 255 bytes")]
    NotAText(&'static str),
    #[error("the payload's body is not a text; write other bytes in body_base64")]
    Body,
    #[error("the payload's body_base64 is not base64")]
    Base64,
    #[error("the payload has both body and body_base64")]
    TwoBodies,
    #[error("the payload's {0} are not an object")]
    NotMembers(&'static str),
    #[error("the payload has a member {0:?}, which means nothing")]
    Unknown(String),
    #[error("properties and headers have {0} bytes together, more than {MAX_PROPERTIES_BYTES}")]
    TooLong(usize),
    #[error(transparent)]
    Properties(#[from] NotProperties),
}

impl Relayed {
    /// The payload of its row, as JSON text.
    ///
    /// # Panics
    ///
    /// Never: texts, numbers, arrays and objects can be written as JSON.
    #[must_use]
    pub fn to_payload(&self) -> String {
        let mut payload = Map::new();
        payload.insert("exchange".into(), text_to_json(&self.exchange));
        payload.insert("routing_key".into(), text_to_json(&self.routing_key));
        match str::from_utf8(&self.body) {
            Ok(text) if is_readable(text) => payload.insert("body".into(), text.into()),
            _ => payload.insert("body_base64".into(), BASE64.encode(&self.body).into()),
        };
        payload.insert("properties".into(), self.properties.to_json().into());
        payload.insert("headers".into(), headers_to_json(&self.headers).into());
        serde_json::to_string(&payload).expect("JSON can be written")
    }

    /// Reads the payload of a row.
    ///
    /// # Errors
    ///
    /// When it is not a message that can be published.
    pub fn from_payload(payload: &str) -> Result<Self, NotRelayed> {
        let Ok(Value::Object(mut payload)) = serde_json::from_str(payload) else { return Err(NotRelayed::NotAnObject) };
        let mut text = |name| match payload.remove(name) {
            Some(value) => text_of_json(&value).ok_or(NotRelayed::NotAText(name)),
            None => Err(NotRelayed::NotAText(name)),
        };
        let (exchange, routing_key) = (text("exchange")?, text("routing_key")?);
        let body = match (payload.remove("body"), payload.remove("body_base64")) {
            (None, None) => Vec::new(),
            (Some(Value::String(text)), None) => text.into_bytes(),
            (Some(_), None) => return Err(NotRelayed::Body),
            (None, Some(Value::String(text))) => BASE64.decode(text).map_err(|_| NotRelayed::Base64)?,
            (None, Some(_)) => return Err(NotRelayed::Base64),
            (Some(_), Some(_)) => return Err(NotRelayed::TwoBodies),
        };
        let mut members = |name| match payload.remove(name) {
            None => Ok(Map::new()),
            Some(Value::Object(members)) => Ok(members),
            Some(_) => Err(NotRelayed::NotMembers(name)),
        };
        let (properties, headers) = (members("properties")?, members("headers")?);
        if let Some(name) = payload.into_iter().map(|(name, _)| name).next() {
            return Err(NotRelayed::Unknown(name));
        }
        let (properties, mut headers) = (Properties::from_json(&properties)?, headers_of_json(&headers)?);
        // Nobody but the daemon writes these, also by SQL.
        headers.retain(|name, _| !name.starts_with(OWN_HEADERS));
        let relayed = Self { exchange, routing_key, properties, headers, body };
        relayed.check_length().map(|()| relayed)
    }

    /// Checks that its properties and headers fit into a frame.
    ///
    /// # Errors
    ///
    /// When they do not.
    pub fn check_length(&self) -> Result<(), NotRelayed> {
        let bytes = bytes_of(&self.properties, &self.headers);
        if bytes > MAX_PROPERTIES_BYTES { Err(NotRelayed::TooLong(bytes)) } else { Ok(()) }
    }
}

/// Whether a body is shown as the text that it is: PostgreSQL cannot store NUL in JSON, and other control characters would take
/// six bytes each.
fn is_readable(text: &str) -> bool {
    let escaped = text.bytes().filter(|byte| *byte < 0x20 && !matches!(byte, b'\t' | b'\n' | b'\r')).count();
    !text.contains('\0') && escaped <= text.len() / 16
}

/// How long properties and headers are in a frame, in bytes, or a little less.
fn bytes_of(properties: &Properties, headers: &Headers) -> usize {
    fn of(value: &HeaderValue) -> usize {
        5 + match value {
            HeaderValue::Text(text) => text.len(),
            HeaderValue::Bytes(bytes) | HeaderValue::Binary(bytes) => bytes.len(),
            HeaderValue::Array(values) => values.iter().map(of).sum(),
            HeaderValue::Table(table) => table.iter().map(|(name, value)| 1 + name.len() + of(value)).sum(),
            _ => 4,
        }
    }
    let properties: usize = properties.texts().iter().filter_map(|(_, text)| Some(1 + text.as_ref()?.len())).sum();
    properties + headers.iter().map(|(name, value)| 1 + name.len() + of(value)).sum::<usize>()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::properties::tests::{headers, properties};

    proptest! {
        #[test]
        fn a_message_is_read_from_its_payload_as_it_was(
            exchange in "\\PC{0,20}",
            routing_key in "(\\PC|\0){0,20}",
            properties in properties(),
            headers in headers(),
            body in prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..200),
                "(.|\n|\0){0,100}".prop_map(String::into_bytes),
            ],
        ) {
            let relayed = Relayed { exchange, routing_key, properties, headers, body };
            let payload = relayed.to_payload();
            prop_assert!(!payload.contains("\\u0000"), "PostgreSQL cannot store it: {}", payload);
            prop_assert_eq!(Relayed::from_payload(&payload), Ok(relayed));
        }

        #[test]
        fn any_payload_is_a_message_or_an_error(payload in ".{0,60}|\\{\"exchange\":\"a\",\"routing_key\":\"b\",.{0,40}\\}") {
            let _ = Relayed::from_payload(&payload);
        }
    }

    #[test]
    fn a_text_is_shown_as_text_and_other_bytes_in_base64() {
        let payload = |body: &[u8]| {
            let relayed = Relayed {
                exchange: "e".into(),
                routing_key: "k".into(),
                properties: Properties::default(),
                headers: Headers::new(),
                body: body.to_vec(),
            };
            relayed.to_payload()
        };
        let rest = r#""exchange":"e","headers":{},"properties":{},"routing_key":"k"}"#;
        assert_eq!(payload(br#"{"a": "\n"}"#), format!(r#"{{"body":"{{\"a\": \"\\n\"}}",{rest}"#));
        assert_eq!(payload(b"a\0b"), format!(r#"{{"body_base64":"YQBi",{rest}"#));
        assert_eq!(payload(&[0xff]), format!(r#"{{"body_base64":"/w==",{rest}"#));
        assert_eq!(payload(&[1; 8]), format!(r#"{{"body_base64":"AQEBAQEBAQE=",{rest}"#));
    }

    #[test]
    fn a_payload_that_is_no_message_is_refused_with_the_reason() {
        let refused = |payload: &str| Relayed::from_payload(payload).expect_err(payload).to_string();
        assert_eq!(refused("[]"), "the payload is not an object");
        assert_eq!(refused("{}"), "the payload has no exchange, or it is not a text of at most 255 bytes");
        let with = |rest: &str| refused(&format!(r#"{{"exchange": "e", "routing_key": "k", {rest}}}"#));
        assert_eq!(with(r#""body": 1"#), "the payload's body is not a text; write other bytes in body_base64");
        assert_eq!(with(r#""body_base64": "?""#), "the payload's body_base64 is not base64");
        assert_eq!(with(r#""headers": []"#), "the payload's headers are not an object");
        assert_eq!(with(r#""header": {}"#), r#"the payload has a member "header", which means nothing"#);
        let long = format!(r#""headers": {{"a": "{}"}}"#, "v".repeat(MAX_PROPERTIES_BYTES));
        assert!(with(&long).starts_with("properties and headers have "));
    }

    #[test]
    fn the_daemons_headers_in_a_payload_are_not_passed_on() {
        let payload = r#"{"exchange": "e", "routing_key": "k", "headers": {"tidings-replay": 9, "a": "b"}}"#;
        let headers = Relayed::from_payload(payload).expect("a message").headers;
        assert_eq!(headers.keys().collect::<Vec<_>>(), ["a"]);
    }
}
