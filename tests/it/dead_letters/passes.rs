//! A pass over the dead letters that is cut off, killed, held up or overrun: at worst a copy with the same id, never a loss,
//! never a second's delay for a row.

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
    no_pass_at_start, often, once, pass_at_start, passes, reject, send, until_waiting, waiting,
};

/// The same daemon, behind a proxy.
fn behind(launch: Launch, world: &World, proxy: &AmqpProxy) -> Launch {
    launch.with("TIDINGS_AMQP_URL", amqp_url(proxy.port, &world.name))
}

/// Has as many messages rejected, and returns their ids.
async fn rejected(world: &World, inbox: &mut Inbox, count: i32) -> BTreeSet<Uuid> {
    no_pass_at_start(world).await;
    let daemon = once(world).ready().await;
    let insert = format!(
        "INSERT INTO tidings.schedules (kind, due_at, payload)
         SELECT 'message', now(), '{{\"routing_key\": \"k\", \"body\": 1}}' FROM generate_series(1, {count})"
    );
    world.sql(&insert).await;
    let mut ids = BTreeSet::new();
    for _ in 0..count {
        ids.insert(reject(inbox).await.id());
    }
    until_waiting(world, "tidings.dead", count.cast_unsigned()).await;
    world.until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    assert!(daemon.stop().await.success());
    pass_at_start(world).await;
    ids
}

#[tokio::test]
async fn a_daemon_killed_between_confirm_and_acknowledgement_leaves_one_copy_with_the_same_id() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    let ids = rejected(&world, &mut inbox, 1).await;
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

    let mut daemon = behind(once(&world), &world, &proxy).ready().await;
    let first = inbox.next().await;
    // It acknowledges only what was confirmed: that is the moment.
    eventually("an acknowledgement", async || (acks.load(Ordering::SeqCst) > 0).then_some(())).await;
    daemon.signal(Signal::SIGKILL);
    daemon.ended().await;
    until_waiting(&world, "tidings.dead", 1).await;
    pass_at_start(&world).await;
    let _daemon = once(&world).ready().await;
    let second = inbox.next().await;

    for copy in [first, second] {
        assert!(ids.contains(&copy.id()));
        assert_eq!(copy.number("tidings-replay"), 1);
    }
    until_waiting(&world, "tidings.dead", 0).await;
    assert_eq!(waiting(&world, "inbox.k").await, 0);
}

#[tokio::test]
async fn nothing_is_acknowledged_before_it_is_confirmed() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    rejected(&world, &mut inbox, 3).await;
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

    let mut daemon = behind(once(&world), &world, &proxy).ready().await;
    for _ in 0..3 {
        inbox.next().await;
    }
    daemon.wait_longer_for_line("broke off").await;

    assert_eq!(acks.load(Ordering::SeqCst), 0);
    until_waiting(&world, "tidings.dead", 3).await;
}

/// Cuts the connection at one moment of a pass over 300 letters, and returns how often each came back.
async fn cut_at(moment: Method, number: usize) -> BTreeMap<Uuid, usize> {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    let ids = rejected(&world, &mut inbox, 300).await;
    let seen = AtomicUsize::new(0);
    let proxy = AmqpProxy::start(world.ports().1, move |method| {
        if method == moment && seen.fetch_add(1, Ordering::SeqCst) + 1 == number { Verdict::Cut } else { Verdict::Pass }
    })
    .await;

    let mut daemon = behind(often(&world), &world, &proxy).ready().await;
    let mut times: BTreeMap<Uuid, usize> = BTreeMap::new();
    while times.len() < ids.len() {
        *times.entry(inbox.next().await.id()).or_default() += 1;
    }
    daemon.wait_for_line("broke off").await;
    until_waiting(&world, "tidings.dead", 0).await;
    assert!(daemon.stop().await.success());
    while let Some(received) = inbox.within(std::time::Duration::from_millis(100)).await {
        *times.entry(received.id()).or_default() += 1;
    }
    assert_eq!(times.keys().copied().collect::<BTreeSet<_>>(), ids, "each came back, and nothing else");
    times
}

#[tokio::test]
async fn a_connection_cut_while_letters_are_fetched_costs_nothing() {
    let times = cut_at(Method::Get, 150).await;
    assert!(times.values().all(|times| *times == 1), "{times:?}");
}

#[tokio::test]
async fn a_connection_cut_while_letters_are_published_costs_copies_of_one_window_at_most() {
    let times = cut_at(Method::Publish, 150).await;
    assert!(times.values().all(|times| *times <= 2), "{times:?}");
    assert!(times.values().filter(|times| **times == 2).count() <= 100, "{times:?}");
}

#[tokio::test]
async fn a_pass_that_hangs_delays_no_row() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    let mut other = world.inbox(&["other"]).await;
    rejected(&world, &mut inbox, 200).await;
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

    let daemon = behind(once(&world), &world, &proxy).ready().await;
    eventually("a pass that hangs", async || (hanging.load(Ordering::SeqCst) > 0).then_some(())).await;
    let id = send(&world, r#"{"routing_key": "other", "body": 1}"#).await;

    assert_eq!(other.next().await.id(), id);
    world.until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    assert!(!daemon.log().contains("broke off"), "the pass still hangs: {}", daemon.log());
}

#[tokio::test]
async fn letters_that_arrive_during_a_pass_are_left_for_the_next() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    rejected(&world, &mut inbox, 150).await;

    let mut daemon = once(&world).ready().await;
    // Each is rejected again at once, while the pass goes on.
    for _ in 0..150 {
        assert_eq!(reject(&mut inbox).await.number("tidings-replay"), 1);
    }

    let line = daemon.wait_for_line("took back dead letters").await;
    assert!(line.contains("replayed=150"), "{line}");
    until_waiting(&world, "tidings.dead", 150).await;
}

#[tokio::test]
async fn a_queue_that_is_full_keeps_its_letters_waiting_and_no_others() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    let mut arguments = FieldTable::default();
    arguments.insert("x-dead-letter-exchange".into(), AMQPValue::LongString("tidings.dlx".into()));
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(1));
    arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    let mut small = world.broker.inbox("tidings", "small", &["small"], arguments).await;
    no_pass_at_start(&world).await;
    let daemon = once(&world).ready().await;
    for _ in 0..3 {
        send(&world, r#"{"routing_key": "small", "body": "small"}"#).await;
        reject(&mut small).await;
    }
    until_waiting(&world, "tidings.dead", 3).await;
    // Nobody takes anything out of it now, and it holds one.
    small.channel.close(200, "enough".into()).await.expect("closed");
    send(&world, r#"{"routing_key": "small", "body": "filling"}"#).await;
    until_waiting(&world, "small", 1).await;
    send(&world, r#"{"routing_key": "k", "body": "other"}"#).await;
    reject(&mut inbox).await;
    until_waiting(&world, "tidings.dead", 4).await;
    assert!(daemon.stop().await.success());
    pass_at_start(&world).await;

    let mut daemon = often(&world).ready().await;

    assert_eq!(inbox.next().await.text(), "other");
    assert!(daemon.wait_for_line("left=3").await.contains("replayed=1"));
    let channel = world.broker.channel().await;
    for left in (0..4).rev() {
        let taken = crate::dead_letters::replay::take(&world, "small").await;
        assert_eq!(taken.text() == "filling", left == 3, "{}", taken.text());
        until_waiting(&world, "tidings.dead", left - u32::from(left > 0)).await;
    }
    drop(channel);
}

#[tokio::test]
async fn dead_letters_that_somebody_deletes_are_declared_again_by_the_next_pass() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    let _daemon = often(&world).ready().await;
    let channel = world.broker.channel().await;
    let options = lapin::options::QueueDeleteOptions::default();
    channel.queue_delete("tidings.dead".into(), options).await.expect("deleted");
    eventually("the queue is back", async || {
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let channel = world.broker.channel().await;
        channel.queue_declare("tidings.dead".into(), options, FieldTable::default()).await.is_ok().then_some(())
    })
    .await;
    send(&world, r#"{"routing_key": "k", "body": 1}"#).await;
    reject(&mut inbox).await;
    assert_eq!(inbox.next().await.number("tidings-replay"), 1);
}

/// Ten rejected messages, three queues on one key, one of them without a consumer and with short lives, twenty passes.
async fn copies_never_rise(queue_type: &str) {
    let world = World::with(&["message"]).await;
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
    let daemon = often(&world).with("TIDINGS_QUEUE_TYPE", queue_type).ready().await;
    for _ in 0..10 {
        send(&world, r#"{"routing_key": "k", "body": 1}"#).await;
        taking.next().await;
    }

    // Its consumer rejects everything; the idle queue's copies expire there again and again.
    for round in 0..=20 {
        let mut ids = BTreeSet::new();
        for _ in 0..10 {
            let received = reject(&mut rejecting).await;
            assert_eq!(received.number("tidings-replay"), round, "one replay a pass");
            ids.insert(received.id());
        }
        assert_eq!(ids.len(), 10);
    }

    for _ in 0..10 {
        rejecting.next().await;
    }
    passes(&daemon, 20).await;
    assert!(daemon.stop().await.success());
    eventually("the ten copies of the idle queue, and no more", async || {
        (waiting(&world, "idle").await + waiting(&world, "tidings.dead").await == 10).then_some(())
    })
    .await;
    for queue in ["taking", "rejecting", "tidings.parking"] {
        assert_eq!(waiting(&world, queue).await, 0, "{queue}");
    }
}

#[tokio::test]
async fn copies_never_rise_in_classic_queues() {
    copies_never_rise("classic").await;
}

#[tokio::test]
async fn copies_never_rise_in_quorum_queues() {
    copies_never_rise("quorum").await;
}
