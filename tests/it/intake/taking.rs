//! What the headers and properties of a message ask for.

use std::time::Duration;

use harness::world::World;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};

use crate::intake::{Publisher, header, headers, inbox, launch, start, text, text_of};

/// How many seconds after its `created_at` the row with this body is due.
async fn due_in(world: &World, body: &str) -> f64 {
    let row = format!("FROM tidings.schedules WHERE payload->>'body' = '{body}'");
    world.wait_until(&format!("SELECT EXISTS (SELECT {row})")).await;
    world.value(&format!("SELECT extract(epoch FROM due_at - created_at)::float8 {row}")).await
}

#[tokio::test]
async fn a_delay_of_any_integer_type_or_in_digits_counts_from_when_the_message_was_received() {
    let world = World::empty().await;
    let _daemon = start(&world).await;
    let publisher = Publisher::new(&world).await;
    let delays = [
        AMQPValue::ShortInt(30_000),
        AMQPValue::ShortUInt(30_000),
        AMQPValue::LongInt(30_000),
        AMQPValue::LongUInt(30_000),
        AMQPValue::LongLongInt(30_000),
        text("30000"),
    ];
    for (number, delay) in delays.into_iter().enumerate() {
        let body = format!("delay {number}");
        publisher.publish("k", headers([("x-delay", delay)]), body.as_bytes()).await;
        let due_in = due_in(&world, &body).await;
        assert!((29.0..=30.5).contains(&due_in), "{body}: {due_in}");
    }
}

#[tokio::test]
async fn a_message_may_say_when_it_is_due_and_without_that_it_is_due_at_once() {
    let world = World::empty().await;
    let _daemon = start(&world).await;
    let publisher = Publisher::new(&world).await;
    let mut inbox = inbox(&world).await;
    let in_an_hour: i64 =
        world.value("SELECT floor(extract(epoch FROM now() + interval '1 hour') * 1000)::bigint").await;
    let rfc3339: String = world
        .value("SELECT to_char(now() AT TIME ZONE 'UTC' + interval '1 hour', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"')")
        .await;
    for (body, due) in
        [("ms", ("tidings-due-ms", AMQPValue::LongLongInt(in_an_hour))), ("text", ("tidings-due", text(&rfc3339)))]
    {
        publisher.publish("k", headers([due]), body.as_bytes()).await;
        let due_in = due_in(&world, body).await;
        assert!((3_590.0..=3_600.5).contains(&due_in), "{body}: {due_in}");
    }
    // A delay counts before the due time of the message that a consumer got before.
    let again = [("x-delay", AMQPValue::LongInt(60_000)), ("tidings-due-ms", AMQPValue::LongLongInt(5))];
    publisher.publish("k", headers(again), b"again").await;
    assert!((59.0..=60.5).contains(&due_in(&world, "again").await));
    for (body, due) in [
        ("negative", headers([("x-delay", AMQPValue::LongInt(-5))])),
        ("zero", headers([("x-delay", AMQPValue::LongInt(0))])),
        ("past", headers([("tidings-due-ms", AMQPValue::LongLongInt(1_000))])),
        ("none", BasicProperties::default()),
    ] {
        publisher.publish("k", due, body.as_bytes()).await;
        assert_eq!(inbox.next().await.text(), body);
    }
}

#[tokio::test]
async fn a_message_with_a_kind_becomes_a_row_of_that_kind_for_its_plugin() {
    let world = World::with_plugins(&["message"]).await;
    let _daemon = start(&world).await;
    let publisher = Publisher::new(&world).await;
    let mut inbox = world.inbox(&["k"]).await;
    let properties = headers([
        ("tidings-kind", text("message")),
        ("tidings-key", text("the key")),
        ("tidings-subject", text("the subject")),
        ("tenant", text("a")),
        ("number", AMQPValue::LongInt(7)),
        ("x-ignored", text("b")),
    ])
    .with_priority(8);
    publisher.publish("any", properties, br#"{"routing_key": "k", "body": {"a": 1}}"#).await;
    let received = inbox.next().await;
    assert_eq!(received.json(), serde_json::json!({"a": 1}));
    let names = ["tidings-kind", "tidings-key", "tidings-subject", "tenant", "number", "x-ignored"];
    let values = names.map(|name| header(&received, name));
    let expected = ["message", "the key", "the subject", "a", "7"].map(|value| Some(text(value)));
    assert_eq!(values[..5], expected);
    assert_eq!(values[5], None);
    assert_eq!(*received.properties().priority(), Some(8));
}

#[tokio::test]
async fn a_key_that_is_taken_is_replaced_kept_or_refused_as_the_message_asks() {
    let world = World::empty().await;
    let _daemon = start(&world).await;
    let publisher = Publisher::new(&world).await;
    let publish = async |body: &str, conflict: Option<&str>| {
        let mut headers = crate::intake::table([("tidings-key", text("a")), ("x-delay", AMQPValue::LongInt(60_000))]);
        if let Some(conflict) = conflict {
            headers.insert("tidings-on-conflict".into(), text(conflict));
        }
        publisher.publish("k", BasicProperties::default().with_headers(headers), body.as_bytes()).await;
    };
    publish("first", None).await;
    world.wait_until("SELECT count(*) = 1 FROM tidings.schedules WHERE payload->>'body' = 'first'").await;
    publish("second", None).await;
    world
        .wait_until("SELECT payload->>'body' = 'second' FROM tidings.schedules WHERE kind = 'relay' AND key = 'a'")
        .await;
    publish("third", Some("keep")).await;
    publish("fourth", Some("error")).await;
    let mut parking = world.broker.inbox("amq.topic", "tidings.parking", &[], FieldTable::default()).await;
    let refused = parking.next().await;
    assert_eq!(refused.text(), "fourth");
    let reason = text_of(&refused, "tidings-parked-reason");
    assert!(reason.starts_with(r#"key "a" of kind "relay" is already scheduled, with id "#), "{reason}");
    let body: String = world.value("SELECT payload->>'body' FROM tidings.schedules").await;
    assert_eq!(body, "second");
}

#[tokio::test]
async fn the_message_id_is_the_key_of_a_message_without_one_and_the_first_message_with_it_stays() {
    let world = World::empty().await;
    let _daemon = start(&world).await;
    let publisher = Publisher::new(&world).await;
    for body in ["first", "second"] {
        let properties = headers([("x-delay", AMQPValue::LongInt(60_000))]).with_message_id("the id".into());
        publisher.publish("k", properties, body.as_bytes()).await;
    }
    publisher.publish("k", headers([("x-delay", AMQPValue::LongInt(60_000))]), b"last").await;
    world.wait_until("SELECT count(*) = 2 FROM tidings.schedules").await;
    let rows: Vec<String> = world
        .value("SELECT array_agg(coalesce(key, '-') || ' ' || (payload->>'body') ORDER BY key NULLS LAST) FROM tidings.schedules")
        .await;
    assert_eq!(rows, ["the id first", "- last"]);
}

#[tokio::test]
async fn messages_cancel_and_move_rows_by_key_and_by_subject_in_their_order() {
    let world = World::empty().await;
    let daemon = launch(&world);
    let publisher = Publisher::new(&world).await;
    // The intake's queue must be there.
    daemon.start_ready().await.stop().await;
    let delayed = |key: &str, subject: &str| {
        let delay = ("x-delay", AMQPValue::LongInt(60_000));
        headers([("tidings-key", text(key)), ("tidings-subject", text(subject)), delay])
    };
    for key in ["a", "b", "c", "d", "e"] {
        publisher.publish("k", delayed(key, if key < "c" { "one" } else { "two" }), key.as_bytes()).await;
    }
    let action = |action: &str, what: &str, name: &str, delay: i32| {
        let delay = ("x-delay", AMQPValue::LongInt(delay));
        headers([("tidings-action", text(action)), (what, text(name)), delay])
    };
    publisher.publish("k", action("cancel", "tidings-subject", "one", 0), b"").await;
    publisher.publish("k", action("cancel", "tidings-key", "c", 0), b"").await;
    publisher.publish("k", delayed("c", "three"), b"c again").await;
    publisher.publish("k", action("reschedule", "tidings-key", "d", 7_200_000), b"").await;
    publisher.publish("k", action("reschedule", "tidings-subject", "three", 10_800_000), b"").await;
    publisher.publish("k", action("cancel", "tidings-key", "nothing has it", 0), b"").await;
    publisher
        .publish("k", headers([("tidings-key", text("last")), ("x-delay", AMQPValue::LongInt(60_000))]), b"")
        .await;
    // All of them are in one batch.
    let _daemon = daemon.start_ready().await;
    world.wait_until("SELECT EXISTS (SELECT FROM tidings.schedules WHERE key = 'last')").await;
    let rows: Vec<String> = world
        .value(
            "SELECT array_agg(key || ' ' || round(extract(epoch FROM due_at - created_at) / 3600) ORDER BY key)
             FROM tidings.schedules WHERE key <> 'last'",
        )
        .await;
    assert_eq!(rows, ["c 3", "d 2", "e 0"]);
}

#[tokio::test]
async fn expiration_counts_from_when_the_message_is_due_and_the_earlier_deadline_counts() {
    let world = World::empty().await;
    let _daemon = start(&world).await;
    let publisher = Publisher::new(&world).await;
    let in_an_hour: i64 =
        world.value("SELECT floor(extract(epoch FROM now() + interval '1 hour') * 1000)::bigint").await;
    let delay = || ("x-delay", AMQPValue::LongInt(60_000));
    publisher.publish("k", headers([delay()]).with_expiration("5000".into()), b"relative").await;
    let absolute = || ("tidings-expires-ms", AMQPValue::LongLongInt(in_an_hour));
    publisher.publish("k", headers([delay(), absolute()]), b"absolute").await;
    publisher.publish("k", headers([delay(), absolute()]).with_expiration("5000".into()), b"both").await;
    world.wait_until("SELECT count(*) = 3 FROM tidings.schedules").await;
    let left = async |body: &str| {
        let sql = format!(
            "SELECT extract(epoch FROM expires_at - due_at)::float8 FROM tidings.schedules WHERE payload->>'body' = '{body}'"
        );
        world.value::<f64>(&sql).await
    };
    assert!((4.999..=5.001).contains(&left("relative").await));
    assert!((3_500.0..=3_541.0).contains(&left("absolute").await));
    assert!((4.999..=5.001).contains(&left("both").await));
}

#[tokio::test]
async fn a_message_whose_deadline_has_passed_is_finished_as_expired() {
    let world = World::empty().await;
    let _daemon = start(&world).await;
    Publisher::new(&world)
        .await
        .publish("k", headers([("tidings-expires-ms", AMQPValue::LongLongInt(1_000))]), b"late")
        .await;
    world
        .wait_until(
            "SELECT EXISTS (SELECT FROM tidings.deliveries WHERE outcome = 'expired' AND payload->>'body' = 'late')",
        )
        .await;
}

#[tokio::test]
async fn a_limited_intake_takes_no_more_messages_a_second_than_it_may() {
    let world = World::empty().await;
    launch(&world).start_ready().await.stop().await;
    let publisher = Publisher::new(&world).await;
    for number in 0..60 {
        publisher.publish("k", headers([("x-delay", AMQPValue::LongInt(60_000))]), number.to_string().as_bytes()).await;
    }
    let _daemon = launch(&world).with("TIDINGS_INTAKE_RATE", 20).start_ready().await;
    world.wait_until("SELECT count(*) = 60 FROM tidings.schedules").await;
    let seconds: f64 = world
        .value("SELECT extract(epoch FROM max(created_at) - min(created_at))::float8 FROM tidings.schedules")
        .await;
    assert!(seconds > 1.5, "60 messages at 20 a second came in {seconds} s");
}

#[tokio::test]
async fn several_daemons_take_from_one_queue_together() {
    let world = World::empty().await;
    let (_first, _second) = (start(&world).await, start(&world).await);
    let counted = async || world.manage("GET", &format!("queues/{}/{}", world.name, crate::intake::QUEUE), None);
    harness::eventually_within(Duration::from_secs(30), "two consumers", async || {
        (counted().await["consumers"] == 2).then_some(())
    })
    .await;
    let publisher = Publisher::new(&world).await;
    let mut inbox = inbox(&world).await;
    for number in 0..50 {
        publisher.publish("k", BasicProperties::default(), number.to_string().as_bytes()).await;
    }
    let mut bodies = Vec::new();
    for _ in 0..50 {
        bodies.push(inbox.next().await.text().parse::<u32>().expect("a number"));
    }
    bodies.sort_unstable();
    assert_eq!(bodies, (0..50).collect::<Vec<_>>());
}
