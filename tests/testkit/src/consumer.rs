//! Somebody who consumes: queues of their own, bound to routing keys, and what arrives in them.

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

use crate::PATIENCE;

/// A consumer's connection.
#[derive(Debug)]
pub struct Broker {
    connection: Connection,
}

/// A queue with a consumer on it.
#[derive(Debug)]
pub struct Inbox {
    /// For whatever else a test does with the broker.
    pub channel: Channel,
    /// Its name.
    pub queue: String,
    consumer: Consumer,
}

/// A message as it was received.
#[derive(Debug)]
pub struct Received {
    /// When, in milliseconds since the Unix epoch, by the clock of this machine, where the database is as well.
    pub at_ms: i64,
    /// Everything else.
    pub delivery: Delivery,
}

impl Broker {
    /// Connects.
    ///
    /// # Panics
    ///
    /// When it cannot.
    pub async fn connect(url: &str) -> Self {
        let connection = Connection::connect(url, ConnectionProperties::default()).await;
        Self { connection: connection.expect("RabbitMQ is there") }
    }

    /// A new channel.
    ///
    /// # Panics
    ///
    /// When there is none.
    pub async fn channel(&self) -> Channel {
        self.connection.create_channel().await.expect("a channel")
    }

    /// Declares a durable queue with `arguments`, binds it to `exchange` with `keys`, and consumes from it. The exchange
    /// is declared as the daemon declares it, so that it does not matter who comes first.
    ///
    /// # Panics
    ///
    /// When it cannot.
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
    /// The next message, acknowledged.
    ///
    /// # Panics
    ///
    /// When none comes in time.
    pub async fn next(&mut self) -> Received {
        let received = self.next_unacknowledged().await;
        received.delivery.ack(BasicAckOptions::default()).await.expect("acknowledged");
        received
    }

    /// The next message.
    ///
    /// # Panics
    ///
    /// When none comes in time.
    pub async fn next_unacknowledged(&mut self) -> Received {
        match self.within(PATIENCE).await {
            Some(received) => received,
            None => panic!("no message came into {} within {} s", self.queue, PATIENCE.as_secs()),
        }
    }

    /// The next message, if one comes within `time`. Not acknowledged.
    ///
    /// # Panics
    ///
    /// When the connection breaks.
    pub async fn within(&mut self, time: Duration) -> Option<Received> {
        let delivery = tokio::time::timeout(time, self.consumer.next()).await.ok()?;
        let delivery = delivery.expect("the consumer goes on").expect("the connection holds");
        let at_ms = time::OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000;
        Some(Received { at_ms: i64::try_from(at_ms).expect("a time"), delivery })
    }

    /// The next message, whenever it comes. Not acknowledged.
    ///
    /// # Panics
    ///
    /// When the connection breaks.
    pub async fn next_or_never(&mut self) -> Received {
        loop {
            if let Some(received) = self.within(PATIENCE).await {
                return received;
            }
        }
    }

    /// Rejects a message for good: to the dead letters, if the queue has them.
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
    /// When it has none that is a UUID.
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
    /// When it is not UTF-8.
    #[must_use]
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.delivery.data).expect("UTF-8")
    }

    /// The body as JSON.
    ///
    /// # Panics
    ///
    /// When it is none.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.delivery.data).expect("JSON")
    }

    /// The headers: texts as they are, numbers in decimal.
    ///
    /// # Panics
    ///
    /// When one has another type.
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

    /// A header that is a number.
    ///
    /// # Panics
    ///
    /// When there is none.
    #[must_use]
    pub fn number(&self, header: &str) -> i64 {
        self.headers().get(header).unwrap_or_else(|| panic!("no {header}")).parse().expect("a number")
    }
}
