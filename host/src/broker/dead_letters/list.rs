//! Lists dead letters by their headers alone, on a connection whose frame guard drops the bodies.
//!
//! Must never acknowledge a dead letter: all of them are back in their queue as soon as the connection closes, for
//! whatever reason it does.

use futures_util::StreamExt as _;
use futures_util::stream::FuturesOrdered;
use lapin::options::BasicGetOptions;
use lapin::{Channel, Connection};

use crate::broker::dead_letters::headers;
use crate::broker::dead_letters::{message_count, queue_name};
use crate::broker::frame_guard::Bodies;
use crate::broker::{Broker, BrokerError, CLOSE_DEADLINE, DeadLetterQueue, QueueType, topology, with_deadline};
use crate::model::dead_letter::DeadLetter;

/// How many `basic.get` are under way at once: enough to hide the round trip, and few enough for RabbitMQ, which keeps
/// the messages in memory while it writes them.
const GETS_AT_ONCE: usize = 16;

/// A dead letter without its body.
#[derive(Debug)]
pub struct ListedDeadLetter {
    /// Its headers, parsed.
    pub says: DeadLetter,
    /// Why it was parked, if it was.
    pub parked_reason: Option<String>,
}

/// A connection for one listing.
#[derive(Debug)]
pub struct BrowseSession {
    connection: Connection,
    channel: Channel,
    exchange: String,
    queue_type: QueueType,
}

impl Broker {
    /// Opens a connection for one listing.
    ///
    /// # Errors
    ///
    /// When no connection can be made.
    pub async fn browse_dead_letters(&self) -> Result<BrowseSession, BrokerError> {
        let connection = self.connect_for_dead_letters(Bodies::Drop).await?;
        let channel = with_deadline("open a channel", connection.create_channel()).await?;
        Ok(BrowseSession { connection, channel, exchange: self.exchange.clone(), queue_type: self.queue_type })
    }
}

impl BrowseSession {
    /// How many messages are in the queue now.
    ///
    /// # Errors
    ///
    /// When the queue does not exist, or RabbitMQ does not answer.
    pub async fn message_count(&self, queue: DeadLetterQueue) -> Result<u32, BrokerError> {
        message_count(&self.channel, queue_name(&self.exchange, queue)).await
    }

    /// Calls `see` with the next dead letters of the queue, in their order, at most `most`. The next call continues
    /// after them.
    ///
    /// # Errors
    ///
    /// When the queue has other arguments than the daemon declares, so that messages may not come back, or when
    /// RabbitMQ does not answer.
    pub async fn list(
        &self,
        queue: DeadLetterQueue,
        most: u32,
        mut see: impl FnMut(ListedDeadLetter),
    ) -> Result<(), BrokerError> {
        topology::ensure_messages_return(&self.connection, &queue.entity(), &self.exchange, self.queue_type).await?;
        let (mut left, mut gets) = (most, FuturesOrdered::new());
        loop {
            while left > 0 && gets.len() < GETS_AT_ONCE {
                gets.push_back(self.channel.basic_get(queue_name(&self.exchange, queue), BasicGetOptions::default()));
                left -= 1;
            }
            let next = async { gets.next().await.transpose() };
            match with_deadline("hand out a dead letter", next).await? {
                Some(Some(message)) => {
                    let properties = &message.delivery.properties;
                    let mut says = headers::parse(properties);
                    says.find_intake(&self.exchange);
                    see(ListedDeadLetter { says, parked_reason: headers::parked_reason(properties) });
                }
                // The queue is empty.
                Some(None) => left = 0,
                None => return Ok(()),
            }
        }
    }

    /// Closes the connection. All dead letters are back in their queue.
    pub async fn close(self) {
        let _ = tokio::time::timeout(CLOSE_DEADLINE, self.connection.close(200, "the listing is over".into())).await;
    }
}
