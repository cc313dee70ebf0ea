//! A listing of dead or parked messages by their headers.
//!
//! Must never run beside a pass or another command: messages that are listed are not in their queue meanwhile.

use crate::broker::{Broker, BrowseSession, DeadLetterQueue, ListedDeadLetter};
use crate::dead_letters::admin::{AdminError, lock_dead_letters, no_queue_error};
use crate::model::clock::DatabaseClock;
use crate::store::{Pass, Store};

/// The lock of the dead letters, and a connection for a listing. It must be ended with [`DeadLetterListing::end`].
#[derive(Debug)]
pub struct DeadLetterListing {
    pass: Pass,
    session: BrowseSession,
    exchange: String,
}

impl DeadLetterListing {
    /// Takes the lock of the dead letters, and opens a connection.
    ///
    /// # Errors
    ///
    /// When a daemon or another command has the lock, or a server does not answer.
    pub async fn begin(store: &Store, broker: &Broker) -> Result<Self, AdminError> {
        let pass = lock_dead_letters(store, broker).await?;
        Ok(Self { pass, session: broker.browse_dead_letters().await?, exchange: broker.exchange().to_owned() })
    }

    /// Closes the connection, and releases the lock. All dead letters are where they were.
    pub async fn end(self) {
        self.session.close().await;
        self.pass.end().await;
    }

    /// How many messages are in the queue.
    ///
    /// # Errors
    ///
    /// When the queue does not exist, or RabbitMQ does not answer.
    pub async fn waiting(&self, queue: DeadLetterQueue) -> Result<u32, AdminError> {
        self.session.message_count(queue).await.map_err(|source| no_queue_error(queue, &self.exchange, source))
    }

    /// The database clock.
    ///
    /// # Errors
    ///
    /// When PostgreSQL does not answer.
    pub async fn clock(&mut self) -> Result<DatabaseClock, AdminError> {
        Ok(self.pass.clock().await?)
    }

    /// Calls `see` with the next dead letters of the queue, in their order, at most `most`.
    ///
    /// # Errors
    ///
    /// When RabbitMQ does not answer, or messages of the queue may not come back.
    pub async fn at(
        &self,
        queue: DeadLetterQueue,
        most: u32,
        see: impl FnMut(ListedDeadLetter),
    ) -> Result<(), AdminError> {
        Ok(self.session.list(queue, most, see).await?)
    }
}
