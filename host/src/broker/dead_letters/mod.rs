//! The dead letters in `tidings.dead` and `tidings.parking`: fetches them one by one, publishes them again in windows,
//! and acknowledges each after RabbitMQ has confirmed its copy. What becomes of a dead letter is decided in
//! `model/dead_letter.rs`, and a pass is made by `dead_letters/replayer.rs`.
//!
//! Must never acknowledge a dead letter before its copy is confirmed, unless it is to be removed, and never publish one
//! through an exchange that may route it to several queues: a dead letter goes to one queue by its name, through the
//! default exchange, so copies do not multiply.
//!
//! To change it, know that:
//!
//! - A pass has a connection of its own, so that nothing that goes wrong with a dead letter delays a row.
//! - Messages are fetched with `basic.get`, not consumed, so that a pass has no more bytes in memory than it asked for.
//! - Messages that are not acknowledged are back in their queue as soon as the channel closes, for whatever reason it
//!   does.

pub mod headers;
pub(super) mod list;

use std::collections::HashSet;
use std::time::Duration;

use futures_util::future::join_all;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::ShortString;
use lapin::{Channel, Confirmation, Connection};

use crate::broker::frame_guard::Bodies;
use crate::broker::{
    Broker, BrokerError, CLOSE_DEADLINE, DeclaredEntity, QueueType, look_at_queue, topology, with_deadline,
};
use crate::model::dead_letter::DeadLetter;
use headers::Destination;

/// How long the confirms of a window may take.
const CONFIRM_DEADLINE: Duration = Duration::from_secs(30);

/// One of the daemon's two queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeadLetterQueue {
    /// `tidings.dead`
    Dead,
    /// `tidings.parking`
    Parked,
}

impl DeadLetterQueue {
    pub(super) fn entity(self) -> DeclaredEntity {
        match self {
            Self::Dead => DeclaredEntity::DeadQueue,
            Self::Parked => DeclaredEntity::ParkingQueue,
        }
    }
}

/// A dead letter that was fetched and is not acknowledged yet.
#[derive(Debug)]
pub struct FetchedDeadLetter {
    /// Its headers, parsed.
    pub parsed: DeadLetter,
    delivery: Delivery,
}

/// What came of publishing a dead letter again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SendResult {
    /// RabbitMQ confirmed it.
    Confirmed,
    /// The queue does not exist.
    NoQueue,
    /// The queue did not take it, for instance because it is full.
    Refused,
}

/// A connection for one pass over the daemon's queues.
#[derive(Debug)]
pub struct DeadLetterSession {
    connection: Connection,
    channel: Channel,
    exchange: String,
    queue_type: QueueType,
}

impl Broker {
    /// How many messages are in `tidings.dead` and in `tidings.parking`, asked on the connection that publishes; `None`
    /// while there is none, or RabbitMQ blocks it.
    ///
    /// # Errors
    ///
    /// When RabbitMQ does not answer, or one of the queues does not exist.
    pub async fn count_dead_letters(&self) -> Result<Option<(u32, u32)>, BrokerError> {
        let connection = self.connection.lock().await.clone();
        let Some(connection) = connection.filter(|_| self.is_open()) else { return Ok(None) };
        let channel = with_deadline("open a channel", connection.create_channel()).await?;
        let mut counts = [0; 2];
        for (count, queue) in counts.iter_mut().zip([DeadLetterQueue::Dead, DeadLetterQueue::Parked]) {
            *count = message_count(&channel, queue_name(&self.exchange, queue)).await?;
        }
        let _ = with_deadline("close a channel", channel.close(200, "counted".into())).await;
        Ok(Some(counts.into()))
    }

    /// Opens a connection for one pass.
    ///
    /// # Errors
    ///
    /// When no connection can be made.
    pub async fn open_dead_letters(&self) -> Result<DeadLetterSession, BrokerError> {
        let connection = self.connect_for_dead_letters(Bodies::Pass).await?;
        let channel = with_deadline("open a channel", connection.create_channel()).await?;
        with_deadline("turn on publisher confirms", channel.confirm_select(ConfirmSelectOptions::default())).await?;
        Ok(DeadLetterSession { connection, channel, exchange: self.exchange.clone(), queue_type: self.queue_type })
    }
}

impl FetchedDeadLetter {
    /// The size of its body, in bytes.
    #[must_use]
    pub fn body_bytes(&self) -> usize {
        self.delivery.data.len()
    }

    /// Its delivery tag, which is unique within its pass.
    #[must_use]
    pub fn delivery_tag(&self) -> u64 {
        self.delivery.delivery_tag
    }
}

impl DeadLetterSession {
    fn name(&self, queue: DeadLetterQueue) -> ShortString {
        queue_name(&self.exchange, queue)
    }

    /// Makes sure that messages that are fetched and not acknowledged come back, however often. The queue must exist.
    ///
    /// # Errors
    ///
    /// When the queue has other arguments than the daemon declares, so that messages may not come back, or when
    /// RabbitMQ does not answer.
    pub async fn ensure_messages_return(&self, queue: DeadLetterQueue) -> Result<(), BrokerError> {
        topology::ensure_messages_return(&self.connection, &queue.entity(), &self.exchange, self.queue_type).await
    }

    /// How many messages are in the queue now.
    ///
    /// # Errors
    ///
    /// When RabbitMQ does not answer, or the queue does not exist.
    pub async fn message_count(&self, queue: DeadLetterQueue) -> Result<u32, BrokerError> {
        message_count(&self.channel, self.name(queue)).await
    }

    /// Fetches the next message; `None` = the queue is empty.
    ///
    /// # Errors
    ///
    /// When RabbitMQ does not answer.
    pub async fn fetch(&self, queue: DeadLetterQueue) -> Result<Option<FetchedDeadLetter>, BrokerError> {
        let fetched = self.channel.basic_get(self.name(queue), BasicGetOptions::default());
        let fetched = with_deadline("hand out a dead letter", fetched).await?;
        Ok(fetched.map(|message| {
            let delivery = message.delivery;
            let mut parsed = headers::parse(&delivery.properties);
            parsed.find_intake(&self.exchange);
            FetchedDeadLetter { parsed, delivery }
        }))
    }

    /// Publishes each dead letter to its destination, and acknowledges those whose copies RabbitMQ confirmed. Returns
    /// how many were confirmed, and the others with what came of them.
    ///
    /// # Errors
    ///
    /// When RabbitMQ does not answer. Then it is unknown which copies arrived, and a dead letter whose acknowledgement
    /// was not sent comes a second time.
    pub async fn send(
        &self,
        dead_letters: Vec<(FetchedDeadLetter, Destination)>,
    ) -> Result<(u64, Vec<(FetchedDeadLetter, SendResult)>), BrokerError> {
        if dead_letters.is_empty() {
            return Ok((0, Vec::new()));
        }
        let published = tokio::time::timeout(CONFIRM_DEADLINE, self.publish(&dead_letters)).await;
        let results = published.map_err(|_| BrokerError::Deadline {
            doing: format!("confirm {} dead letters", dead_letters.len()),
            after: CONFIRM_DEADLINE,
        })??;
        let (mut confirmed, mut others) = (0, Vec::new());
        for ((dead_letter, _), result) in dead_letters.into_iter().zip(results) {
            if result == SendResult::Confirmed {
                self.acknowledge(&dead_letter).await?;
                confirmed += 1;
            } else {
                others.push((dead_letter, result));
            }
        }
        Ok((confirmed, others))
    }

    async fn publish(&self, dead_letters: &[(FetchedDeadLetter, Destination)]) -> Result<Vec<SendResult>, BrokerError> {
        let options = BasicPublishOptions { mandatory: true, immediate: false };
        let failed = |source| BrokerError::Operation { doing: "take a dead letter".into(), source };
        let publishes = dead_letters.iter().map(|(dead_letter, destination)| async move {
            let queue = self.queue(destination);
            let properties = headers::properties_for(destination, &dead_letter.delivery.properties);
            // Through the default exchange: to this queue and to no other.
            self.channel.basic_publish("".into(), queue, options, &dead_letter.delivery.data, properties).await
        });
        let confirms: Result<Vec<_>, _> = join_all(publishes).await.into_iter().collect();
        let confirmations: Result<Vec<_>, _> = join_all(confirms.map_err(failed)?).await.into_iter().collect();
        let confirmations = confirmations.map_err(failed)?;
        // The client library attaches a returned message to whichever confirm completes next. Its routing key is the
        // name of the queue that does not exist.
        let missing: HashSet<&ShortString> = confirmations
            .iter()
            .filter_map(|confirmation| match confirmation {
                Confirmation::Ack(returned) | Confirmation::Nack(returned) => returned.as_ref(),
                Confirmation::NotRequested => None,
            })
            .map(|returned| &returned.delivery.routing_key)
            .collect();
        let result = |((_, destination), confirmation): (&(FetchedDeadLetter, Destination), &Confirmation)| {
            if missing.contains(&self.queue(destination)) {
                SendResult::NoQueue
            } else if matches!(confirmation, Confirmation::Ack(_)) {
                SendResult::Confirmed
            } else {
                SendResult::Refused
            }
        };
        Ok(dead_letters.iter().zip(&confirmations).map(result).collect())
    }

    fn queue(&self, destination: &Destination) -> ShortString {
        match destination {
            Destination::OriginalQueue { queue, .. } => queue.as_str().into(),
            Destination::ParkingQueue(_) => self.name(DeadLetterQueue::Parked),
            Destination::DeadQueue => self.name(DeadLetterQueue::Dead),
        }
    }

    /// Acknowledges a dead letter, which removes it from its queue for good.
    ///
    /// # Errors
    ///
    /// When the connection is lost.
    pub async fn acknowledge(&self, dead_letter: &FetchedDeadLetter) -> Result<(), BrokerError> {
        let acknowledged = self.channel.basic_ack(dead_letter.delivery.delivery_tag, BasicAckOptions::default());
        with_deadline("take an acknowledgement", acknowledged).await
    }

    /// Closes the connection. What was not acknowledged is back in its queue.
    pub async fn close(self) {
        let _ = tokio::time::timeout(CLOSE_DEADLINE, self.connection.close(200, "the pass is over".into())).await;
    }
}

pub(super) fn queue_name(exchange: &str, queue: DeadLetterQueue) -> ShortString {
    queue.entity().name(exchange).into()
}

async fn message_count(channel: &Channel, queue: ShortString) -> Result<u32, BrokerError> {
    Ok(look_at_queue(channel, queue).await?.message_count())
}
