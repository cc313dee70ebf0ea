//! How the daemons of one exchange hear each other: a fanout exchange `tidings.fleet`, and for each daemon a queue that exists as
//! long as its connection.
//!
//! Must never hand on a body that is longer than an announcement.

use futures_util::StreamExt as _;
use lapin::options::{
    BasicConsumeOptions, BasicPublishOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Consumer, ExchangeKind};

use crate::broker::{Broker, BrokerError, with_deadline};

/// No announcement is as long.
const MAX_BYTES: usize = 4 * 1024;
/// The queue keeps so many announcements.
const MAX_WAITING: i32 = 1_000;
/// After this time, in ms, RabbitMQ removes an announcement that nobody took.
const EXPIRATION: &str = "60000";

/// A channel on which this daemon hears the others.
#[derive(Debug)]
pub struct FleetChannel {
    channel: Channel,
    consumer: Consumer,
    exchange: String,
}

impl Broker {
    /// The exchange through which daemons hear each other.
    #[must_use]
    pub fn fleet_exchange(&self) -> String {
        format!("{}.fleet", self.exchange)
    }

    /// Begins to hear the other daemons; `None` = there is no connection now.
    ///
    /// # Errors
    ///
    /// When RabbitMQ refuses a request, for instance because our user may not make the exchange or the queue.
    pub async fn open_fleet(&self) -> Result<Option<FleetChannel>, BrokerError> {
        let Some(connection) = self.connection.lock().await.clone() else { return Ok(None) };
        let channel = with_deadline("open a channel for the fleet", connection.create_channel()).await?;
        let (exchange, none) = (self.fleet_exchange(), FieldTable::default());
        let options = ExchangeDeclareOptions { auto_delete: true, ..ExchangeDeclareOptions::default() };
        let declared = channel.exchange_declare(exchange.as_str().into(), ExchangeKind::Fanout, options, none.clone());
        with_deadline(&format!("declare the exchange {exchange}"), declared).await?;
        // A new name each time: RabbitMQ keeps the queue of a connection that broke until it notices that.
        let queue = format!("{exchange}.{:032x}", fastrand::u128(..));
        let mut arguments = FieldTable::default();
        arguments.insert("x-max-length".into(), AMQPValue::LongInt(MAX_WAITING));
        let options = QueueDeclareOptions { exclusive: true, auto_delete: true, ..QueueDeclareOptions::default() };
        let declared = channel.queue_declare(queue.as_str().into(), options, arguments);
        with_deadline(&format!("declare the queue {queue}"), declared).await?;
        let options = QueueBindOptions::default();
        let bound =
            channel.queue_bind(queue.as_str().into(), exchange.as_str().into(), "".into(), options, none.clone());
        with_deadline(&format!("bind the queue {queue}"), bound).await?;
        let options = BasicConsumeOptions { no_ack: true, exclusive: true, ..BasicConsumeOptions::default() };
        let consumed = channel.basic_consume(queue.as_str().into(), "".into(), options, none);
        let consumer = with_deadline(&format!("consume from the queue {queue}"), consumed).await?;
        Ok(Some(FleetChannel { channel, consumer, exchange }))
    }
}

impl FleetChannel {
    /// Sends an announcement to all daemons of the exchange, this one included.
    ///
    /// # Errors
    ///
    /// When the connection is lost.
    pub async fn announce(&self, body: &[u8]) -> Result<(), BrokerError> {
        let properties =
            BasicProperties::default().with_expiration(EXPIRATION.into()).with_content_type("application/json".into());
        let options = BasicPublishOptions::default();
        let published = self.channel.basic_publish(self.exchange.as_str().into(), "".into(), options, body, properties);
        with_deadline("announce this daemon", published).await.map(drop)
    }

    /// Waits for the next announcement. Cancel-safe.
    ///
    /// # Errors
    ///
    /// When the channel or the connection is lost.
    pub async fn next(&mut self) -> Result<Vec<u8>, BrokerError> {
        loop {
            let lost = |source| BrokerError::Operation { doing: "deliver announcements of daemons".into(), source };
            match self.consumer.next().await {
                Some(Ok(delivery)) if delivery.data.len() <= MAX_BYTES => return Ok(delivery.data),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(lost(error)),
                None => {
                    return Err(lost(lapin::ErrorKind::InvalidConnectionState(lapin::ConnectionState::Closed).into()));
                }
            }
        }
    }
}
