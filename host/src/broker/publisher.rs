//! Publishes batches and tells, message by message, what the broker said. A message is confirmed only by an ack on a
//! channel in confirm mode, when no return of it came: the ack of an unroutable message is an ack as well.
//!
//! A channel serves one batch at a time. That keeps publishing in order, and the returns of a batch with it: the client
//! library hands a returned message to whichever confirm completes next, so all confirms of the batch are collected and
//! the returns are matched by message id.

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

use crate::broker::{Broker, BrokerError, PUBLISHING, within};
use crate::model::message::{HeaderValue, Message};

/// How long the confirms of a batch may take. Whatever is not confirmed then is unknown.
const CONFIRM_DEADLINE: Duration = Duration::from_secs(10);

/// The broker has the message, for good. Only the publisher makes one.
#[derive(Clone, Copy, Debug)]
pub struct Confirmed {
    at: Instant,
}

impl Confirmed {
    /// When the confirm came.
    #[must_use]
    pub fn at(&self) -> Instant {
        self.at
    }
}

/// What the broker said of one message.
#[derive(Clone, Debug)]
pub enum Verdict {
    /// It has it.
    Confirmed(Confirmed),
    /// It did not take it: no queue is bound to the routing key, or a queue refused it.
    Refused(String),
    /// It closed the channel over it: it is larger than RabbitMQ's `max_message_size` for instance. The same again would be
    /// no better.
    Poison(String),
    /// We do not know. The message may or may not be in a queue.
    Unknown,
}

impl Broker {
    /// Publishes `messages` and waits for the confirms. Every message gets a verdict, in no order.
    pub async fn publish(&self, messages: &[Message]) -> HashMap<Uuid, Verdict> {
        let deadline = Instant::now() + CONFIRM_DEADLINE;
        let mut verdicts: HashMap<Uuid, Verdict> =
            messages.iter().map(|message| (message.id, Verdict::Unknown)).collect();
        let Err(error) = self.publish_window(messages, deadline, &mut verdicts).await else {
            self.refusals.say(PUBLISHING, None);
            return verdicts;
        };
        let is_unknown = |verdict: &Verdict| matches!(verdict, Verdict::Unknown);
        let unknown = verdicts.values().filter(|verdict| is_unknown(verdict)).count();
        let refusal = format!("RabbitMQ takes no message for the exchange {}: {}", self.exchange, chain(&error));
        if !is_about_all(&error) || self.refusals.say(PUBLISHING, Some(refusal)) {
            warn!(error = &error as &dyn std::error::Error, unknown, "could not publish, the unconfirmed rows stay");
        }
        if is_soft(&error, &AMQPSoftError::NOTFOUND) {
            // Somebody has deleted the exchange. It is ours, so we make it again.
            self.declare_again().await;
        }
        if !is_about_a_message(&error) {
            return verdicts;
        }
        // One of them closed the channel, and would take its whole batch with it again: each on its own, until it is found.
        for message in messages {
            if !verdicts.get(&message.id).is_some_and(is_unknown) {
                continue;
            }
            match self.publish_window(std::slice::from_ref(message), deadline, &mut verdicts).await {
                Ok(()) => {}
                Err(error) if is_about_a_message(&error) => {
                    let reason = format!("RabbitMQ closed the channel over its message: {}", chain(&error));
                    verdicts.insert(message.id, Verdict::Poison(reason));
                }
                Err(_) => break,
            }
        }
        verdicts
    }

    /// Publishes `messages` on a channel that nobody else uses, and notes what is known of each.
    async fn publish_window(
        &self,
        messages: &[Message],
        deadline: Instant,
        verdicts: &mut HashMap<Uuid, Verdict>,
    ) -> Result<(), BrokerError> {
        let channel = self.channel().await?;
        publish_on(&channel, &self.exchange, messages, deadline, verdicts).await?;
        // A channel with doubts is not used again: a late confirm would be taken for that of another message.
        self.idle_channels.lock().await.push(channel);
        Ok(())
    }

    async fn declare_again(&self) {
        if let Err(error) = self.keep().await {
            warn!(error = &error as &dyn std::error::Error, "could not declare what is ours again");
        }
    }

    /// An idle channel, or a new one.
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
        let channel = within("open a channel", connection.create_channel()).await?;
        within("turn on publisher confirms", channel.confirm_select(ConfirmSelectOptions::default())).await?;
        Ok(channel)
    }
}

/// Whether the broker would not take any other message either, although it is there: a right was withdrawn, for instance, or
/// it confirms nothing.
fn is_about_all(error: &BrokerError) -> bool {
    match error {
        BrokerError::Operation { source, .. } => {
            matches!(source.kind(), lapin::ErrorKind::ProtocolError(error) if matches!(error.kind(), AMQPErrorKind::Soft(_)))
                && !is_about_a_message(error)
        }
        error => matches!(error, BrokerError::Deadline { .. }),
    }
}

/// Whether the broker closed the channel over one of the messages on it, and not because of itself or the exchange.
fn is_about_a_message(error: &BrokerError) -> bool {
    is_soft(error, &AMQPSoftError::PRECONDITIONFAILED)
}

/// Whether the broker closed a channel for this reason.
fn is_soft(error: &BrokerError, reason: &AMQPSoftError) -> bool {
    matches!(error, BrokerError::Operation { source, .. } if matches!(source.kind(), lapin::ErrorKind::ProtocolError(error)
        if matches!(error.kind(), AMQPErrorKind::Soft(soft) if soft == reason)))
}

/// An error and its error_chain, on one line.
fn chain(error: &BrokerError) -> String {
    let error_chain = std::iter::successors(Some(error as &dyn std::error::Error), |error| error.source());
    error_chain.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

async fn publish_on(
    channel: &Channel,
    exchange: &str,
    messages: &[Message],
    deadline: Instant,
    verdicts: &mut HashMap<Uuid, Verdict>,
) -> Result<(), BrokerError> {
    let exchange = ShortString::from(exchange);
    let doing = || format!("take {} messages", messages.len());
    let options = BasicPublishOptions { mandatory: true, immediate: false };
    // Each is queued in order when it is first polled; awaiting them together fills the socket.
    let publishes = messages.iter().map(|message| {
        let exchange = exchange.clone();
        async move {
            let (routing_key, properties) = wire(message);
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
    let in_doubt = messages.iter().any(|message| matches!(verdicts.get(&message.id), Some(Verdict::Unknown)));
    match failure {
        Some(source) => Err(BrokerError::Operation { doing: doing(), source }),
        None if in_doubt => Err(BrokerError::Deadline { doing: doing(), after: CONFIRM_DEADLINE }),
        None => Ok(()),
    }
}

/// A message in AMQP's types, but for its body. Lengths were checked where the event and the row came in.
fn wire(message: &Message) -> (ShortString, BasicProperties) {
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

    /// RabbitMQ's own, and the client library takes what it is offered.
    const FRAME_BYTES: usize = 128 * 1024;

    proptest! {
        // Each is some 50 KiB.
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn whatever_a_row_and_an_event_may_be_their_headers_fit_into_one_frame(
            count in prop_oneof![0..5_usize, 1_000..5_000_usize],
            value_bytes in prop_oneof![Just(0), 0..40_000_usize],
            short_bytes in 1..=255_usize,
        ) {
            // What the table takes: 16 KiB as JSON text, where each has two quotes for its name and for its value, a colon, a
            // comma, and two spaces.
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
            let own = (0..count).map(|number| (format!("e{number:x}"), "v".repeat(value_bytes / count.max(1))));
            let text = || "k".repeat(short_bytes);
            let Ok(event) = Event::new(text(), text(), Vec::new(), own.collect()) else { return Ok(()) };
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
            let (routing_key, properties) = wire(&message);
            prop_assert_eq!(routing_key.as_str(), text());
            let frame = AMQPFrame::Header(1, AMQPContentHeader { class_id: 60, body_size: 0, properties });
            let (frame, _) = gen_frame(&frame)(WriteContext::from(Vec::new())).expect("a frame").into_inner();
            prop_assert!(frame.len() <= FRAME_BYTES, "{} bytes", frame.len());
        }
    }
}
