//! Where the daemon's canaries arrive: an exclusive queue on a connection of its own, which RabbitMQ deletes when the
//! connection closes.

use futures_util::StreamExt as _;
use lapin::options::{BasicConsumeOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{Connection, Consumer};
use uuid::Uuid;

use crate::broker::{Broker, BrokerError, with_deadline};

/// An exclusive queue with a consumer on it.
#[derive(Debug)]
pub struct CanaryInbox {
    consumer: Consumer,
    /// The queue exists as long as this connection.
    _connection: Connection,
}

impl Broker {
    /// Opens an inbox for messages with this routing key.
    ///
    /// # Errors
    ///
    /// When no connection can be made, or RabbitMQ refuses a request.
    pub async fn canary_inbox(&self, routing_key: &str) -> Result<CanaryInbox, BrokerError> {
        let connection = self.connect_without_declaring("tidings canary").await?;
        let channel = with_deadline("open a channel for the canary", connection.create_channel()).await?;
        let (exclusive, no_arguments) =
            (QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() }, FieldTable::default());
        let declared = channel.queue_declare("".into(), exclusive, no_arguments.clone());
        let queue = with_deadline("declare the canary's queue", declared).await?.name().clone();
        let exchange = self.exchange.as_str().into();
        let options = QueueBindOptions::default();
        let bound = channel.queue_bind(queue.clone(), exchange, routing_key.into(), options, no_arguments.clone());
        with_deadline("bind the canary's queue", bound).await?;
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        let consumed = channel.basic_consume(queue, "".into(), options, no_arguments);
        Ok(CanaryInbox {
            consumer: with_deadline("start the canary's consumer", consumed).await?,
            _connection: connection,
        })
    }
}

impl CanaryInbox {
    /// Waits for the next message, and returns its id. Cancel-safe.
    ///
    /// # Errors
    ///
    /// When the connection is lost.
    pub async fn next(&mut self) -> Result<Uuid, BrokerError> {
        loop {
            let lost = |source| BrokerError::Operation { doing: "deliver the canary".into(), source };
            let delivery = match self.consumer.next().await {
                Some(Ok(delivery)) => delivery,
                Some(Err(error)) => return Err(lost(error)),
                None => {
                    return Err(lost(lapin::ErrorKind::InvalidConnectionState(lapin::ConnectionState::Closed).into()));
                }
            };
            let id = delivery.properties.message_id().as_ref().and_then(|id| id.as_str().parse().ok());
            if let Some(id) = id {
                return Ok(id);
            }
        }
    }
}
