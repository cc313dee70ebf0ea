//! The two example consumers, the one in Rust and the one in Python: whatever fails, comes twice, or is stopped or killed
//! in the middle, what a message asks for is done once, and no message is lost. They are what an application copies.

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

use crate::dead_letters::replay::{often, send, until_waiting, waiting};

/// The consumer's queue.
const QUEUE: &str = "games";
/// The sessions that wait for a lock: nobody's but the consumer's.
const HELD_UP: &str = "FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";

/// Which of the two.
#[derive(Clone, Copy)]
enum Example {
    Rust,
    Python,
}

/// A world, and how to start the consumer in it.
async fn stage(example: Example) -> (World, Launch) {
    // Before anything is connected: what blocks for minutes sends no heartbeats.
    let launch = match example {
        Example::Rust => Launch::program(&build::rust_consumer().expect("it builds")),
        Example::Python => {
            let (source, packages) = build::python_consumer().expect("its packages can be installed");
            Launch::program(Path::new("python3")).args([source]).with("PYTHONPATH", packages.display())
        }
    };
    let world = World::with(&["message"]).await;
    let (postgres, rabbitmq) = world.ports();
    let launch = launch
        .with("DATABASE_URL", database_url(postgres, &world.name))
        .with("AMQP_URL", heartbeating(rabbitmq, &world))
        .with("QUEUE", QUEUE)
        .with("BINDING", "game.*");
    (world, launch)
}

/// The URL as the examples' own usage has it.
fn heartbeating(port: u16, world: &World) -> String {
    format!("{}?heartbeat=10", amqp_url(port, &world.name))
}

/// A consumer that is at its queue.
async fn consuming(launch: &Launch) -> Daemon {
    let mut consumer = launch.start();
    consumer.wait_for_line("ready").await;
    consumer
}

/// What was done, in the order of its beginning.
async fn effects(world: &World) -> Vec<String> {
    world
        .value(
            "SELECT coalesce(array_agg(format('%s %s %s', message_id, routing_key, body) ORDER BY at), '{}')
             FROM consumer_effects",
        )
        .await
}

/// Holds up whatever a consumer wants to do, until it is rolled back.
async fn hold_up(world: &World) -> Transaction<'static, Postgres> {
    let mut transaction = world.db.begin().await.expect("a transaction");
    sqlx::query("LOCK TABLE consumer_effects").execute(&mut *transaction).await.expect("the lock");
    transaction
}

/// Waits until as many transactions are held up.
async fn until_held_up(world: &World, count: usize) {
    world.until(&format!("SELECT count(*) = {count} {HELD_UP}")).await;
}

/// Waits until the queue is without a consumer.
async fn until_left(world: &World) {
    let channel = world.broker.channel().await;
    eventually("nobody consumes", async || {
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let queue = channel.queue_declare(QUEUE.into(), passive, FieldTable::default()).await.expect("it exists");
        (queue.consumer_count() == 0).then_some(())
    })
    .await;
}

/// Puts a message that no daemon made straight into the queue.
async fn put(world: &World, body: &[u8], properties: BasicProperties) {
    let channel = world.broker.channel().await;
    channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
    let options = BasicPublishOptions::default();
    let published = channel.basic_publish("".into(), QUEUE.into(), options, body, properties).await;
    assert!(published.expect("written").await.expect("answered").is_ack());
}

/// Stops the consumer. What it had not acknowledged by then would be in the queue again.
async fn stop_and_find_nothing_left(world: &World, consumer: Daemon) {
    assert_eq!(consumer.stop().await.code(), Some(0));
    assert_eq!((waiting(world, QUEUE).await, waiting(world, "tidings.dead").await), (0, 0));
}

async fn commits_each_effect_and_then_acknowledges(example: Example) {
    let (world, launch) = stage(example).await;
    let _daemon = world.daemon().await;
    let mut consumer = consuming(&launch).await;
    let mut done = Vec::new();
    for key in ["game.due", "game.over"] {
        let id = send(&world, &format!(r#"{{"routing_key": "{key}", "body": {{"game": "Zoë"}}}}"#)).await;

        consumer.wait_for_line(&format!("handled {id} {key}")).await;

        done.push(format!(r#"{id} {key} {{"game": "Zoë"}}"#));
    }
    assert_eq!(effects(&world).await, done);
    assert!(!consumer.log().contains("rejected"));
    stop_and_find_nothing_left(&world, consumer).await;
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
    let (world, launch) = stage(example).await;
    let _daemon = often(&world).ready().await;
    let mut consumer = consuming(&launch).await;
    world.sql("CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not today'; END $$").await;
    world.sql("CREATE TRIGGER refuse BEFORE INSERT ON consumer_effects FOR EACH ROW EXECUTE FUNCTION refuse()").await;
    let rejections = |consumer: &Daemon, id: Uuid| consumer.log().matches(&format!("rejected {id}")).count();
    let until_rejected = async |consumer: &Daemon, id: Uuid, times: usize| {
        let so_often = async || (rejections(consumer, id) >= times).then_some(());
        eventually(&format!("rejection {times} of {id}"), so_often).await;
    };

    let hopeless = send(&world, r#"{"routing_key": "game.due", "body": {"fail": true}}"#).await;
    let refused = send(&world, r#"{"routing_key": "game.due", "body": {"n": 1}}"#).await;
    // Each a second time too, so that the daemon has replayed it.
    until_rejected(&consumer, hopeless, 2).await;
    until_rejected(&consumer, refused, 2).await;
    assert!(effects(&world).await.is_empty());
    world.sql("DROP TRIGGER refuse ON consumer_effects").await;

    // The key it was published with, although a replay comes under the name of the queue.
    consumer.wait_for_line(&format!("handled {refused} game.due")).await;
    let (of_hopeless, of_refused) = (rejections(&consumer, hopeless), rejections(&consumer, refused));
    until_rejected(&consumer, hopeless, of_hopeless + 2).await;
    assert_eq!(rejections(&consumer, refused), of_refused, "it did not come again");
    assert_eq!(effects(&world).await, [format!(r#"{refused} game.due {{"n": 1}}"#)]);
    until_waiting(&world, "tidings.dead", 1).await;
    assert_eq!(consumer.stop().await.code(), Some(0));
}

#[tokio::test]
async fn the_consumer_in_rust_rejects_what_fails_and_handles_it_once_when_it_succeeds() {
    rejects_what_fails_until_it_succeeds(Example::Rust).await;
}

#[tokio::test]
async fn the_consumer_in_python_rejects_what_fails_and_handles_it_once_when_it_succeeds() {
    rejects_what_fails_until_it_succeeds(Example::Python).await;
}

async fn acknowledges_copies_without_doing_anything(example: Example) {
    let (world, launch) = stage(example).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.daemon().await;
    let mut consumer = consuming(&launch).await;
    let held_up = hold_up(&world).await;
    let id = send(&world, r#"{"routing_key": "game.due", "body": {"n": 1}}"#).await;
    let message = inbox.next().await;
    let copy = || put(&world, &message.delivery.data, message.properties().clone());
    let duplicates = |consumer: &Daemon| consumer.log().matches(&format!("duplicate {id}")).count();
    until_held_up(&world, 1).await;

    // While the message is at work, where no transaction can see the other's row yet, and once more afterwards.
    copy().await;
    until_held_up(&world, 2).await;
    held_up.rollback().await.expect("let go");
    consumer.wait_for_line(&format!("handled {id} game.due")).await;
    consumer.wait_for_line(&format!("duplicate {id}")).await;
    copy().await;
    eventually("the second duplicate", async || (duplicates(&consumer) == 2).then_some(())).await;

    assert_eq!(effects(&world).await, [format!(r#"{id} game.due {{"n": 1}}"#)]);
    stop_and_find_nothing_left(&world, consumer).await;
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
    let (world, launch) = stage(example).await;
    let _daemon = world.daemon().await;
    let mut consumer = consuming(&launch).await;
    let now: i64 = world.value("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint").await;
    let (stale, fresh) = (Uuid::new_v4(), Uuid::new_v4());
    for (id, expires_ms) in [(stale, now), (fresh, now + 3_600_000)] {
        let mut headers = FieldTable::default();
        headers.insert("tidings-expires-ms".into(), AMQPValue::LongLongInt(expires_ms));
        headers.insert("tidings-routing-key".into(), AMQPValue::LongString("game.due".into()));
        let properties = BasicProperties::default().with_message_id(id.to_string().into()).with_headers(headers);
        put(&world, b"{}", properties).await;
    }

    consumer.wait_for_line(&format!("stale {stale}")).await;
    consumer.wait_for_line(&format!("handled {fresh} game.due")).await;

    assert_eq!(effects(&world).await, [format!("{fresh} game.due {{}}")]);
    stop_and_find_nothing_left(&world, consumer).await;
}

#[tokio::test]
async fn the_consumer_in_rust_does_nothing_past_a_deadline() {
    does_nothing_past_a_deadline(Example::Rust).await;
}

#[tokio::test]
async fn the_consumer_in_python_does_nothing_past_a_deadline() {
    does_nothing_past_a_deadline(Example::Python).await;
}

async fn finishes_what_it_has_begun_when_it_is_stopped(example: Example) {
    let (world, launch) = stage(example).await;
    let _daemon = world.daemon().await;
    let mut consumer = consuming(&launch).await;
    let held_up = hold_up(&world).await;
    // Five more than it takes at once.
    for n in 0..25 {
        send(&world, &format!(r#"{{"routing_key": "game.due", "body": {n}}}"#)).await;
    }
    until_held_up(&world, 20).await;
    until_waiting(&world, QUEUE, 5).await;

    consumer.signal(Signal::SIGTERM);
    until_left(&world).await;
    held_up.rollback().await.expect("let go");

    assert_eq!(consumer.ended().await.code(), Some(0));
    assert_eq!(consumer.log().matches("handled ").count(), 20, "{}", consumer.log());
    assert_eq!(effects(&world).await.len(), 20);
    assert_eq!(waiting(&world, QUEUE).await, 5);
    let next = consuming(&launch).await;
    world.until("SELECT count(*) = 25 AND count(DISTINCT body) = 25 FROM consumer_effects").await;
    eventually("the rest", async || (next.log().matches("handled ").count() == 5).then_some(())).await;
    stop_and_find_nothing_left(&world, next).await;
}

#[tokio::test]
async fn the_consumer_in_rust_finishes_what_it_has_begun_when_it_is_stopped() {
    finishes_what_it_has_begun_when_it_is_stopped(Example::Rust).await;
}

#[tokio::test]
async fn the_consumer_in_python_finishes_what_it_has_begun_when_it_is_stopped() {
    finishes_what_it_has_begun_when_it_is_stopped(Example::Python).await;
}

async fn gets_again_what_it_was_killed_over(example: Example) {
    let (world, launch) = stage(example).await;
    let (_, rabbitmq) = world.ports();
    let _daemon = world.daemon().await;
    let proxy = Proxy::start(0, rabbitmq).await;
    let mut first = consuming(&launch).await;
    let mut held_up = hold_up(&world).await;
    let before = send(&world, r#"{"routing_key": "game.due", "body": {"n": 1}}"#).await;
    let kill = async |consumer: &mut Daemon| {
        consumer.signal(Signal::SIGKILL);
        consumer.ended().await;
        until_waiting(&world, QUEUE, 1).await;
    };

    until_held_up(&world, 1).await;
    kill(&mut first).await;
    // PostgreSQL has not noticed: the transaction of the first is still there, and the second waits for its end.
    let mut second = consuming(&launch.clone().with("AMQP_URL", heartbeating(proxy.port, &world))).await;
    until_held_up(&world, 2).await;
    held_up.rollback().await.expect("let go");
    second.wait_for_line(&format!("handled {before} game.due")).await;

    held_up = hold_up(&world).await;
    let after = send(&world, r#"{"routing_key": "game.due", "body": {"n": 2}}"#).await;
    until_held_up(&world, 1).await;
    // What it acknowledges is lost on the way.
    proxy.set(Mode::Swallow);
    held_up.rollback().await.expect("let go");
    second.wait_for_line(&format!("handled {after} game.due")).await;
    kill(&mut second).await;
    let mut third = consuming(&launch).await;
    third.wait_for_line(&format!("duplicate {after}")).await;

    let done = [format!(r#"{before} game.due {{"n": 1}}"#), format!(r#"{after} game.due {{"n": 2}}"#)];
    assert_eq!(effects(&world).await, done);
    stop_and_find_nothing_left(&world, third).await;
}

#[tokio::test]
async fn the_consumer_in_rust_gets_again_what_it_was_killed_over_and_does_it_once() {
    gets_again_what_it_was_killed_over(Example::Rust).await;
}

#[tokio::test]
async fn the_consumer_in_python_gets_again_what_it_was_killed_over_and_does_it_once() {
    gets_again_what_it_was_killed_over(Example::Python).await;
}

async fn begins_again_after_losing_the_database(example: Example) {
    let (world, launch) = stage(example).await;
    let _daemon = world.daemon().await;
    let mut consumer = consuming(&launch).await;
    let held_up = hold_up(&world).await;
    let id = send(&world, r#"{"routing_key": "game.due", "body": {"n": 1}}"#).await;
    until_held_up(&world, 1).await;

    world.sql(&format!("SELECT pg_terminate_backend(pid) {HELD_UP}")).await;
    consumer.wait_for_line("beginning again").await;
    held_up.rollback().await.expect("let go");

    consumer.wait_for_line(&format!("handled {id} game.due")).await;
    assert!(!consumer.log().contains("rejected"), "the message was not to blame");
    assert_eq!(effects(&world).await, [format!(r#"{id} game.due {{"n": 1}}"#)]);
    stop_and_find_nothing_left(&world, consumer).await;
}

#[tokio::test]
async fn the_consumer_in_rust_begins_again_after_losing_the_database() {
    begins_again_after_losing_the_database(Example::Rust).await;
}

#[tokio::test]
async fn the_consumer_in_python_begins_again_after_losing_the_database() {
    begins_again_after_losing_the_database(Example::Python).await;
}
