//! The dead letters and the parked ones: fetched one by one, sent on in windows, and acknowledged only when the broker has
//! confirmed where they went. A pass has a connection of its own, so that nothing it meets delays a due row.
//!
//! Letters are fetched, not consumed: that way a pass holds as many bytes as it wants to and no more. What it does not
//! acknowledge is back in its queue as soon as its channel is closed, however that comes about.

pub mod headers;
pub(super) mod list;

use std::collections::HashSet;
use std::time::Duration;

use futures_util::future::join_all;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions,
};
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, Confirmation, Connection};

use crate::broker::frame_guard::Bodies;
use crate::broker::{Broker, BrokerError, CLOSE_DEADLINE, OwnEntity, QueueType, topology, within};
use crate::model::dead_letter::DeadLetter;
use headers::SendTo;

/// How long the confirms of a window may take.
const CONFIRM_DEADLINE: Duration = Duration::from_secs(30);

/// One of the daemon's own queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeadLetterQueue {
    /// `tidings.dead`
    Dead,
    /// `tidings.parking`
    Parked,
}

impl DeadLetterQueue {
    pub(super) fn own(self) -> OwnEntity {
        match self {
            Self::Dead => OwnEntity::Dead,
            Self::Parked => OwnEntity::Parking,
        }
    }
}

/// A letter that was fetched and is not acknowledged yet.
#[derive(Debug)]
pub struct FetchedLetter {
    /// What it says of itself.
    pub says: DeadLetter,
    delivery: Delivery,
}

/// What the broker said of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SendResult {
    /// It has it.
    Confirmed,
    /// There is no such queue.
    NoQueue,
    /// The queue did not take it; it is full perhaps.
    Refused,
}

/// The daemon's own queues, on a connection for one pass.
#[derive(Debug)]
pub struct DeadLetters {
    connection: Connection,
    channel: Channel,
    exchange: String,
    queue_type: QueueType,
}

impl Broker {
    /// How many letters are dead and how many are parked, asked on the connection that publishes; `None` while it cannot.
    ///
    /// # Errors
    ///
    /// When the broker does not answer, or one of the queues is gone.
    pub async fn count_letters(&self) -> Result<Option<(u32, u32)>, BrokerError> {
        let connection = self.connection.lock().await.clone();
        let Some(connection) = connection.filter(|_| self.is_open()) else { return Ok(None) };
        let channel = within("open a channel", connection.create_channel()).await?;
        let mut counts = [0; 2];
        for (count, pile) in counts.iter_mut().zip([DeadLetterQueue::Dead, DeadLetterQueue::Parked]) {
            *count = count_letters(&channel, queue(&self.exchange, pile)).await?;
        }
        let _ = within("close a channel", channel.close(200, "counted".into())).await;
        Ok(Some(counts.into()))
    }

    /// Opens a connection for one pass.
    ///
    /// # Errors
    ///
    /// When there is none to be had.
    pub async fn dead_letters(&self) -> Result<DeadLetters, BrokerError> {
        let connection = self.connect_for_letters(Bodies::Pass).await?;
        let channel = within("open a channel", connection.create_channel()).await?;
        within("turn on publisher confirms", channel.confirm_select(ConfirmSelectOptions::default())).await?;
        Ok(DeadLetters { connection, channel, exchange: self.exchange.clone(), queue_type: self.queue_type })
    }
}

impl FetchedLetter {
    /// The size of its body, in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.delivery.data.len()
    }

    /// What tells it from the others of its pass.
    #[must_use]
    pub fn tag(&self) -> u64 {
        self.delivery.delivery_tag
    }
}

impl DeadLetters {
    fn name(&self, pile: DeadLetterQueue) -> ShortString {
        queue(&self.exchange, pile)
    }

    /// Makes sure that letters that are not acknowledged come back, as [`topology::come_back`]. The queue must be there.
    ///
    /// # Errors
    ///
    /// When they may not, or the broker does not answer.
    pub async fn come_back(&self, pile: DeadLetterQueue) -> Result<(), BrokerError> {
        topology::come_back(&self.connection, pile.own(), &self.exchange, self.queue_type).await
    }

    /// How many letters lie there now.
    ///
    /// # Errors
    ///
    /// When the broker does not answer.
    pub async fn waiting(&self, pile: DeadLetterQueue) -> Result<u32, BrokerError> {
        count_letters(&self.channel, self.name(pile)).await
    }

    /// The next letter, if there is one.
    ///
    /// # Errors
    ///
    /// When the broker does not answer.
    pub async fn fetch(&self, pile: DeadLetterQueue) -> Result<Option<FetchedLetter>, BrokerError> {
        let fetched = self.channel.basic_get(self.name(pile), BasicGetOptions::default());
        let fetched = within("hand out a dead letter", fetched).await?;
        Ok(fetched.map(|message| {
            let delivery = message.delivery;
            FetchedLetter { says: headers::read(&delivery.properties), delivery }
        }))
    }

    /// Sends `letters` on, and acknowledges those that were confirmed. The others are given back, with what was said.
    ///
    /// # Errors
    ///
    /// When the broker does not answer. Then nobody knows which of them arrived, and none is acknowledged.
    pub async fn send(
        &self,
        letters: Vec<(FetchedLetter, SendTo)>,
    ) -> Result<(u64, Vec<(FetchedLetter, SendResult)>), BrokerError> {
        if letters.is_empty() {
            return Ok((0, Vec::new()));
        }
        let published = tokio::time::timeout(CONFIRM_DEADLINE, self.publish(&letters)).await;
        let sent = published.map_err(|_| BrokerError::Deadline {
            doing: format!("confirm {} dead letters", letters.len()),
            after: CONFIRM_DEADLINE,
        })??;
        let (mut confirmed, mut others) = (0, Vec::new());
        for ((letter, _), sent) in letters.into_iter().zip(sent) {
            if sent == SendResult::Confirmed {
                self.acknowledge(&letter).await?;
                confirmed += 1;
            } else {
                others.push((letter, sent));
            }
        }
        Ok((confirmed, others))
    }

    async fn publish(&self, letters: &[(FetchedLetter, SendTo)]) -> Result<Vec<SendResult>, BrokerError> {
        let options = BasicPublishOptions { mandatory: true, immediate: false };
        let failed = |source| BrokerError::Operation { doing: "take a dead letter".into(), source };
        let publishes = letters.iter().map(|(letter, sending)| async move {
            let (queue, properties) = (self.queue(sending), headers::sent_on(&letter.delivery.properties, sending));
            // Through the default exchange: to this queue and to no other.
            self.channel.basic_publish("".into(), queue, options, &letter.delivery.data, properties).await
        });
        let confirms: Result<Vec<_>, _> = join_all(publishes).await.into_iter().collect();
        let confirmations: Result<Vec<_>, _> = join_all(confirms.map_err(failed)?).await.into_iter().collect();
        let confirmations = confirmations.map_err(failed)?;
        // A returned message comes with whichever confirm is next; its routing key is the queue that does not exist.
        let missing: HashSet<&ShortString> = confirmations
            .iter()
            .filter_map(|confirmation| match confirmation {
                Confirmation::Ack(returned) | Confirmation::Nack(returned) => returned.as_ref(),
                Confirmation::NotRequested => None,
            })
            .map(|returned| &returned.delivery.routing_key)
            .collect();
        let sent = |((_, sending), confirmation): (&(FetchedLetter, SendTo), &Confirmation)| {
            if missing.contains(&self.queue(sending)) {
                SendResult::NoQueue
            } else if matches!(confirmation, Confirmation::Ack(_)) {
                SendResult::Confirmed
            } else {
                SendResult::Refused
            }
        };
        Ok(letters.iter().zip(&confirmations).map(sent).collect())
    }

    fn queue(&self, sending: &SendTo) -> ShortString {
        match sending {
            SendTo::Back { queue, .. } => queue.as_str().into(),
            SendTo::Park(_) => self.name(DeadLetterQueue::Parked),
            SendTo::Tail => self.name(DeadLetterQueue::Dead),
        }
    }

    /// A letter is done with, for good.
    ///
    /// # Errors
    ///
    /// When the connection is gone.
    pub async fn acknowledge(&self, letter: &FetchedLetter) -> Result<(), BrokerError> {
        let acknowledged = self.channel.basic_ack(letter.delivery.delivery_tag, BasicAckOptions::default());
        within("take an acknowledgement", acknowledged).await
    }

    /// Ends the pass: what was not acknowledged is back in its queue.
    pub async fn close(self) {
        let _ = tokio::time::timeout(CLOSE_DEADLINE, self.connection.close(200, "the pass is over".into())).await;
    }
}

pub(super) fn queue(exchange: &str, pile: DeadLetterQueue) -> ShortString {
    pile.own().name(exchange).into()
}

pub(super) async fn count_letters(channel: &Channel, queue: ShortString) -> Result<u32, BrokerError> {
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let doing = format!("count the letters in the queue {queue}");
    Ok(within(&doing, channel.queue_declare(queue, options, FieldTable::default())).await?.message_count())
}
