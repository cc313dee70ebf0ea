//! Plugin `message`: for simple uses, no code needed. The payload says what to send.
//!
//! Payload: `{"routing_key": text, "body": any JSON, "content_type"?: text, "headers"?: {name: text}, "ttl_ms"?: number}`.
//! A body that is a text is sent as it is, any other as JSON text.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::value::RawValue;

use bindings::exports::tidings::plugin::builder::{BuildError, Built, Guest, PluginInfo, Schedule};
use bindings::tidings::plugin::types::{Event, KindInfo};

#[expect(clippy::pedantic, reason = "generated from wit/plugin.wit")]
#[cfg_attr(target_family = "wasm", expect(unsafe_code, reason = "generated from wit/plugin.wit"))]
mod bindings {
    wit_bindgen::generate!({ path: "../../wit", world: "plugin" });
    // Only a component has these exports; a linker for other targets cannot take their names.
    #[cfg(target_family = "wasm")]
    export!(Plugin);
    #[cfg(target_family = "wasm")]
    use super::Plugin;
}

/// The kind that this plugin serves.
const KIND: &str = "message";

/// What a row says. Unknown members are refused: a misspelt `ttl_ms` would make a message that lives for ever.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Payload<'a> {
    routing_key: String,
    // Raw, so that numbers reach the consumer with the digits they were stored with.
    #[serde(borrow)]
    body: &'a RawValue,
    content_type: Option<String>,
    #[serde(default)]
    headers: BTreeMap<String, String>,
    ttl_ms: Option<u64>,
}

struct Plugin;

impl Guest for Plugin {
    fn describe() -> PluginInfo {
        PluginInfo {
            name: env!("CARGO_PKG_NAME").into(),
            version: env!("CARGO_PKG_VERSION").into(),
            kinds: vec![KindInfo {
                kind: KIND.into(),
                summary: "Sends what the payload says".into(),
                payload_schema: Some(include_str!("../payload.schema.json").into()),
                example: Some(r#"{"routing_key":"hello.world","body":{"greeting":"Hello"},"ttl_ms":60000}"#.into()),
            }],
        }
    }

    fn build(row: Schedule) -> Result<Built, BuildError> {
        message(&row.payload)
    }
}

/// The plugin itself: the payload, member by member.
fn message(payload: &str) -> Result<Built, BuildError> {
    let invalid = |error| BuildError::Invalid(format!("the payload is not a message: {error}"));
    let payload: Payload = serde_json::from_str(payload).map_err(invalid)?;
    if !(1..=255).contains(&payload.routing_key.len()) {
        return Err(BuildError::Invalid("the payload is not a message: routing_key must be 1 to 255 bytes".into()));
    }
    let body = payload.body.get();
    let (body, content_type) = if body.starts_with('"') {
        let text: String = serde_json::from_str(body).map_err(invalid)?;
        (text.into_bytes(), "text/plain; charset=utf-8")
    } else {
        (body.as_bytes().to_vec(), "application/json")
    };
    Ok(Built {
        event: Event {
            routing_key: payload.routing_key,
            content_type: payload.content_type.unwrap_or_else(|| content_type.into()),
            body,
            headers: payload.headers.into_iter().collect(),
        },
        ttl_ms: payload.ttl_ms,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body_of(json: &str) -> (String, String) {
        let built = message(&format!(r#"{{"routing_key":"a.b","body":{json}}}"#)).expect("a message");
        (String::from_utf8(built.event.body).expect("UTF-8"), built.event.content_type)
    }

    /// For `cargo measure`: what a call costs without WebAssembly, in nanoseconds.
    #[test]
    #[ignore = "a measurement"]
    fn measure() {
        let payload = std::env::var("MEASURED_PAYLOAD").expect("given by `cargo measure`");
        let calls = 100_000;
        let begun = std::time::Instant::now();
        for _ in 0..calls {
            assert!(std::hint::black_box(message(std::hint::black_box(&payload))).is_ok());
        }
        println!("measured {}", begun.elapsed().as_nanos() / calls);
    }

    #[test]
    fn a_text_body_is_sent_as_it_is() {
        assert_eq!(body_of(r#""h\u00e9 \"you\"""#), ("hé \"you\"".into(), "text/plain; charset=utf-8".into()));
    }

    #[test]
    fn any_other_body_is_sent_as_json_text_digit_by_digit() {
        for json in
            ["null", "true", "[1, 2]", r#"{"a": 1.10000000000000000000000001, "b": 123456789012345678901234567890}"#]
        {
            assert_eq!(body_of(json), (json.into(), "application/json".into()));
        }
    }

    #[test]
    fn the_optional_members_reach_the_event() {
        let built = message(
            r#"{"routing_key":"a.b","body":"","content_type":"text/csv","headers":{"a":"1","b":"2"},"ttl_ms":0}"#,
        )
        .expect("a message");
        assert_eq!(built.event.content_type, "text/csv");
        assert_eq!(built.event.headers, [("a".to_owned(), "1".to_owned()), ("b".to_owned(), "2".to_owned())]);
        assert_eq!(built.ttl_ms, Some(0));
        assert_eq!(message(r#"{"routing_key":"a","body":1}"#).expect("a message").ttl_ms, None);
    }

    #[test]
    fn a_payload_that_is_no_message_is_invalid_and_says_why() {
        for (payload, why) in [
            (r#"{"body":1}"#, "routing_key"),
            (r#"{"routing_key":"a"}"#, "body"),
            (r#"{"routing_key":"","body":1}"#, "routing_key"),
            (r#"{"routing_key":"a","body":1,"ttl":5}"#, "ttl"),
            (r#"{"routing_key":"a","body":1,"ttl_ms":-5}"#, "-5"),
            (r#"{"routing_key":"a","body":1,"headers":{"a":1}}"#, "string"),
        ] {
            let Err(BuildError::Invalid(sentence)) = message(payload) else {
                panic!("{payload} was built");
            };
            assert!(sentence.contains(why), "{sentence}");
        }
    }
}
