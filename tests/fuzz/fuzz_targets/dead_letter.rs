//! The header frame of a dead letter, which anybody may have written: through the frame guard, the client library's parser, what
//! it says of itself and its fate, to the frame that it is sent on with.

#![cfg_attr(fuzzing, no_main)]

use amq_protocol::frame::{AMQPContentHeader, AMQPFrame, WriteContext, gen_frame, parse_frame};
use amq_protocol::protocol::BasicProperties;
use tidings::broker::SendTo;
use tidings::broker::dead_letters::headers;
use tidings::broker::frame_guard::field_table;
use tidings::model::dead_letter::Fate;
use tidings::model::event::LONGEST_TTL_MS;

/// Class, weight and length of the body.
const FIXED: [u8; 12] = [0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// RabbitMQ's own limit of a frame, and the least that a client may ask for.
const LONGEST: [usize; 2] = [128 * 1024, 4 * 1024];

tidings_fuzz::target!(try_dead_letter);

fn try_dead_letter(bytes: &[u8]) {
    let [mode, bytes @ ..] = bytes else { return };
    let longest = LONGEST[usize::from(mode & 1)];
    // All properties, or the entries of the headers alone.
    let payload = if mode & 2 == 0 {
        [&FIXED, bytes].concat()
    } else {
        let length = u32::try_from(bytes.len()).expect("libFuzzer gives less").to_be_bytes();
        [&FIXED[..], &[0x20, 0], &length, bytes].concat()
    };
    let replaced = field_table::instead(&payload, longest);
    let is_replaced = replaced.is_some();
    let properties = read(&replaced.unwrap_or(payload));
    let says = headers::read(&properties);
    assert!(!is_replaced || says.unreadable.is_some());
    let _ = (says.since_ms(), headers::parked_reason(&properties));

    let fate = says.fate(i64::from(*mode) << 33, u32::from(mode >> 4));
    let queue = says.queue.clone().unwrap_or_default();
    let gone = SendTo::Park(format!("the queue {queue:?} it died in is gone"));
    let sending = match fate {
        Fate::Replay { queue, expiration_ms, replays } => {
            assert!((1..=255).contains(&queue.len()) && replays >= 1);
            assert!(expiration_ms.is_none_or(|left| (1..=LONGEST_TTL_MS).contains(&left)));
            SendTo::Back { queue, expiration_ms, replays }
        }
        Fate::Park(reason) => SendTo::Park(reason),
        Fate::Expired | Fate::Leave(_) => return,
    };
    for sending in [sending, gone, SendTo::Tail] {
        let frame = written(headers::sent_on(&properties, &sending));
        assert!(frame.len() <= longest, "{} bytes", frame.len());
        assert_eq!(field_table::instead(&frame[7..frame.len() - 1], usize::MAX), None, "it can be read again");
    }
}

/// The client library's own reading.
fn read(payload: &[u8]) -> BasicProperties {
    let length = u32::try_from(payload.len()).expect("shorter than a frame").to_be_bytes();
    let frame = [&[2, 0, 1][..], &length, payload, &[0xCE]].concat();
    match parse_frame(&frame[..]) {
        Ok(([], AMQPFrame::Header(_, header))) => header.properties,
        other => panic!("it cannot be read: {other:?}"),
    }
}

/// The client library's own writing.
fn written(properties: BasicProperties) -> Vec<u8> {
    let frame = AMQPFrame::Header(1, AMQPContentHeader { class_id: 60, body_size: 0, properties });
    gen_frame(&frame)(WriteContext::from(Vec::new())).expect("a frame").into_inner().0
}
