//! Plugin `message`: for simple uses, no code needed. The payload says what to send.
//!
//! Payload: `{"routing_key": text, "body": any JSON, "content_type"?: text, "headers"?: {name: text}, "ttl_ms"?: number}`.
//! A body that is a text is sent as it is, any other as JSON text.

mod payload;

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
    let message = payload::read(payload)
        .map_err(|error| BuildError::Invalid(format!("the payload is not a message: {error}")))?;
    Ok(Built {
        event: Event {
            routing_key: message.routing_key,
            content_type: message.content_type,
            body: message.body,
            headers: message.headers,
        },
        ttl_ms: message.ttl_ms,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn a_payload_that_is_no_message_is_the_rows_mistake() {
        let Err(BuildError::Invalid(sentence)) = message("{}") else { panic!("it was built") };
        assert!(sentence.starts_with("the payload is not a message: missing field"), "{sentence}");
        assert_eq!(message(r#"{"routing_key":"a","body":1,"ttl_ms":7}"#).expect("a message").ttl_ms, Some(7));
    }
}
