//! Ten thousand messages, consumers that reject three of ten, and a broker that is restarted twice in the middle: what has
//! no deadline is handled in the end, what has one never after it, and nothing is lost.

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

use crate::dead_letters::replay::often;

const QUEUE: &str = "inbox";
const MESSAGES: usize = 10_000;
const CONSUMERS: u64 = 3;
/// Of those that have a deadline: every second.
const TTL_MS: i64 = 4_000;
/// For what takes as long as it takes on a busy machine.
const LONG: Duration = Duration::from_mins(4);

/// What consumers did.
#[derive(Debug, Default)]
struct Ledger {
    /// When each was handled, first and again, and its deadline.
    handled: BTreeMap<Uuid, Vec<(i64, Option<i64>)>>,
    rejected: usize,
    /// Came too late, and was left alone.
    stale: usize,
}

impl Ledger {
    fn handled(&self, with_deadline: bool) -> usize {
        self.handled.values().filter(|times| times[0].1.is_some() == with_deadline).count()
    }
}

/// Consumes for ever, through whatever happens to the broker.
async fn consume(url: String, seed: u64, ledger: Arc<Mutex<Ledger>>) {
    let mut random = seed;
    // The pace of reconnecting.
    let mut pace = tokio::time::interval(Duration::from_millis(200));
    loop {
        pace.tick().await;
        let _ = session(&url, &mut random, &ledger).await;
    }
}

async fn session(url: &str, random: &mut u64, ledger: &Mutex<Ledger>) -> lapin::Result<()> {
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

async fn expired(daemon: &mut Daemon) -> usize {
    let url = format!("http://{}/metrics", daemon.http_addr().await);
    let text = ureq::get(&url).call().expect("an answer").body_mut().read_to_string().expect("text");
    let counts = text.lines().filter(|line| line.starts_with("tidings_expired_total{"));
    counts.map(|line| line.rsplit(' ').next().expect("a value").parse::<usize>().expect("a number")).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_late_while_consumers_reject_and_the_broker_restarts() {
    let servers = Servers::alone().await;
    let servers = Arc::new(Mutex::new(servers));
    let world = {
        // The lock is held by nobody else yet.
        let held = servers.lock().expect("whole");
        tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(World::on(&held, &["message"])))
    };
    // Dead letters of other queues are handed on without a confirm, and lost if the broker stops in that moment.
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
    let mut daemon = often(&world).ready().await;
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
        eventually_within(LONG, &format!("{handled} handled"), reached).await;
        let servers = Arc::clone(&servers);
        let restarted = tokio::task::spawn_blocking(move || {
            servers.lock().expect("whole").restart(Server::RabbitMq, Signal::SIGTERM)
        });
        restarted.await.expect("no panic").expect("restarted");
    }

    let all_without = async || (ledger.lock().expect("whole").handled(false) == MESSAGES / 2).then_some(());
    eventually_within(LONG, "all without a deadline handled", all_without).await;
    eventually_within(LONG, "nothing is pending", async || {
        world.value::<bool>("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await.then_some(())
    })
    .await;
    // Past the last deadline, what is left expires.
    let broker = Broker::connect(&url).await;
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    for queue in [QUEUE, "tidings.dead"] {
        eventually_within(LONG, &format!("{queue} is empty"), async || {
            let channel = broker.channel().await;
            let declared = channel.queue_declare(queue.into(), options, FieldTable::default()).await.expect("a queue");
            (declared.message_count() == 0).then_some(())
        })
        .await;
    }
    let history: i64 = world.value("SELECT count(*) FROM tidings.deliveries").await;
    let past: bool =
        world.value(&format!("SELECT max(due_at) + interval '{TTL_MS} ms' < now() FROM tidings.deliveries")).await;
    let expired = expired(&mut daemon).await;
    let ledger = ledger.lock().expect("whole");
    let copies: usize = ledger.handled.values().map(|times| times.len() - 1).sum();
    println!(
        "{} handled, of which {} with a deadline, {copies} copies; {} rejections; {expired} expired, {} came stale",
        ledger.handled.len(),
        ledger.handled(true),
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
    // All of them are past their deadline by now, so whoever was not handled has expired: counted by the daemon, copies and
    // all.
    let accounted = ledger.handled(true) + ledger.stale + expired;
    assert!(accounted >= MESSAGES / 2, "of those with a deadline {accounted} are accounted for");
    assert!(past, "the last deadline has passed");
}
