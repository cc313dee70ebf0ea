//! Publishes batches of messages, and returns RabbitMQ's verdict on each. Only this file makes a [`Confirmed`].
//!
//! Must never count a message as confirmed without an ack on a channel in confirm mode, or after RabbitMQ has returned
//! it: RabbitMQ acks an unroutable message as well.
//!
//! To change it, know that:
//!
//! - **A channel serves one batch at a time.** That keeps the messages in order, and each return with its batch. The
//!   client library attaches a returned message to whichever confirm completes next, so the publisher collects all
//!   confirms of the batch and matches the returns by message id.
//! - **A message that makes RabbitMQ close the channel** (a body larger than `max_message_size`, for instance) **takes
//!   its batch along only once.** The rest of the batch is then published one by one, and the message that closes a
//!   channel again gets [`Verdict::Poison`]; its row is parked.

use std::collections::HashMap;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Confirmation};
use tokio::time::{Instant, timeout_at};
use tracing::warn;
use uuid::Uuid;

use crate::broker::{Broker, BrokerError, PUBLISHING, with_deadline};
use crate::model::message::{HeaderValue, Message};

/// How long the confirms of a batch may take. A message that is not confirmed by then is [`Verdict::Unknown`].
const CONFIRM_DEADLINE: Duration = Duration::from_secs(10);

/// RabbitMQ has confirmed a message. Only the publisher makes this.
#[derive(Clone, Copy, Debug)]
pub struct Confirmed {
    at: Instant,
}

impl Confirmed {
    /// When the confirm arrived.
    #[must_use]
    pub fn at(&self) -> Instant {
        self.at
    }
}

/// RabbitMQ's verdict on one message.
#[derive(Clone, Debug)]
pub enum Verdict {
    /// RabbitMQ has it.
    Confirmed(Confirmed),
    /// RabbitMQ did not take it, with the reason: no queue is bound to the routing key, or a queue refused it.
    Refused(String),
    /// RabbitMQ closed the channel because of it, with the reason: it is larger than `max_message_size`, for instance.
    /// To publish it again would not help.
    Poison(String),
    /// Neither confirmed nor refused. The message may be in a queue.
    Unknown,
}

impl Broker {
    /// Publishes `messages`, waits for the confirms, and returns a verdict for each message.
    pub async fn publish(&self, messages: &[Message]) -> HashMap<Uuid, Verdict> {
        let deadline = Instant::now() + CONFIRM_DEADLINE;
        let mut verdicts: HashMap<Uuid, Verdict> =
            messages.iter().map(|message| (message.id, Verdict::Unknown)).collect();
        let Err(error) = self.publish_batch(messages, deadline, &mut verdicts).await else {
            self.refusals.say(PUBLISHING, None);
            return verdicts;
        };
        let is_unknown = |verdict: &Verdict| matches!(verdict, Verdict::Unknown);
        let unknown = verdicts.values().filter(|verdict| is_unknown(verdict)).count();
        let refusal = format!("RabbitMQ takes no message for the exchange {}: {}", self.exchange, with_causes(&error));
        if !affects_every_message(&error) || self.refusals.say(PUBLISHING, Some(refusal)) {
            warn!(
                error = &error as &dyn std::error::Error,
                unknown, "could not publish; rows whose messages are not confirmed stay due"
            );
        }
        if is_channel_error(&error, &AMQPSoftError::NOTFOUND) {
            // The exchange has been deleted.
            self.declare_exchange_again().await;
        }
        if !is_caused_by_a_message(&error) {
            return verdicts;
        }
        // One of the messages closed the channel, and would close the next one as well. Published one by one, it takes
        // no other message along.
        for message in messages {
            if !verdicts.get(&message.id).is_some_and(is_unknown) {
                continue;
            }
            match self.publish_batch(std::slice::from_ref(message), deadline, &mut verdicts).await {
                Ok(()) => {}
                Err(error) if is_caused_by_a_message(&error) => {
                    let reason = format!("RabbitMQ closed the channel over its message: {}", with_causes(&error));
                    verdicts.insert(message.id, Verdict::Poison(reason));
                }
                Err(_) => break,
            }
        }
        verdicts
    }

    /// Publishes `messages` on a channel that no other batch uses, and writes their verdicts into `verdicts`.
    async fn publish_batch(
        &self,
        messages: &[Message],
        deadline: Instant,
        verdicts: &mut HashMap<Uuid, Verdict>,
    ) -> Result<(), BrokerError> {
        let channel = self.channel().await?;
        publish_and_await_confirms(&channel, &self.exchange, messages, deadline, verdicts).await?;
        // Reached only if every message is confirmed or refused. On any other channel a late confirm could be taken for
        // that of a later message.
        self.idle_channels.lock().await.push(channel);
        Ok(())
    }

    async fn declare_exchange_again(&self) {
        if let Err(error) = self.repair_topology().await {
            warn!(
                error = &error as &dyn std::error::Error,
                "could not declare the daemon's exchanges and queues again"
            );
        }
    }

    /// An idle channel, or a new one in confirm mode.
    async fn channel(&self) -> Result<Channel, BrokerError> {
        while let Some(channel) = self.idle_channels.lock().await.pop() {
            if channel.status().connected() {
                return Ok(channel);
            }
        }
        let connection = self.connection.lock().await.clone();
        let Some(connection) = connection else {
            return Err(BrokerError::Deadline { doing: "be connected".into(), after: Duration::ZERO });
        };
        let channel = with_deadline("open a channel", connection.create_channel()).await?;
        with_deadline("turn on publisher confirms", channel.confirm_select(ConfirmSelectOptions::default())).await?;
        Ok(channel)
    }
}

/// Whether RabbitMQ would refuse every other message as well, although it is reachable: a permission was withdrawn, for
/// instance, or it confirms nothing.
fn affects_every_message(error: &BrokerError) -> bool {
    match error {
        BrokerError::Operation { source, .. } => {
            matches!(source.kind(), lapin::ErrorKind::ProtocolError(error) if matches!(error.kind(), AMQPErrorKind::Soft(_)))
                && !is_caused_by_a_message(error)
        }
        error => matches!(error, BrokerError::Deadline { .. }),
    }
}

/// Whether RabbitMQ closed the channel because of one of the messages on it, and not because of itself or the exchange.
fn is_caused_by_a_message(error: &BrokerError) -> bool {
    is_channel_error(error, &AMQPSoftError::PRECONDITIONFAILED)
}

/// Whether RabbitMQ closed a channel for this reason.
fn is_channel_error(error: &BrokerError, reason: &AMQPSoftError) -> bool {
    matches!(error, BrokerError::Operation { source, .. } if matches!(source.kind(), lapin::ErrorKind::ProtocolError(error)
        if matches!(error.kind(), AMQPErrorKind::Soft(soft) if soft == reason)))
}

/// An error and its causes, on one line.
fn with_causes(error: &BrokerError) -> String {
    let causes = std::iter::successors(Some(error as &dyn std::error::Error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

async fn publish_and_await_confirms(
    channel: &Channel,
    exchange: &str,
    messages: &[Message],
    deadline: Instant,
    verdicts: &mut HashMap<Uuid, Verdict>,
) -> Result<(), BrokerError> {
    let exchange = ShortString::from(exchange);
    let doing = || format!("take {} messages", messages.len());
    let options = BasicPublishOptions { mandatory: true, immediate: false };
    // Each message is queued, in order, when its future is first polled; awaiting all of them together fills the
    // socket.
    let publishes = messages.iter().map(|message| {
        let exchange = exchange.clone();
        async move {
            let (routing_key, properties) = routing_key_and_properties(message);
            channel.basic_publish(exchange, routing_key, options, &message.body, properties).await
        }
    });
    let Ok(published) = timeout_at(deadline, join_all(publishes)).await else {
        return Err(BrokerError::Deadline { doing: doing(), after: CONFIRM_DEADLINE });
    };

    let mut failure = None;
    let mut confirms = FuturesUnordered::new();
    for (message, published) in messages.iter().zip(published) {
        match published {
            Ok(confirm) => confirms.push(async move { (message.id, confirm.await) }),
            Err(error) => failure = Some(error),
        }
    }
    let mut returned = HashMap::new();
    while let Ok(Some((id, confirmation))) = timeout_at(deadline, confirms.next()).await {
        let (verdict, message) = match confirmation {
            Ok(Confirmation::Ack(message)) => (Verdict::Confirmed(Confirmed { at: Instant::now() }), message),
            Ok(Confirmation::Nack(message)) => (Verdict::Refused("a queue refused the message (nack)".into()), message),
            Ok(Confirmation::NotRequested) => (Verdict::Unknown, None),
            Err(error) => {
                failure = Some(error);
                continue;
            }
        };
        verdicts.insert(id, verdict);
        if let Some(message) = message {
            let id = message.delivery.properties.message_id().as_ref().and_then(|id| id.as_str().parse::<Uuid>().ok());
            if let Some(id) = id {
                let (code, text, key) = (message.reply_code, &message.reply_text, &message.delivery.routing_key);
                returned.insert(id, format!("no queue took the message with routing key {key:?} ({code} {text})"));
            }
        }
    }
    for (id, reason) in returned {
        verdicts.insert(id, Verdict::Refused(reason));
    }
    let has_unknown = messages.iter().any(|message| matches!(verdicts.get(&message.id), Some(Verdict::Unknown)));
    match failure {
        Some(source) => Err(BrokerError::Operation { doing: doing(), source }),
        None if has_unknown => Err(BrokerError::Deadline { doing: doing(), after: CONFIRM_DEADLINE }),
        None => Ok(()),
    }
}

/// What the message is published with, beside its body. The lengths were checked when the event and the row were read.
fn routing_key_and_properties(message: &Message) -> (ShortString, BasicProperties) {
    let short = |text: &str| ShortString::try_new(text).expect("checked to have at most 255 bytes");
    let mut headers = FieldTable::default();
    for (name, value) in &message.headers {
        let value = match value {
            HeaderValue::Text(text) => AMQPValue::LongString(text.as_str().into()),
            HeaderValue::Number(number) => AMQPValue::LongLongInt(*number),
        };
        headers.insert(short(name), value);
    }
    let mut properties = BasicProperties::default()
        .with_message_id(short(&message.id.to_string()))
        .with_type(short(&message.kind))
        .with_app_id("tidings".into())
        .with_delivery_mode(2)
        .with_timestamp(message.timestamp)
        .with_headers(headers);
    if let Some(content_type) = &message.content_type {
        properties = properties.with_content_type(short(content_type));
    }
    if let Some(expiration) = message.expiration_ms {
        properties = properties.with_expiration(short(&expiration.to_string()));
    }
    (short(&message.routing_key), properties)
}

#[cfg(test)]
mod tests {
    use amq_protocol::frame::{AMQPContentHeader, AMQPFrame, WriteContext, gen_frame};
    use proptest::prelude::*;
    use time::OffsetDateTime;

    use super::*;
    use crate::model::event::{BuiltEvent, Event};
    use crate::model::schedule::Schedule;

    /// RabbitMQ's default, which the client library accepts.
    const FRAME_BYTES: usize = 128 * 1024;

    proptest! {
        // Each case has some 50 KiB.
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn the_headers_of_any_row_and_any_event_fit_into_one_frame(
            count in prop_oneof![0..5_usize, 1_000..5_000_usize],
            value_bytes in prop_oneof![Just(0), 0..40_000_usize],
            short_bytes in 1..=255_usize,
        ) {
            // The table's CHECK allows 16 KiB of JSON text, in which each header has four quotes, a colon, a comma and
            // two spaces beside its name and its value.
            let mut left = 16 * 1024;
            let mut headers = Vec::new();
            for number in 0..count {
                let (name, value) = (format!("{number:x}"), "v".repeat(value_bytes.min(16_000) / count.max(1)));
                left -= (name.len() + value.len() + 8).min(left);
                if left == 0 {
                    break;
                }
                headers.push((name, value));
            }
            let event_headers = (0..count).map(|number| (format!("e{number:x}"), "v".repeat(value_bytes / count.max(1))));
            let text = || "k".repeat(short_bytes);
            let Ok(event) = Event::new(text(), text(), Vec::new(), event_headers.collect()) else { return Ok(()) };
            let schedule = Schedule {
                id: Uuid::max(),
                kind: "k".repeat(100),
                key: Some(text()),
                subject: Some(text()),
                due_at: OffsetDateTime::UNIX_EPOCH,
                expires_at: None,
                payload: "{}".into(),
                headers,
                attempts: u32::MAX,
                failures: 0,
                refusals: 0,
            };
            let built = BuiltEvent { event, built_ms: 0, expires_ms: Some(i64::MAX), plugin: "p".repeat(210).into() };
            let message = Message::new(&schedule, built, &"e".repeat(200), 1).expect("in time");
            let (routing_key, properties) = routing_key_and_properties(&message);
            prop_assert_eq!(routing_key.as_str(), text());
            let frame = AMQPFrame::Header(1, AMQPContentHeader { class_id: 60, body_size: 0, properties });
            let (frame, _) = gen_frame(&frame)(WriteContext::from(Vec::new())).expect("a frame").into_inner();
            prop_assert!(frame.len() <= FRAME_BYTES, "{} bytes", frame.len());
        }
    }
}
