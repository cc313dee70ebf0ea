//! What comes from a plugin: its description, the names of its imports and exports, and its events, up to the message.

#![cfg_attr(fuzzing, no_main)]

use arbitrary::{Arbitrary as _, Unstructured};
use tidings::model::event::{BuiltEvent, Event, LONGEST_TTL_MS, deadline_ms};
use tidings::model::message::{Expired, Message};
use tidings::model::schedule::Schedule;
use tidings::plugins::{World, check_description, check_world};
use time::OffsetDateTime;
use uuid::Uuid;

tidings_fuzz::target!(try_plugin);

/// Routing key, content type, body, headers and time to live in milliseconds.
type EventParts<'a> = (&'a str, &'a str, &'a [u8], Vec<(&'a str, &'a str)>, Option<u64>);

fn try_plugin(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    let Ok(choice) = u8::arbitrary(&mut input) else { return };
    let _ = match choice % 4 {
        0 => <(&str, &str, Vec<&str>)>::arbitrary(&mut input).map(try_description),
        1 => <(Vec<String>, Vec<String>)>::arbitrary(&mut input).map(try_world),
        _ => <(EventParts, u64)>::arbitrary(&mut input).map(try_event),
    };
}

fn try_description((name, version, kinds): (&str, &str, Vec<&str>)) {
    match check_description(name, version, &kinds) {
        Ok(()) => {
            assert!((1..=100).contains(&name.len()) && (1..=100).contains(&version.len()) && !name.contains('@'));
            assert!(kinds.iter().all(|kind| (1..=100).contains(&kind.len()) && kind.is_ascii()));
        }
        Err(error) => assert!(error.to_string().len() < 2_000),
    }
}

fn try_world((imports, exports): (Vec<String>, Vec<String>)) {
    let world = World { imports, exports };
    if check_world(&world).is_ok() {
        assert!(world.imports.iter().all(|name| name.starts_with("wasi:") || name.starts_with("tidings:plugin/")));
    }
}

fn try_event(((routing_key, content_type, body, headers, ttl_ms), now_ms): (EventParts, u64)) {
    let headers = headers.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    let event = match Event::new(routing_key.to_owned(), content_type.to_owned(), body.to_vec(), headers) {
        Ok(event) => event,
        Err(error) => return assert!(error.to_string().len() < 2_000),
    };
    assert_eq!(event.digest().len(), 64);
    let now_ms = now_ms.cast_signed();
    let expires_ms = ttl_ms.map(|ttl_ms| deadline_ms(now_ms, ttl_ms));
    let built = BuiltEvent { event, built_ms: now_ms, expires_ms, plugin: "p@1+00000000".into() };
    match Message::new(&schedule(), built, "tidings", now_ms) {
        Ok(message) => {
            assert_eq!(message.expiration_ms.is_some(), ttl_ms.is_some());
            assert!(message.expiration_ms.is_none_or(|left| (1..=LONGEST_TTL_MS).contains(&left)));
            let has_valid_length = |name: &str| (1..=255).contains(&name.len());
            assert!(
                message.headers.iter().all(|(name, _)| has_valid_length(name))
                    && has_valid_length(&message.routing_key)
            );
        }
        Err(Expired(expired_at_ms)) => assert!(expired_at_ms <= now_ms),
    }
}

fn schedule() -> Schedule {
    Schedule {
        id: Uuid::nil(),
        kind: "kind".into(),
        key: None,
        subject: None,
        due_at: OffsetDateTime::UNIX_EPOCH,
        expires_at: None,
        payload: "{}".into(),
        headers: vec![("traceparent".into(), "00-1".into())],
        attempts: 0,
        failures: 0,
        refusals: 0,
        untried_since: None,
        recurrence: None,
        nominal_at: None,
        line: None,
        priority: 4,
    }
}
