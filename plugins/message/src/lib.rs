//! Plugin `message`: sends the message that the payload describes, for simple uses that need no plugin of their own.
//!
//! Payload: `{"routing_key": text, "body": any JSON, "content_type"?: text, "headers"?: {name: text}, "ttl_ms"?: number}`.
//! A body that is a JSON string is sent as its text, any other body as JSON.

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
        build_message(&row.payload)
    }
}

/// Builds the message that the payload describes.
fn build_message(payload: &str) -> Result<Built, BuildError> {
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

    /// For `cargo measure`: how many nanoseconds a call takes without WebAssembly.
    #[test]
    #[ignore = "a measurement"]
    fn measure() {
        let payload = std::env::var("MEASURED_PAYLOAD").expect("given by `cargo measure`");
        let calls = 100_000;
        let begun = std::time::Instant::now();
        for _ in 0..calls {
            assert!(std::hint::black_box(build_message(std::hint::black_box(&payload))).is_ok());
        }
        println!("measured {}", begun.elapsed().as_nanos() / calls);
    }

    #[test]
    fn a_payload_that_is_no_message_is_invalid() {
        let Err(BuildError::Invalid(sentence)) = build_message("{}") else { panic!("it was built") };
        assert!(sentence.starts_with("the payload is not a message: missing field"), "{sentence}");
        assert_eq!(build_message(r#"{"routing_key":"a","body":1,"ttl_ms":7}"#).expect("a message").ttl_ms, Some(7));
    }
}
