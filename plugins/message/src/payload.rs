//! Reads and checks a row's payload. The daemon can publish every payload that is accepted here: a payload that breaks a
//! rule of wit/plugin.wit must be refused as invalid, or the daemon would count it as a failure of the plugin. Uses
//! nothing of Tidings.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::value::RawValue;

/// AMQP gives the length of a short string in one byte.
const MAX_SHORT_STRING_BYTES: usize = 255;
/// All headers together, with the bytes that AMQP adds.
const MAX_HEADERS_BYTES: usize = 32 * 1024;
/// How many bytes AMQP adds to each header.
const HEADER_OVERHEAD_BYTES: usize = 6;

/// The message to send.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Message {
    /// 1 to 255 bytes.
    pub(crate) routing_key: String,
    /// At most 255 bytes.
    pub(crate) content_type: String,
    pub(crate) body: Vec<u8>,
    /// At most 32 KiB together. Names have 1 to 255 bytes and are not reserved.
    pub(crate) headers: Vec<(String, String)>,
    /// In milliseconds; `None` = never expires.
    pub(crate) ttl_ms: Option<u64>,
}

/// The payload of a row. Unknown members are refused: with a misspelt `ttl_ms` the message would never expire.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Payload<'a> {
    routing_key: String,
    // Kept as JSON text, so that numbers reach the consumer with the digits with which they were stored.
    #[serde(borrow)]
    body: &'a RawValue,
    content_type: Option<String>,
    #[serde(default)]
    headers: BTreeMap<String, String>,
    ttl_ms: Option<u64>,
}

/// The message that `payload` describes, or a sentence about its mistake.
pub(crate) fn read(payload: &str) -> Result<Message, String> {
    let payload: Payload = serde_json::from_str(payload).map_err(|error| error.to_string())?;
    if !(1..=MAX_SHORT_STRING_BYTES).contains(&payload.routing_key.len()) {
        return Err(format!("routing_key must be 1 to {MAX_SHORT_STRING_BYTES} bytes"));
    }
    if payload.content_type.as_ref().is_some_and(|content_type| content_type.len() > MAX_SHORT_STRING_BYTES) {
        return Err(format!("content_type must be at most {MAX_SHORT_STRING_BYTES} bytes"));
    }
    if let Some(name) = payload.headers.keys().find(|name| !is_allowed_name(name)) {
        let start: String = name.chars().take(120).collect();
        return Err(format!(
            "headers has the name {start:?}: names must be 1 to {MAX_SHORT_STRING_BYTES} bytes, not begin with tidings- or x-, nor be CC or BCC"
        ));
    }
    let bytes: usize =
        payload.headers.iter().map(|(name, value)| name.len() + value.len() + HEADER_OVERHEAD_BYTES).sum();
    if bytes > MAX_HEADERS_BYTES {
        return Err(format!("headers must be at most {MAX_HEADERS_BYTES} bytes together"));
    }
    let body = payload.body.get();
    let (body, content_type) = if body.starts_with('"') {
        let text: String = serde_json::from_str(body).map_err(|error| format!("body: {error}"))?;
        (text.into_bytes(), "text/plain; charset=utf-8")
    } else {
        (body.as_bytes().to_vec(), "application/json")
    };
    Ok(Message {
        routing_key: payload.routing_key,
        content_type: payload.content_type.unwrap_or_else(|| content_type.into()),
        body,
        headers: payload.headers.into_iter().collect(),
        ttl_ms: payload.ttl_ms,
    })
}

/// Whether a plugin may set a header of this name.
fn is_allowed_name(name: &str) -> bool {
    let reserved = name.starts_with("tidings-") || name.starts_with("x-") || matches!(name, "CC" | "BCC");
    (1..=MAX_SHORT_STRING_BYTES).contains(&name.len()) && !reserved
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn body_of(json: &str) -> (String, String) {
        let message = read(&format!(r#"{{"routing_key":"a.b","body":{json}}}"#)).expect("a message");
        (String::from_utf8(message.body).expect("UTF-8"), message.content_type)
    }

    #[test]
    fn a_text_body_is_sent_as_it_is() {
        assert_eq!(body_of(r#""h\u00e9 \"you\"""#), ("hé \"you\"".into(), "text/plain; charset=utf-8".into()));
    }

    #[test]
    fn any_other_body_is_sent_as_json_with_the_same_digits() {
        for json in
            ["null", "true", "[1, 2]", r#"{"a": 1.10000000000000000000000001, "b": 123456789012345678901234567890}"#]
        {
            assert_eq!(body_of(json), (json.into(), "application/json".into()));
        }
    }

    #[test]
    fn the_optional_members_reach_the_event() {
        let message =
            read(r#"{"routing_key":"a.b","body":"","content_type":"text/csv","headers":{"a":"1","b":"2"},"ttl_ms":0}"#)
                .expect("a message");
        assert_eq!(message.content_type, "text/csv");
        assert_eq!(message.headers, [("a".to_owned(), "1".to_owned()), ("b".to_owned(), "2".to_owned())]);
        assert_eq!(message.ttl_ms, Some(0));
        assert_eq!(read(r#"{"routing_key":"a","body":1}"#).expect("a message").ttl_ms, None);
    }

    #[test]
    fn a_payload_that_is_no_message_is_refused_with_the_reason() {
        let long = "n".repeat(256);
        for (payload, expected) in [
            (r#"{"body":1}"#, "routing_key"),
            (r#"{"routing_key":"a"}"#, "body"),
            (r#"{"routing_key":"","body":1}"#, "routing_key"),
            (r#"{"routing_key":"a","body":1,"ttl":5}"#, "ttl"),
            (r#"{"routing_key":"a","body":1,"ttl_ms":-5}"#, "-5"),
            (r#"{"routing_key":"a","body":1,"headers":{"a":1}}"#, "string"),
            (r#"{"routing_key":"a","body":1,"headers":{"x-death":"1"}}"#, r#"headers has the name "x-death""#),
            (r#"{"routing_key":"a","body":1,"headers":{"":"1"}}"#, r#"headers has the name """#),
            (&format!(r#"{{"routing_key":"a","body":1,"headers":{{"{long}":"1"}}}}"#), "1 to 255 bytes"),
            (&format!(r#"{{"routing_key":"a","body":1,"headers":{{"a":"{}"}}}}"#, long.repeat(128)), "32768 bytes"),
            (&format!(r#"{{"routing_key":"a","body":1,"content_type":"{long}"}}"#), "content_type"),
        ] {
            let sentence = read(payload).expect_err(payload);
            assert!(sentence.contains(expected), "{sentence}");
        }
    }

    #[test]
    fn a_deeply_nested_body_is_sent_without_a_stack_overflow() {
        let deep = format!("{}{}", "[".repeat(500_000), "]".repeat(500_000));
        assert_eq!(body_of(&deep).0, deep);
    }

    /// Any JSON that is not deeply nested.
    fn json() -> impl Strategy<Value = Value> {
        let flat = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            "(.|\n){0,12}".prop_map(Value::from),
        ];
        flat.prop_recursive(3, 12, 4, |value| {
            prop_oneof![
                proptest::collection::vec(value.clone(), 0..4).prop_map(Value::from),
                proptest::collection::btree_map("[a-z]{0,3}", value, 0..4)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    /// A payload whose members are valid or almost valid.
    fn payload() -> impl Strategy<Value = String> {
        let text = || prop_oneof!["(.|\n){0,90}", (250..260_usize).prop_map(|length| "k".repeat(length))];
        let name = prop_oneof![3 => "\\PC{1,9}", 1 => "(tidings|x|X)-[a-z]{0,3}|B?CC|", 1 => "n{250,260}"];
        let headers = proptest::collection::btree_map(name, prop_oneof!["\\PC{0,9}", "v{9000,12000}"], 0..5);
        let optional = proptest::option::of(prop_oneof![
            text().prop_map(|text| ("content_type".to_owned(), json!(text))),
            headers.prop_map(|headers| ("headers".to_owned(), json!(headers))),
            any::<u64>().prop_map(|ttl_ms| ("ttl_ms".to_owned(), json!(ttl_ms))),
            ("content_type|headers|ttl_ms|ttl", json()),
        ]);
        (text(), json(), optional).prop_map(|(routing_key, body, optional)| {
            let mut payload = json!({"routing_key": routing_key, "body": body});
            if let Some((name, value)) = optional {
                payload[name] = value;
            }
            payload.to_string()
        })
    }

    proptest! {
        #[test]
        fn an_accepted_payload_can_be_published_and_a_refused_one_names_its_mistake(
            payload in prop_oneof![
                4 => payload(),
                1 => json().prop_map(|json| json.to_string()),
                1 => "(.|\n){0,40}",
            ],
        ) {
            match read(&payload) {
                Ok(Message { routing_key, content_type, headers, .. }) => {
                    prop_assert!((1..=255).contains(&routing_key.len()) && content_type.len() <= 255);
                    prop_assert!(headers.iter().all(|(name, _)| is_allowed_name(name)));
                    let bytes: usize = headers.iter().map(|(name, value)| name.len() + value.len() + 6).sum();
                    prop_assert!(bytes <= 32 * 1024);
                }
                Err(sentence) => {
                    let members = ["routing_key", "body", "content_type", "headers", "ttl", " at line 1 column ", " at line "];
                    prop_assert!(members.iter().any(|member| sentence.contains(member)), "{}", sentence);
                }
            }
        }
    }
}
