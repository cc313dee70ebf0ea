//! The messages of frameworks whose users have the delayed-message plugin, with their properties and with the types of
//! their headers: written here by hand as Celery 5.6 (kombu, py-amqp) and Spring AMQP 4 put them on the wire. The page
//! on moving here has an unchanged program with pika, which another test runs.

use harness::world::World;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldArray, FieldTable};

use crate::intake::{Publisher, TO, inbox, number_of, own_headers, start, table, text, text_of, without_headers};

/// The delay of the messages, in milliseconds.
const DELAY_MS: i32 = 700;

/// Publishes the message with a delay, and checks that it arrives when it is due, and as it was but for the sign of its
/// delay.
async fn arrives_as_it_was(key: &str, properties: BasicProperties, body: &[u8], delay: AMQPValue) {
    let world = World::empty().await;
    let _daemon = start(&world).await;
    let mut inbox = inbox(&world).await;
    let mut headers = properties.headers().clone().expect("headers");
    headers.insert("x-delay".into(), delay);
    // A message that waited in the queue until the daemon took messages from there is delayed from its timestamp on.
    let seconds = std::time::UNIX_EPOCH.elapsed().expect("a time after 1970").as_secs();
    let properties = if properties.timestamp().is_some() { properties.with_timestamp(seconds) } else { properties };
    let published_ms = world.value::<i64>("SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint").await;
    Publisher::new(&world).await.publish(key, properties.clone().with_headers(headers.clone()), body).await;

    let received = inbox.next().await;

    let due_ms = number_of(&received, "tidings-due-ms");
    assert!(due_ms >= published_ms + i64::from(DELAY_MS), "the delay counts from when it was published");
    assert!(received.at_ms >= due_ms, "it came early");
    assert_eq!((received.delivery.exchange.as_str(), received.delivery.routing_key.as_str()), (TO, key));
    assert_eq!(received.delivery.data, body);
    let mut expected = without_headers(&properties);
    if properties.message_id().is_none() {
        expected = expected.with_message_id(text_of(&received, "tidings-id").into());
    }
    if properties.kind().is_none() {
        expected = expected.with_type("relay".into());
    }
    assert_eq!(format!("{:?}", without_headers(received.properties())), format!("{expected:?}"));
    headers.insert("x-delay".into(), AMQPValue::LongInt(-DELAY_MS));
    assert_eq!(own_headers(&received), headers);
}

#[tokio::test]
async fn a_task_of_celery_arrives_when_it_is_due_as_it_was_sent() {
    // As `app.send_task("mail.remind", args=[42], kwargs={"name": "é"}, headers={"x-delay": 700})` sends it.
    let id = "3b0e7a5e-58a8-4c3b-9f4c-0a2f1b8d6c11";
    let headers = table([
        ("lang", text("py")),
        ("task", text("mail.remind")),
        ("id", text(id)),
        ("shadow", AMQPValue::Void),
        ("eta", AMQPValue::Void),
        ("expires", AMQPValue::Void),
        ("group", AMQPValue::Void),
        ("group_index", AMQPValue::Void),
        ("retries", AMQPValue::LongInt(0)),
        ("timelimit", AMQPValue::FieldArray(FieldArray::from(vec![AMQPValue::Void, AMQPValue::Void]))),
        ("root_id", text(id)),
        ("parent_id", AMQPValue::Void),
        ("argsrepr", text("[42]")),
        ("kwargsrepr", text("{'name': 'é'}")),
        ("origin", text("gen1@host")),
        ("ignore_result", AMQPValue::Boolean(false)),
        ("replaced_task_nesting", AMQPValue::LongInt(0)),
        ("stamped_headers", AMQPValue::Void),
        ("stamps", AMQPValue::FieldTable(FieldTable::default())),
    ]);
    let properties = BasicProperties::default()
        .with_content_type("application/json".into())
        .with_content_encoding("utf-8".into())
        .with_headers(headers)
        .with_delivery_mode(2)
        .with_priority(0)
        .with_correlation_id(id.into())
        .with_reply_to("c6f0a1de-2b3c-3f53-8a5e-3a0c8c6a8a11".into());
    let body = r#"[[42], {"name": "\u00e9"}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]"#;
    arrives_as_it_was("mail", properties, body.as_bytes(), AMQPValue::LongInt(DELAY_MS)).await;
}

#[tokio::test]
async fn a_message_of_spring_arrives_when_it_is_due_as_it_was_sent() {
    // As `convertAndSend("orders.delayed", "order.expired", order, m -> { m.getMessageProperties().setDelayLong(700L); … })`
    // sends it.
    let headers = table([
        ("__TypeId__", text("com.example.OrderExpired")),
        ("__ContentTypeId__", text("java.lang.Object")),
        ("__KeyTypeId__", text("java.lang.String")),
        ("spring_listener_return_correlation", text("8f8c6e2a-3f0e-4b8e-8a1e-3d1e5f0b7c11")),
        ("spring_returned_message_correlation", text("8f8c6e2a-3f0e-4b8e-8a1e-3d1e5f0b7c12")),
        ("attempts", AMQPValue::LongInt(1)),
        ("total", AMQPValue::LongLongInt(12_345_678_901)),
        ("placed", AMQPValue::Timestamp(1_795_291_200)),
        ("rush", AMQPValue::Boolean(true)),
    ]);
    let properties = BasicProperties::default()
        .with_content_type("application/json".into())
        .with_content_encoding("UTF-8".into())
        .with_headers(headers)
        .with_delivery_mode(2)
        .with_priority(0)
        .with_message_id("order-4711-expired".into())
        .with_timestamp(1_795_291_200)
        .with_type("OrderExpired".into())
        .with_app_id("shop".into());
    let body = br#"{"order":4711,"total":123.45}"#;
    arrives_as_it_was("order.expired", properties, body, AMQPValue::LongLongInt(DELAY_MS.into())).await;
}
