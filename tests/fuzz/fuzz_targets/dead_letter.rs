//! The header frame of a dead letter, which anyone who may publish can have written. The target takes it through the
//! frame guard, the client library's parser, the daemon's parser and the decision about its fate, to the frame with
//! which it is published again.

#![cfg_attr(fuzzing, no_main)]

use amq_protocol::frame::{AMQPContentHeader, AMQPFrame, WriteContext, gen_frame, parse_frame};
use amq_protocol::protocol::BasicProperties;
use tidings::broker::Destination;
use tidings::broker::dead_letters::headers;
use tidings::broker::frame_guard::field_table;
use tidings::model::dead_letter::Fate;
use tidings::model::event::LONGEST_TTL_MS;

/// The bytes before the properties: class, weight and length of the body.
const FIXED_BYTES: [u8; 12] = [0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// The maximum frame sizes that are tried: RabbitMQ's default, and the smallest that a client may ask for.
const MAX_FRAME_BYTES: [usize; 2] = [128 * 1024, 4 * 1024];

tidings_fuzz::target!(try_dead_letter);

fn try_dead_letter(bytes: &[u8]) {
    let [mode, bytes @ ..] = bytes else { return };
    let max_frame_bytes = MAX_FRAME_BYTES[usize::from(mode & 1)];
    // The input is all properties, or only the entries of the header table.
    let payload = if mode & 2 == 0 {
        [&FIXED_BYTES, bytes].concat()
    } else {
        let length = u32::try_from(bytes.len()).expect("libFuzzer's inputs are shorter").to_be_bytes();
        [&FIXED_BYTES[..], &[0x20, 0], &length, bytes].concat()
    };
    let replacement = field_table::replacement(&payload, max_frame_bytes);
    let is_replaced = replacement.is_some();
    let properties = parse_with_library(&replacement.unwrap_or(payload));
    let dead_letter = headers::parse(&properties);
    assert!(!is_replaced || dead_letter.unreadable.is_some());
    let _ = (dead_letter.since_ms(), headers::parked_reason(&properties));

    let fate = dead_letter.fate(i64::from(*mode) << 33, u32::from(mode >> 4));
    let queue = dead_letter.queue.clone().unwrap_or_default();
    let queue_gone = Destination::ParkingQueue(format!("the queue {queue:?} it died in is gone"));
    let destination = match fate {
        Fate::Replay { queue, expiration_ms, replays, routing_key } => {
            assert!((1..=255).contains(&queue.len()) && replays >= 1);
            assert!(expiration_ms.is_none_or(|left| (1..=LONGEST_TTL_MS).contains(&left)));
            Destination::OriginalQueue { queue, expiration_ms, replays, routing_key }
        }
        Fate::Park(reason) => Destination::ParkingQueue(reason),
        Fate::Expired | Fate::Leave(_) => return,
    };
    for destination in [destination, queue_gone, Destination::DeadQueue] {
        let frame = write_with_library(headers::properties_for(&destination, &properties));
        assert!(frame.len() <= max_frame_bytes, "{} bytes", frame.len());
        assert_eq!(field_table::replacement(&frame[7..frame.len() - 1], usize::MAX), None, "it can be read again");
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

/// Writes a header frame with the client library.
fn write_with_library(properties: BasicProperties) -> Vec<u8> {
    let frame = AMQPFrame::Header(1, AMQPContentHeader { class_id: 60, body_size: 0, properties });
    gen_frame(&frame)(WriteContext::from(Vec::new())).expect("a frame").into_inner().0
}
