//! The dead letters and the parked ones: fetched one by one, sent on in windows, and acknowledged only when the broker has
//! confirmed where they went. A pass has a connection of its own, so that nothing it meets delays a due row.
//!
//! Letters are fetched, not consumed: that way a pass holds as many bytes as it wants to and no more. What it does not
//! acknowledge is back in its queue as soon as its channel is closed, however that comes about.

use std::collections::HashSet;
use std::time::Duration;

use futures_util::future::join_all;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions,
};
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, Confirmation, Connection};

use super::letter::{self, Sending};
use super::sieve::Bodies;
use super::{Broker, BrokerError, CLOSE_DEADLINE, Own, QueueType, topology, within};
use crate::dead_letter::DeadLetter;

/// How long the confirms of a window may take.
const CONFIRM_DEADLINE: Duration = Duration::from_secs(30);

/// One of the daemon's own queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pile {
    /// `tidings.dead`
    Dead,
    /// `tidings.parking`
    Parked,
}

impl Pile {
    pub(super) fn own(self) -> Own {
        match self {
            Self::Dead => Own::Dead,
            Self::Parked => Own::Parking,
        }
    }
}

/// A letter that was fetched and is not acknowledged yet.
#[derive(Debug)]
pub struct Letter {
    /// What it says of itself.
    pub says: DeadLetter,
    delivery: Delivery,
}

/// What the broker said of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sent {
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
        for (count, pile) in counts.iter_mut().zip([Pile::Dead, Pile::Parked]) {
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

impl Letter {
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
    fn name(&self, pile: Pile) -> ShortString {
        queue(&self.exchange, pile)
    }

    /// Makes sure that letters that are not acknowledged come back, as [`topology::come_back`]. The queue must be there.
    ///
    /// # Errors
    ///
    /// When they may not, or the broker does not answer.
    pub async fn come_back(&self, pile: Pile) -> Result<(), BrokerError> {
        topology::come_back(&self.connection, pile.own(), &self.exchange, self.queue_type).await
    }

    /// How many letters lie there now.
    ///
    /// # Errors
    ///
    /// When the broker does not answer.
    pub async fn waiting(&self, pile: Pile) -> Result<u32, BrokerError> {
        count_letters(&self.channel, self.name(pile)).await
    }

    /// The next letter, if there is one.
    ///
    /// # Errors
    ///
    /// When the broker does not answer.
    pub async fn fetch(&self, pile: Pile) -> Result<Option<Letter>, BrokerError> {
        let fetched = self.channel.basic_get(self.name(pile), BasicGetOptions::default());
        let fetched = within("hand out a dead letter", fetched).await?;
        Ok(fetched.map(|message| {
            let delivery = message.delivery;
            Letter { says: letter::read(&delivery.properties), delivery }
        }))
    }

    /// Sends `letters` on, and acknowledges those that were confirmed. The others are given back, with what was said.
    ///
    /// # Errors
    ///
    /// When the broker does not answer. Then nobody knows which of them arrived, and none is acknowledged.
    pub async fn send(&self, letters: Vec<(Letter, Sending)>) -> Result<(u64, Vec<(Letter, Sent)>), BrokerError> {
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
            if sent == Sent::Confirmed {
                self.acknowledge(&letter).await?;
                confirmed += 1;
            } else {
                others.push((letter, sent));
            }
        }
        Ok((confirmed, others))
    }

    async fn publish(&self, letters: &[(Letter, Sending)]) -> Result<Vec<Sent>, BrokerError> {
        let options = BasicPublishOptions { mandatory: true, immediate: false };
        let failed = |source| BrokerError::Operation { doing: "take a dead letter".into(), source };
        let publishes = letters.iter().map(|(letter, sending)| async move {
            let (queue, properties) = (self.queue(sending), letter::sent_on(&letter.delivery.properties, sending));
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
        let sent = |((_, sending), confirmation): (&(Letter, Sending), &Confirmation)| {
            if missing.contains(&self.queue(sending)) {
                Sent::NoQueue
            } else if matches!(confirmation, Confirmation::Ack(_)) {
                Sent::Confirmed
            } else {
                Sent::Refused
            }
        };
        Ok(letters.iter().zip(&confirmations).map(sent).collect())
    }

    fn queue(&self, sending: &Sending) -> ShortString {
        match sending {
            Sending::Back { queue, .. } => queue.as_str().into(),
            Sending::Park(_) => self.name(Pile::Parked),
            Sending::Tail => self.name(Pile::Dead),
        }
    }

    /// A letter is done with, for good.
    ///
    /// # Errors
    ///
    /// When the connection is gone.
    pub async fn acknowledge(&self, letter: &Letter) -> Result<(), BrokerError> {
        let acknowledged = self.channel.basic_ack(letter.delivery.delivery_tag, BasicAckOptions::default());
        within("take an acknowledgement", acknowledged).await
    }

    /// Ends the pass: what was not acknowledged is back in its queue.
    pub async fn close(self) {
        let _ = tokio::time::timeout(CLOSE_DEADLINE, self.connection.close(200, "the pass is over".into())).await;
    }
}

pub(super) fn queue(exchange: &str, pile: Pile) -> ShortString {
    pile.own().name(exchange).into()
}

pub(super) async fn count_letters(channel: &Channel, queue: ShortString) -> Result<u32, BrokerError> {
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let doing = format!("count the letters in the queue {queue}");
    Ok(within(&doing, channel.queue_declare(queue, options, FieldTable::default())).await?.message_count())
}
