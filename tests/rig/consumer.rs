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
use lapin::{Connection, ConnectionProperties, ExchangeKind};

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
    loop {
        pace.tick().await;
        if let Err(error) = run_session(url, &mut random, &mut file).await {
            eprintln!("consumer {number}: {error:#}");
        }
    }
}

/// Declares the exchange, the queue and the binding that the consumers need.
pub(crate) async fn declare(connection: &Connection) -> lapin::Result<()> {
    let channel = connection.create_channel().await?;
    let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    channel.exchange_declare("tidings".into(), ExchangeKind::Topic, durable, FieldTable::default()).await?;
    let mut arguments = FieldTable::default();
    arguments.insert("x-dead-letter-exchange".into(), AMQPValue::LongString("tidings.dlx".into()));
    channel.queue_declare(QUEUE.into(), QueueDeclareOptions::durable(), arguments).await?;
    let (options, none) = (QueueBindOptions::default(), FieldTable::default());
    channel.queue_bind(QUEUE.into(), "tidings".into(), ROUTING_KEY.into(), options, none).await?;
    channel.close(200, "declared".into()).await
}

async fn run_session(url: &str, random: &mut Random, file: &mut File) -> anyhow::Result<()> {
    let connecting = Connection::connect(url, ConnectionProperties::default());
    let connection = tokio::time::timeout(Duration::from_secs(10), connecting).await.context("connecting")??;
    tokio::time::timeout(Duration::from_secs(10), declare(&connection)).await.context("declaring")??;
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
