//! A process that consumes messages, rejects one in twenty, and writes each message to a file before it acknowledges or
//! rejects it. It reconnects whenever the connection to RabbitMQ fails.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use futures_util::StreamExt as _;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions, ExchangeDeclareOptions, QueueBindOptions,
    QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Connection, ExchangeKind};

use crate::addresses::Nodes;
use crate::ledger::Arrival;
use crate::random::Random;

/// The queue from which all consumers consume.
pub(crate) const QUEUE: &str = "rig";
/// The routing key of all messages.
pub(crate) const ROUTING_KEY: &str = "rig";

/// Consumes until the process is killed.
pub(crate) async fn consume(url: &str, seed: u64, number: u64, dir: &Path) -> anyhow::Result<()> {
    let mut random = Random::new(seed ^ (number << 48));
    let file = dir.join(format!("{number}"));
    let mut file = OpenOptions::new().create(true).append(true).open(&file).context("the file of arrivals")?;
    let mut pace = tokio::time::interval(Duration::from_millis(200));
    let nodes = Nodes::of(url, number);
    loop {
        pace.tick().await;
        if let Err(error) = run_session(&nodes, &mut random, &mut file).await {
            eprintln!("consumer {number}: {error:#}");
        }
    }
}

/// Declares the exchange, the queue and the binding that the consumers need.
///
/// In a cluster the queue is a quorum queue that keeps a rejected message until the queue of dead letters has confirmed it.
/// By default RabbitMQ would not wait for that, and lose messages that are rejected while that queue has no leader, so that
/// nobody could tell whether the daemon loses dead letters.
pub(crate) async fn declare(connection: &Connection, is_cluster: bool) -> lapin::Result<()> {
    let channel = connection.create_channel().await?;
    let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    channel.exchange_declare("tidings".into(), ExchangeKind::Topic, durable, FieldTable::default()).await?;
    let mut arguments = FieldTable::default();
    arguments.insert("x-dead-letter-exchange".into(), AMQPValue::LongString("tidings.dlx".into()));
    if is_cluster {
        for (name, value) in [
            ("x-queue-type", "quorum"),
            ("x-dead-letter-strategy", "at-least-once"),
            // Without it RabbitMQ ignores the strategy. The queue has no limit, so nothing is refused.
            ("x-overflow", "reject-publish"),
        ] {
            arguments.insert(name.into(), AMQPValue::LongString(value.into()));
        }
    }
    channel.queue_declare(QUEUE.into(), QueueDeclareOptions::durable(), arguments).await?;
    let (options, none) = (QueueBindOptions::default(), FieldTable::default());
    channel.queue_bind(QUEUE.into(), "tidings".into(), ROUTING_KEY.into(), options, none).await?;
    channel.close(200, "declared".into()).await
}

async fn run_session(nodes: &Nodes, random: &mut Random, file: &mut File) -> anyhow::Result<()> {
    let connection = tokio::time::timeout(Duration::from_secs(10), nodes.connect()).await.context("connecting")??;
    let declared = declare(&connection, nodes.are_several());
    tokio::time::timeout(Duration::from_secs(10), declared).await.context("declaring")??;
    let channel = connection.create_channel().await?;
    channel.basic_qos(200, BasicQosOptions::default()).await?;
    let (options, none) = (BasicConsumeOptions::default(), FieldTable::default());
    let mut messages = channel.basic_consume(QUEUE.into(), "".into(), options, none).await?;
    while let Some(delivery) = messages.next().await {
        let delivery = delivery?;
        let (id, mut arrival) = parse_delivery(&delivery).context("a message that the rig did not schedule")?;
        let stale = arrival.expires_ms.is_some_and(|at| at <= arrival.at_ms);
        arrival.handled = !stale && random.below(20) > 0;
        file.write_all(arrival.line(id).as_bytes())?;
        if arrival.handled || stale {
            delivery.ack(BasicAckOptions::default()).await?;
        } else {
            delivery.nack(BasicNackOptions { requeue: false, multiple: false }).await?;
        }
    }
    Ok(())
}

fn parse_delivery(delivery: &Delivery) -> Option<(uuid::Uuid, Arrival)> {
    let now = time::OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000;
    let headers = delivery.properties.headers().as_ref()?.inner();
    let number = |name: &str| match headers.get(name)? {
        AMQPValue::LongLongInt(number) => Some(*number),
        _ => None,
    };
    let id = delivery.properties.message_id().as_ref()?.as_str().parse().ok()?;
    let arrival = Arrival {
        at_ms: i64::try_from(now).ok()?,
        due_ms: number("tidings-due-ms")?,
        expires_ms: number("tidings-expires-ms"),
        replay: number("tidings-replay")?,
        redelivered: delivery.redelivered,
        handled: false,
    };
    Some((id, arrival))
}
