//! What `tidings doctor` asks of the broker over AMQP: whether what is ours is there, and is what we would declare. Only
//! what is there is declared, so that nothing is made.

use lapin::Connection;

use crate::broker::topology;
use crate::broker::topology::{OwnEntity, Permitted};
use crate::broker::{Broker, BrokerError, CLOSE_DEADLINE, QueueType};

/// What was found of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// It is what the daemon would declare; of a queue, with as many letters in it.
    Ours(u32),
    /// It is there, and our user may not declare it, so nobody has compared it; of a queue, with as many letters in it.
    AsItIs(u32),
    /// It is not there, in the broker's words.
    Absent(String),
}

/// A connection that only looks.
#[derive(Debug)]
pub struct Visit {
    connection: Connection,
    exchange: String,
    queue_type: QueueType,
}

impl Broker {
    /// Opens a connection, and declares nothing on it.
    ///
    /// # Errors
    ///
    /// When there is none to be had.
    pub async fn visit(&self) -> Result<Visit, BrokerError> {
        let connection = self.connect_only("tidings doctor").await?;
        Ok(Visit { connection, exchange: self.exchange.clone(), queue_type: self.queue_type })
    }
}

impl Visit {
    /// Looks at one of our things.
    ///
    /// # Errors
    ///
    /// [`BrokerError::Mismatch`] when it is another than the daemon would declare, or when the broker cannot be asked.
    pub async fn look(&self, own: OwnEntity) -> Result<Found, BrokerError> {
        let letters = match topology::look(&self.connection, own, &self.exchange).await? {
            Ok(letters) => letters,
            Err(said) => return Ok(Found::Absent(said)),
        };
        // The passive kind compares nothing. The same again, of what is there, changes nothing.
        match topology::declare(&self.connection, own, &self.exchange, self.queue_type).await? {
            Permitted::Done => Ok(Found::Ours(letters)),
            Permitted::Refused(_) => Ok(Found::AsItIs(letters)),
        }
    }

    /// Ends the visit.
    pub async fn close(self) {
        let _ = tokio::time::timeout(CLOSE_DEADLINE, self.connection.close(200, "good-bye".into())).await;
    }
}
