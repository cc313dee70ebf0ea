//! Ten thousand messages, consumers that reject three of ten, and a RabbitMQ that is restarted twice. Every message
//! without a deadline is handled in the end, no message is handled after its deadline, and none is lost.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::StreamExt as _;
use harness::consumer::{Broker, Received};
use harness::daemon::Daemon;
use harness::eventually_within;
use harness::servers::{Server, Servers};
use harness::world::{World, amqp_url};
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Connection, ConnectionProperties};
use nix::sys::signal::Signal;
use uuid::Uuid;

use crate::dead_letters::replay::launch_with_frequent_passes;

const QUEUE: &str = "inbox";
const MESSAGES: usize = 10_000;
const CONSUMERS: u64 = 3;
/// The time to live of every second message; the others have no deadline.
const TTL_MS: i64 = 4_000;
/// How long each stage of the test may take on a busy machine.
const STAGE_LIMIT: Duration = Duration::from_mins(4);

/// What the consumers did.
#[derive(Debug, Default)]
struct Ledger {
    /// The times at which each message was handled, and its deadline, in ms since the Unix epoch.
    handled: BTreeMap<Uuid, Vec<(i64, Option<i64>)>>,
    rejected: usize,
    /// The number of messages that arrived after their deadline and were not handled.
    stale: usize,
}

impl Ledger {
    fn count_handled(&self, with_deadline: bool) -> usize {
        self.handled.values().filter(|times| times[0].1.is_some() == with_deadline).count()
    }
}

/// Consumes for ever, and reconnects whenever the connection fails.
async fn consume(url: String, seed: u64, ledger: Arc<Mutex<Ledger>>) {
    let mut random = seed;
    // Limits how often it reconnects.
    let mut pace = tokio::time::interval(Duration::from_millis(200));
    loop {
        pace.tick().await;
        let _ = run_session(&url, &mut random, &ledger).await;
    }
}

async fn run_session(url: &str, random: &mut u64, ledger: &Mutex<Ledger>) -> lapin::Result<()> {
    let connection = Connection::connect(url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    channel.basic_qos(50, BasicQosOptions::default()).await?;
    let (options, none) = (BasicConsumeOptions::default(), FieldTable::default());
    let mut messages = channel.basic_consume(QUEUE.into(), "".into(), options, none).await?;
    while let Some(delivery) = messages.next().await {
        let now_ms = i64::try_from(time::OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000).expect("a time");
        let received = Received { at_ms: now_ms, delivery: delivery? };
        let expires_ms = received.headers().get("tidings-expires-ms").map(|ms| ms.parse().expect("a number"));
        // xorshift64*
        *random ^= *random >> 12;
        *random ^= *random << 25;
        *random ^= *random >> 27;
        let rejects = random.wrapping_mul(0x2545_F491_4F6C_DD1D) % 10 < 3;
        if expires_ms.is_some_and(|at: i64| at <= now_ms) {
            ledger.lock().expect("whole").stale += 1;
        } else if rejects {
            received.delivery.nack(BasicNackOptions { requeue: false, multiple: false }).await?;
            ledger.lock().expect("whole").rejected += 1;
            continue;
        } else {
            let mut ledger = ledger.lock().expect("whole");
            ledger.handled.entry(received.id()).or_default().push((now_ms, expires_ms));
        }
        received.delivery.ack(BasicAckOptions::default()).await?;
    }
    Ok(())
}

async fn count_expired(daemon: &mut Daemon) -> usize {
    let url = format!("http://{}/metrics", daemon.http_addr().await);
    let text = ureq::get(&url).call().expect("an answer").body_mut().read_to_string().expect("text");
    let counts = text.lines().filter(|line| line.starts_with("tidings_expired_total{"));
    counts.map(|line| line.rsplit(' ').next().expect("a value").parse::<usize>().expect("a number")).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_message_is_lost_or_handled_after_its_deadline_while_consumers_reject_and_rabbitmq_restarts() {
    let servers = Servers::start_private_async().await;
    let servers = Arc::new(Mutex::new(servers));
    let world = {
        // No other task uses the lock yet, so holding it while blocking is safe.
        let held = servers.lock().expect("whole");
        tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(World::on_servers(&held, &["message"]))
        })
    };
    // Without `at-least-once`, RabbitMQ dead-letters without confirms, and loses a message if it stops at that moment.
    let mut arguments = FieldTable::default();
    for (name, value) in [
        ("x-queue-type", "quorum"),
        ("x-dead-letter-exchange", "tidings.dlx"),
        ("x-dead-letter-strategy", "at-least-once"),
        ("x-overflow", "reject-publish"),
    ] {
        arguments.insert(name.into(), AMQPValue::LongString(value.into()));
    }
    let inbox = world.broker.inbox("tidings", QUEUE, &["k"], arguments).await;
    inbox.channel.close(200, "others consume".into()).await.expect("closed");
    let url = amqp_url(world.ports().1, &world.name);
    let ledger = Arc::new(Mutex::new(Ledger::default()));
    let seed = Uuid::new_v4().as_u64_pair().0 | 1;
    println!("seed {seed}");
    let mut consumers = tokio::task::JoinSet::new();
    for number in 0..CONSUMERS {
        consumers.spawn(consume(url.clone(), seed.wrapping_add(number * 2), Arc::clone(&ledger)));
    }
    let mut daemon = launch_with_frequent_passes(&world).start_ready().await;
    world
        .sql(&format!(
            "INSERT INTO tidings.schedules (kind, due_at, payload)
               SELECT 'message', now() + n * interval '3 milliseconds',
                      jsonb_build_object('routing_key', 'k', 'body', n, 'ttl_ms', CASE WHEN n % 2 = 0 THEN {TTL_MS} END)
               FROM generate_series(1, {MESSAGES}) AS n"
        ))
        .await;

    for handled in [MESSAGES / 5, MESSAGES / 2] {
        let reached = async || (ledger.lock().expect("whole").handled.len() >= handled).then_some(());
        eventually_within(STAGE_LIMIT, &format!("{handled} handled"), reached).await;
        let servers = Arc::clone(&servers);
        let restarted = tokio::task::spawn_blocking(move || {
            servers.lock().expect("whole").restart(Server::RabbitMq, Signal::SIGTERM)
        });
        restarted.await.expect("no panic").expect("restarted");
    }

    let all_without = async || (ledger.lock().expect("whole").count_handled(false) == MESSAGES / 2).then_some(());
    eventually_within(STAGE_LIMIT, "all without a deadline handled", all_without).await;
    eventually_within(STAGE_LIMIT, "nothing is pending", async || {
        world.value::<bool>("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await.then_some(())
    })
    .await;
    // After the last deadline, all remaining messages expire.
    let broker = Broker::connect(&url).await;
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    for queue in [QUEUE, "tidings.dead"] {
        eventually_within(STAGE_LIMIT, &format!("{queue} is empty"), async || {
            let channel = broker.channel().await;
            let declared = channel.queue_declare(queue.into(), options, FieldTable::default()).await.expect("a queue");
            (declared.message_count() == 0).then_some(())
        })
        .await;
    }
    let history: i64 = world.value("SELECT count(*) FROM tidings.deliveries").await;
    let past: bool =
        world.value(&format!("SELECT max(due_at) + interval '{TTL_MS} ms' < now() FROM tidings.deliveries")).await;
    let expired = count_expired(&mut daemon).await;
    let ledger = ledger.lock().expect("whole");
    let copies: usize = ledger.handled.values().map(|times| times.len() - 1).sum();
    println!(
        "{} handled, of which {} with a deadline, {copies} copies; {} rejections; {expired} expired, {} came stale",
        ledger.handled.len(),
        ledger.count_handled(true),
        ledger.rejected,
        ledger.stale
    );
    assert_eq!(history, i64::try_from(MESSAGES).expect("few"));
    assert!(ledger.rejected > MESSAGES / 10, "they do reject");
    for (id, times) in &ledger.handled {
        for (at_ms, expires_ms) in times {
            assert!(expires_ms.is_none_or(|expires_ms| *at_ms < expires_ms), "{id} was handled after its deadline");
        }
    }
    // All deadlines have passed, so every message with a deadline was handled, arrived stale, or was counted as expired
    // by the daemon, which counts copies too.
    let accounted = ledger.count_handled(true) + ledger.stale + expired;
    assert!(accounted >= MESSAGES / 2, "of those with a deadline {accounted} are accounted for");
    assert!(past, "the last deadline has passed");
}
