//! Rejected messages are replayed until they are acknowledged or expire. Only the queue that rejected a message gets it
//! again, and dead letters that cannot be replayed block no others.

use std::collections::BTreeMap;

use harness::consumer::{Inbox, Received};
use harness::daemon::{Daemon, Launch};
use harness::eventually;
use harness::world::World;
use lapin::BasicProperties;
use lapin::options::{BasicAckOptions, BasicGetOptions, BasicPublishOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};

/// Records that a pass has just begun, so that a daemon that starts now makes none.
pub(crate) async fn suppress_pass_at_start(world: &World) {
    world.sql("INSERT INTO tidings.passes VALUES ('tidings', now()) ON CONFLICT (exchange) DO UPDATE SET began_at = now()").await;
}

/// Removes the record of the last pass, so that a daemon that starts now makes one.
pub(crate) async fn force_pass_at_start(world: &World) {
    world.sql("DELETE FROM tidings.passes").await;
}

/// How to start a daemon that makes at most one pass during a test, at its start.
pub(crate) fn launch_with_hourly_passes(world: &World) -> Launch {
    world.launch().with("TIDINGS_SWEEP_MS", 600_000).with("TIDINGS_REPLAY_INTERVAL_MS", 3_600_000)
}

/// How to start a daemon that makes a pass every second.
pub(crate) fn launch_with_frequent_passes(world: &World) -> Launch {
    world.launch().with("TIDINGS_SWEEP_MS", 600_000).with("TIDINGS_REPLAY_INTERVAL_MS", 1_000)
}

pub(crate) async fn schedule_message(world: &World, payload: &str) -> uuid::Uuid {
    world.value(&format!("SELECT tidings.schedule('message', now(), '{payload}')")).await
}

/// The number of messages in a queue without a consumer.
pub(crate) async fn count_messages(world: &World, queue: &str) -> u32 {
    let channel = world.broker.channel().await;
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(queue.into(), options, FieldTable::default()).await.expect("it exists").message_count()
}

pub(crate) async fn wait_for_message_count(world: &World, queue: &str, count: u32) {
    eventually(&format!("{count} in {queue}"), async || (count_messages(world, queue).await == count).then_some(()))
        .await;
}

/// Publishes a message that does not come from a daemon.
pub(crate) async fn publish_message(
    world: &World,
    exchange: &str,
    key: &str,
    body: &[u8],
    properties: BasicProperties,
) {
    let channel = world.broker.channel().await;
    let options = BasicPublishOptions::default();
    let published = channel.basic_publish(exchange.into(), key.into(), options, body, properties).await;
    published.expect("written").await.expect("taken");
    // A round trip to RabbitMQ, after which the message is in its queue.
    count_messages(world, "tidings.dead").await;
}

/// Takes the first message from a queue without a consumer.
pub(crate) async fn take_message(world: &World, queue: &str) -> Received {
    let channel = world.broker.channel().await;
    let message = eventually(&format!("a message in {queue}"), async || {
        channel.basic_get(queue.into(), BasicGetOptions { no_ack: true }).await.expect("it exists")
    })
    .await;
    Received { at_ms: 0, delivery: message.delivery }
}

pub(crate) async fn reject_next(inbox: &mut Inbox) -> Received {
    let received = inbox.next_unacknowledged().await;
    inbox.reject(&received).await;
    received
}

/// Waits until a daemon has made `count` passes.
pub(crate) async fn wait_for_passes(daemon: &Daemon, count: usize) {
    eventually(&format!("{count} passes"), async || {
        (daemon.log().matches("took back dead letters").count() >= count).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_rejected_message_is_replayed_unchanged_to_its_own_queue_only_until_it_is_acknowledged() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["a.*"]).await;
    let mut other = world.inbox(&["#"]).await;
    let _daemon = launch_with_frequent_passes(&world).start_ready().await;
    let id = schedule_message(
        &world,
        r#"{"routing_key": "a.b", "body": {"n": 1}, "headers": {"own": "header"}, "content_type": "text/x"}"#,
    )
    .await;
    assert_eq!(other.next().await.id(), id);

    let mut seen = Vec::new();
    for _ in 0..3 {
        seen.push(reject_next(&mut inbox).await);
    }
    let taken = inbox.next().await;

    let first = &seen[0];
    for (replay, again) in seen.iter().chain([&taken]).enumerate() {
        assert_eq!((again.id(), &again.delivery.data), (id, &first.delivery.data));
        assert_eq!(again.number("tidings-replay"), i64::try_from(replay).expect("few"));
        let without = |received: &Received| -> BTreeMap<String, String> {
            received.headers().into_iter().filter(|(name, _)| name != "tidings-replay").collect()
        };
        assert_eq!(without(again), without(first), "its own headers, and nothing of its deaths");
        for (one, another) in [
            (again.properties().content_type(), first.properties().content_type()),
            (again.properties().kind(), first.properties().kind()),
            (again.properties().app_id(), first.properties().app_id()),
        ] {
            assert_eq!(one, another);
        }
        assert_eq!(again.properties().delivery_mode(), &Some(2));
        assert_eq!(again.properties().expiration(), &None);
    }
    wait_for_message_count(&world, "tidings.dead", 0).await;
    assert!(other.next_within(std::time::Duration::from_millis(200)).await.is_none(), "the other queue had its copy");
}

#[tokio::test]
async fn a_dead_letter_is_replayed_with_its_remaining_time_to_live_and_an_expired_one_never() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["long"]).await;
    // A queue without a consumer, in which messages expire.
    let channel = world.broker.channel().await;
    let mut arguments = FieldTable::default();
    arguments.insert("x-dead-letter-exchange".into(), AMQPValue::LongString("tidings.dlx".into()));
    let daemon = launch_with_frequent_passes(&world).start_ready().await;
    channel.queue_declare("short".into(), QueueDeclareOptions::durable(), arguments).await.expect("a queue");
    channel
        .queue_bind(
            "short".into(),
            "tidings".into(),
            "short".into(),
            lapin::options::QueueBindOptions::default(),
            FieldTable::default(),
        )
        .await
        .expect("bound");

    schedule_message(&world, r#"{"routing_key": "short", "body": 1, "ttl_ms": 300}"#).await;
    schedule_message(&world, r#"{"routing_key": "long", "body": 1, "ttl_ms": 600000}"#).await;
    let first = reject_next(&mut inbox).await;
    let again = inbox.next().await;

    let life = |received: &Received| -> i64 {
        received.properties().expiration().as_ref().expect("it expires").as_str().parse().expect("a number")
    };
    let deadline = first.number("tidings-expires-ms");
    assert_eq!(again.number("tidings-expires-ms"), deadline, "the deadline never moves");
    assert!(life(&again) < life(&first));
    assert!((deadline - again.at_ms - life(&again)).abs() < 5_000, "what is left of it");
    wait_for_passes(&daemon, 1).await;
    eventually("the expired one is dropped", async || daemon.log().contains("expired=1").then_some(())).await;
    wait_for_message_count(&world, "tidings.dead", 0).await;
    assert_eq!(count_messages(&world, "short").await, 0);
}

#[tokio::test]
async fn a_daemon_that_restarts_often_does_not_replay_at_every_start() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    let daemon = launch_with_hourly_passes(&world).start_ready().await;
    eventually("the pass of the start", async || {
        world.value::<bool>("SELECT EXISTS (SELECT FROM tidings.passes)").await.then_some(())
    })
    .await;
    schedule_message(&world, r#"{"routing_key": "k", "body": 1}"#).await;
    reject_next(&mut inbox).await;
    assert!(daemon.stop().await.success());

    for _ in 0..3 {
        let daemon = launch_with_hourly_passes(&world).start_ready().await;
        // When it delivers a row, it has decided whether to make a pass.
        world.sql(r#"SELECT tidings.schedule('message', now(), '{"routing_key":"k","body":2}')"#).await;
        inbox.next().await;
        assert!(daemon.stop().await.success());
    }
    assert_eq!(count_messages(&world, "tidings.dead").await, 1);

    world.sql("UPDATE tidings.passes SET began_at = began_at - interval '6 minutes'").await;
    let _daemon = launch_with_hourly_passes(&world).start_ready().await;
    assert_eq!(inbox.next().await.number("tidings-replay"), 1);
}

#[tokio::test]
async fn dead_letters_that_cannot_be_replayed_are_parked_with_the_reason_and_block_no_others() {
    let world = World::with_plugins(&["message"]).await;
    let daemon = launch_with_frequent_passes(&world).with("TIDINGS_REPLAY_MAX", 2).start_ready().await;
    let mut inbox = world.inbox(&["k"]).await;
    let header = |name: &str, value: AMQPValue| {
        let mut headers = FieldTable::default();
        headers.insert(name.into(), value);
        BasicProperties::default().with_headers(headers)
    };
    publish_message(&world, "tidings.dlx", "", b"no history", BasicProperties::default()).await;
    publish_message(&world, "tidings.dlx", "", b"odd history", header("x-death", AMQPValue::LongString("?".into())))
        .await;
    publish_message(&world, "", "inbox.k", b"odd deadline", header("tidings-expires-ms", AMQPValue::Boolean(true)))
        .await;
    let odd = inbox.next_unacknowledged().await;
    inbox.reject(&odd).await;
    schedule_message(&world, r#"{"routing_key": "k", "body": "tireless"}"#).await;
    for _ in 0..3 {
        reject_next(&mut inbox).await;
    }
    wait_for_message_count(&world, "tidings.parking", 4).await;
    // A queue that is deleted after it has rejected a message.
    let mut gone = world.inbox(&["gone"]).await;
    schedule_message(&world, r#"{"routing_key": "gone", "body": "gone"}"#).await;
    let last = gone.next_unacknowledged().await;
    gone.reject(&last).await;
    gone.channel.queue_delete(gone.queue.as_str().into(), QueueDeleteOptions::default()).await.expect("deleted");
    wait_for_message_count(&world, "tidings.parking", 5).await;

    let mut reasons = BTreeMap::new();
    for _ in 0..5 {
        let parked = take_message(&world, "tidings.parking").await;
        let headers = parked.properties().headers().clone().expect("headers");
        let reason = match headers.inner().get("tidings-parked-reason") {
            Some(AMQPValue::LongString(reason)) => String::from_utf8_lossy(reason.as_bytes()).into_owned(),
            other => panic!("{other:?}"),
        };
        reasons.insert(String::from_utf8_lossy(&parked.delivery.data).into_owned(), reason);
    }
    for (body, reason) in [
        ("no history", "no x-death"),
        ("odd history", "no x-death"),
        ("odd deadline", "tidings-expires-ms is not a number"),
        ("tireless", "replayed 2 times"),
        ("gone", "is gone"),
    ] {
        assert!(reasons.get(body).is_some_and(|actual| actual.contains(reason)), "{body}: {reasons:?}");
    }
    assert_eq!(count_messages(&world, "tidings.dead").await, 0);
    drop(daemon);
}

#[tokio::test]
async fn a_dead_letter_from_another_publisher_is_replayed_unchanged() {
    let world = World::empty().await;
    // The daemon declares its exchanges and queues.
    assert!(launch_with_hourly_passes(&world).start_ready().await.stop().await.success());
    let mut inbox = world.inbox(&["k"]).await;
    let mut headers = FieldTable::default();
    headers.insert("flag".into(), AMQPValue::Boolean(true));
    headers.insert("number".into(), AMQPValue::LongInt(-7));
    headers.insert("CC".into(), AMQPValue::FieldArray(vec![AMQPValue::LongString("elsewhere".into())].into()));
    let properties = BasicProperties::default()
        .with_headers(headers)
        .with_message_id("not a uuid".into())
        .with_correlation_id("c".into())
        .with_priority(3)
        .with_user_id("guest".into());
    let body = vec![0_u8, 255, 1, 254];
    publish_message(&world, "", "inbox.k", &body, properties).await;
    let received = inbox.next_unacknowledged().await;
    inbox.reject(&received).await;
    wait_for_message_count(&world, "tidings.dead", 1).await;
    let _daemon = launch_with_frequent_passes(&world).start_ready().await;

    let again = inbox.next_unacknowledged().await;
    assert_eq!(again.delivery.data, body);
    let properties = again.properties();
    assert_eq!(properties.message_id(), &Some("not a uuid".into()));
    assert_eq!((properties.correlation_id(), properties.priority()), (&Some("c".into()), &Some(3)));
    let headers = properties.headers().as_ref().expect("headers").inner();
    assert_eq!(headers.get("flag"), Some(&AMQPValue::Boolean(true)));
    assert_eq!(headers.get("number"), Some(&AMQPValue::LongInt(-7)));
    assert_eq!(headers.get("tidings-replay"), Some(&AMQPValue::LongLongInt(1)));
    again.delivery.ack(BasicAckOptions::default()).await.expect("acknowledged");
}

#[tokio::test]
async fn several_daemons_replay_a_dead_letter_only_once_in_each_pass() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    let _daemons = [
        launch_with_frequent_passes(&world).start_ready().await,
        launch_with_frequent_passes(&world).start_ready().await,
        launch_with_frequent_passes(&world).start_ready().await,
    ];
    for _ in 0..20 {
        schedule_message(&world, r#"{"routing_key": "k", "body": 1}"#).await;
    }
    for round in 0..3 {
        let mut ids = std::collections::BTreeSet::new();
        for _ in 0..20 {
            let received = reject_next(&mut inbox).await;
            assert_eq!(received.number("tidings-replay"), round);
            assert!(ids.insert(received.id()), "twice in a pass");
        }
    }
}
