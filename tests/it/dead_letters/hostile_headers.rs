//! Dead letters that nobody sane has written: each is parked with a reason or goes back untouched, none stands in the way
//! of another, and none takes the daemon with it.

use std::collections::BTreeMap;

use harness::consumer::Received;
use harness::eventually;
use harness::raw::{RawPublisher, header, long, nested};
use harness::world::World;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};

use crate::dead_letters::replay::{often, once, publish, reject, send, take, until_waiting, waiting};

/// Why a letter was parked.
pub(crate) fn reason(parked: &Received) -> String {
    let headers = parked.properties().headers().as_ref().expect("headers").inner();
    match headers.get("tidings-parked-reason") {
        Some(AMQPValue::LongString(reason)) => String::from_utf8_lossy(reason.as_bytes()).into_owned(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn letters_that_no_library_can_read_are_parked_with_their_headers_as_they_came() {
    let world = World::with(&["message"]).await;
    assert!(once(&world).ready().await.stop().await.success());
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

    let daemon = often(&world).ready().await;
    send(&world, r#"{"routing_key": "k", "body": "sane"}"#).await;
    reject(&mut inbox).await;

    assert_eq!(inbox.next().await.text(), "sane");
    until_waiting(&world, "tidings.dead", 0).await;
    for _ in &odd {
        let parked = take(&world, "tidings.parking").await;
        assert!(reason(&parked).contains("cannot be read"), "{}", reason(&parked));
        let headers = parked.properties().headers().as_ref().expect("headers").inner();
        let Some(AMQPValue::ByteArray(carried)) = headers.get("tidings-unreadable") else { panic!("{headers:?}") };
        let came = [&(1_u16 << 13).to_be_bytes()[..], &long(&odd[parked.text()])].concat();
        assert!(carried.as_slice() == came, "{} came otherwise", parked.text());
    }
    drop(daemon);
}

#[tokio::test]
async fn headers_too_long_to_be_published_again_stay_where_they_are_and_in_nobodys_way() {
    let world = World::with(&["message"]).await;
    assert!(once(&world).ready().await.stop().await.success());
    let mut raw = RawPublisher::connect(world.ports().1, &world.name);
    raw.publish("tidings.dead", &header(b"long", b'S', &long(&vec![b'x'; 130_900])), b"long");
    let mut inbox = world.inbox(&["k"]).await;

    let daemon = often(&world).ready().await;
    send(&world, r#"{"routing_key": "k", "body": "sane"}"#).await;
    for _ in 0..3 {
        reject(&mut inbox).await;
    }

    assert_eq!(inbox.next().await.text(), "sane");
    eventually("a sentence", async || daemon.log().contains("too long to be published again").then_some(())).await;
    assert!(daemon.stop().await.success());
    assert_eq!(waiting(&world, "tidings.dead").await, 1);
    let (code, output) = world.tidings(["dead", "replay", "--dry-run"]).await;
    assert!(code == 0 && output.contains("would stay: its headers are too long"), "{output}");
    let (code, output) = world.tidings(["dead", "drop", "--all"]).await;
    assert!(code == 0 && output.contains("1 dropped"), "{output}");
    until_waiting(&world, "tidings.dead", 0).await;
}

#[tokio::test]
async fn absurd_histories_are_parked_with_the_reason() {
    let world = World::with(&["message"]).await;
    assert!(once(&world).ready().await.stop().await.success());
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
    for (what, headers) in &absurd {
        raw.publish("tidings.dead", headers, what.as_bytes());
    }

    let daemon = often(&world).ready().await;

    until_waiting(&world, "tidings.parking", u32::try_from(absurd.len()).expect("few")).await;
    for _ in &absurd {
        let parked = take(&world, "tidings.parking").await;
        let expected = if parked.text() == "a queue that there is not" { "is gone" } else { "no x-death" };
        assert!(reason(&parked).contains(expected), "{}: {}", parked.text(), reason(&parked));
    }
    assert_eq!(waiting(&world, "tidings.dead").await, 0);
    drop(daemon);
}

#[tokio::test]
async fn absurd_deadlines_are_parked_or_past_or_cut_to_what_the_broker_takes() {
    let world = World::with(&["message"]).await;
    assert!(once(&world).ready().await.stop().await.success());
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
    for (what, headers) in &letters {
        let replay = header(b"tidings-replay", b'l', &i64::MAX.to_be_bytes());
        raw.publish("tidings.dead", &[&headers[..], &replay, &death].concat(), what.as_bytes());
    }

    let daemon = often(&world).ready().await;

    until_waiting(&world, "tidings.dead", 0).await;
    let back = take(&world, "back").await;
    assert_eq!(back.text(), "back");
    assert_eq!(back.properties().expiration().as_ref().expect("it expires").as_str(), "315360000000");
    assert_eq!(back.number("tidings-replay"), i64::MAX);
    for _ in 0..4 {
        let parked = take(&world, "tidings.parking").await;
        assert!(parked.text().starts_with("unreadable"), "{}", parked.text());
        assert!(reason(&parked).contains("tidings-expires-ms is not a number"));
    }
    eventually("the rest expired", async || daemon.log().contains("expired=4").then_some(())).await;
    assert_eq!(waiting(&world, "back").await + waiting(&world, "tidings.parking").await, 0);
}

#[tokio::test]
async fn a_gigantic_letter_goes_back_as_it_was() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    let _daemon = often(&world).ready().await;
    // The largest that RabbitMQ 4 takes, if it is not told otherwise.
    let body: Vec<u8> = (0..16_u32 << 20).map(|number| number.to_le_bytes()[0]).collect();
    publish(&world, "", "inbox.k", &body, BasicProperties::default()).await;
    reject(&mut inbox).await;

    assert!(inbox.next().await.delivery.data == body);
}
