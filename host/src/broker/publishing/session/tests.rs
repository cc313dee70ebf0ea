//! Batches on channels, as RabbitMQ answers them.

use amq_protocol::frame::parse_frame;
use proptest::prelude::*;

use super::*;
use crate::broker::Verdict;
use crate::broker::publishing::error::{NOT_FOUND, PRECONDITION_FAILED};
use crate::model::message::MessageProperties;

fn session() -> Session {
    Session::new(4_096, 100)
}

fn messages(ids: std::ops::Range<u128>) -> Vec<Message> {
    let message = |id| Message {
        id: Uuid::from_u128(id),
        kind: "k".into(),
        exchange: None,
        routing_key: "r".into(),
        properties: MessageProperties::Event { content_type: None, timestamp: 0, priority: 4 },
        expiration_ms: None,
        headers: Vec::new(),
        body: b"{}".to_vec(),
    };
    ids.map(message).collect()
}

fn ack(channel: u16, delivery_tag: u64, multiple: bool) -> AMQPFrame {
    AMQPFrame::Method(channel, AMQPClass::Basic(basic::AMQPMethod::Ack(basic::Ack { delivery_tag, multiple })))
}

fn nack(channel: u16, delivery_tag: u64) -> AMQPFrame {
    let nack = basic::Nack { delivery_tag, multiple: false, requeue: false };
    AMQPFrame::Method(channel, AMQPClass::Basic(basic::AMQPMethod::Nack(nack)))
}

fn close_channel(channel: u16, code: u16) -> AMQPFrame {
    let close = channel::Close { reply_code: code, reply_text: "why".into(), class_id: 60, method_id: 40 };
    AMQPFrame::Method(channel, AMQPClass::Channel(channel::AMQPMethod::Close(close)))
}

fn close_ok(channel: u16) -> AMQPFrame {
    AMQPFrame::Method(channel, AMQPClass::Channel(channel::AMQPMethod::CloseOk(channel::CloseOk {})))
}

/// What is written now, in a few words, by channel.
fn written(session: &mut Session) -> Vec<String> {
    let bytes: Vec<u8> = std::iter::from_fn(|| session.next_outgoing()).flatten().collect();
    let (mut rest, mut frames) = (&bytes[..], Vec::new());
    while !rest.is_empty() {
        let (after, frame) = parse_frame(rest).expect("a frame");
        rest = after;
        frames.extend(match frame {
            AMQPFrame::Method(on, AMQPClass::Channel(channel::AMQPMethod::Open(_))) => Some(format!("open {on}")),
            AMQPFrame::Method(on, AMQPClass::Channel(channel::AMQPMethod::Close(_))) => Some(format!("close {on}")),
            AMQPFrame::Method(on, AMQPClass::Channel(channel::AMQPMethod::CloseOk(_))) => Some(format!("closed {on}")),
            AMQPFrame::Method(on, AMQPClass::Confirm(_)) => Some(format!("confirm {on}")),
            AMQPFrame::Method(on, AMQPClass::Basic(_)) => Some(format!("publish {on}")),
            AMQPFrame::Heartbeat => Some("heartbeat".into()),
            _ => None,
        });
    }
    frames
}

/// How a batch ended: a letter for each message, and the error.
fn ended(end: &mut oneshot::Receiver<BatchEnd>) -> Option<(String, Option<String>)> {
    let (confirms, error) = end.try_recv().ok()?;
    Some((letters(confirms), error.map(|error| error.to_string())))
}

fn letters(confirms: Confirms) -> String {
    let letter = |verdict: &Verdict| match verdict {
        Verdict::Confirmed(_) => 'c',
        Verdict::Refused(_) => 'r',
        Verdict::Poison(_) => 'p',
        Verdict::Unknown => '?',
    };
    confirms.into_verdicts().iter().map(letter).collect()
}

fn handle(session: &mut Session, frame: AMQPFrame) -> Result<(), PublishError> {
    session.handle(frame, Instant::now())
}

#[test]
fn a_channel_on_which_a_message_was_refused_is_closed_and_not_used_again() {
    let mut session = session();
    let (first, mut end) = session.publish("e", &messages(0..2)).expect("open");
    handle(&mut session, nack(first, 1)).expect("it goes on");
    written(&mut session);
    handle(&mut session, ack(first, 2, false)).expect("it goes on");
    assert_eq!(ended(&mut end), Some(("rc".into(), None)));
    assert_eq!(written(&mut session), [format!("close {first}")]);

    let (second, _end) = session.publish("e", &messages(2..3)).expect("open");
    assert_ne!(second, first);
    handle(&mut session, close_ok(first)).expect("it goes on");
    handle(&mut session, ack(second, 1, false)).expect("it goes on");
    let (third, _end) = session.publish("e", &messages(3..4)).expect("open");
    assert_eq!(third, second);
}

#[test]
fn a_channel_is_opened_with_the_first_batch_and_used_again_when_all_is_confirmed() {
    let mut session = session();
    let (first, mut end) = session.publish("e", &messages(0..2)).expect("begun");
    let (second, _) = session.publish("e", &messages(2..3)).expect("begun");
    assert_eq!((first, second), (1, 2));
    let expected = ["open 1", "confirm 1", "publish 1", "publish 1", "open 2", "confirm 2", "publish 2"];
    assert_eq!(written(&mut session), expected);
    handle(&mut session, ack(1, 1, false)).expect("fine");
    assert_eq!(ended(&mut end), None);
    handle(&mut session, ack(1, 2, true)).expect("fine");
    assert_eq!(ended(&mut end), Some(("cc".into(), None)));
    // Its messages are counted on.
    let (channel, mut end) = session.publish("e", &messages(3..5)).expect("begun");
    assert_eq!((channel, written(&mut session)), (1, vec!["publish 1".to_owned(), "publish 1".into()]));
    handle(&mut session, ack(1, 4, true)).expect("fine");
    assert_eq!(ended(&mut end), Some(("cc".into(), None)));
}

#[test]
fn a_channel_that_rabbitmq_closes_ends_its_batch_with_the_reason_and_no_other() {
    let mut session = session();
    let (_, mut first) = session.publish("e", &messages(0..2)).expect("begun");
    let (_, mut second) = session.publish("e", &messages(2..3)).expect("begun");
    written(&mut session);
    handle(&mut session, ack(1, 1, false)).expect("fine");
    handle(&mut session, close_channel(1, PRECONDITION_FAILED)).expect("the connection goes on");
    assert_eq!(ended(&mut first), Some(("c?".into(), Some("RabbitMQ closed the channel: why (406)".into()))));
    assert_eq!((ended(&mut second), written(&mut session)), (None, vec!["closed 1".to_owned()]));
    let (channel, _) = session.publish("e", &messages(3..4)).expect("begun");
    assert_eq!((channel, written(&mut session)[0].as_str()), (1, "open 1"));
}

#[test]
fn a_batch_that_is_given_up_frees_its_channel_only_when_rabbitmq_has_closed_it() {
    let mut session = session();
    let (channel, _end) = session.publish("e", &messages(0..2)).expect("begun");
    written(&mut session);
    handle(&mut session, ack(1, 1, false)).expect("fine");
    assert_eq!(session.abandon(channel).map(letters), Some("c?".into()));
    assert_eq!(written(&mut session), ["close 1"]);
    // A late confirm counts for nobody.
    handle(&mut session, ack(1, 2, false)).expect("fine");
    assert_eq!(session.publish("e", &messages(2..3)).expect("begun").0, 2);
    handle(&mut session, close_ok(1)).expect("fine");
    assert_eq!(session.publish("e", &messages(3..4)).expect("begun").0, 1);
}

#[test]
fn a_batch_that_is_given_up_before_it_is_written_is_not_written_any_more() {
    let mut session = session();
    let (_, mut end) = session.publish("e", &messages(0..1)).expect("begun");
    written(&mut session);
    handle(&mut session, ack(1, 1, false)).expect("fine");
    assert!(ended(&mut end).is_some());
    session.status.blocked = Some("memory".into());
    let (used, _end) = session.publish("e", &messages(1..3)).expect("begun");
    let (new, _end) = session.publish("e", &messages(3..4)).expect("begun");
    assert_eq!((used, new, written(&mut session)), (1, 2, Vec::new()), "RabbitMQ would not read it");
    assert_eq!(
        (session.abandon(used).map(letters), session.abandon(new).map(letters)),
        (Some("??".into()), Some("?".into()))
    );
    session.status.blocked = None;
    assert_eq!(written(&mut session), Vec::<String>::new());
    // The channel's messages are counted as if the batch had never been.
    let (channel, mut end) = session.publish("e", &messages(4..5)).expect("begun");
    assert_eq!((channel, written(&mut session)), (1, vec!["publish 1".to_owned()]));
    handle(&mut session, ack(1, 2, false)).expect("fine");
    assert_eq!(ended(&mut end), Some(("c".into(), None)));
}

#[test]
fn the_end_of_the_connection_ends_all_batches_and_refuses_further_ones() {
    let mut session = session();
    let (_, mut end) = session.publish("e", &messages(0..2)).expect("begun");
    written(&mut session);
    let close = connection::Close { reply_code: 320, reply_text: "shutdown".into(), class_id: 0, method_id: 0 };
    let close = AMQPFrame::Method(0, AMQPClass::Connection(connection::AMQPMethod::Close(close)));
    let error = handle(&mut session, close).expect_err("it ends");
    session.end(&error);
    let text = "RabbitMQ closed the connection: shutdown (320)";
    assert_eq!(ended(&mut end), Some(("??".into(), Some(text.into()))));
    assert_eq!(session.publish("e", &messages(2..3)).expect_err("it has ended").to_string(), text);
}

#[test]
fn a_confirm_that_no_message_waits_for_ends_the_connection() {
    let mut session = session();
    session.publish("e", &messages(0..2)).expect("begun");
    let error = handle(&mut session, ack(1, 3, false)).expect_err("there is none");
    assert!(error.to_string().contains("a confirm of message 3, which channel 1 does not have"), "{error}");
}

#[test]
fn a_heartbeat_is_sent_only_if_nothing_else_is() {
    let mut session = session();
    session.send_heartbeat();
    session.send_heartbeat();
    assert_eq!(written(&mut session), ["heartbeat"]);
    session.publish("e", &messages(0..1)).expect("begun");
    session.send_heartbeat();
    assert!(!written(&mut session).contains(&"heartbeat".to_owned()));
}

proptest! {
    /// RabbitMQ confirms what was published on each channel, in any order, and closes channels.
    #[test]
    fn no_message_is_confirmed_that_rabbitmq_did_not_confirm(
        steps in prop::collection::vec((0..4_u8, 0..4_u16, 1..4_u128, any::<bool>()), 1..60),
    ) {
        let mut session = session();
        // By channel: the server's count of messages, the batch's first number, its confirmed numbers, and its end.
        let mut batches = BTreeMap::new();
        let mut published = BTreeMap::<u16, u64>::new();
        for (step, channel, count, flag) in steps {
            let channel = channel + 1;
            match step {
                0 => {
                    let (channel, end) = session.publish("e", &messages(0..count)).expect("begun");
                    let frames = written(&mut session);
                    if frames[0].starts_with("open") {
                        published.insert(channel, 0);
                    }
                    let before = published[&channel];
                    published.insert(channel, before + u64::try_from(count).expect("few"));
                    prop_assert!(batches.insert(channel, (before, vec![false; usize::try_from(count).expect("few")], end)).is_none(), "two batches");
                }
                1 | 2 => {
                    let Some((before, confirmed, end)) = batches.get_mut(&channel) else { continue };
                    let index = usize::try_from(count - 1).expect("few").min(confirmed.len() - 1);
                    let from = if flag { 0 } else { index };
                    confirmed[from..=index].fill(true);
                    handle(&mut session, ack(channel, *before + 1 + index as u64, flag)).expect("fine");
                    let all = confirmed.iter().all(|confirmed| *confirmed);
                    let expected = all.then(|| ("c".repeat(confirmed.len()), None));
                    prop_assert_eq!(ended(end), expected);
                    if all {
                        batches.remove(&channel);
                    }
                }
                _ => {
                    let Some((_, confirmed, mut end)) = batches.remove(&channel) else { continue };
                    let letters_expected: String = confirmed.iter().map(|confirmed| if *confirmed { 'c' } else { '?' }).collect();
                    if flag {
                        handle(&mut session, close_channel(channel, NOT_FOUND)).expect("the connection goes on");
                        prop_assert_eq!(ended(&mut end).map(|end| end.0), Some(letters_expected));
                    } else {
                        prop_assert_eq!(session.abandon(channel).map(letters), Some(letters_expected));
                        handle(&mut session, close_ok(channel)).expect("fine");
                    }
                    written(&mut session);
                    published.remove(&channel);
                }
            }
        }
    }
}
