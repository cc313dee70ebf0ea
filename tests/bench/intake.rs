//! Measures the way in by AMQP: how fast messages become rows, how long a message takes that is due at once, how late delayed ones
//! come, and what a long queue costs. Beside each stands what the servers do alone, or what users have now: a queue in which
//! messages expire and are dead-lettered.

use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use harness::daemon::{Daemon, Launch};
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
    ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions, QueuePurgeOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, ExchangeKind};
use uuid::Uuid;

use crate::load::{BODY_BYTES, Stage};
use crate::raw::{millis, now_us};
use crate::report::{Figure, Times};
use crate::{Bench, MILLION};

const FROM: &str = "orders.delayed";
const TO: &str = "orders";
/// The intake's queue.
const QUEUE: &str = "tidings.intake.orders.delayed";
/// The queue at which messages arrive.
const ARRIVALS: &str = "arrivals";
/// A queue in which messages expire, and which dead-letters to [`TO`].
const LADDER: &str = "ladder";
/// How many messages wait when the daemon starts.
const BACKLOG: u32 = 60_000;
/// How many messages are published one at a time, so many a second.
const SINGLES: u32 = 400;
const RATE: u32 = 50;
/// The delay of messages whose lateness is measured.
const DELAY_MS: i64 = 1_000;
const DELAYED_RATE: u32 = 500;
const SECONDS: u32 = 20;
/// The number of unconfirmed messages on one channel.
const WINDOW: usize = 500;
const CHANNELS: u32 = 4;
/// The header with the time at which a message was published, in microseconds since the Unix epoch.
const SENT: &str = "sent-us";

/// The whole scenario.
pub(crate) async fn intake(bench: &Bench) -> Vec<Figure> {
    let stage = Stage::with_plugins(&[]).await;
    let channel = stage.world.broker.channel().await;
    declare(&channel).await;
    let mut figures = rates(bench, &stage, &channel).await;
    figures.extend(times(bench, &stage, &channel).await);
    stage.remove().await;
    figures
}

fn launch(stage: &Stage) -> Launch {
    stage.world.launch().with("TIDINGS_INTAKE", format!("{FROM}={TO}"))
}

/// Declares what the daemon declares too, and the queues of consumers.
async fn declare(channel: &Channel) {
    let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    for exchange in [FROM, TO] {
        let declared = channel.exchange_declare(exchange.into(), ExchangeKind::Topic, durable, FieldTable::default());
        declared.await.expect("the exchange");
    }
    let text = |text: &str| AMQPValue::LongString(text.into());
    for (queue, source, arguments) in [
        (ARRIVALS, TO, vec![("x-queue-type", text("classic"))]),
        (QUEUE, FROM, vec![("x-queue-type", text("classic")), ("x-dead-letter-exchange", text("tidings.dlx"))]),
        (LADDER, "", vec![("x-queue-type", text("classic")), ("x-dead-letter-exchange", text(TO))]),
    ] {
        let arguments = arguments.into_iter().fold(FieldTable::default(), |mut table, (name, value)| {
            table.insert(name.into(), value);
            table
        });
        channel.queue_declare(queue.into(), QueueDeclareOptions::durable(), arguments).await.expect("a queue");
        if !source.is_empty() {
            let options = QueueBindOptions::default();
            let bound = channel.queue_bind(queue.into(), source.into(), "#".into(), options, FieldTable::default());
            bound.await.expect("a binding");
        }
    }
}

/// How fast messages become rows, beside how fast each server does its part alone, and the memory meanwhile.
async fn rates(bench: &Bench, stage: &Stage, channel: &Channel) -> Vec<Figure> {
    let messages = bench.rows(BACKLOG);
    let (mut taken, mut consumed, mut inserted) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..bench.rounds() {
        publish_many(stage, messages).await;
        consumed.push(consume_raw(stage, messages).await);
        publish_many(stage, messages).await;
        let daemon = launch(stage).start_ready().await;
        taken.push(wait_until_taken(stage, messages).await);
        stop(stage, daemon).await;
        inserted.push(insert_raw(stage, messages).await);
        empty(stage).await;
    }
    let long = bench.rows(MILLION);
    publish_many(stage, long).await;
    let daemon = launch(stage).start_ready().await;
    wait_until_taken(stage, long).await;
    let peak = peak_resident_mib(&daemon);
    stop(stage, daemon).await;
    empty(stage).await;
    channel.queue_purge(QUEUE.into(), QueuePurgeOptions::default()).await.expect("purged");
    vec![
        Figure::new(format!("{messages} waiting messages become rows"), "a second", taken.clone())
            .beside("RabbitMQ: consumed and acknowledged", consumed)
            .at_least(8_000.0),
        Figure::new("the same", "a second", taken).beside("PostgreSQL: inserted, 500 at a time", inserted),
        Figure::new(format!("peak memory, {long} waiting messages"), "MiB", [peak]).at_most(256.0),
    ]
}

/// How long a message takes that is due at once, and how late delayed ones are.
async fn times(bench: &Bench, stage: &Stage, channel: &Channel) -> Vec<Figure> {
    let daemon = launch(stage).start_ready().await;
    let (mut at_once, mut raw) = (Vec::new(), Vec::new());
    let (mut relayed, mut ladder) = (Vec::new(), Vec::new());
    let singles = bench.rows(SINGLES).min(SINGLES);
    for _ in 0..bench.rounds() {
        let mut receiver = Arrivals::start(stage).await;
        at_once.push(receiver.measure(stage, Way::Intake, RATE, singles, 0).await);
        raw.push(receiver.measure(stage, Way::Direct, RATE, singles, 0).await);
        let delayed = DELAYED_RATE * bench.seconds(SECONDS);
        relayed.push(receiver.measure(stage, Way::Intake, DELAYED_RATE, delayed, DELAY_MS).await);
        ladder.push(receiver.measure(stage, Way::Ladder, DELAYED_RATE, delayed, DELAY_MS).await);
        receiver.channel.close(200, "measured".into()).await.expect("closed");
        channel.queue_purge(ARRIVALS.into(), QueuePurgeOptions::default()).await.expect("purged");
    }
    stop(stage, daemon).await;
    let percentiles =
        |times: &[Times], percent| times.iter().map(|times| times.percentile(percent)).collect::<Vec<f64>>();
    let early: Vec<f64> = relayed.iter().map(Times::count_negative).collect();
    vec![
        Figure::new("x-delay 0: publish to arrival, p50", "ms", percentiles(&at_once, 50))
            .beside("published to the queue directly", percentiles(&raw, 50))
            .under(6.0),
        Figure::new("x-delay 0: publish to arrival, p99", "ms", percentiles(&at_once, 99))
            .beside("published to the queue directly", percentiles(&raw, 99))
            .under(20.0),
        Figure::new("x-delay 1 s: late by, p50", "ms", percentiles(&relayed, 50))
            .beside("queue with a TTL, dead-lettered", percentiles(&ladder, 50)),
        Figure::new("x-delay 1 s: late by, p99", "ms", percentiles(&relayed, 99))
            .beside("queue with a TTL, dead-lettered", percentiles(&ladder, 99)),
        Figure::new("that came early", "messages", early).at_most(0.0),
    ]
}

/// Stops the daemon, and lets PostgreSQL clean up.
async fn stop(stage: &Stage, daemon: Daemon) {
    assert!(daemon.stop().await.success());
    stage.world.sql("CHECKPOINT").await;
}

async fn empty(stage: &Stage) {
    stage.world.sql("TRUNCATE tidings.schedules, tidings.deliveries").await;
    stage.world.sql("CHECKPOINT").await;
}

async fn confirming_channel(stage: &Stage) -> Channel {
    let channel = stage.world.broker.channel().await;
    channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
    channel
}

/// A persistent message with a body of 400 bytes, as a client of the delayed-message plugin publishes it.
fn properties(delay_ms: i64) -> BasicProperties {
    let mut headers = FieldTable::default();
    headers.insert("x-delay".into(), AMQPValue::LongLongInt(delay_ms));
    headers.insert(SENT.into(), AMQPValue::LongLongInt(now_us()));
    BasicProperties::default()
        .with_message_id(Uuid::new_v4().to_string().into())
        .with_content_type("application/json".into())
        .with_delivery_mode(2)
        .with_headers(headers)
}

async fn publish(channel: &Channel, exchange: &str, key: &str, properties: BasicProperties) {
    let body = [b'x'; BODY_BYTES];
    let options = BasicPublishOptions::default();
    let published = channel.basic_publish(exchange.into(), key.into(), options, &body, properties).await;
    assert!(matches!(published.expect("written").await, Ok(Confirmation::Ack(None))));
}

/// Publishes messages to the intake that are due tomorrow.
async fn publish_many(stage: &Stage, messages: u32) {
    let mut publishers = tokio::task::JoinSet::new();
    for _ in 0..CHANNELS {
        let channel = confirming_channel(stage).await;
        publishers.spawn(async move {
            let publishes =
                stream::iter(0..messages / CHANNELS).map(|_| publish(&channel, FROM, "k", properties(86_400_000)));
            publishes.buffer_unordered(WINDOW).for_each(|()| std::future::ready(())).await;
        });
    }
    publishers.join_all().await;
}

/// Waits until so many rows wait, and returns how many were written in a second.
async fn wait_until_taken(stage: &Stage, messages: u32) -> f64 {
    let wanted = messages / CHANNELS * CHANNELS;
    let all = format!("SELECT count(*) >= {wanted} FROM tidings.schedules");
    let taken = async || stage.world.value::<bool>(&all).await.then_some(());
    harness::eventually_within(Duration::from_mins(10), "all rows", taken).await;
    let seconds = "SELECT extract(epoch FROM max(created_at) - min(created_at))::float8 FROM tidings.schedules";
    f64::from(wanted) / stage.world.value::<f64>(seconds).await
}

/// Consumes and acknowledges what waits in the intake's queue, 500 at a time, and returns how many in a second.
async fn consume_raw(stage: &Stage, messages: u32) -> f64 {
    let channel = stage.world.broker.channel().await;
    channel.basic_qos(1_000, BasicQosOptions::default()).await.expect("a window");
    let (options, none) = (BasicConsumeOptions::default(), FieldTable::default());
    let begun = std::time::Instant::now();
    let mut consumer = channel.basic_consume(QUEUE.into(), "".into(), options, none).await.expect("a consumer");
    let wanted = messages / CHANNELS * CHANNELS;
    for number in 1..=wanted {
        let Delivery { delivery_tag, .. } = consumer.next().await.expect("a message").expect("the connection holds");
        if number % 500 == 0 || number == wanted {
            channel.basic_ack(delivery_tag, BasicAckOptions { multiple: true }).await.expect("acknowledged");
        }
    }
    let rate = f64::from(wanted) / begun.elapsed().as_secs_f64();
    channel.close(200, "measured".into()).await.expect("closed");
    rate
}

/// Copies the rows that an intake has written, 500 in a statement, and returns how many in a second.
async fn insert_raw(stage: &Stage, messages: u32) -> f64 {
    stage.world.sql("DROP TABLE IF EXISTS sample").await;
    stage.world.sql("CREATE TABLE sample AS SELECT * FROM tidings.schedules LIMIT 500").await;
    stage.world.sql("TRUNCATE tidings.schedules").await;
    let begun = std::time::Instant::now();
    for number in 0..messages / 500 {
        stage
            .world
            .sql(&format!(
                "INSERT INTO tidings.schedules (id, kind, key, due_at, payload)
                 SELECT gen_random_uuid(), kind, key || {number}, due_at, payload FROM sample"
            ))
            .await;
    }
    f64::from(messages / 500 * 500) / begun.elapsed().as_secs_f64()
}

fn peak_resident_mib(daemon: &Daemon) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a size");
    line.trim().trim_end_matches(" kB").parse::<f64>().expect("a number") / 1024.0
}

/// By which way a message comes to its queue.
#[derive(Clone, Copy, Debug)]
enum Way {
    Intake,
    Direct,
    Ladder,
}

/// A consumer that notes when messages arrive.
struct Arrivals {
    channel: Channel,
    arrived: tokio::sync::mpsc::UnboundedReceiver<i64>,
}

impl Arrivals {
    async fn start(stage: &Stage) -> Self {
        let channel = stage.world.broker.channel().await;
        channel.basic_qos(1_000, BasicQosOptions::default()).await.expect("a window");
        let (options, none) = (BasicConsumeOptions::default(), FieldTable::default());
        let mut messages = channel.basic_consume(ARRIVALS.into(), "".into(), options, none).await.expect("a consumer");
        let (note, arrived) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Some(Ok(message)) = messages.next().await {
                let took = now_us() - sent_us(&message);
                if message.ack(BasicAckOptions::default()).await.is_err() || note.send(took).is_err() {
                    break;
                }
            }
        });
        Self { channel, arrived }
    }

    /// Publishes so many messages at a steady rate, and returns how long after their delay they arrived.
    async fn measure(&mut self, stage: &Stage, way: Way, rate: u32, messages: u32, delay_ms: i64) -> Times {
        let channel = confirming_channel(stage).await;
        let mut pace = tokio::time::interval(Duration::from_secs(1) / rate);
        let mut confirms = tokio::task::JoinSet::new();
        for _ in 0..messages {
            pace.tick().await;
            let channel = channel.clone();
            confirms.spawn(async move {
                match way {
                    Way::Intake => publish(&channel, FROM, "k", properties(delay_ms)).await,
                    Way::Direct => publish(&channel, "", ARRIVALS, properties(delay_ms)).await,
                    Way::Ladder => {
                        let properties = properties(delay_ms).with_expiration(delay_ms.to_string().into());
                        publish(&channel, "", LADDER, properties).await;
                    }
                }
            });
        }
        confirms.join_all().await;
        let mut late = Vec::new();
        for _ in 0..messages {
            let took = tokio::time::timeout(Duration::from_mins(1), self.arrived.recv()).await;
            late.push(millis(
                took.expect("a message within a minute").expect("the consumer goes on") - delay_ms * 1_000,
            ));
        }
        channel.close(200, "measured".into()).await.expect("closed");
        Times::new(late)
    }
}

fn sent_us(message: &Delivery) -> i64 {
    let headers = message.properties.headers().as_ref().expect("headers").inner();
    match headers.get(SENT) {
        Some(AMQPValue::LongLongInt(sent)) => *sent,
        other => panic!("{other:?}"),
    }
}
