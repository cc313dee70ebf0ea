//! What `tidings doctor` asks of RabbitMQ over AMQP: whether the daemon's exchanges and queues exist, and are as the
//! daemon would declare them.
//!
//! Must never create anything: it declares only what exists.

use lapin::Connection;

use crate::broker::topology;
use crate::broker::topology::{DELAYED_MESSAGE, DeclareResult, DeclaredEntity};
use crate::broker::{Broker, BrokerError, CLOSE_DEADLINE, QueueType};

/// What the doctor found of an exchange or a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// It is as the daemon would declare it. A queue has this many messages.
    Ours(u32),
    /// It exists, but the daemon's user may not declare it, so it was not compared. A queue has this many messages.
    AsItIs(u32),
    /// An exchange of an intake has this type, which is not the one that the daemon would declare, and is used as it is.
    OfAnotherType(String),
    /// It does not exist, in RabbitMQ's words.
    Absent(String),
}

/// A connection for the doctor's checks.
#[derive(Debug)]
pub struct TopologyInspection {
    connection: Connection,
    exchange: String,
    queue_type: QueueType,
}

impl Broker {
    /// Opens a connection for the doctor's checks, and declares nothing on it.
    ///
    /// # Errors
    ///
    /// When no connection can be made.
    pub async fn visit(&self) -> Result<TopologyInspection, BrokerError> {
        let connection = self.connect_without_declaring("tidings doctor").await?;
        Ok(TopologyInspection { connection, exchange: self.exchange.clone(), queue_type: self.queue_type })
    }
}

impl TopologyInspection {
    /// Looks at one of the daemon's exchanges or queues.
    ///
    /// # Errors
    ///
    /// [`BrokerError::Mismatch`] when it has other properties than the daemon would declare; other errors when RabbitMQ
    /// does not answer.
    pub async fn look(&self, entity: &DeclaredEntity) -> Result<Found, BrokerError> {
        let messages = match topology::declare_passively(&self.connection, entity, &self.exchange).await? {
            Ok(messages) => messages,
            Err(answer) => return Ok(Found::Absent(answer)),
        };
        // A passive declaration compares nothing. A declaration of what exists changes nothing.
        match topology::declare(&self.connection, entity, &self.exchange, self.queue_type).await {
            Ok(DeclareResult::Done) => Ok(Found::Ours(messages)),
            Ok(DeclareResult::NotPermitted(_)) => Ok(Found::AsItIs(messages)),
            Err(error @ BrokerError::Mismatch { .. }) if entity.is_used_as_it_is() => {
                match topology::current_type(&error).as_deref() {
                    Some(DELAYED_MESSAGE) => Err(BrokerError::Delayed { exchange: entity.name(&self.exchange) }),
                    Some(other) => Ok(Found::OfAnotherType(other.to_owned())),
                    // It has the type, and differs otherwise.
                    None => Ok(Found::Ours(messages)),
                }
            }
            Err(error) => Err(error),
        }
    }

    /// Closes the connection.
    pub async fn close(self) {
        let _ = tokio::time::timeout(CLOSE_DEADLINE, self.connection.close(200, "good-bye".into())).await;
    }
}
