//! A relayed message goes out as it came.

use harness::world::World;
use lapin::BasicProperties;
use lapin::options::ExchangeDeleteOptions;
use lapin::types::{AMQPValue, DecimalValue, FieldArray, FieldTable};
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;

use crate::intake::{
    Publisher, TO, header, headers, inbox, number_of, own_headers, start, table, text, text_of, without_headers,
};

/// A table with a value of every type.
fn every_type() -> FieldTable {
    table([
        ("boolean", AMQPValue::Boolean(true)),
        ("i8", AMQPValue::ShortShortInt(-8)),
        ("u8", AMQPValue::ShortShortUInt(200)),
        ("i16", AMQPValue::ShortInt(-16)),
        ("u16", AMQPValue::ShortUInt(60_000)),
        ("i32", AMQPValue::LongInt(-32)),
        ("u32", AMQPValue::LongUInt(4_000_000_000)),
        ("i64", AMQPValue::LongLongInt(i64::MIN)),
        ("f32", AMQPValue::Float(0.1)),
        ("f64", AMQPValue::Double(1e300)),
        ("decimal", AMQPValue::DecimalValue(DecimalValue { scale: 2, value: 314 })),
        ("text", text("é\n\0\"\\")),
        ("binary", AMQPValue::LongString(vec![0xff, 0].into())),
        ("array", AMQPValue::FieldArray(FieldArray::from(vec![AMQPValue::Void, text("a"), AMQPValue::LongInt(1)]))),
        ("timestamp", AMQPValue::Timestamp(1_795_291_200)),
        ("table", AMQPValue::FieldTable(table([("x", AMQPValue::FieldTable(table([("y", AMQPValue::Float(2.5))])))]))),
        ("bytes", AMQPValue::ByteArray(vec![1, 2, 3].into())),
        ("void", AMQPValue::Void),
        ("x-custom", text("kept")),
        ("CC", AMQPValue::FieldArray(FieldArray::from(vec![text("another.key")]))),
    ])
}

#[tokio::test]
async fn properties_headers_and_body_are_as_they_came_and_the_delay_is_negated() {
    let world = World::empty().await;
    let _daemon = start(&world).await;
    let publisher = Publisher::new(&world).await;
    let mut inbox = inbox(&world).await;
    let mut own = every_type();
    own.insert("x-delay".into(), AMQPValue::LongInt(300));
    let properties = BasicProperties::default()
        .with_content_type("application/x".into())
        .with_content_encoding("gzip".into())
        .with_headers(own.clone())
        .with_delivery_mode(1)
        .with_priority(7)
        .with_correlation_id("correlation".into())
        .with_reply_to("reply".into())
        .with_message_id("not a uuid".into())
        .with_timestamp(1_700_000_000)
        .with_type("the type".into())
        .with_user_id("guest".into())
        .with_app_id("the app".into());
    let body = [0, 1, 0xff, b'"'];
    publisher.publish("the.key", properties.clone(), &body).await;
    let received = inbox.next().await;
    assert_eq!(received.delivery.data, body);
    assert_eq!((received.delivery.exchange.as_str(), received.delivery.routing_key.as_str()), (TO, "the.key"));
    let read = received.properties();
    // RabbitMQ takes it from no other user.
    let user = header(&received, "tidings-user-id");
    assert_eq!((read.user_id(), user), (&None, Some(text("guest"))));
    assert_eq!(
        format!("{:?}", without_headers(&read.clone().with_user_id("guest".into()))),
        format!("{:?}", without_headers(&properties))
    );
    own.insert("x-delay".into(), AMQPValue::LongInt(-300));
    assert_eq!(own_headers(&received), own);
    for (name, value) in [
        ("tidings-kind", "relay"),
        ("tidings-key", "not a uuid"),
        ("tidings-exchange", TO),
        ("tidings-routing-key", "the.key"),
    ] {
        assert_eq!(header(&received, name), Some(text(value)), "{name}");
    }
    let (due, id) = (number_of(&received, "tidings-due-ms"), text_of(&received, "tidings-id"));
    assert!(received.at_ms >= due, "it is not early");
    let history = format!(
        "SELECT floor(extract(epoch FROM due_at) * 1000)::bigint FROM tidings.deliveries WHERE id = '{id}' AND kind = 'relay'"
    );
    world.wait_until(&format!("SELECT EXISTS ({history})")).await;
    assert_eq!(world.value::<i64>(&history).await, due);
}

#[tokio::test]
async fn a_message_without_an_id_and_a_type_gets_those_of_its_row() {
    let world = World::empty().await;
    let _daemon = start(&world).await;
    let mut inbox = inbox(&world).await;
    Publisher::new(&world).await.publish("", BasicProperties::default(), b"").await;
    let received = inbox.next().await;
    assert_eq!(received.properties().kind().as_ref().map(lapin::types::ShortString::as_str), Some("relay"));
    assert_eq!(received.id().to_string(), text_of(&received, "tidings-id"));
    assert_eq!(received.delivery.routing_key.as_str(), "");
}

#[tokio::test]
async fn the_daemons_headers_of_a_publisher_are_not_passed_on() {
    let world = World::empty().await;
    let _daemon = start(&world).await;
    let mut inbox = inbox(&world).await;
    let forged = headers([
        ("tidings-replay", AMQPValue::LongLongInt(99)),
        ("tidings-id", text("forged")),
        ("tidings-attempt", AMQPValue::LongLongInt(99)),
        ("tidings-made-up", text("forged")),
    ]);
    Publisher::new(&world).await.publish("k", forged, b"").await;
    let received = inbox.next().await;
    assert_eq!((number_of(&received, "tidings-replay"), number_of(&received, "tidings-attempt")), (0, 1));
    assert_ne!(text_of(&received, "tidings-id"), "forged");
    assert_eq!(header(&received, "tidings-made-up"), None);
}

#[tokio::test]
async fn the_remaining_life_of_a_message_is_its_expiration() {
    let world = World::empty().await;
    let _daemon = start(&world).await;
    let mut inbox = inbox(&world).await;
    let properties = headers([("x-delay", AMQPValue::LongInt(500))]).with_expiration("60000".into());
    Publisher::new(&world).await.publish("k", properties, b"").await;
    let received = inbox.next().await;
    let left: u64 = received.properties().expiration().as_ref().expect("one").as_str().parse().expect("a number");
    assert!((50_000..=60_000).contains(&left), "{left}");
    assert_eq!(number_of(&received, "tidings-expires-ms") - number_of(&received, "tidings-due-ms"), 60_000);
}

#[tokio::test]
async fn a_row_may_be_relayed_by_sql_to_an_exchange_that_an_intake_names_and_to_no_other() {
    let world = World::empty().await;
    let _daemon = start(&world).await;
    let mut inbox = inbox(&world).await;
    world
        .sql(
            r#"SELECT tidings.schedule('relay', now(), '{"exchange": "orders", "routing_key": "k", "body": "by SQL",
                "properties": {"priority": 3, "type": "t"},
                "headers": {"n": 7, "t": {"table": {"at": {"timestamp": 5}}}, "f": {"f32": "0.5"}}}')"#,
        )
        .await;
    let received = inbox.next().await;
    assert_eq!(received.text(), "by SQL");
    assert_eq!(*received.properties().priority(), Some(3));
    assert_eq!(header(&received, "n"), Some(AMQPValue::LongLongInt(7)));
    assert_eq!(header(&received, "t"), Some(AMQPValue::FieldTable(table([("at", AMQPValue::Timestamp(5))]))));
    assert_eq!(header(&received, "f"), Some(AMQPValue::Float(0.5)));

    let schedule = |payload: &str| format!("SELECT tidings.schedule('relay', now(), '{payload}')");
    world.sql(&schedule(r#"{"exchange": "amq.fanout", "routing_key": "k"}"#)).await;
    world.wait_until("SELECT EXISTS (SELECT FROM tidings.schedules WHERE last_error LIKE 'no intake of this daemon names the exchange \"amq.fanout\"%')").await;
    world.sql(&schedule(r#"{"exchange": "orders"}"#)).await;
    world
        .wait_until("SELECT EXISTS (SELECT FROM tidings.parked WHERE reason LIKE 'the payload has no routing_key%')")
        .await;
    // Another row goes on.
    world.sql(&schedule(r#"{"exchange": "orders", "routing_key": "k", "body": "next"}"#)).await;
    assert_eq!(inbox.next().await.text(), "next");
}

#[tokio::test]
async fn without_an_intake_rows_of_the_kind_relay_are_held() {
    let world = World::with_plugins(&["message"]).await;
    let _daemon = world.start_daemon().await;
    world.sql(r#"SELECT tidings.schedule('relay', now(), '{"exchange": "tidings", "routing_key": "k"}')"#).await;
    world.wait_until("SELECT held FROM tidings.schedules").await;
}

#[tokio::test]
async fn while_no_queue_takes_a_relayed_message_its_row_waits_and_other_rows_go_on() {
    let world = World::with_plugins(&["message"]).await;
    let _daemon = start(&world).await;
    let publisher = Publisher::new(&world).await;
    let mut others = world.inbox(&["k"]).await;
    publisher.publish("k", BasicProperties::default().with_message_id("unroutable".into()), b"waits").await;
    world
        .wait_until("SELECT EXISTS (SELECT FROM tidings.schedules WHERE last_error LIKE 'no queue took the message with routing key \"k\"%')")
        .await;
    world.sql(r#"SELECT tidings.schedule('message', now(), '{"routing_key": "k", "body": 1}')"#).await;
    others.next().await;
    let mut inbox = inbox(&world).await;
    assert_eq!(inbox.next().await.text(), "waits");
}

#[tokio::test]
async fn while_the_exchange_is_gone_relayed_rows_wait_and_other_rows_go_on() {
    let world = World::with_plugins(&["message"]).await;
    let _daemon = start(&world).await;
    let mut others = world.inbox(&["k"]).await;
    let channel = world.broker.channel().await;
    // In its place comes an exchange to which nobody may publish.
    channel.exchange_delete(TO.into(), ExchangeDeleteOptions::default()).await.expect("deleted");
    let internal = lapin::options::ExchangeDeclareOptions { internal: true, durable: true, ..Default::default() };
    channel
        .exchange_declare(TO.into(), lapin::ExchangeKind::Topic, internal, FieldTable::default())
        .await
        .expect("declared");
    let publisher = Publisher::new(&world).await;
    for _ in 0..3 {
        publisher.publish("k", BasicProperties::default(), b"waits").await;
    }
    world.wait_until("SELECT count(*) = 3 FROM tidings.schedules WHERE last_error LIKE 'RabbitMQ takes no message for the exchange orders%'").await;
    for body in 0..5 {
        world
            .sql(&format!(r#"SELECT tidings.schedule('message', now(), '{{"routing_key": "k", "body": {body}}}')"#))
            .await;
        assert_eq!(others.next().await.json(), body);
    }
    channel.exchange_delete(TO.into(), ExchangeDeleteOptions::default()).await.expect("deleted");
    // The daemon declares it again; the queue must be bound before the rows are tried.
    let mut inbox = inbox(&world).await;
    for _ in 0..3 {
        assert_eq!(inbox.next().await.text(), "waits");
    }
}

/// A value of any type that RabbitMQ passes on unchanged.
fn value() -> impl Strategy<Value = AMQPValue> {
    let flat = prop_oneof![
        Just(AMQPValue::Void),
        any::<bool>().prop_map(AMQPValue::Boolean),
        any::<i8>().prop_map(AMQPValue::ShortShortInt),
        any::<u8>().prop_map(AMQPValue::ShortShortUInt),
        any::<i16>().prop_map(AMQPValue::ShortInt),
        any::<u16>().prop_map(AMQPValue::ShortUInt),
        any::<i32>().prop_map(AMQPValue::LongInt),
        any::<u32>().prop_map(AMQPValue::LongUInt),
        any::<i64>().prop_map(AMQPValue::LongLongInt),
        any::<f32>().prop_filter("a number", |number| number.is_finite()).prop_map(AMQPValue::Float),
        any::<f64>().prop_filter("a number", |number| number.is_finite()).prop_map(AMQPValue::Double),
        (any::<u8>(), any::<u32>()).prop_map(|(scale, value)| AMQPValue::DecimalValue(DecimalValue { scale, value })),
        any::<u64>().prop_map(AMQPValue::Timestamp),
        proptest::collection::vec(any::<u8>(), 0..30).prop_map(|bytes| AMQPValue::LongString(bytes.into())),
        "\\PC{0,20}".prop_map(|text| AMQPValue::LongString(text.into())),
        proptest::collection::vec(any::<u8>(), 0..30).prop_map(|bytes| AMQPValue::ByteArray(bytes.into())),
    ];
    flat.prop_recursive(4, 24, 4, |value| {
        prop_oneof![
            proptest::collection::vec(value.clone(), 0..4)
                .prop_map(|values| AMQPValue::FieldArray(FieldArray::from(values))),
            own_table(value).prop_map(AMQPValue::FieldTable),
        ]
    })
}

fn own_table(value: impl Strategy<Value = AMQPValue>) -> impl Strategy<Value = FieldTable> {
    proptest::collection::vec(("[a-zA-Z .é\"\\\\]{1,12}", value), 0..6).prop_map(|entries| {
        entries.into_iter().fold(FieldTable::default(), |mut table, (name, value)| {
            table.insert(name.into(), value);
            table
        })
    })
}

#[tokio::test]
async fn headers_and_bodies_of_any_kind_arrive_as_they_came() {
    let world = World::empty().await;
    let _daemon = start(&world).await;
    let publisher = Publisher::new(&world).await;
    let mut inbox = inbox(&world).await;
    let mut runner = TestRunner::default();
    let strategy = (own_table(value()), proptest::collection::vec(any::<u8>(), 0..300), "\\PC{0,40}");
    for _ in 0..150 {
        let (own, body, key) = strategy.new_tree(&mut runner).expect("a message").current();
        let key = &key[..key.floor_char_boundary(200)];
        publisher.publish(key, BasicProperties::default().with_headers(own.clone()), &body).await;
        let received = inbox.next().await;
        assert_eq!(received.delivery.data, body);
        assert_eq!(received.delivery.routing_key.as_str(), key);
        let read = received.properties().headers().clone().expect("headers");
        for (name, value) in own.inner() {
            assert_eq!(read.inner().get(name), Some(value), "{name}");
        }
        let others = read.inner().keys().filter(|name| !name.as_str().starts_with("tidings-")).count();
        assert_eq!(others, own.inner().len());
    }
}
