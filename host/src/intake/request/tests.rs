//! A message of any bytes and headers is a request, or a sentence says why it is none.

use proptest::prelude::*;

use super::*;
use crate::model::properties::Properties;
use crate::model::properties::tests::{headers, properties, value};

const NOW_MS: i64 = 1_795_291_200_123;

fn intake() -> Intake {
    Intake { from: "orders.delayed".into(), to: "orders".into() }
}

fn rules() -> Rules {
    Rules { max_body: 1_000, kinds: None }
}

fn message<const N: usize>(headers: [(&str, HeaderValue); N]) -> Incoming {
    let headers = headers.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    Incoming { routing_key: "k".into(), headers, ..Incoming::default() }
}

fn text(text: &str) -> HeaderValue {
    HeaderValue::Text(text.into())
}

fn row(message: &Incoming) -> NewRow {
    match read(message, &intake(), "q", &rules(), NOW_MS) {
        Ok(Request::Schedule(row)) => *row,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_delay_counts_before_the_due_time_of_the_message_that_a_consumer_got() {
    let due = |message: &Incoming| row(message).due;
    let delay = || ("x-delay", HeaderValue::I32(5_000));
    assert_eq!(due(&message([delay()])), When::After(5_000));
    assert_eq!(due(&message([delay(), ("tidings-due-ms", HeaderValue::Number(7))])), When::After(5_000));
    assert_eq!(due(&message([("x-delay", text("-5000")), ("tidings-due-ms", HeaderValue::Number(7))])), When::At(7));
    assert_eq!(due(&message([("tidings-due", text("2026-11-22T00:00:00.5+01:00"))])), When::At(1_795_302_000_500));
    assert_eq!(due(&message([("tidings-due-ms", HeaderValue::Number(-1))])), When::After(0));
    assert_eq!(due(&message([("x-delay", HeaderValue::Void)])), When::After(0));
    assert_eq!(due(&Incoming::default()), When::After(0));
}

#[test]
fn the_priority_of_a_message_is_that_of_its_row() {
    for (priority, expected) in [(None, 4), (Some(0), 0), (Some(9), 9), (Some(255), 9)] {
        let properties = Properties { priority, ..Properties::default() };
        assert_eq!(row(&Incoming { properties, ..Incoming::default() }).priority, expected, "{priority:?}");
    }
}

#[test]
fn only_a_message_that_waited_is_delayed_from_when_it_was_published() {
    let sent = |seconds, waited| {
        let properties = Properties { timestamp: Some(seconds), ..Properties::default() };
        row(&Incoming { properties, waited, ..message([("x-delay", HeaderValue::I32(5_000))]) }).due
    };
    assert_eq!(sent(1_795_291_000, true), When::AfterSent { delay_ms: 5_000, sent: 1_795_291_000 });
    assert_eq!(sent(1_795_291_000, false), When::After(5_000));
    assert_eq!(sent(u64::MAX, true), When::After(5_000), "it is no time");
}

#[test]
fn a_redelivered_message_has_the_same_id_and_one_that_asks_for_something_else_another() {
    let id = |queue: &str, id: &str, delay: i32, other: &str| {
        let properties = Properties { message_id: Some(id.into()), ..Properties::default() };
        let headers = message([("x-delay", HeaderValue::I32(delay)), ("other", text(other))]).headers;
        match read(&Incoming { properties, headers, ..Incoming::default() }, &intake(), queue, &rules(), NOW_MS) {
            Ok(Request::Schedule(row)) => row.id.expect("an id"),
            other => panic!("{other:?}"),
        }
    };
    let first = id("q", "a", 5, "");
    // A row that an older release has written must be found.
    assert_eq!(first.to_string(), "71d427ae-54f5-85d3-a848-1ebe895dabd0");
    assert_eq!(first, id("q", "a", 5, "added by RabbitMQ"));
    for other in [id("q", "b", 5, ""), id("p", "a", 5, ""), id("q", "a", 6, "")] {
        assert_ne!(first, other);
    }
    assert_ne!(id("q", "ab", 5, ""), id("qa", "b", 5, ""));
    assert_eq!(row(&Incoming::default()).id, None);
}

#[test]
fn a_delay_that_has_passed_is_negative() {
    assert_eq!(negated(100), HeaderValue::I32(-100));
    assert_eq!(negated(-5), HeaderValue::I32(5));
    assert_eq!(negated(1 << 40), HeaderValue::Number(-(1 << 40)));
    let relayed = relayed(&message([("x-delay", text("100"))]), &intake());
    assert_eq!(relayed.headers["x-delay"], HeaderValue::I32(-100));
}

/// Headers of which some are those that are read.
fn any_headers() -> impl Strategy<Value = Headers> {
    let name = proptest::sample::select(
        &[
            "x-delay",
            "tidings-due-ms",
            "tidings-due",
            "tidings-expires-ms",
            "tidings-kind",
            "tidings-key",
            "tidings-subject",
            "tidings-on-conflict",
            "tidings-action",
        ][..],
    );
    let word = proptest::sample::select(
        &["relay", "mail", "cancel", "reschedule", "replace", "keep", "5", "-5", "2026-11-22T00:00:00Z", ""][..],
    );
    let value = prop_oneof![3 => word.prop_map(text), 1 => any::<i64>().prop_map(HeaderValue::Number), 1 => value()];
    (headers(), proptest::collection::vec((name, value), 0..5)).prop_map(|(mut headers, read)| {
        headers.extend(read.into_iter().map(|(name, value)| (name.to_owned(), value)));
        headers
    })
}

proptest! {
    #[test]
    fn any_message_is_a_request_or_a_sentence_and_a_relayed_one_keeps_what_is_its_own(
        headers in any_headers(),
        properties in properties(),
        expiration in proptest::option::of("[0-9]{1,12}"),
        body in prop_oneof![proptest::collection::vec(any::<u8>(), 0..60), "[\\[\\]{}\":,0-9a]{0,20}".prop_map(String::into_bytes)],
        waited in any::<bool>(),
    ) {
        let message = Incoming { routing_key: "k".into(), properties, headers, expiration, body, waited, ..Incoming::default() };
        match read(&message, &intake(), "q", &rules(), NOW_MS) {
            Err(sentence) => prop_assert!(!sentence.is_empty()),
            Ok(Request::Schedule(row)) => {
                prop_assert!(row.key.iter().chain(&row.subject).all(|name| (1..=255).contains(&name.len()) && !name.contains('\0')));
                prop_assert!(!row.payload.contains("\\u0000") || row.kind != relay::KIND);
                let ten_years = LONGEST_TTL_MS.cast_signed();
                match row.due {
                    When::At(at_ms) => prop_assert!(at_ms > 0 && at_ms - NOW_MS <= ten_years),
                    When::After(delay_ms) => prop_assert!((0..=ten_years).contains(&delay_ms)),
                    When::AfterSent { delay_ms, sent } => {
                        prop_assert!((1..=ten_years).contains(&delay_ms) && waited && sent <= NOW_MS / 1_000);
                    }
                }
                if row.kind == relay::KIND {
                    let relayed = Relayed::from_payload(&row.payload).expect("it can be relayed");
                    prop_assert_eq!(&relayed.properties, &message.properties);
                    prop_assert_eq!(&relayed.body, &message.body);
                    prop_assert_eq!((&*relayed.exchange, &*relayed.routing_key), ("orders", "k"));
                    for (name, value) in message.headers.iter().filter(|(name, _)| *name != "x-delay" && !name.starts_with("tidings-")) {
                        prop_assert_eq!(relayed.headers.get(name), Some(value));
                    }
                }
            }
            Ok(Request::Cancel(_) | Request::Reschedule(..)) => {}
        }
    }
}
