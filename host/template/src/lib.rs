//! Plugin `__NAME__`: turns a due row of the schedule into an event.
//!
//! A plugin is a function of the row, the row's `now_ms` and its configuration. It has no network, files, clock or
//! randomness, and values that it keeps in memory may be gone at the next call. If there is no event, it answers with
//! one of the cases of `BuildError`.

// Generated from `wit/plugin.wit`.
#[rustfmt::skip]
mod tidings;

use tidings::{BuildError, Built, Event, Guest, KindInfo, PluginInfo, Schedule, host};

/// The kind of the rows that this plugin serves.
const KIND: &str = "__KIND__";

/// The routing key of its events, unless `[config]` in `__NAME__.toml` has a `routing-key`.
const ROUTING_KEY: &str = "__KIND__.due";

/// The time to live of an event: one hour.
const TTL_MS: u64 = 60 * 60 * 1000;

/// Builds the event of a row. It calls no function of the daemon, so that `cargo test` can run it.
fn build_event(row: Schedule, routing_key: String) -> Result<Built, BuildError> {
    // Such a row is parked, that is, set aside for a person, with this sentence.
    if row.payload == "null" {
        return Err(BuildError::Invalid("the payload must not be null".into()));
    }
    // Such a row is finished without an event. `now_ms` is the only clock of a plugin.
    if row.now_ms.saturating_sub(row.due_ms) > TTL_MS {
        return Err(BuildError::Skip("it was due more than an hour ago".into()));
    }
    Ok(Built {
        event: Event {
            routing_key,
            content_type: "application/json".into(),
            body: row.payload.into_bytes(),
            headers: vec![],
        },
        ttl_ms: Some(TTL_MS),
    })
}

struct Plugin;

impl Guest for Plugin {
    fn describe() -> PluginInfo {
        PluginInfo {
            name: env!("CARGO_PKG_NAME").into(),
            version: env!("CARGO_PKG_VERSION").into(),
            kinds: vec![KindInfo {
                kind: KIND.into(),
                summary: "Sends the payload as it is".into(),
                payload_schema: None,
                example: Some(r#"{"hello": "world"}"#.into()),
            }],
        }
    }

    fn build(row: Schedule) -> Result<Built, BuildError> {
        let routing_key = host::config("routing-key").unwrap_or_else(|| ROUTING_KEY.into());
        build_event(row, routing_key)
    }
}

tidings::export!(Plugin);

#[cfg(test)]
mod tests {
    use super::*;

    const DUE_MS: u64 = 1_790_000_000_000;

    fn row(payload: &str, late_ms: u64) -> Schedule {
        Schedule {
            id: "0b9c6a52-7d0e-4d9c-8b52-6c1d7f1f8a11".into(),
            kind: KIND.into(),
            key: None,
            subject: None,
            due_ms: DUE_MS,
            now_ms: DUE_MS + late_ms,
            expires_ms: None,
            attempt: 1,
            payload: payload.into(),
            headers: vec![],
        }
    }

    #[test]
    fn a_payload_is_sent_unchanged_with_a_ttl_of_one_hour() {
        let built = build_event(row(r#"{"hello": "world"}"#, 0), "a.b".into()).expect("an event");
        assert_eq!(built.event.routing_key, "a.b");
        assert_eq!(built.event.content_type, "application/json");
        assert_eq!(built.event.body, br#"{"hello": "world"}"#);
        assert_eq!(built.ttl_ms, Some(3_600_000));
    }

    #[test]
    fn a_null_payload_is_invalid() {
        let answer = build_event(row("null", 0), "a.b".into());
        let sentence = "the payload must not be null";
        assert_eq!(answer, Err(BuildError::Invalid(sentence.into())));
    }

    #[test]
    fn a_row_is_skipped_when_it_is_more_than_an_hour_late() {
        assert!(build_event(row("{}", TTL_MS), "a.b".into()).is_ok());
        let answer = build_event(row("{}", TTL_MS + 1), "a.b".into());
        let sentence = "it was due more than an hour ago";
        assert_eq!(answer, Err(BuildError::Skip(sentence.into())));
    }
}
