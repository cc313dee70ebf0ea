//! What a producer writes into a row's payload: the message of the plugin `message`, and the times of the game plugins.

#![cfg_attr(fuzzing, no_main)]

use game_envelope::{Instant, wrap};
use tidings::model::event::Event;

// The plugin is a component, so this crate cannot depend on it as a library.
#[path = "../../../plugins/message/src/payload.rs"]
mod payload;

tidings_fuzz::target!(try_payload);

fn try_payload(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    match payload::read(text) {
        // The daemon must accept every event that the plugin makes, so that a mistake in a row is not counted as a
        // failure of the plugin.
        Ok(payload::Message { routing_key, content_type, body, headers, ttl_ms: _ }) => {
            let event = Event::new(routing_key, content_type, body, headers);
            assert!(event.is_ok(), "{event:?}");
        }
        Err(reason) => assert!(!reason.is_empty()),
    }
    if let Ok(instant) = serde_json::from_str::<Instant>(text) {
        let written = serde_json::to_string(&instant).expect("a string");
        assert_eq!(serde_json::from_str::<Instant>(&written).expect("the same"), instant);
        let _ = wrap("game.test", instant.unix_ms().cast_unsigned(), instant);
    }
}
