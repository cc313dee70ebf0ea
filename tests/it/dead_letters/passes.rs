//! Passes over the dead letters that are interrupted, killed, blocked or overtaken by new dead letters. The worst
//! outcome is a second copy with the same id; no dead letter is lost and no row is delayed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use harness::amqp_proxy::{AmqpProxy, Method, Verdict};
use harness::consumer::Inbox;
use harness::daemon::Launch;
use harness::eventually;
use harness::world::{World, amqp_url};
use lapin::options::{QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use nix::sys::signal::Signal;
use uuid::Uuid;

use crate::dead_letters::replay::{
    count_messages, force_pass_at_start, launch_with_frequent_passes, launch_with_hourly_passes, reject_next,
    schedule_message, suppress_pass_at_start, wait_for_message_count, wait_for_passes,
};

/// Makes the daemon connect to RabbitMQ through a proxy.
fn connect_through(launch: Launch, world: &World, proxy: &AmqpProxy) -> Launch {
    launch.with("TIDINGS_AMQP_URL", amqp_url(proxy.port, &world.name))
}

/// Makes `count` dead letters, and returns their ids. The next daemon makes a pass when it starts.
async fn make_dead_letters(world: &World, inbox: &mut Inbox, count: i32) -> BTreeSet<Uuid> {
    suppress_pass_at_start(world).await;
    let daemon = launch_with_hourly_passes(world).start_ready().await;
    let insert = format!(
        "INSERT INTO tidings.schedules (kind, due_at, payload)
         SELECT 'message', now(), '{{\"routing_key\": \"k\", \"body\": 1}}' FROM generate_series(1, {count})"
    );
    world.sql(&insert).await;
    let mut ids = BTreeSet::new();
    for _ in 0..count {
        ids.insert(reject_next(inbox).await.id());
    }
    wait_for_message_count(world, "tidings.dead", count.cast_unsigned()).await;
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    assert!(daemon.stop().await.success());
    force_pass_at_start(world).await;
    ids
}

#[tokio::test]
async fn a_daemon_killed_between_confirm_and_acknowledgement_leaves_one_copy_with_the_same_id() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    let ids = make_dead_letters(&world, &mut inbox, 1).await;
    let acks = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&acks);
    let proxy = AmqpProxy::start(world.ports().1, move |method| {
        if method != Method::Ack {
            return Verdict::Pass;
        }
        counted.fetch_add(1, Ordering::SeqCst);
        Verdict::Lose
    })
    .await;

    let mut daemon = connect_through(launch_with_hourly_passes(&world), &world, &proxy).start_ready().await;
    let first = inbox.next().await;
    // The daemon acknowledges only after the confirm, so it is now between confirm and acknowledgement.
    eventually("an acknowledgement", async || (acks.load(Ordering::SeqCst) > 0).then_some(())).await;
    daemon.signal(Signal::SIGKILL);
    daemon.wait_for_end().await;
    wait_for_message_count(&world, "tidings.dead", 1).await;
    force_pass_at_start(&world).await;
    let _daemon = launch_with_hourly_passes(&world).start_ready().await;
    let second = inbox.next().await;

    for copy in [first, second] {
        assert!(ids.contains(&copy.id()));
        assert_eq!(copy.number("tidings-replay"), 1);
    }
    wait_for_message_count(&world, "tidings.dead", 0).await;
    assert_eq!(count_messages(&world, "inbox.k").await, 0);
}

#[tokio::test]
async fn a_dead_letter_is_not_acknowledged_before_its_copy_is_confirmed() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    make_dead_letters(&world, &mut inbox, 3).await;
    let acks = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&acks);
    let proxy = AmqpProxy::start(world.ports().1, move |method| match method {
        Method::Confirm => Verdict::Lose,
        Method::Ack => {
            counted.fetch_add(1, Ordering::SeqCst);
            Verdict::Pass
        }
        _ => Verdict::Pass,
    })
    .await;

    let mut daemon = connect_through(launch_with_hourly_passes(&world), &world, &proxy).start_ready().await;
    for _ in 0..3 {
        inbox.next().await;
    }
    daemon.wait_longer_for_line("broke off").await;

    assert_eq!(acks.load(Ordering::SeqCst), 0);
    wait_for_message_count(&world, "tidings.dead", 3).await;
}

/// Cuts the connection at the `number`th `moment` of a pass over 300 dead letters, and returns how many times each
/// arrived.
async fn cut_connection_at(moment: Method, number: usize) -> BTreeMap<Uuid, usize> {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    let ids = make_dead_letters(&world, &mut inbox, 300).await;
    let seen = AtomicUsize::new(0);
    let proxy = AmqpProxy::start(world.ports().1, move |method| {
        if method == moment && seen.fetch_add(1, Ordering::SeqCst) + 1 == number { Verdict::Cut } else { Verdict::Pass }
    })
    .await;

    let mut daemon = connect_through(launch_with_frequent_passes(&world), &world, &proxy).start_ready().await;
    let mut times: BTreeMap<Uuid, usize> = BTreeMap::new();
    while times.len() < ids.len() {
        *times.entry(inbox.next().await.id()).or_default() += 1;
    }
    daemon.wait_for_line("broke off").await;
    wait_for_message_count(&world, "tidings.dead", 0).await;
    assert!(daemon.stop().await.success());
    while let Some(received) = inbox.next_within(std::time::Duration::from_millis(100)).await {
        *times.entry(received.id()).or_default() += 1;
    }
    assert_eq!(times.keys().copied().collect::<BTreeSet<_>>(), ids, "each came back, and nothing else");
    times
}

#[tokio::test]
async fn a_connection_cut_while_dead_letters_are_fetched_neither_loses_nor_duplicates_any() {
    let times = cut_connection_at(Method::Get, 150).await;
    assert!(times.values().all(|times| *times == 1), "{times:?}");
}

#[tokio::test]
async fn a_connection_cut_while_dead_letters_are_published_duplicates_at_most_one_window() {
    let times = cut_connection_at(Method::Publish, 150).await;
    assert!(times.values().all(|times| *times <= 2), "{times:?}");
    assert!(times.values().filter(|times| **times == 2).count() <= 100, "{times:?}");
}

#[tokio::test]
async fn a_pass_that_hangs_delays_no_row() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    let mut other = world.inbox(&["other"]).await;
    make_dead_letters(&world, &mut inbox, 200).await;
    let hanging = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&hanging);
    let proxy = AmqpProxy::start(world.ports().1, move |method| {
        if method != Method::Get {
            return Verdict::Pass;
        }
        counted.fetch_add(1, Ordering::SeqCst);
        Verdict::Lose
    })
    .await;

    let daemon = connect_through(launch_with_hourly_passes(&world), &world, &proxy).start_ready().await;
    eventually("a pass that hangs", async || (hanging.load(Ordering::SeqCst) > 0).then_some(())).await;
    let id = schedule_message(&world, r#"{"routing_key": "other", "body": 1}"#).await;

    assert_eq!(other.next().await.id(), id);
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    assert!(!daemon.log().contains("broke off"), "the pass still hangs: {}", daemon.log());
}

#[tokio::test]
async fn dead_letters_that_arrive_during_a_pass_are_left_for_the_next_pass() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    make_dead_letters(&world, &mut inbox, 150).await;

    let mut daemon = launch_with_hourly_passes(&world).start_ready().await;
    // Each message is rejected again at once, while the pass continues.
    for _ in 0..150 {
        assert_eq!(reject_next(&mut inbox).await.number("tidings-replay"), 1);
    }

    let line = daemon.wait_for_line("took back dead letters").await;
    assert!(line.contains("replayed=150"), "{line}");
    wait_for_message_count(&world, "tidings.dead", 150).await;
}

#[tokio::test]
async fn dead_letters_of_a_full_queue_wait_and_delay_no_others() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    let mut arguments = FieldTable::default();
    arguments.insert("x-dead-letter-exchange".into(), AMQPValue::LongString("tidings.dlx".into()));
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(1));
    arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    let mut small = world.broker.inbox("tidings", "small", &["small"], arguments).await;
    suppress_pass_at_start(&world).await;
    let daemon = launch_with_hourly_passes(&world).start_ready().await;
    for _ in 0..3 {
        schedule_message(&world, r#"{"routing_key": "small", "body": "small"}"#).await;
        reject_next(&mut small).await;
    }
    wait_for_message_count(&world, "tidings.dead", 3).await;
    // The queue has no consumer any more, and holds one message.
    small.channel.close(200, "enough".into()).await.expect("closed");
    schedule_message(&world, r#"{"routing_key": "small", "body": "filling"}"#).await;
    wait_for_message_count(&world, "small", 1).await;
    schedule_message(&world, r#"{"routing_key": "k", "body": "other"}"#).await;
    reject_next(&mut inbox).await;
    wait_for_message_count(&world, "tidings.dead", 4).await;
    assert!(daemon.stop().await.success());
    force_pass_at_start(&world).await;

    let mut daemon = launch_with_frequent_passes(&world).start_ready().await;

    assert_eq!(inbox.next().await.text(), "other");
    assert!(daemon.wait_for_line("left=3").await.contains("replayed=1"));
    let channel = world.broker.channel().await;
    for left in (0..4).rev() {
        let taken = crate::dead_letters::replay::take_message(&world, "small").await;
        assert_eq!(taken.text() == "filling", left == 3, "{}", taken.text());
        wait_for_message_count(&world, "tidings.dead", left - u32::from(left > 0)).await;
    }
    drop(channel);
}

#[tokio::test]
async fn a_deleted_dead_letter_queue_is_declared_again_and_replays_continue() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    let _daemon = launch_with_frequent_passes(&world).start_ready().await;
    let channel = world.broker.channel().await;
    let options = lapin::options::QueueDeleteOptions::default();
    channel.queue_delete("tidings.dead".into(), options).await.expect("deleted");
    eventually("the queue is back", async || {
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let channel = world.broker.channel().await;
        channel.queue_declare("tidings.dead".into(), options, FieldTable::default()).await.is_ok().then_some(())
    })
    .await;
    schedule_message(&world, r#"{"routing_key": "k", "body": 1}"#).await;
    reject_next(&mut inbox).await;
    assert_eq!(inbox.next().await.number("tidings-replay"), 1);
}

/// Makes twenty passes over ten rejected messages. Three queues are bound with the same key; one of them has no
/// consumer and a short `x-message-ttl`.
async fn check_that_copies_do_not_multiply(queue_type: &str) {
    let world = World::with_plugins(&["message"]).await;
    let arguments = |ttl_ms: Option<i32>| {
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString(queue_type.into()));
        arguments.insert("x-dead-letter-exchange".into(), AMQPValue::LongString("tidings.dlx".into()));
        if let Some(ttl_ms) = ttl_ms {
            arguments.insert("x-message-ttl".into(), AMQPValue::LongInt(ttl_ms));
        }
        arguments
    };
    let mut rejecting = world.broker.inbox("tidings", "rejecting", &["k"], arguments(None)).await;
    let mut taking = world.broker.inbox("tidings", "taking", &["k"], arguments(None)).await;
    let channel = world.broker.channel().await;
    channel.queue_declare("idle".into(), QueueDeclareOptions::durable(), arguments(Some(200))).await.expect("a queue");
    let (options, none) = (QueueBindOptions::default(), FieldTable::default());
    channel.queue_bind("idle".into(), "tidings".into(), "k".into(), options, none).await.expect("bound");
    let daemon = launch_with_frequent_passes(&world).with("TIDINGS_QUEUE_TYPE", queue_type).start_ready().await;
    for _ in 0..10 {
        schedule_message(&world, r#"{"routing_key": "k", "body": 1}"#).await;
        taking.next().await;
    }

    // The consumer of `rejecting` rejects everything. The copies in the queue `idle` expire again and again.
    for round in 0..=20 {
        let mut ids = BTreeSet::new();
        for _ in 0..10 {
            let received = reject_next(&mut rejecting).await;
            assert_eq!(received.number("tidings-replay"), round, "one replay a pass");
            ids.insert(received.id());
        }
        assert_eq!(ids.len(), 10);
    }

    for _ in 0..10 {
        rejecting.next().await;
    }
    wait_for_passes(&daemon, 20).await;
    assert!(daemon.stop().await.success());
    eventually("the ten copies of the idle queue, and no more", async || {
        (count_messages(&world, "idle").await + count_messages(&world, "tidings.dead").await == 10).then_some(())
    })
    .await;
    for queue in ["taking", "rejecting", "tidings.parking"] {
        assert_eq!(count_messages(&world, queue).await, 0, "{queue}");
    }
}

#[tokio::test]
async fn replays_never_multiply_copies_in_classic_queues() {
    check_that_copies_do_not_multiply("classic").await;
}

#[tokio::test]
async fn replays_never_multiply_copies_in_quorum_queues() {
    check_that_copies_do_not_multiply("quorum").await;
}
