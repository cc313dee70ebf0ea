//! A look at the letters: at their headers alone, since their bodies never get past the sieve. None is taken: all of them are
//! back in their queue as soon as the connection is closed, however that comes about.

use futures_util::StreamExt as _;
use futures_util::stream::FuturesOrdered;
use lapin::options::BasicGetOptions;
use lapin::{Channel, Connection};

use crate::broker::dead_letters::headers;
use crate::broker::dead_letters::{count_letters, queue};
use crate::broker::frame_guard::Bodies;
use crate::broker::{Broker, BrokerError, CLOSE_DEADLINE, DeadLetterQueue, QueueType, topology, within};
use crate::model::dead_letter::DeadLetter;

/// Letters that are asked for at once: enough to hide the way to the broker, and few enough for it to hold, which it does while
/// they are written.
const AT_ONCE: usize = 16;

/// A letter without its body.
#[derive(Debug)]
pub struct Looked {
    /// What it says of itself.
    pub says: DeadLetter,
    /// Why it was parked, if it was.
    pub parked_reason: Option<String>,
}

/// A connection for one look.
#[derive(Debug)]
pub struct Look {
    connection: Connection,
    channel: Channel,
    exchange: String,
    queue_type: QueueType,
}

impl Broker {
    /// Opens a connection for one look.
    ///
    /// # Errors
    ///
    /// When there is none to be had.
    pub async fn look(&self) -> Result<Look, BrokerError> {
        let connection = self.connect_for_letters(Bodies::Drop).await?;
        let channel = within("open a channel", connection.create_channel()).await?;
        Ok(Look { connection, channel, exchange: self.exchange.clone(), queue_type: self.queue_type })
    }
}

impl Look {
    /// How many letters lie there now.
    ///
    /// # Errors
    ///
    /// When there is no such queue, or the broker does not answer.
    pub async fn waiting(&self, pile: DeadLetterQueue) -> Result<u32, BrokerError> {
        count_letters(&self.channel, queue(&self.exchange, pile)).await
    }

    /// Shows the next letters to `see`, in their order: up to `most`, or as many as there are. Another call goes on behind them.
    ///
    /// # Errors
    ///
    /// When the queue is another than ours, from which letters that were looked at may not come back, or the broker does not
    /// answer.
    pub async fn at(&self, pile: DeadLetterQueue, most: u32, mut see: impl FnMut(Looked)) -> Result<(), BrokerError> {
        topology::come_back(&self.connection, pile.own(), &self.exchange, self.queue_type).await?;
        let (mut left, mut asked) = (most, FuturesOrdered::new());
        loop {
            while left > 0 && asked.len() < AT_ONCE {
                asked.push_back(self.channel.basic_get(queue(&self.exchange, pile), BasicGetOptions::default()));
                left -= 1;
            }
            let next = async { asked.next().await.transpose() };
            match within("hand out a letter", next).await? {
                Some(Some(message)) => {
                    let properties = &message.delivery.properties;
                    see(Looked { says: headers::read(properties), parked_reason: headers::parked_reason(properties) });
                }
                // There are no more.
                Some(None) => left = 0,
                None => return Ok(()),
            }
        }
    }

    /// Ends the look: all of them are back.
    pub async fn close(self) {
        let _ = tokio::time::timeout(CLOSE_DEADLINE, self.connection.close(200, "the look is over".into())).await;
    }
}
