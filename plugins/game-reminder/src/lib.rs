//! Plugin `game-reminder`: tells players that a game starts soon. A reminder expires when the game starts; a row for a
//! game that has started is skipped.
//!
//! Payload: `{"game_id": UUID, "title": text, "starts_at": RFC 3339, "reminder_minutes": number}`.

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
const KIND: &str = "game-reminder";
/// The event that it builds, and its routing key.
const EVENT_TYPE: &str = "game.reminder_due";

/// The payload of a row. Its `title` is for people who read the table, and the plugin does not need it.
#[derive(Deserialize)]
struct Payload {
    game_id: Uuid,
    starts_at: Instant,
    reminder_minutes: u32,
}

/// The data of the event.
#[derive(Serialize)]
struct Data {
    game_id: Uuid,
    reminder_minutes: u32,
}

struct Plugin;

impl Guest for Plugin {
    fn describe() -> PluginInfo {
        PluginInfo {
            name: env!("CARGO_PKG_NAME").into(),
            version: env!("CARGO_PKG_VERSION").into(),
            kinds: vec![KindInfo {
                kind: KIND.into(),
                summary: "Reminds that a game starts soon, until it starts".into(),
                payload_schema: Some(include_str!("../payload.schema.json").into()),
                example: Some(
                    r#"{"game_id":"6f0f5e2e-6a2b-4b0e-9d0b-3a4f0a6b1c2d","title":"Friday chess","starts_at":"2026-11-27T19:00:00Z","reminder_minutes":15}"#
                        .into(),
                ),
            }],
        }
    }

    fn build(row: Schedule) -> Result<Built, BuildError> {
        remind(&row.payload, row.now_ms)
    }
}

/// Builds a reminder that expires when the game starts.
fn remind(payload: &str, now_ms: u64) -> Result<Built, BuildError> {
    let payload: Payload = serde_json::from_str(payload)
        .map_err(|error| BuildError::Invalid(format!("the payload is not a game reminder: {error}")))?;
    let now = i64::try_from(now_ms).map_err(|_| BuildError::Invalid(format!("now-ms {now_ms} is not a time")))?;
    let left_ms = payload.starts_at.unix_ms().saturating_sub(now);
    let Some(ttl_ms) = u64::try_from(left_ms).ok().filter(|left| *left > 0) else {
        return Err(BuildError::Skip(format!("the game has started, {} ms ago", left_ms.unsigned_abs())));
    };
    let data = Data { game_id: payload.game_id, reminder_minutes: payload.reminder_minutes };
    Ok(Built {
        event: Event {
            routing_key: EVENT_TYPE.into(),
            content_type: "application/json".into(),
            body: game_envelope::wrap(EVENT_TYPE, now_ms, data).map_err(BuildError::Other)?,
            headers: vec![],
        },
        ttl_ms: Some(ttl_ms),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// 2026-11-21T20:00:00Z
    const NOW_MS: u64 = 1_795_291_200_000;

    fn payload(starts_at: &str) -> String {
        format!(
            r#"{{"game_id":"6f0f5e2e-6a2b-4b0e-9d0b-3a4f0a6b1c2d","title":"chess","starts_at":"{starts_at}","reminder_minutes":60}}"#
        )
    }

    #[test]
    fn a_reminder_expires_when_the_game_starts() {
        let built = remind(&payload("2026-11-21T22:00:00Z"), NOW_MS).expect("a reminder");
        assert_eq!(built.ttl_ms, Some(7_200_000));
        assert_eq!(built.event.routing_key, "game.reminder_due");
        assert_eq!(
            String::from_utf8(built.event.body).expect("UTF-8"),
            r#"{"event_type":"game.reminder_due","timestamp":"2026-11-21T20:00:00.000000+00:00","data":{"game_id":"6f0f5e2e-6a2b-4b0e-9d0b-3a4f0a6b1c2d","reminder_minutes":60},"trace_id":null}"#
        );
    }

    #[test]
    fn the_time_to_live_is_exact_to_the_millisecond_and_has_no_minimum() {
        for (starts_at, ttl_ms) in
            [("2026-11-21T20:01:00Z", 60_000), ("2026-11-21T20:01:00.001Z", 60_001), ("2026-11-21T20:00:00.001Z", 1)]
        {
            let built = remind(&payload(starts_at), NOW_MS).expect("a reminder");
            assert_eq!(built.ttl_ms, Some(ttl_ms), "{starts_at}");
        }
    }

    #[test]
    fn a_game_that_has_started_is_skipped() {
        for starts_at in ["2026-11-21T20:00:00Z", "2026-11-21T19:00:00Z", "1969-01-01T00:00:00Z"] {
            let outcome = remind(&payload(starts_at), NOW_MS);
            assert!(matches!(outcome, Err(BuildError::Skip(_))), "{starts_at}");
        }
    }

    #[test]
    fn a_payload_that_is_no_reminder_is_invalid_with_the_reason() {
        for (payload, expected) in [
            ("{}", "game_id"),
            (r#"{"game_id":"7"}"#, "UUID"),
            ("[1]", "game reminder"),
            ("null", "game reminder"),
            (&payload("tomorrow"), "RFC 3339"),
        ] {
            let Err(BuildError::Invalid(sentence)) = remind(payload, NOW_MS) else {
                panic!("{payload} was built");
            };
            assert!(sentence.contains(expected), "{sentence}");
        }
    }

    proptest! {
        #[test]
        fn a_reminder_built_at_any_time_expires_exactly_when_the_game_starts(
            starts_at in "[0-9]{4}-(0[1-9]|1[0-2])-[0-2][1-8]T[01][0-9]:[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,9})?Z",
            now_ms in prop_oneof![any::<u64>(), 0..253_402_300_800_000_u64],
        ) {
            let instant: Instant = serde_json::from_str(&format!("\"{starts_at}\"")).expect("a time");
            let left_ms = i128::from(instant.unix_ms()) - i128::from(now_ms);
            match remind(&payload(&starts_at), now_ms) {
                Ok(built) => prop_assert_eq!(built.ttl_ms.map(i128::from), Some(left_ms)),
                Err(BuildError::Skip(reason)) => {
                    let ago = format!(" {} ms ago", -left_ms);
                    prop_assert!(left_ms <= 0 && reason.ends_with(&ago), "{}", reason);
                }
                Err(BuildError::Invalid(reason) | BuildError::Other(reason)) => {
                    let time = format!("now-ms {now_ms} ");
                    prop_assert!(reason.starts_with(&time), "{}", reason);
                }
                Err(BuildError::Retry(_)) => prop_assert!(false, "it is never too early"),
            }
        }

        #[test]
        fn an_arbitrary_payload_is_invalid_with_the_reason(payload in "(.|\n){0,60}|\\{\"game_id\":[^}]{0,20}\\}") {
            match remind(&payload, NOW_MS) {
                Err(BuildError::Invalid(reason)) => prop_assert!(reason.starts_with("the payload is not a game reminder: ")),
                other => prop_assert!(false, "{:?}", other),
            }
        }
    }
}
