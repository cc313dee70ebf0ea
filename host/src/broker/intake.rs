//! The connection on which an intake takes messages.
//!
//! Must never have more than [`HELD_BYTES`] of bodies in memory, but for a single body that is larger, and never acknowledge a
//! message by itself: the intake does, after the commit of its row.
//!
//! RabbitMQ puts messages that are not acknowledged back into their queue as soon as the connection closes.

use std::sync::Arc;

use futures_util::{FutureExt as _, StreamExt as _};
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, Consumer};
use tokio::time::Instant;
use uuid::Uuid;

use crate::broker::dead_letters::headers::{INTAKE_QUEUE, PARKED_REASON, ROUTING_KEY, truncate_reason};
use crate::broker::frame_guard::{Bodies, ByteBudget};
use crate::broker::properties::Arrived;
use crate::broker::{Broker, BrokerError, CLOSE_DEADLINE, DeclaredEntity, look_at_queue, with_deadline};
use crate::model::intake::{Incoming, Intake};
use crate::model::message::Message;
use crate::model::properties::HeaderValue;

/// So many bytes of bodies may wait in the daemon, of all intakes together.
pub(super) const HELD_BYTES: usize = 32 * 1024 * 1024;
/// So many bytes of bodies a batch has, except its last body: its rows are in memory as well while they are written.
const BATCH_BYTES: usize = 1024 * 1024;
/// The headers that a queue adds.
const ADDED_BY_QUEUES: [&str; 2] = ["x-delivery-count", "x-acquired-count"];
/// Where a refused message keeps its header `CC`.
const CC: &str = "tidings-cc";
/// So many messages of one intake may wait in the daemon: while a batch is written, the next one arrives.
const PREFETCH: u16 = 1_000;

/// What a queue has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueCounts {
    /// Messages that no consumer has.
    pub messages: u32,
    /// Consumers.
    pub consumers: u32,
}

/// The connection of an intake.
#[derive(Debug)]
pub struct IntakeConnection(Connection);

/// A consumer on the queue of one intake. Dropping it returns what it has not acknowledged.
#[derive(Debug)]
pub struct IntakeConsumer {
    channel: Channel,
    consumer: Consumer,
    budget: Arc<ByteBudget>,
    /// So many of the next messages lay in the queue before this consumer was there.
    waiting: u32,
    /// The number of the last message. RabbitMQ counts those of a channel from 1 on.
    last_tag: u64,
}

/// A message that was taken and is not acknowledged yet. Its body counts as held until it is dropped.
#[derive(Debug)]
pub struct Received {
    /// The message.
    pub message: Incoming,
    /// When it arrived.
    pub at: Instant,
    tag: u64,
    _held: Held,
}

/// Bytes that count as held until this is dropped.
#[derive(Debug)]
struct Held {
    bytes: usize,
    budget: Arc<ByteBudget>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.release(self.bytes);
    }
}

impl Broker {
    /// The intakes.
    #[must_use]
    pub fn intakes(&self) -> &[Arc<Intake>] {
        &self.intakes
    }

    /// How many messages wait in the queue of each intake, and how many consumers it has; `None` = there is no such queue, or no
    /// connection, or RabbitMQ blocks it.
    pub async fn count_intakes(&self) -> Vec<(Arc<Intake>, Option<QueueCounts>)> {
        let connection = self.connection.lock().await.clone().filter(|_| self.is_open());
        self.count_intakes_on(connection.as_deref()).await
    }

    /// As [`Broker::count_intakes`], on a connection of its own, for a command.
    ///
    /// # Errors
    ///
    /// When no connection can be made.
    pub async fn inspect_intakes(&self) -> Result<Vec<(Arc<Intake>, Option<QueueCounts>)>, BrokerError> {
        let connection = self.connect_without_declaring("tidings intakes").await?;
        let counts = self.count_intakes_on(Some(&connection)).await;
        let _ = tokio::time::timeout(CLOSE_DEADLINE, connection.close(200, "good-bye".into())).await;
        Ok(counts)
    }

    async fn count_intakes_on(&self, connection: Option<&Connection>) -> Vec<(Arc<Intake>, Option<QueueCounts>)> {
        let mut counts = Vec::with_capacity(self.intakes.len());
        for intake in &self.intakes {
            let of_queue = match connection {
                Some(connection) => count(connection, intake.queue(&self.exchange)).await.ok(),
                None => None,
            };
            counts.push((Arc::clone(intake), of_queue));
        }
        counts
    }

    /// Opens a connection for an intake, and starts to consume from its queue.
    ///
    /// # Errors
    ///
    /// When no connection can be made, the queue does not exist, or RabbitMQ does not allow it or does not answer.
    pub async fn open_intake(&self, intake: &Intake) -> Result<(IntakeConnection, IntakeConsumer), BrokerError> {
        let (name, queue) = (format!("tidings intake {}", intake.from), intake.queue(&self.exchange));
        let budget = Arc::clone(&self.intake_budget);
        let connection = self.connect_guarded(&name, Bodies::Within(Arc::clone(&budget))).await?;
        let channel = with_deadline("open a channel", connection.create_channel()).await?;
        let waiting = look_at_queue(&channel, queue.as_str().into()).await?.message_count();
        let limited = channel.basic_qos(PREFETCH, BasicQosOptions::default());
        with_deadline("limit what it delivers at once", limited).await?;
        let (options, no_arguments) = (BasicConsumeOptions::default(), FieldTable::default());
        let consumed = channel.basic_consume(queue.as_str().into(), "".into(), options, no_arguments);
        let consumer = with_deadline(&format!("deliver what is in the queue {queue}"), consumed).await?;
        Ok((IntakeConnection(connection), IntakeConsumer { channel, consumer, budget, waiting, last_tag: 0 }))
    }
}

/// The copy of a message that an intake refuses, for the queue `tidings.parking` of the daemon's exchange: with the reason, and with
/// the queue to which a person may put it back.
#[must_use]
pub fn parked_copy(exchange: &str, id: Uuid, message: &Incoming, queue: &str, reason: &str) -> Message {
    let (properties, mut headers) = (message.properties.clone(), message.headers.clone());
    // It would name another queue.
    headers.remove("x-death");
    // It would send copies to other queues.
    let copies = headers.remove("CC");
    headers.extend(copies.map(|copies| (CC.to_owned(), copies)));
    headers.insert(PARKED_REASON.to_owned(), HeaderValue::Text(truncate_reason(reason)));
    headers.insert(INTAKE_QUEUE.to_owned(), HeaderValue::Text(queue.to_owned()));
    headers.insert(ROUTING_KEY.to_owned(), HeaderValue::Text(message.routing_key.clone()));
    let parking = DeclaredEntity::ParkingQueue.name(exchange);
    Message::to_queue(id, parking, properties, headers, message.body.clone())
}

/// A message as it arrived with these properties.
#[must_use]
pub fn incoming(properties: &BasicProperties, exchange: &str, routing_key: &str, body: Vec<u8>) -> Incoming {
    let Arrived { properties, mut headers, expiration, is_unreadable } = Arrived::from(properties);
    // A quorum queue adds them when it delivers a message again.
    headers.retain(|name, _| !ADDED_BY_QUEUES.contains(&name.as_str()));
    let mut routing_key = routing_key.to_owned();
    if exchange.is_empty() {
        // One that was put back came by the name of the queue.
        if let Some(own) = headers.get(ROUTING_KEY).and_then(HeaderValue::as_text).filter(|own| own.len() <= 255) {
            own.clone_into(&mut routing_key);
        }
        headers.extend(headers.get(CC).cloned().map(|copies| ("CC".to_owned(), copies)));
    }
    Incoming { routing_key, properties, headers, expiration, is_unreadable, body, redelivered: false, waited: false }
}

impl IntakeConnection {
    /// Closes the connection. What was not acknowledged is back in its queue.
    pub async fn close(self) {
        let _ = tokio::time::timeout(CLOSE_DEADLINE, self.0.close(200, "good-bye".into())).await;
    }
}

impl IntakeConsumer {
    /// Waits for a message, and returns it with those that have arrived: `limit` at most, and so many that their bodies have
    /// [`BATCH_BYTES`] together, except the last body. Cancel-safe.
    ///
    /// # Errors
    ///
    /// When the connection is lost, or the queue is deleted; or when a message before one that arrived did not arrive. To acknowledge
    /// what follows would acknowledge that as well.
    pub async fn next(&mut self, limit: usize) -> Result<Vec<Received>, BrokerError> {
        let lost = |source| BrokerError::Operation { doing: "deliver to an intake".into(), source };
        let closed = || lost(lapin::ErrorKind::InvalidConnectionState(lapin::ConnectionState::Closed).into());
        let first = self.consumer.next().await.ok_or_else(closed)?.map_err(lost)?;
        let mut batch = vec![self.receive(first)?];
        let mut bytes = batch[0].message.body.len();
        while batch.len() < limit && bytes < BATCH_BYTES {
            match self.consumer.next().now_or_never() {
                Some(Some(Ok(delivery))) => {
                    bytes += delivery.data.len();
                    batch.push(self.receive(delivery)?);
                }
                // An error comes again at the next call.
                _ => break,
            }
        }
        Ok(batch)
    }

    fn receive(&mut self, delivery: Delivery) -> Result<Received, BrokerError> {
        let Delivery { delivery_tag, exchange, routing_key, redelivered, properties, data, .. } = delivery;
        if delivery_tag != self.last_tag + 1 {
            return Err(BrokerError::Gap { last: self.last_tag, next: delivery_tag });
        }
        self.last_tag = delivery_tag;
        let waited = self.waiting > 0 || redelivered;
        self.waiting = self.waiting.saturating_sub(1);
        let held = Held { bytes: data.len(), budget: Arc::clone(&self.budget) };
        let message = incoming(&properties, exchange.as_str(), routing_key.as_str(), data);
        let message = Incoming { redelivered, waited, ..message };
        Ok(Received { message, at: Instant::now(), tag: delivery_tag, _held: held })
    }

    /// Acknowledges single messages.
    ///
    /// # Errors
    ///
    /// When the connection is lost.
    pub async fn acknowledge_each(&self, tags: &[u64]) -> Result<(), BrokerError> {
        for tag in tags {
            let acknowledged = self.channel.basic_ack(*tag, BasicAckOptions::default());
            with_deadline("take an acknowledgement", acknowledged).await?;
        }
        Ok(())
    }

    /// Acknowledges messages, which removes them from the queue for good. They are all that this consumer has returned and not
    /// acknowledged before; `last` is the last of them.
    ///
    /// # Errors
    ///
    /// When the connection is lost.
    pub async fn acknowledge_all(&self, last: u64) -> Result<(), BrokerError> {
        let acknowledged = self.channel.basic_ack(last, BasicAckOptions { multiple: true });
        with_deadline("take an acknowledgement", acknowledged).await
    }
}

impl Received {
    /// The number by which it is acknowledged.
    #[must_use]
    pub fn tag(&self) -> u64 {
        self.tag
    }
}

/// Counts on a channel of its own, because RabbitMQ closes it if there is no such queue.
async fn count(connection: &Connection, queue: String) -> Result<QueueCounts, BrokerError> {
    let channel = with_deadline("open a channel", connection.create_channel()).await?;
    let found = look_at_queue(&channel, queue.into()).await?;
    let _ = with_deadline("close a channel", channel.close(200, "counted".into())).await;
    Ok(QueueCounts { messages: found.message_count(), consumers: found.consumer_count() })
}
