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
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Confirmation, Connection};

use super::headers::UNREADABLE;
use super::{Broker, BrokerError, CLOSE_DEADLINE, QueueType, topology, within};
use crate::dead_letter::{DeadLetter, Unreadable, Unsendable};

/// How long the confirms of a window may take.
const CONFIRM_DEADLINE: Duration = Duration::from_secs(30);
/// What the broker itself adds to a message on its way, and would take for its history if it were published again; and what
/// would send copies elsewhere.
const NOT_CARRIED_ON: [&str; 10] = [
    "x-death",
    "x-first-death-exchange",
    "x-first-death-queue",
    "x-first-death-reason",
    "x-last-death-exchange",
    "x-last-death-queue",
    "x-last-death-reason",
    "x-delivery-count",
    "x-acquired-count",
    "CC",
];
/// The header with which a parked letter says why.
const PARKED_REASON: &str = "tidings-parked-reason";

/// One of the daemon's own queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pile {
    /// `tidings.dead`
    Dead,
    /// `tidings.parking`
    Parked,
}

/// A letter that was fetched and is not acknowledged yet.
#[derive(Debug)]
pub struct Letter {
    /// What it says of itself.
    pub says: DeadLetter,
    /// Why it was parked, if it was.
    pub parked_reason: Option<String>,
    delivery: Delivery,
}

/// Where a letter is sent.
#[derive(Clone, Debug)]
pub enum Sending {
    /// Back into its queue.
    Back {
        /// The queue.
        queue: String,
        /// `expiration`; `None` = it never expires.
        expiration_ms: Option<u64>,
        /// `tidings-replay`.
        replays: i64,
    },
    /// To the parked ones, with the reason.
    Park(String),
    /// To the end of the dead letters, as it is.
    Tail,
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
        let connection = self.connect_for_letters().await?;
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
}

impl DeadLetters {
    fn name(&self, pile: Pile) -> ShortString {
        queue(&self.exchange, pile)
    }

    /// Declares the queues, should somebody have deleted them.
    ///
    /// # Errors
    ///
    /// When they exist with other arguments, or the broker does not answer.
    pub async fn declare(&self) -> Result<(), BrokerError> {
        topology::declare(&self.connection, &self.exchange, self.queue_type).await
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
            let headers = delivery.properties.headers().clone().unwrap_or_default();
            let parked_reason = text(&headers, PARKED_REASON);
            Letter { says: read(&delivery.properties, &headers), parked_reason, delivery }
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
            let (queue, properties) = self.wire(letter, sending);
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

    /// Where a letter goes and with what: everything as it was but what the broker added, its remaining life and the count.
    fn wire(&self, letter: &Letter, sending: &Sending) -> (ShortString, BasicProperties) {
        let mut headers = letter.delivery.properties.headers().clone().unwrap_or_default();
        let mut expiration = None;
        match sending {
            Sending::Back { expiration_ms, replays, .. } => {
                headers = headers
                    .inner()
                    .iter()
                    .filter(|(name, _)| !NOT_CARRIED_ON.contains(&name.as_str()) && name.as_str() != PARKED_REASON)
                    .fold(FieldTable::default(), |mut kept, (name, value)| {
                        kept.insert(name.clone(), value.clone());
                        kept
                    });
                headers.insert("tidings-replay".into(), AMQPValue::LongLongInt(*replays));
                expiration = *expiration_ms;
            }
            // With its history, for the person who will look at it.
            Sending::Park(reason) => {
                headers.insert(PARKED_REASON.into(), AMQPValue::LongString(reason.as_str().into()));
            }
            Sending::Tail => {}
        }
        (self.queue(sending), carried_on(&letter.delivery.properties, headers, expiration))
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

fn queue(exchange: &str, pile: Pile) -> ShortString {
    match pile {
        Pile::Dead => format!("{exchange}.dead").into(),
        Pile::Parked => format!("{exchange}.parking").into(),
    }
}

async fn count_letters(channel: &Channel, queue: ShortString) -> Result<u32, BrokerError> {
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let doing = format!("count the letters in the queue {queue}");
    Ok(within(&doing, channel.queue_declare(queue, options, FieldTable::default())).await?.message_count())
}

/// Every property but those that must not be carried on: the user, which must be whoever publishes, and the old life.
fn carried_on(old: &BasicProperties, headers: FieldTable, expiration_ms: Option<u64>) -> BasicProperties {
    let mut new = BasicProperties::default().with_headers(headers);
    if let Some(value) = old.content_type() {
        new = new.with_content_type(value.clone());
    }
    if let Some(value) = old.content_encoding() {
        new = new.with_content_encoding(value.clone());
    }
    if let Some(value) = old.delivery_mode() {
        new = new.with_delivery_mode(*value);
    }
    if let Some(value) = old.priority() {
        new = new.with_priority(*value);
    }
    if let Some(value) = old.correlation_id() {
        new = new.with_correlation_id(value.clone());
    }
    if let Some(value) = old.reply_to() {
        new = new.with_reply_to(value.clone());
    }
    if let Some(value) = old.message_id() {
        new = new.with_message_id(value.clone());
    }
    if let Some(value) = old.timestamp() {
        new = new.with_timestamp(*value);
    }
    if let Some(value) = old.kind() {
        new = new.with_type(value.clone());
    }
    if let Some(value) = old.app_id() {
        new = new.with_app_id(value.clone());
    }
    if let Some(expiration_ms) = expiration_ms {
        new = new.with_expiration(expiration_ms.to_string().into());
    }
    new
}

/// What a letter says of itself. Whatever anybody has written into the headers, this has an answer.
fn read(properties: &BasicProperties, headers: &FieldTable) -> DeadLetter {
    let death = match headers.inner().get("x-death") {
        // The newest is the first.
        Some(AMQPValue::FieldArray(deaths)) => match deaths.as_slice().first() {
            Some(AMQPValue::FieldTable(death)) => Some(death),
            _ => None,
        },
        _ => None,
    };
    let unreadable = match headers.inner().get(UNREADABLE) {
        Some(AMQPValue::ByteArray(bytes)) if bytes.is_empty() => Some(Unsendable::TooLong),
        Some(AMQPValue::ByteArray(_)) => Some(Unsendable::Carried),
        _ => None,
    };
    let whole = |name: &str| headers.inner().get(name).and_then(number);
    let of_death = |name: &str| death.and_then(|death| text(death, name));
    DeadLetter {
        unreadable,
        id: properties.message_id().as_ref().map(ToString::to_string),
        kind: text(headers, "tidings-kind"),
        queue: of_death("queue").filter(|queue| queue.len() <= 255),
        reason: of_death("reason"),
        died_at: death.and_then(|death| match death.inner().get("time") {
            Some(AMQPValue::Timestamp(seconds)) => Some(*seconds),
            _ => None,
        }),
        expires_ms: headers.inner().get("tidings-expires-ms").map(|value| number(value).ok_or(Unreadable)),
        due_ms: whole("tidings-due-ms"),
        replays: whole("tidings-replay").unwrap_or(0),
    }
}

fn text(table: &FieldTable, name: &str) -> Option<String> {
    match table.inner().get(name)? {
        AMQPValue::LongString(text) => String::from_utf8(text.as_bytes().to_vec()).ok(),
        AMQPValue::ShortString(text) => Some(text.to_string()),
        _ => None,
    }
}

fn number(value: &AMQPValue) -> Option<i64> {
    match value {
        AMQPValue::ShortShortInt(number) => Some((*number).into()),
        AMQPValue::ShortShortUInt(number) => Some((*number).into()),
        AMQPValue::ShortInt(number) => Some((*number).into()),
        AMQPValue::ShortUInt(number) => Some((*number).into()),
        AMQPValue::LongInt(number) => Some((*number).into()),
        AMQPValue::LongUInt(number) => Some((*number).into()),
        AMQPValue::LongLongInt(number) => Some(*number),
        _ => None,
    }
}
