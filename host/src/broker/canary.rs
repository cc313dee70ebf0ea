//! Where canaries arrive: a queue that nobody else can use, on a connection of its own, gone with it.

use futures_util::StreamExt as _;
use lapin::options::{BasicConsumeOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{Connection, ConnectionProperties, Consumer};
use uuid::Uuid;

use crate::broker::{Broker, BrokerError, within};

/// A queue with a consumer on it.
#[derive(Debug)]
pub struct CanaryInbox {
    consumer: Consumer,
    /// The queue lives as long.
    _connection: Connection,
}

impl Broker {
    /// An inbox for messages with this routing key.
    ///
    /// # Errors
    ///
    /// When there is no connection, or the broker refuses.
    pub async fn canary_inbox(&self, routing_key: &str) -> Result<CanaryInbox, BrokerError> {
        let properties = ConnectionProperties::default().with_connection_name("tidings canary".into());
        let connection = self.connected(Connection::connect_uri(self.uri.clone(), properties)).await?;
        let channel = within("open a channel for the canary", connection.create_channel()).await?;
        let (exclusive, none) =
            (QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() }, FieldTable::default());
        let declared = channel.queue_declare("".into(), exclusive, none.clone());
        let queue = within("declare the canary's queue", declared).await?.name().clone();
        let exchange = self.exchange.as_str().into();
        let options = QueueBindOptions::default();
        let bound = channel.queue_bind(queue.clone(), exchange, routing_key.into(), options, none.clone());
        within("bind the canary's queue", bound).await?;
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        let consumed = channel.basic_consume(queue, "".into(), options, none);
        Ok(CanaryInbox { consumer: within("consume the canary", consumed).await?, _connection: connection })
    }
}

impl CanaryInbox {
    /// The id of the next message. Cancel-safe.
    ///
    /// # Errors
    ///
    /// When the connection is lost.
    pub async fn next(&mut self) -> Result<Uuid, BrokerError> {
        loop {
            let lost = |source| BrokerError::Operation { doing: "hear of the canary".into(), source };
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
