//! The header frame and the body of a message that was published to an intake. The target takes them through the frame guard, the
//! client library's parser and the reading of the request, to the frames with which the message is relayed, or parked if it is
//! refused. They must fit into a connection's frames, and be readable.

#![cfg_attr(fuzzing, no_main)]

use amq_protocol::frame::{AMQPFrame, parse_frame};
use amq_protocol::protocol::BasicProperties;
use tidings::broker::frame_guard::field_table;
use tidings::broker::{incoming, parked_copy, write_message};
use tidings::intake::request::{Rules, read};
use tidings::model::intake::{Incoming, Intake, Request};
use tidings::model::message::Message;
use tidings::model::relay;
use tidings::model::relay::Relayed;
use tidings::model::schedule::Schedule;
use time::OffsetDateTime;
use uuid::Uuid;

/// The bytes before the properties: class, weight and length of the body.
const FIXED_BYTES: [u8; 12] = [0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// RabbitMQ's default.
const MAX_FRAME_BYTES: usize = 128 * 1024;
const NOW_MS: i64 = 1_795_291_200_000;

tidings_fuzz::target!(try_message);

fn try_message(bytes: &[u8]) {
    let [mode, split, bytes @ ..] = bytes else { return };
    let (properties, body) = bytes.split_at(bytes.len() * usize::from(*split) / 256);
    // The input is all properties, or only the entries of the header table.
    let payload = if mode & 1 == 0 {
        [&FIXED_BYTES, properties].concat()
    } else {
        let length = u32::try_from(properties.len()).expect("libFuzzer's inputs are shorter").to_be_bytes();
        [&FIXED_BYTES[..], &[0x20, 0], &length, properties].concat()
    };
    let payload = field_table::replacement(&payload, MAX_FRAME_BYTES).unwrap_or(payload);
    let exchange = if mode & 2 == 0 { "orders.delayed" } else { "" };
    let message = incoming(&parse_with_library(&payload), exchange, "key", body.to_vec());
    let message = Incoming { redelivered: mode & 4 != 0, waited: mode & 8 != 0, ..message };
    let intake = Intake { from: "orders.delayed".into(), to: "orders".into() };
    let rules = Rules { max_body: 1_000, kinds: None };
    match read(&message, &intake, "tidings.intake.orders.delayed", &rules, NOW_MS) {
        Err(reason) => {
            assert!(!reason.is_empty());
            check(&parked_copy("tidings", Uuid::nil(), &message, "tidings.intake.orders.delayed", &reason));
        }
        Ok(Request::Schedule(row)) if row.kind == relay::KIND => {
            let relayed = Relayed::from_payload(&row.payload).expect("it can be relayed");
            let schedule = Schedule {
                id: row.id.unwrap_or_default(),
                kind: row.kind,
                key: row.key,
                subject: row.subject,
                due_at: OffsetDateTime::UNIX_EPOCH,
                expires_at: None,
                payload: String::new(),
                headers: Vec::new(),
                attempts: 0,
                failures: 0,
                refusals: 0,
                untried_since: None,
                recurrence: None,
                nominal_at: None,
                line: None,
                priority: 4,
            };
            check(&Message::relayed(&schedule, relayed, NOW_MS).expect("it has no deadline"));
        }
        Ok(_) => {}
    }
}

/// Checks that the library can read each frame of a message, and that none is too long.
fn check(message: &Message) {
    let mut frames = Vec::new();
    write_message(&mut frames, 1, "exchange", message, MAX_FRAME_BYTES);
    let mut rest = &frames[..];
    while !rest.is_empty() {
        let (after, frame) = parse_frame(rest).expect("a frame");
        assert!(rest.len() - after.len() <= MAX_FRAME_BYTES, "{} bytes: {frame:?}", rest.len() - after.len());
        rest = after;
    }
}

/// Parses the payload of a header frame with the client library.
fn parse_with_library(payload: &[u8]) -> BasicProperties {
    let length = u32::try_from(payload.len()).expect("shorter than a frame").to_be_bytes();
    let frame = [&[2, 0, 1][..], &length, payload, &[0xCE]].concat();
    match parse_frame(&frame[..]) {
        Ok(([], AMQPFrame::Header(_, header))) => header.properties,
        other => panic!("the library cannot read it: {other:?}"),
    }
}
