//! Who only looks at the letters: alone with them as well, since what is looked at is not in its queue meanwhile.

use crate::broker::{Broker, DeadLetterQueue, Look, Looked};
use crate::dead_letters::admin::{AdminError, alone, no_queue};
use crate::model::clock::DatabaseClock;
use crate::store::{Pass, Store};

/// A look at the letters' headers, and the right to it. It must be ended with [`DeadLetterListing::end`].
#[derive(Debug)]
pub struct DeadLetterListing {
    pass: Pass,
    letters: Look,
    exchange: String,
}

impl DeadLetterListing {
    /// Gets the right to the letters, and a connection to them.
    ///
    /// # Errors
    ///
    /// When somebody else has it, or a server does not answer.
    pub async fn begin(store: &Store, broker: &Broker) -> Result<Self, AdminError> {
        let pass = alone(store, broker).await?;
        Ok(Self { pass, letters: broker.look().await?, exchange: broker.exchange().to_owned() })
    }

    /// Ends the look, and gives back the right: all letters are where they were.
    pub async fn end(self) {
        self.letters.close().await;
        self.pass.end().await;
    }

    /// How many letters of the pile wait.
    ///
    /// # Errors
    ///
    /// When there is no such queue, or the broker does not answer.
    pub async fn waiting(&self, pile: DeadLetterQueue) -> Result<u32, AdminError> {
        self.letters.waiting(pile).await.map_err(|source| no_queue(pile, &self.exchange, source))
    }

    /// The time, by the database.
    ///
    /// # Errors
    ///
    /// When it does not answer.
    pub async fn clock(&mut self) -> Result<DatabaseClock, AdminError> {
        Ok(self.pass.clock().await?)
    }

    /// Shows up to `most` letters of the pile to `see`, in their order.
    ///
    /// # Errors
    ///
    /// When the broker does not answer.
    pub async fn at(&self, pile: DeadLetterQueue, most: u32, see: impl FnMut(Looked)) -> Result<(), AdminError> {
        Ok(self.letters.at(pile, most, see).await?)
    }
}
