//! Plugin `game-status`: tells the game services that a game is to change its status now. The change must happen however
//! late it is, so the event never expires.
//!
//! Payload: `{"game_id": UUID, "target_status": text, "transition_time": RFC 3339}`.

use game_envelope::Instant;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

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
const KIND: &str = "game-status";
/// The event that it builds, and its routing key.
const EVENT_TYPE: &str = "game.status_transition_due";

/// The payload of a row, which is also the data of the event.
#[derive(Deserialize, Serialize)]
struct Transition {
    game_id: Uuid,
    target_status: String,
    transition_time: Instant,
}

struct Plugin;

impl Guest for Plugin {
    fn describe() -> PluginInfo {
        PluginInfo {
            name: env!("CARGO_PKG_NAME").into(),
            version: env!("CARGO_PKG_VERSION").into(),
            kinds: vec![KindInfo {
                kind: KIND.into(),
                summary: "Tells that a game's status is to change, until someone does it".into(),
                payload_schema: Some(include_str!("../payload.schema.json").into()),
                example: Some(
                    r#"{"game_id":"6f0f5e2e-6a2b-4b0e-9d0b-3a4f0a6b1c2d","target_status":"IN_PROGRESS","transition_time":"2026-11-27T19:00:00Z"}"#
                        .into(),
                ),
            }],
        }
    }

    fn build(row: Schedule) -> Result<Built, BuildError> {
        build_transition(&row.payload, row.now_ms)
    }
}

/// Checks the payload, and wraps it into the envelope.
fn build_transition(payload: &str, now_ms: u64) -> Result<Built, BuildError> {
    let transition: Transition = serde_json::from_str(payload)
        .map_err(|error| BuildError::Invalid(format!("the payload is not a status change: {error}")))?;
    if transition.target_status.is_empty() {
        return Err(BuildError::Invalid("the payload is not a status change: target_status is empty".into()));
    }
    Ok(Built {
        event: Event {
            routing_key: EVENT_TYPE.into(),
            content_type: "application/json".into(),
            body: game_envelope::wrap(EVENT_TYPE, now_ms, transition).map_err(BuildError::Other)?,
            headers: vec![],
        },
        ttl_ms: None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// 2026-11-21T20:00:00Z
    const NOW_MS: u64 = 1_795_291_200_000;

    #[test]
    fn a_status_change_carries_its_payload_and_never_expires_even_when_late() {
        for time in ["2026-11-21T22:00:00Z", "2020-01-01T00:00:00+02:00"] {
            let payload = format!(
                r#"{{"game_id":"6f0f5e2e-6a2b-4b0e-9d0b-3a4f0a6b1c2d","target_status":"COMPLETED","transition_time":"{time}","more":1}}"#
            );
            let built = build_transition(&payload, NOW_MS).expect("a status change");
            assert_eq!(built.ttl_ms, None);
            assert_eq!(built.event.routing_key, "game.status_transition_due");
            assert_eq!(
                String::from_utf8(built.event.body).expect("UTF-8"),
                format!(
                    r#"{{"event_type":"game.status_transition_due","timestamp":"2026-11-21T20:00:00.000000+00:00","data":{{"game_id":"6f0f5e2e-6a2b-4b0e-9d0b-3a4f0a6b1c2d","target_status":"COMPLETED","transition_time":"{time}"}},"trace_id":null}}"#
                )
            );
        }
    }

    #[test]
    fn a_payload_that_is_no_status_change_is_invalid_with_the_reason() {
        for (payload, expected) in [
            ("{}", "game_id"),
            (
                r#"{"game_id":"6f0f5e2e-6a2b-4b0e-9d0b-3a4f0a6b1c2d","target_status":"","transition_time":"2026-11-21T22:00:00Z"}"#,
                "target_status",
            ),
            (r#"{"game_id":"6f0f5e2e-6a2b-4b0e-9d0b-3a4f0a6b1c2d","target_status":"X"}"#, "transition_time"),
        ] {
            let Err(BuildError::Invalid(sentence)) = build_transition(payload, NOW_MS) else {
                panic!("{payload} was built");
            };
            assert!(sentence.contains(expected), "{sentence}");
        }
    }

    proptest! {
        #[test]
        fn any_status_that_is_not_empty_is_sent_unchanged(status in "(.|\n){0,40}") {
            let payload = serde_json::json!({
                "game_id": Uuid::nil(), "target_status": status, "transition_time": "2026-11-21T22:00:00Z",
            });
            match build_transition(&payload.to_string(), NOW_MS) {
                Ok(built) => {
                    let body: serde_json::Value = serde_json::from_slice(&built.event.body).expect("JSON");
                    prop_assert_eq!(&body["data"], &payload);
                    prop_assert!(!status.is_empty());
                }
                Err(error) => prop_assert!(status.is_empty(), "{:?}", error),
            }
        }

        #[test]
        fn an_arbitrary_payload_is_invalid_with_the_reason(payload in "(.|\n){0,60}", now_ms in any::<u64>()) {
            match build_transition(&payload, now_ms) {
                Err(BuildError::Invalid(reason)) => prop_assert!(reason.starts_with("the payload is not a status change: ")),
                other => prop_assert!(false, "{:?}", other),
            }
        }
    }
}
