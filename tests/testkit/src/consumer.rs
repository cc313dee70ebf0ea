//! A consumer for tests and the demo: declares queues, binds them to routing keys, and receives messages from them.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::StreamExt as _;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicNackOptions, ExchangeDeclareOptions, QueueBindOptions,
    QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, Consumer};
use uuid::Uuid;

use crate::EVENT_TIMEOUT;

/// A consumer's connection.
#[derive(Debug)]
pub struct Broker {
    connection: Connection,
}

/// A queue with a consumer on it.
#[derive(Debug)]
pub struct Inbox {
    /// The channel of the consumer. Tests use it for further AMQP methods.
    pub channel: Channel,
    /// The name of the queue.
    pub queue: String,
    consumer: Consumer,
}

/// A message as it was received.
#[derive(Debug)]
pub struct Received {
    /// When the message was received, in milliseconds since the Unix epoch, by the clock of this machine. PostgreSQL
    /// runs on the same machine, so this is the database clock too.
    pub at_ms: i64,
    /// The delivery as the client library returned it.
    pub delivery: Delivery,
}

impl Broker {
    /// Connects to RabbitMQ.
    ///
    /// # Panics
    ///
    /// When the connection fails.
    pub async fn connect(url: &str) -> Self {
        let connection = Connection::connect(url, ConnectionProperties::default()).await;
        Self { connection: connection.expect("RabbitMQ is there") }
    }

    /// Opens a channel.
    ///
    /// # Panics
    ///
    /// When the channel cannot be opened.
    pub async fn channel(&self) -> Channel {
        self.connection.create_channel().await.expect("a channel")
    }

    /// Declares a durable queue with `arguments`, binds it to `exchange` with `keys`, and consumes from it. The
    /// exchange is declared with the same properties as the daemon declares it, so that either may start first.
    ///
    /// # Panics
    ///
    /// When RabbitMQ refuses a declaration or the connection fails.
    pub async fn inbox(&self, exchange: &str, queue: &str, keys: &[&str], arguments: FieldTable) -> Inbox {
        let channel = self.channel().await;
        let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        let topic = lapin::ExchangeKind::Topic;
        channel.exchange_declare(exchange.into(), topic, durable, FieldTable::default()).await.expect("the exchange");
        channel.queue_declare(queue.into(), QueueDeclareOptions::durable(), arguments).await.expect("a queue");
        for key in keys {
            let options = QueueBindOptions::default();
            channel
                .queue_bind(queue.into(), exchange.into(), (*key).into(), options, FieldTable::default())
                .await
                .expect("a binding");
        }
        let options = BasicConsumeOptions::default();
        let consumer =
            channel.basic_consume(queue.into(), "".into(), options, FieldTable::default()).await.expect("a consumer");
        Inbox { channel, queue: queue.to_owned(), consumer }
    }
}

impl Inbox {
    /// Waits for the next message and acknowledges it.
    ///
    /// # Panics
    ///
    /// When no message arrives within [`EVENT_TIMEOUT`].
    pub async fn next(&mut self) -> Received {
        let received = self.next_unacknowledged().await;
        received.delivery.ack(BasicAckOptions::default()).await.expect("acknowledged");
        received
    }

    /// Waits for the next message and does not acknowledge it.
    ///
    /// # Panics
    ///
    /// When no message arrives within [`EVENT_TIMEOUT`].
    pub async fn next_unacknowledged(&mut self) -> Received {
        match self.next_within(EVENT_TIMEOUT).await {
            Some(received) => received,
            None => panic!("no message came into {} within {} s", self.queue, EVENT_TIMEOUT.as_secs()),
        }
    }

    /// The next message, if one arrives within `time`. It is not acknowledged.
    ///
    /// # Panics
    ///
    /// When the connection breaks.
    pub async fn next_within(&mut self, time: Duration) -> Option<Received> {
        let delivery = tokio::time::timeout(time, self.consumer.next()).await.ok()?;
        let delivery = delivery.expect("the consumer goes on").expect("the connection holds");
        let at_ms = time::OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000;
        Some(Received { at_ms: i64::try_from(at_ms).expect("a time"), delivery })
    }

    /// Waits for the next message without a time limit and does not acknowledge it.
    ///
    /// # Panics
    ///
    /// When the connection breaks.
    pub async fn next_without_timeout(&mut self) -> Received {
        loop {
            if let Some(received) = self.next_within(EVENT_TIMEOUT).await {
                return received;
            }
        }
    }

    /// Rejects a message without requeueing it: RabbitMQ dead-letters it if the queue has a dead letter exchange.
    ///
    /// # Panics
    ///
    /// When the connection breaks.
    pub async fn reject(&self, received: &Received) {
        received.delivery.nack(BasicNackOptions { requeue: false, multiple: false }).await.expect("rejected");
    }
}

impl Received {
    /// The message id.
    ///
    /// # Panics
    ///
    /// When the message has no id, or its id is not a UUID.
    #[must_use]
    pub fn id(&self) -> Uuid {
        let id = self.properties().message_id().as_ref().expect("a message id");
        id.as_str().parse().expect("a UUID")
    }

    /// The properties.
    #[must_use]
    pub fn properties(&self) -> &BasicProperties {
        &self.delivery.properties
    }

    /// The body as text.
    ///
    /// # Panics
    ///
    /// When the body is not UTF-8.
    #[must_use]
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.delivery.data).expect("UTF-8")
    }

    /// The body as JSON.
    ///
    /// # Panics
    ///
    /// When the body is not JSON.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.delivery.data).expect("JSON")
    }

    /// The headers, with numbers written in decimal.
    ///
    /// # Panics
    ///
    /// When there are no headers, or one is neither a long string nor a 64-bit integer.
    #[must_use]
    pub fn headers(&self) -> BTreeMap<String, String> {
        let headers = self.properties().headers().as_ref().expect("headers");
        let text = |value: &AMQPValue| match value {
            AMQPValue::LongString(text) => String::from_utf8(text.as_bytes().to_vec()).expect("UTF-8"),
            AMQPValue::LongLongInt(number) => number.to_string(),
            other => panic!("a header is {other:?}"),
        };
        headers.inner().iter().map(|(name, value)| (name.to_string(), text(value))).collect()
    }

    /// The value of a header that is a number.
    ///
    /// # Panics
    ///
    /// When the header is missing or is not a number.
    #[must_use]
    pub fn number(&self, header: &str) -> i64 {
        self.headers().get(header).unwrap_or_else(|| panic!("no {header}")).parse().expect("a number")
    }
}
