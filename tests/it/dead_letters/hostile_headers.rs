//! Dead letters with malformed or absurd headers: each is parked with a reason or replayed unchanged. None blocks
//! another or crashes the daemon.

use std::collections::BTreeMap;

use harness::consumer::Received;
use harness::eventually;
use harness::raw::{RawPublisher, header, long, nested};
use harness::world::World;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};

use crate::dead_letters::replay::{
    count_messages, launch_with_frequent_passes, launch_with_hourly_passes, publish_message, reject_next,
    schedule_message, take_message, wait_for_message_count,
};

/// The reason for which a dead letter was parked, from its header.
pub(crate) fn parked_reason(parked: &Received) -> String {
    let headers = parked.properties().headers().as_ref().expect("headers").inner();
    match headers.get("tidings-parked-reason") {
        Some(AMQPValue::LongString(reason)) => String::from_utf8_lossy(reason.as_bytes()).into_owned(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn dead_letters_with_unreadable_headers_are_parked_with_the_headers_unchanged() {
    let world = World::with_plugins(&["message"]).await;
    assert!(launch_with_hourly_passes(&world).start_ready().await.stop().await.success());
    let odd = BTreeMap::from([
        ("deep", nested(b"n", 20_000)),
        ("not so deep", nested(b"n", 1_000)),
        ("name", header(b"\xff\xfe", b'S', &long(b"x"))),
        ("name within", header(b"t", b'F', &long(&header(b"\xff", b'V', b"")))),
    ]);
    let mut raw = RawPublisher::connect(world.ports().1, &world.name);
    for (body, headers) in &odd {
        raw.publish("tidings.dead", headers, body.as_bytes());
    }
    let mut inbox = world.inbox(&["k"]).await;

    let daemon = launch_with_frequent_passes(&world).start_ready().await;
    schedule_message(&world, r#"{"routing_key": "k", "body": "sane"}"#).await;
    reject_next(&mut inbox).await;

    assert_eq!(inbox.next().await.text(), "sane");
    wait_for_message_count(&world, "tidings.dead", 0).await;
    for _ in &odd {
        let parked = take_message(&world, "tidings.parking").await;
        assert!(parked_reason(&parked).contains("cannot be read"), "{}", parked_reason(&parked));
        let headers = parked.properties().headers().as_ref().expect("headers").inner();
        let Some(AMQPValue::ByteArray(carried)) = headers.get("tidings-unreadable") else { panic!("{headers:?}") };
        let came = [&(1_u16 << 13).to_be_bytes()[..], &long(&odd[parked.text()])].concat();
        assert!(carried.as_slice() == came, "{} came otherwise", parked.text());
    }
    drop(daemon);
}

#[tokio::test]
async fn a_dead_letter_whose_headers_are_too_long_to_publish_again_stays_and_blocks_no_other() {
    let world = World::with_plugins(&["message"]).await;
    assert!(launch_with_hourly_passes(&world).start_ready().await.stop().await.success());
    let mut raw = RawPublisher::connect(world.ports().1, &world.name);
    raw.publish("tidings.dead", &header(b"long", b'S', &long(&vec![b'x'; 130_900])), b"long");
    let mut inbox = world.inbox(&["k"]).await;

    let daemon = launch_with_frequent_passes(&world).start_ready().await;
    schedule_message(&world, r#"{"routing_key": "k", "body": "sane"}"#).await;
    for _ in 0..3 {
        reject_next(&mut inbox).await;
    }

    assert_eq!(inbox.next().await.text(), "sane");
    eventually("a sentence", async || daemon.log().contains("too long to be published again").then_some(())).await;
    assert!(daemon.stop().await.success());
    assert_eq!(count_messages(&world, "tidings.dead").await, 1);
    let (code, output) = world.tidings(["dead", "replay", "--dry-run"]).await;
    assert!(code == 0 && output.contains("would stay: its headers are too long"), "{output}");
    let (code, output) = world.tidings(["dead", "drop", "--all"]).await;
    assert!(code == 0 && output.contains("1 dropped"), "{output}");
    wait_for_message_count(&world, "tidings.dead", 0).await;
}

#[tokio::test]
async fn dead_letters_with_an_invalid_x_death_are_parked_with_the_reason() {
    let world = World::with_plugins(&["message"]).await;
    assert!(launch_with_hourly_passes(&world).start_ready().await.stop().await.success());
    let death = |entries: &[u8]| header(b"x-death", b'A', &long(&[&b"F"[..], &long(entries)].concat()));
    let queue = |kind, value: &[u8]| death(&header(b"queue", kind, value));
    let long_name = long(&[b'q'; 300]);
    let absurd = [
        ("a text", header(b"x-death", b'S', &long(b"rejected"))),
        ("a table", header(b"x-death", b'F', &long(b""))),
        ("an empty list", header(b"x-death", b'A', &long(b""))),
        ("a list of texts", header(b"x-death", b'A', &long(&[&b"S"[..], &long(b"q")].concat()))),
        ("no queue", death(&header(b"reason", b'S', &long(b"rejected")))),
        ("a number for a queue", queue(b'l', &7_i64.to_be_bytes())),
        ("an empty queue", queue(b'S', &long(b""))),
        ("a queue that is not UTF-8", queue(b'S', &long(b"\xff"))),
        ("a queue with a long name", queue(b'S', &long_name)),
        ("a queue that there is not", queue(b'S', &long(b"nowhere"))),
    ];
    let mut raw = RawPublisher::connect(world.ports().1, &world.name);
    for (description, headers) in &absurd {
        raw.publish("tidings.dead", headers, description.as_bytes());
    }

    let daemon = launch_with_frequent_passes(&world).start_ready().await;

    wait_for_message_count(&world, "tidings.parking", u32::try_from(absurd.len()).expect("few")).await;
    for _ in &absurd {
        let parked = take_message(&world, "tidings.parking").await;
        let expected = if parked.text() == "a queue that there is not" { "is gone" } else { "no x-death" };
        assert!(parked_reason(&parked).contains(expected), "{}: {}", parked.text(), parked_reason(&parked));
    }
    assert_eq!(count_messages(&world, "tidings.dead").await, 0);
    drop(daemon);
}

#[tokio::test]
async fn dead_letters_with_absurd_deadlines_are_parked_or_expired_or_get_the_longest_expiration() {
    let world = World::with_plugins(&["message"]).await;
    assert!(launch_with_hourly_passes(&world).start_ready().await.stop().await.success());
    let death = header(b"x-death", b'A', &long(&[&b"F"[..], &long(&header(b"queue", b'S', &long(b"back")))].concat()));
    let expires = |kind, value: &[u8]| header(b"tidings-expires-ms", kind, value);
    let letters = [
        ("unreadable: text", expires(b'S', &long(b"4102444800000"))),
        ("unreadable: double", expires(b'd', &4.1e12_f64.to_be_bytes())),
        ("unreadable: timestamp", expires(b'T', &4_102_444_800_u64.to_be_bytes())),
        ("unreadable: nothing", expires(b'V', b"")),
        ("past: zero", expires(b'l', &0_i64.to_be_bytes())),
        ("past: negative", expires(b'l', &(-1_i64).to_be_bytes())),
        ("past: least", expires(b'l', &i64::MIN.to_be_bytes())),
        ("past: short", expires(b's', &7_i16.to_be_bytes())),
        ("back", expires(b'l', &i64::MAX.to_be_bytes())),
    ];
    let channel = world.broker.channel().await;
    let durable = lapin::options::QueueDeclareOptions::durable();
    channel.queue_declare("back".into(), durable, FieldTable::default()).await.expect("a queue");
    let mut raw = RawPublisher::connect(world.ports().1, &world.name);
    for (description, headers) in &letters {
        let replay = header(b"tidings-replay", b'l', &i64::MAX.to_be_bytes());
        raw.publish("tidings.dead", &[&headers[..], &replay, &death].concat(), description.as_bytes());
    }

    let daemon = launch_with_frequent_passes(&world).start_ready().await;

    wait_for_message_count(&world, "tidings.dead", 0).await;
    let back = take_message(&world, "back").await;
    assert_eq!(back.text(), "back");
    assert_eq!(back.properties().expiration().as_ref().expect("it expires").as_str(), "315360000000");
    assert_eq!(back.number("tidings-replay"), i64::MAX);
    for _ in 0..4 {
        let parked = take_message(&world, "tidings.parking").await;
        assert!(parked.text().starts_with("unreadable"), "{}", parked.text());
        assert!(parked_reason(&parked).contains("tidings-expires-ms is not a number"));
    }
    eventually("the rest expired", async || daemon.log().contains("expired=4").then_some(())).await;
    assert_eq!(count_messages(&world, "back").await + count_messages(&world, "tidings.parking").await, 0);
}

#[tokio::test]
async fn a_dead_letter_of_16_mib_is_replayed_unchanged() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    let _daemon = launch_with_frequent_passes(&world).start_ready().await;
    // The default limit of RabbitMQ 4.
    let body: Vec<u8> = (0..16_u32 << 20).map(|number| number.to_le_bytes()[0]).collect();
    publish_message(&world, "", "inbox.k", &body, BasicProperties::default()).await;
    reject_next(&mut inbox).await;

    assert!(inbox.next().await.delivery.data == body);
}
