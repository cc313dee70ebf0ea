//! Plugin `__NAME__`: turns a due row of the schedule into an event.
//!
//! It is a function of the row, the row's `now_ms` and the plugin's configuration. It has no network, files, clock or
//! randomness, and what it keeps in memory may be gone at the next call. `BuildError` has the other answers.

// Generated; see there.
#[rustfmt::skip]
mod tidings;

use tidings::{BuildError, Built, Event, Guest, KindInfo, PluginInfo, Schedule, host};

/// The kind of the rows that this plugin serves.
const KIND: &str = "__KIND__";

/// Where its events go, unless `[config]` in `__NAME__.toml` has a `routing-key`.
const ROUTING_KEY: &str = "__KIND__.due";

/// How long an event is of use: one hour.
const TTL_MS: u64 = 60 * 60 * 1000;

/// The plugin itself. It calls nothing of the daemon's, so that `cargo test` can call it.
fn event(row: Schedule, routing_key: String) -> Result<Built, BuildError> {
    // Such a row is set aside for a person, with this sentence.
    if row.payload == "null" {
        return Err(BuildError::Invalid("the payload must not be null".into()));
    }
    // Such a row is finished without an event. `now_ms` is the only clock.
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
        event(row, routing_key)
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
    fn a_payload_is_sent_as_it_is_and_lives_an_hour() {
        let built = event(row(r#"{"hello": "world"}"#, 0), "a.b".into()).expect("an event");
        assert_eq!(built.event.routing_key, "a.b");
        assert_eq!(built.event.content_type, "application/json");
        assert_eq!(built.event.body, br#"{"hello": "world"}"#);
        assert_eq!(built.ttl_ms, Some(3_600_000));
    }

    #[test]
    fn null_is_invalid() {
        let answer = event(row("null", 0), "a.b".into());
        let sentence = "the payload must not be null";
        assert_eq!(answer, Err(BuildError::Invalid(sentence.into())));
    }

    #[test]
    fn a_row_is_skipped_when_it_is_more_than_an_hour_late() {
        assert!(event(row("{}", TTL_MS), "a.b".into()).is_ok());
        let answer = event(row("{}", TTL_MS + 1), "a.b".into());
        let sentence = "it was due more than an hour ago";
        assert_eq!(answer, Err(BuildError::Skip(sentence.into())));
    }
}
