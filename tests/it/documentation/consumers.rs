//! The example consumers in Rust and Python, which applications copy. Each message has its effect once and none is
//! lost, even if handling fails, a copy arrives, or the consumer is stopped or killed.

use std::path::Path;

use harness::daemon::{Daemon, Launch};
use harness::proxy::{Mode, Proxy};
use harness::world::{World, amqp_url, database_url};
use harness::{build, eventually};
use lapin::BasicProperties;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use nix::sys::signal::Signal;
use sqlx::{Postgres, Transaction};
use uuid::Uuid;

use crate::dead_letters::replay::{
    count_messages, launch_with_frequent_passes, schedule_message, wait_for_message_count,
};

/// The consumer's queue.
const QUEUE: &str = "games";
/// Selects the sessions that wait for a lock. Only the consumer's sessions do.
const BLOCKED_SESSIONS: &str = "FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";

/// One of the two example consumers.
#[derive(Clone, Copy)]
enum Example {
    Rust,
    Python,
}

/// Makes a world, and returns it with the settings to start the consumer in it.
async fn create_stage(example: Example) -> (World, Launch) {
    // Built before anything connects to RabbitMQ: this blocks for minutes, in which no heartbeats would be sent.
    let launch = match example {
        Example::Rust => Launch::of_program(&build::rust_consumer().expect("it builds")),
        Example::Python => {
            let (source, packages) = build::python_consumer().expect("its packages can be installed");
            Launch::of_program(Path::new("python3")).args([source]).with("PYTHONPATH", packages.display())
        }
    };
    let world = World::with_plugins(&["message"]).await;
    let (postgres, rabbitmq) = world.ports();
    let launch = launch
        .with("DATABASE_URL", database_url(postgres, &world.name))
        .with("AMQP_URL", amqp_url_with_heartbeat(rabbitmq, &world))
        .with("QUEUE", QUEUE)
        .with("BINDING", "game.*");
    (world, launch)
}

/// The AMQP URL with the heartbeat that the examples' usage recommends.
fn amqp_url_with_heartbeat(port: u16, world: &World) -> String {
    format!("{}?heartbeat=10", amqp_url(port, &world.name))
}

/// Starts a consumer and waits until it consumes.
async fn start_consumer(launch: &Launch) -> Daemon {
    let mut consumer = launch.start();
    consumer.wait_for_line("ready").await;
    consumer
}

/// The effects that the consumer has committed, in the order in which they began.
async fn fetch_effects(world: &World) -> Vec<String> {
    world
        .value(
            "SELECT coalesce(array_agg(format('%s %s %s', message_id, routing_key, body) ORDER BY at), '{}')
             FROM consumer_effects",
        )
        .await
}

/// Blocks the effects of all consumers until the returned transaction is rolled back.
async fn block_effects(world: &World) -> Transaction<'static, Postgres> {
    let mut transaction = world.db.begin().await.expect("a transaction");
    sqlx::query("LOCK TABLE consumer_effects").execute(&mut *transaction).await.expect("the lock");
    transaction
}

/// Waits until `count` transactions of the consumers are blocked.
async fn wait_for_blocked(world: &World, count: usize) {
    world.wait_until(&format!("SELECT count(*) = {count} {BLOCKED_SESSIONS}")).await;
}

/// Waits until the queue has no consumer.
async fn wait_until_unconsumed(world: &World) {
    let channel = world.broker.channel().await;
    eventually("nobody consumes", async || {
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let queue = channel.queue_declare(QUEUE.into(), passive, FieldTable::default()).await.expect("it exists");
        (queue.consumer_count() == 0).then_some(())
    })
    .await;
}

/// Publishes a message directly to the queue, without a daemon.
async fn publish_to_queue(world: &World, body: &[u8], properties: BasicProperties) {
    let channel = world.broker.channel().await;
    channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
    let options = BasicPublishOptions::default();
    let published = channel.basic_publish("".into(), QUEUE.into(), options, body, properties).await;
    assert!(published.expect("written").await.expect("answered").is_ack());
}

/// Stops the consumer and checks that the queues are empty. An unacknowledged message would be in the queue again.
async fn stop_and_check_queues(world: &World, consumer: Daemon) {
    assert_eq!(consumer.stop().await.code(), Some(0));
    assert_eq!((count_messages(world, QUEUE).await, count_messages(world, "tidings.dead").await), (0, 0));
}

async fn commits_each_effect_and_then_acknowledges(example: Example) {
    let (world, launch) = create_stage(example).await;
    let _daemon = world.start_daemon().await;
    let mut consumer = start_consumer(&launch).await;
    let mut done = Vec::new();
    for key in ["game.due", "game.over"] {
        let id = schedule_message(&world, &format!(r#"{{"routing_key": "{key}", "body": {{"game": "Zoë"}}}}"#)).await;

        consumer.wait_for_line(&format!("handled {id} {key}")).await;

        done.push(format!(r#"{id} {key} {{"game": "Zoë"}}"#));
    }
    assert_eq!(fetch_effects(&world).await, done);
    assert!(!consumer.log().contains("rejected"));
    stop_and_check_queues(&world, consumer).await;
}

#[tokio::test]
async fn the_consumer_in_rust_commits_each_effect_and_then_acknowledges() {
    commits_each_effect_and_then_acknowledges(Example::Rust).await;
}

#[tokio::test]
async fn the_consumer_in_python_commits_each_effect_and_then_acknowledges() {
    commits_each_effect_and_then_acknowledges(Example::Python).await;
}

async fn rejects_what_fails_until_it_succeeds(example: Example) {
    let (world, launch) = create_stage(example).await;
    let _daemon = launch_with_frequent_passes(&world).start_ready().await;
    let mut consumer = start_consumer(&launch).await;
    world.sql("CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not today'; END $$").await;
    world.sql("CREATE TRIGGER refuse BEFORE INSERT ON consumer_effects FOR EACH ROW EXECUTE FUNCTION refuse()").await;
    let rejections = |consumer: &Daemon, id: Uuid| consumer.log().matches(&format!("rejected {id}")).count();
    let until_rejected = async |consumer: &Daemon, id: Uuid, times: usize| {
        let so_often = async || (rejections(consumer, id) >= times).then_some(());
        eventually(&format!("rejection {times} of {id}"), so_often).await;
    };

    let hopeless = schedule_message(&world, r#"{"routing_key": "game.due", "body": {"fail": true}}"#).await;
    let refused = schedule_message(&world, r#"{"routing_key": "game.due", "body": {"n": 1}}"#).await;
    // Wait for the second rejection of each, which is that of a replay.
    until_rejected(&consumer, hopeless, 2).await;
    until_rejected(&consumer, refused, 2).await;
    assert!(fetch_effects(&world).await.is_empty());
    world.sql("DROP TRIGGER refuse ON consumer_effects").await;

    // The original routing key, although a replay is published with the name of the queue.
    consumer.wait_for_line(&format!("handled {refused} game.due")).await;
    let (of_hopeless, of_refused) = (rejections(&consumer, hopeless), rejections(&consumer, refused));
    until_rejected(&consumer, hopeless, of_hopeless + 2).await;
    assert_eq!(rejections(&consumer, refused), of_refused, "it did not come again");
    assert_eq!(fetch_effects(&world).await, [format!(r#"{refused} game.due {{"n": 1}}"#)]);
    wait_for_message_count(&world, "tidings.dead", 1).await;
    assert_eq!(consumer.stop().await.code(), Some(0));
}

#[tokio::test]
async fn the_consumer_in_rust_rejects_a_message_that_fails_and_handles_it_once_when_it_succeeds() {
    rejects_what_fails_until_it_succeeds(Example::Rust).await;
}

#[tokio::test]
async fn the_consumer_in_python_rejects_a_message_that_fails_and_handles_it_once_when_it_succeeds() {
    rejects_what_fails_until_it_succeeds(Example::Python).await;
}

async fn acknowledges_copies_without_doing_anything(example: Example) {
    let (world, launch) = create_stage(example).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.start_daemon().await;
    let mut consumer = start_consumer(&launch).await;
    let held_up = block_effects(&world).await;
    let id = schedule_message(&world, r#"{"routing_key": "game.due", "body": {"n": 1}}"#).await;
    let message = inbox.next().await;
    let copy = || publish_to_queue(&world, &message.delivery.data, message.properties().clone());
    let duplicates = |consumer: &Daemon| consumer.log().matches(&format!("duplicate {id}")).count();
    wait_for_blocked(&world, 1).await;

    // One copy arrives while the message is being handled, when neither transaction sees the other's row, and one
    // afterwards.
    copy().await;
    wait_for_blocked(&world, 2).await;
    held_up.rollback().await.expect("let go");
    consumer.wait_for_line(&format!("handled {id} game.due")).await;
    consumer.wait_for_line(&format!("duplicate {id}")).await;
    copy().await;
    eventually("the second duplicate", async || (duplicates(&consumer) == 2).then_some(())).await;

    assert_eq!(fetch_effects(&world).await, [format!(r#"{id} game.due {{"n": 1}}"#)]);
    stop_and_check_queues(&world, consumer).await;
}

#[tokio::test]
async fn the_consumer_in_rust_acknowledges_copies_without_doing_anything() {
    acknowledges_copies_without_doing_anything(Example::Rust).await;
}

#[tokio::test]
async fn the_consumer_in_python_acknowledges_copies_without_doing_anything() {
    acknowledges_copies_without_doing_anything(Example::Python).await;
}

async fn does_nothing_past_a_deadline(example: Example) {
    let (world, launch) = create_stage(example).await;
    let _daemon = world.start_daemon().await;
    let mut consumer = start_consumer(&launch).await;
    let now: i64 = world.value("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint").await;
    let (stale, fresh) = (Uuid::new_v4(), Uuid::new_v4());
    for (id, expires_ms) in [(stale, now), (fresh, now + 3_600_000)] {
        let mut headers = FieldTable::default();
        headers.insert("tidings-expires-ms".into(), AMQPValue::LongLongInt(expires_ms));
        headers.insert("tidings-routing-key".into(), AMQPValue::LongString("game.due".into()));
        let properties = BasicProperties::default().with_message_id(id.to_string().into()).with_headers(headers);
        publish_to_queue(&world, b"{}", properties).await;
    }

    consumer.wait_for_line(&format!("stale {stale}")).await;
    consumer.wait_for_line(&format!("handled {fresh} game.due")).await;

    assert_eq!(fetch_effects(&world).await, [format!("{fresh} game.due {{}}")]);
    stop_and_check_queues(&world, consumer).await;
}

#[tokio::test]
async fn the_consumer_in_rust_does_not_handle_a_message_past_its_deadline() {
    does_nothing_past_a_deadline(Example::Rust).await;
}

#[tokio::test]
async fn the_consumer_in_python_does_not_handle_a_message_past_its_deadline() {
    does_nothing_past_a_deadline(Example::Python).await;
}

async fn finishes_what_it_has_begun_when_it_is_stopped(example: Example) {
    let (world, launch) = create_stage(example).await;
    let _daemon = world.start_daemon().await;
    let mut consumer = start_consumer(&launch).await;
    let held_up = block_effects(&world).await;
    // The consumer handles 20 messages at once.
    for n in 0..25 {
        schedule_message(&world, &format!(r#"{{"routing_key": "game.due", "body": {n}}}"#)).await;
    }
    wait_for_blocked(&world, 20).await;
    wait_for_message_count(&world, QUEUE, 5).await;

    consumer.signal(Signal::SIGTERM);
    wait_until_unconsumed(&world).await;
    held_up.rollback().await.expect("let go");

    assert_eq!(consumer.wait_for_end().await.code(), Some(0));
    assert_eq!(consumer.log().matches("handled ").count(), 20, "{}", consumer.log());
    assert_eq!(fetch_effects(&world).await.len(), 20);
    assert_eq!(count_messages(&world, QUEUE).await, 5);
    let next = start_consumer(&launch).await;
    world.wait_until("SELECT count(*) = 25 AND count(DISTINCT body) = 25 FROM consumer_effects").await;
    eventually("the rest", async || (next.log().matches("handled ").count() == 5).then_some(())).await;
    stop_and_check_queues(&world, next).await;
}

#[tokio::test]
async fn the_consumer_in_rust_finishes_the_messages_it_has_begun_when_it_is_stopped() {
    finishes_what_it_has_begun_when_it_is_stopped(Example::Rust).await;
}

#[tokio::test]
async fn the_consumer_in_python_finishes_the_messages_it_has_begun_when_it_is_stopped() {
    finishes_what_it_has_begun_when_it_is_stopped(Example::Python).await;
}

async fn gets_again_what_it_was_killed_over(example: Example) {
    let (world, launch) = create_stage(example).await;
    let (_, rabbitmq) = world.ports();
    let _daemon = world.start_daemon().await;
    let proxy = Proxy::start(0, rabbitmq).await;
    let mut first = start_consumer(&launch).await;
    let mut held_up = block_effects(&world).await;
    let before = schedule_message(&world, r#"{"routing_key": "game.due", "body": {"n": 1}}"#).await;
    let kill = async |consumer: &mut Daemon| {
        consumer.signal(Signal::SIGKILL);
        consumer.wait_for_end().await;
        wait_for_message_count(&world, QUEUE, 1).await;
    };

    wait_for_blocked(&world, 1).await;
    kill(&mut first).await;
    // PostgreSQL has not noticed that the first consumer is gone: its transaction is still open, and the second
    // consumer waits for it.
    let mut second =
        start_consumer(&launch.clone().with("AMQP_URL", amqp_url_with_heartbeat(proxy.port, &world))).await;
    wait_for_blocked(&world, 2).await;
    held_up.rollback().await.expect("let go");
    second.wait_for_line(&format!("handled {before} game.due")).await;

    held_up = block_effects(&world).await;
    let after = schedule_message(&world, r#"{"routing_key": "game.due", "body": {"n": 2}}"#).await;
    wait_for_blocked(&world, 1).await;
    // The proxy swallows the acknowledgement.
    proxy.set(Mode::Swallow);
    held_up.rollback().await.expect("let go");
    second.wait_for_line(&format!("handled {after} game.due")).await;
    kill(&mut second).await;
    let mut third = start_consumer(&launch).await;
    third.wait_for_line(&format!("duplicate {after}")).await;

    let done = [format!(r#"{before} game.due {{"n": 1}}"#), format!(r#"{after} game.due {{"n": 2}}"#)];
    assert_eq!(fetch_effects(&world).await, done);
    stop_and_check_queues(&world, third).await;
}

#[tokio::test]
async fn the_consumer_in_rust_gets_a_message_again_after_it_was_killed_and_handles_it_once() {
    gets_again_what_it_was_killed_over(Example::Rust).await;
}

#[tokio::test]
async fn the_consumer_in_python_gets_a_message_again_after_it_was_killed_and_handles_it_once() {
    gets_again_what_it_was_killed_over(Example::Python).await;
}

async fn begins_again_after_losing_the_database(example: Example) {
    let (world, launch) = create_stage(example).await;
    let _daemon = world.start_daemon().await;
    let mut consumer = start_consumer(&launch).await;
    let held_up = block_effects(&world).await;
    let id = schedule_message(&world, r#"{"routing_key": "game.due", "body": {"n": 1}}"#).await;
    wait_for_blocked(&world, 1).await;

    world.sql(&format!("SELECT pg_terminate_backend(pid) {BLOCKED_SESSIONS}")).await;
    consumer.wait_for_line("beginning again").await;
    held_up.rollback().await.expect("let go");

    consumer.wait_for_line(&format!("handled {id} game.due")).await;
    assert!(!consumer.log().contains("rejected"), "the message was not to blame");
    assert_eq!(fetch_effects(&world).await, [format!(r#"{id} game.due {{"n": 1}}"#)]);
    stop_and_check_queues(&world, consumer).await;
}

#[tokio::test]
async fn the_consumer_in_rust_starts_again_after_losing_the_database() {
    begins_again_after_losing_the_database(Example::Rust).await;
}

#[tokio::test]
async fn the_consumer_in_python_starts_again_after_losing_the_database() {
    begins_again_after_losing_the_database(Example::Python).await;
}
